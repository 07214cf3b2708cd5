"""3x3 convolutions in float32 with a quarter of the products, for a network that is only computed with any more."""

import functools

import numpy as np
import torch
from torch import Tensor, nn

TILE = 4  # pixels of a side that are made together, of TILE + 2 of the map
FEWEST_CHANNELS = 128  # in and out; below, the transforms take more time than the products that they save
_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # small and spread: 1 to 2 times a plain convolution's rounding, (1, 2) gives 4
_NUMBERS = 2**20  # of the tiles that are transformed at a time, so that they stay in the cache
_FEWEST_TILES = 64  # of them, so that the weights are not read for too few


class Winograd(nn.Module):
    """What an nn.Conv2d of 3x3 with zeros around computes, by the algorithm F(4x4, 3x3) where the sides are multiples
    of 4 and the maps float32; else by oneDNN.

        Y = A^T [(G g G^T) * (B^T d B)] A

    of tiles d (6x6) of the map and the weight's g (3x3): * is a product for each of 36 numbers, which sums over the
    channels are matrix products of. The weights take four times the memory.

    Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), equation 8;
    Winograd 1980, "Arithmetic complexity of computations".
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        _, g, _ = transforms()
        weight = conv.weight.detach().double().permute(2, 3, 1, 0).flatten(0, 1)  # (9, C, N)
        products = torch.einsum("pk,kcn->pcn", torch.kron(g, g), weight).to(conv.weight.dtype)
        self.register_buffer("weight", products.contiguous())

    @staticmethod
    def serves(conv: nn.Module) -> bool:
        """Whether a layer is worth it."""
        plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1)
        if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
            return False
        return min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS and conv.weight.dtype is torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            return self.conv(x)
        shape = x.shape[0], self.conv.out_channels, *x.shape[2:]
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return self._run(x, y, torch.Tensor.copy_)

    def added_to(self, skip: Tensor, x: Tensor) -> Tensor:
        """skip + self(x), written over `skip`."""
        if not self._fits(x) or not skip.is_contiguous(memory_format=torch.channels_last):
            return skip + self(x)
        return self._run(x, skip, torch.Tensor.add_)

    def _fits(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype is not torch.float32 or not x.numel():
            return False
        return not (x.shape[2] % TILE or x.shape[3] % TILE)

    def _run(self, x: Tensor, y: Tensor, put) -> Tensor:
        """Some rows of tiles, or some images, at a time; `put` writes pixels to y."""
        batch, channels, height, width = x.shape
        down, across, out = height // TILE, width // TILE, y.shape[1]
        x = x.permute(0, 2, 3, 1)
        y_tiles = y.permute(0, 2, 3, 1).view(batch, down, TILE, across, TILE, out)
        at_once = max(_FEWEST_TILES, _NUMBERS // (36 * max(channels, out)))
        images = max(1, at_once // (down * across))
        rows = min(down, max(1, at_once // across))
        for first in range(0, batch, images):
            for row in range(0, down, rows):
                above, below = TILE * row - 1, min(TILE * (row + rows), height) + 1
                part = x[first : first + images, max(above, 0) : below]
                zeros = (0, 0, 1, 1, max(-above, 0), max(below - height, 0))
                pixels = self._tiles(nn.functional.pad(part, zeros), across)  # (4, 4, images, rows, across, N)
                put(y_tiles[first : first + images, row : row + rows], pixels.permute(2, 3, 0, 4, 1, 5))
        return y

    def _tiles(self, x: Tensor, across: int) -> Tensor:
        x = x.contiguous()  # (images, 4 rows + 2, W + 2, C)
        images, height, _, channels = x.shape
        to_products, _, to_pixels = (m.to(x) for m in _kron())
        rows = height // TILE
        over_images, over_rows, over_columns, _ = x.stride()
        strides = over_rows, over_columns, over_images, TILE * over_rows, TILE * over_columns, 1
        tiles = x.as_strided((6, 6, images, rows, across, channels), strides).reshape(36, -1)
        products = torch.bmm((to_products @ tiles).view(36, -1, channels), self.weight).view(36, -1)
        if self.conv.bias is None:
            pixels = to_pixels @ products
        else:
            bias = self.conv.bias.repeat(images * rows * across)
            pixels = torch.addmm(bias, to_pixels, products)
        return pixels.view(TILE, TILE, images, rows, across, -1)


@functools.cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6) in float64: y = A^T [(G g) * (B^T d)] are the 4 sums over 3 neighbours of 6
    numbers d, times g.

    They are evaluation of polynomials at points and the interpolation from there, transposed. Source: Toom 1963 and
    Cook 1966; Lavin and Gray 2016 (arXiv 1509.09308), section 4.
    """
    points, count = np.array(_POINTS), len(_POINTS) + 1
    to_products, to_weights, to_pixels = np.zeros((count, count)), np.zeros((count, 3)), np.zeros((TILE, count))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        to_products[i, :-1] = np.poly(others)[::-1]
        to_weights[i] = point ** np.arange(3) / np.prod(point - others)
        to_pixels[:, i] = point ** np.arange(TILE)
    to_products[-1] = np.poly(points)[::-1]
    to_weights[-1, -1] = to_pixels[-1, -1] = 1.0  # the point at infinity
    return torch.from_numpy(to_products), torch.from_numpy(to_weights), torch.from_numpy(to_pixels)


@functools.cache
def _kron() -> tuple[Tensor, ...]:
    """The same for both directions at once."""
    return tuple(torch.kron(m, m) for m in transforms())


def with_fewer_products(network: nn.Module) -> None:
    """Put `Winograd` in the place of the layers below that are worth it."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if Winograd.serves(child):
                setattr(module, name, Winograd(child))
