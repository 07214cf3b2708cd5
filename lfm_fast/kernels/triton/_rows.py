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


def alike_rows(*tensors: Tensor) -> tuple[int, int, list[tuple[Tensor, int]]]:
    """How many rows of how many elements to take tensors of one shape as, and `rows` of each: one long row where all
    are contiguous, else one per index of the first dimension."""
    x = tensors[0]
    if x.dim() == 0 or all(t.is_contiguous() for t in tensors):
        return min(x.numel(), 1), x.numel(), [(t, 0) for t in tensors]
    return x.shape[0], elements(x), [rows(t) for t in tensors]
