"""Which item the n-th sample of training is: a permutation per epoch that depends on (seed, epoch) alone.

Sample numbers are global: global batch k of size B holds the numbers k B to (k + 1) B - 1, and every rank takes a slice
of them. So neither the number of ranks nor a restart changes what is drawn.
"""

from functools import lru_cache

import numpy as np
import torch


def item_of(sample_numbers: torch.Tensor, num_items: int, seed: int) -> torch.Tensor:
    """Item drawn by each global sample number: permutation_{n // N}[n % N].

    Args:
        sample_numbers: (B,) int64, each at least 0.
        num_items: N, the number of items an epoch goes through once each.
        seed: of the run; any integer, taken modulo 2^64.

    Returns:
        (B,) int64 in [0, N).

    Raises:
        ValueError: no items, or a negative or non-integer sample number.

    Example:
        >>> sorted(item_of(torch.arange(5, 10), num_items=5, seed=0).tolist())
        [0, 1, 2, 3, 4]
    """
    if num_items < 1:
        raise ValueError(f"num_items={num_items}: there must be at least one item to draw from.")
    if sample_numbers.is_floating_point() or sample_numbers.ndim != 1:
        raise ValueError(
            f"sample_numbers is {sample_numbers.dtype} of shape {tuple(sample_numbers.shape)}; pass int64, shape (B,)."
        )
    numbers = sample_numbers.cpu().numpy().astype(np.int64)
    if numbers.size and numbers.min() < 0:
        raise ValueError(f"sample number {numbers.min()} is negative: sample numbers count from 0.")
    epochs, places = np.divmod(numbers, num_items)
    items = np.empty_like(numbers)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        items[here] = _permutation(num_items, int(seed) % 2**64, int(epoch))[places[here]]
    return torch.from_numpy(items)


@lru_cache(maxsize=3)  # a batch spans two epochs at most in practice; one more for a reader that looks ahead
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """Rank of raw 64-bit Philox words: NumPy promises that stream for ever, but not `Generator.permutation`'s."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_items)
    return np.argsort(words, kind="stable")
