"""Statistics of a stream of normals that is too long to hold, each with the probability that chance exceeds it.

A draw is `draw(index, numel, seed, stream, offset) -> (B, numel)`. Blocks of samples are drawn one after the other and
reduced to sums; `verdicts` turns those into p-values. Every p-value is two-sided or of a chi-square, so a right
generator gives each uniformly in [0, 1].
"""

import math

import numpy as np
import torch
from scipy import stats

SAMPLES, ELEMENTS = 64, 16_384  # of one block: 2^20 normals, 12 MB with what is made of them
LAGS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 255, 256, 257, 1024, 4096)  # inside a Philox block, a tile, a chunk, and across
BINS, PAIR_BINS = 4096, 32
TAILS = (4.0, 4.5, 5.0, 5.5)
MOMENTS = 6
# what shares no number with a block, by what makes it different
OTHERS = {
    "next index": lambda a: {**a, "index": a["index"] + 1},
    "index 2^32 on": lambda a: {**a, "index": a["index"] + 2**32},
    "next stream": lambda a: {**a, "stream": a["stream"] + 1},
    "next seed": lambda a: {**a, "seed": a["seed"] + 1},
    "seed 2^32 on": lambda a: {**a, "seed": a["seed"] + 2**32},
    "next offset": lambda a: {**a, "offset": a["offset"] + 1},
    "later offset": lambda a: {**a, "offset": a["offset"] + ELEMENTS // 4},
}


class Sums:
    """What is kept of the blocks drawn so far."""

    def __init__(self):
        self.count = 0
        self.bins = torch.zeros(BINS, dtype=torch.int64)
        self.pairs = {gap: torch.zeros(PAIR_BINS**2, dtype=torch.int64) for gap in (1, 2)}
        self.powers = np.zeros(MOMENTS)
        self.tails = np.zeros(len(TAILS), dtype=np.int64)
        self.largest = 0.0
        self.products = {}  # name: [sum of products of size 1, number of products]

    def add(self, x):
        """x (B, N) float32, one block."""
        wide = x.double()
        self.count += x.numel()
        uniform = torch.special.ndtr(wide)
        self.bins += torch.bincount((uniform * BINS).long().clamp_(max=BINS - 1).flatten(), minlength=BINS)
        coarse = (uniform * PAIR_BINS).long().clamp_(max=PAIR_BINS - 1)
        for gap, table in self.pairs.items():  # of elements that share nothing: each counts in one pair only
            grouped = coarse[:, : coarse.shape[1] // (2 * gap) * 2 * gap].unflatten(1, (-1, 2, gap))
            table += torch.bincount((grouped[:, :, 0] * PAIR_BINS + grouped[:, :, 1]).flatten(), minlength=len(table))
        power = torch.ones_like(wide)
        for k in range(MOMENTS):
            power *= wide
            self.powers[k] += power.sum().item()
        size = x.abs()
        self.tails += np.array([int((size > t).sum()) for t in TAILS])
        self.largest = max(self.largest, size.max().item())
        square = (x * x - 1) * 2**-0.5  # mean 0, variance 1, as x
        for lag in LAGS:
            self.correlate(f"lag {lag}", x[:, :-lag], x[:, lag:])
            self.correlate(f"squares, lag {lag}", square[:, :-lag], square[:, lag:])
        self.correlate("neighbouring rows", x[:-1], x[1:])
        self.correlate("squares of neighbouring rows", square[:-1], square[1:])

    def correlate(self, name, x, y):
        # a row at a time in float32: rounding is far below the sum's own spread, the square root of the count
        total = torch.linalg.vecdot(x, y).sum(dtype=torch.float64).item()
        before, count = self.products.get(name, (0.0, 0))
        self.products[name] = (before + total, count + x.numel())


def drawn(draw, numbers, seed=20_240_607, stream=0, first_index=0, offset=0, compare=True):
    """The sums of about `numbers` normals: whole blocks of consecutive samples."""
    sums = Sums()
    for k in range(max(1, round(numbers / (SAMPLES * ELEMENTS)))):
        index = torch.arange(SAMPLES) + (first_index + k * SAMPLES)
        arguments = {"index": index, "seed": seed, "stream": stream, "offset": offset}
        x = draw(numel=ELEMENTS, **arguments)
        sums.add(x)
        for name, change in OTHERS.items() if compare else ():
            y = draw(numel=ELEMENTS, **change(arguments))
            sums.correlate(name, x, y)
            sums.correlate(f"squares, {name}", x * x - 1, (y * y - 1) / 2)
    return sums


def verdicts(sums):
    """{what: p-value} under independent standard normals."""
    n = sums.count
    found = {"bins (chi-square)": stats.chisquare(sums.bins.numpy()).pvalue}
    steps = np.cumsum(sums.bins.numpy()) / n - np.arange(1, BINS + 1) / BINS
    # the greatest distance at the bins' ends is at most Kolmogorov's over all x: its p-value is on the safe side
    found["Kolmogorov-Smirnov"] = stats.kstwobign.sf(math.sqrt(n) * np.abs(steps).max())
    for gap, table in sums.pairs.items():
        found[f"pairs {gap} apart (chi-square)"] = stats.chisquare(table.numpy()).pvalue
    for k in range(1, MOMENTS + 1):
        mean, variance = stats.norm.moment(k), stats.norm.moment(2 * k) - stats.norm.moment(k) ** 2
        found[f"moment {k}"] = two_sided((sums.powers[k - 1] / n - mean) / math.sqrt(variance / n))
    for t, count in zip(TAILS, sums.tails):
        found[f"tail beyond {t}"] = stats.binomtest(int(count), n, 2 * stats.norm.sf(t)).pvalue
    below = math.exp(n * math.log1p(-2 * stats.norm.sf(sums.largest)))  # that n numbers are all as small as that
    found["largest"] = 2 * min(below, 1 - below)
    for name, (total, count) in sums.products.items():
        found[name] = two_sided(total / math.sqrt(count))
    return found


def two_sided(deviations):
    return 2 * stats.norm.sf(abs(deviations))
