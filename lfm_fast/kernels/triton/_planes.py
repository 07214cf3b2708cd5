"""(B, C, positions) tensors as tiles of positions x channels, for contiguous and channels_last memory alike."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfm_fast.kernels.triton._rows import rows

TILE = 2048  # elements; a part of the order of sums, so no timing chooses it
# Where channels lie innermost, a tile has many channels and few positions: with 16 of them their sums were a fifth of
# all bytes.
TILE_CHANNELS_LAST = 8192
_MOST_CHANNELS = 128


@dataclass(frozen=True)
class Planes:
    """How a tensor is cut: `strides` of sample, channel and position, and how many of each a tile has."""

    samples: int
    channels: int
    positions: int
    channels_last: bool

    @staticmethod
    def of(x: Tensor) -> "Planes":
        positions = 1
        for size in x.shape[2:]:
            positions *= size
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return Planes(x.shape[0], x.shape[1], positions, last)

    def place(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """x with its samples cut this way, copied where they are not, and its strides."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            return x, (self.channels * self.positions, 1, self.channels)
        x, stride = rows(x)
        return x, (stride, self.positions, 1)

    def new(self, like: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.place(torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=layout))

    @property
    def tile(self) -> dict:
        """Of kernels that sum over it."""
        return self._cut(TILE_CHANNELS_LAST if self.channels_last else TILE)

    @property
    def piece(self) -> dict:
        """Of kernels that sum nothing: a smaller one leaves more registers."""
        return self._cut(TILE)

    @property
    def num_warps(self) -> int:
        """Of kernels that sum over a tile: no thread has more than 32 elements."""
        return 8 if self.tile["P"] * self.tile["C"] > 4096 else 4

    def _cut(self, elements: int) -> dict:
        positions, channels = (triton.next_power_of_2(max(n, 1)) for n in (self.positions, self.channels))
        if self.channels_last:
            channels = min(channels, _MOST_CHANNELS)
            return {"P": min(positions, elements // channels), "C": channels}
        positions = min(positions, elements)
        return {"P": positions, "C": min(channels, elements // positions)}

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.positions, self.tile["P"])

    @property
    def tiles(self) -> int:
        return self.programs(self.tile)

    @property
    def pieces(self) -> int:
        return self.programs(self.piece)

    def programs(self, cut: dict) -> int:
        return self.samples * triton.cdiv(self.positions, cut["P"]) * triton.cdiv(self.channels, cut["C"])


@triton.jit
def place(channels, positions, P: tl.constexpr, C: tl.constexpr):
    """This program's tile: its sample, first channel, chunk of positions, and which of its elements there are."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, C)
    chunks = tl.cdiv(positions, P)
    channel = (program % blocks) * C
    chunk = (program // blocks) % chunks
    sample = (program // blocks // chunks).to(tl.int64)
    position = tl.arange(0, P)[:, None]
    inside = (position < positions - chunk.to(tl.int64) * P) & (channel + tl.arange(0, C)[None, :] < channels)
    return sample, channel, chunk, inside


@triton.jit
def pointers(
    x, sample, channel, chunk, sample_stride, channel_stride, position_stride, P: tl.constexpr, C: tl.constexpr
):
    """To the elements of a tile, (P, C)."""
    first = sample * sample_stride + channel.to(tl.int64) * channel_stride + chunk.to(tl.int64) * P * position_stride
    return x + first + (tl.arange(0, P)[:, None] * position_stride + tl.arange(0, C)[None, :] * channel_stride)
