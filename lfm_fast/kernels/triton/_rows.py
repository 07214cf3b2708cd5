"""Tensors as rows, one per sample, for kernels that cut each sample into blocks."""

from torch import Tensor


def elements(x: Tensor) -> int:
    """Per sample; also right where there are no samples."""
    count = 1
    for size in x.shape[1:]:
        count *= size
    return count


def rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x and the stride between its samples. Copied only where a sample's own elements are strided, so that the slices
    of a wider tensor and one sample expanded to many are read where they lie."""
    if x is None:
        return None, 0
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != expected:
            x = x.contiguous()
            break
        expected *= size
    return x, x.stride(0)
