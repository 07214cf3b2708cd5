"""From a label map in pixels to the channels that a network reads beside its latents."""

import torch
from torch import Tensor, nn

from lfm_fast.models.velocity_network import require_count


class LabelMapEncoder(nn.Module):
    """A label map (B, H, W) of ids as channels in latent resolution, (B, out_channels, H / d, W / d).

        c[b, :, i, j] = sum_k share[b, k, i, j] weight[k, :]

    share is how much of the d x d pixels of cell (i, j) class k covers: one-hot planes reduced bilinearly (by halves,
    which is the average of each cell) and then a 1x1 convolution. Counting classes per cell and one matrix product give
    the same without the (B, K, H, W) planes; the gradient of the weight is one matrix product as well.

    Args:
        num_classes: K.
        downsampling: d, pixels per latent side, as the autoencoder has it.
        out_channels: of the condition.
        frozen: keep the weight as it was drawn, uniform in +-1/sqrt(K) as a fresh 1x1 convolution's, for what was
            trained with an untrained projection (compat="lfm"). Otherwise it is a parameter, drawn from N(0, 1), so
            that a cell of one class has the unit variance of a latent.

    Example:
        >>> encoder = LabelMapEncoder(num_classes=3, downsampling=2)
        >>> encoder(torch.zeros(5, 8, 8, dtype=torch.int64)).shape
        torch.Size([5, 4, 4, 4])

    Raises:
        ValueError: a size that is no positive integer.

    Source: Rombach et al. 2022, arXiv 2112.10752, section 3.3 and semantic synthesis in section 4.3.2.
    """

    kind = "label_map"
    argument = "condition"

    def __init__(self, *, num_classes: int, downsampling: int, out_channels: int = 4, frozen: bool = False):
        super().__init__()
        sizes = {"num_classes": num_classes, "downsampling": downsampling, "out_channels": out_channels}
        for name, value in sizes.items():
            require_count(name, value)
        self.config = {**sizes, "frozen": bool(frozen)}
        self.num_classes, self.downsampling = num_classes, downsampling
        if frozen:
            weight = (2 * torch.rand(num_classes, out_channels) - 1) / num_classes**0.5
            self.register_buffer("weight", weight)  # no optimizer moves it, and checkpoints keep it
        else:
            self.weight = nn.Parameter(torch.randn(num_classes, out_channels))

    def forward(self, label_map: Tensor) -> Tensor:
        """(B, H, W) int64 ids from 0 to K - 1, H and W multiples of d -> (B, out_channels, H / d, W / d)."""
        d = self.downsampling
        batch, rows, columns = label_map.shape[0], label_map.shape[1] // d, label_map.shape[2] // d
        cells = label_map.reshape(batch, rows, d, columns, d).transpose(2, 3).reshape(batch * rows * columns, d * d)
        counts = self.weight.new_zeros(cells.shape[0], self.num_classes)
        counts.scatter_add_(1, cells, self.weight.new_ones(1, 1).expand_as(cells))  # whole numbers: exact in any order
        encoded = (counts @ self.weight) / (d * d)
        return encoded.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def check(self, label_map, count: int) -> None:
        """Raise ValueError unless this is one map (H, W) of known ids for each of `count` samples."""
        d = self.downsampling
        if not isinstance(label_map, Tensor) or label_map.ndim != 3 or label_map.dtype != torch.int64:
            what = (
                f"{label_map.dtype} of shape {tuple(label_map.shape)}" if isinstance(label_map, Tensor) else label_map
            )
            raise ValueError(f"the condition is {what}; expected label maps, an int64 tensor (B, H, W).")
        if label_map.shape[0] != count:
            raise ValueError(f"the condition holds {label_map.shape[0]} label maps for {count} samples.")
        if label_map.shape[1] % d or label_map.shape[2] % d or not label_map[:1].numel():
            raise ValueError(
                f"label maps of {label_map.shape[1]}x{label_map.shape[2]} pixels do not divide into latents of one for "
                f"every {d}x{d}; resize them to the images' size."
            )
        wrong = (label_map < 0) | (label_map >= self.num_classes)
        if bool(wrong.any()):
            sample, row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"label map {sample} has the id {int(label_map[sample, row, column])} at row {row}, column {column}, "
                f"but this network knows 0 to {self.num_classes - 1}."
            )
