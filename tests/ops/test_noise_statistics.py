"""The noise over long streams: normal, uncorrelated, never the same twice, and equal to the bit at every CPU level.

Seeds are fixed, so each test passes or fails for good. A p-value below LEAST would come by chance once in a million;
with about 60 of them a change of the generator that is right would be refused once in 16,000 times.
"""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from children import LEVELS, run_child
from compare import assert_same_bits
from noise_battery import ELEMENTS, OTHERS, drawn, verdicts
from scipy import stats

from lfm_fast import ops
from lfm_fast.ops.philox_normal import box_muller, philox_words

FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
LEAST = 1e-6
LARGEST = 6.6604  # sqrt(-2 log 2^-32): u has 31 bits and a half


def ours(index, numel, seed, stream, offset):
    return ops.philox_normal(index, numel, seed, stream, offset)


def assert_normal(sums):
    assert sums.largest <= LARGEST
    too_rare = {what: p for what, p in verdicts(sums).items() if not p > LEAST}
    assert not too_rare, f"of {sums.count:,} numbers: {too_rare}"


def test_two_million_numbers_are_normal_and_uncorrelated():
    assert_normal(drawn(ours, 2e6))


@pytest.mark.slow
@pytest.mark.statistics
def test_a_hundred_million_numbers_are_normal_and_uncorrelated():
    """In full, 10^8 numbers of one seed; quick, a tenth. Less than 100 MB at a time."""
    assert_normal(drawn(ours, 1e8 if FULL else 1e7))


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize(
    ("seed", "stream", "first_index", "offset"),
    [(0, 0, 0, 0), (-1, 7, -32, 0), (2**62 + 1, 2**32 - 2, 2**32 - 32, 12_345), (2**40, 5, 2**62, 2**31 - 2048)],
)
def test_edges_of_the_counter_are_normal_too(seed, stream, first_index, offset):
    assert_normal(drawn(ours, 2e7 if FULL else 2e6, seed, stream, first_index, offset))


def test_against_scipys_normal():
    """Kolmogorov-Smirnov on the numbers themselves, not on bins."""
    x = ops.philox_normal(torch.arange(256) + 1000, 1024, seed=3).flatten().numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert stats.kstest(np.abs(x[:100_000]), "halfnorm").pvalue > 1e-3


def words_of(rounds=10, steps=(0x9E3779B9, 0xBB67AE85)):
    """Philox with other rounds and key steps, in torch: philox_words when the defaults stand."""

    def words(index, blocks, seed, stream, offset):
        mask, index = 2**32 - 1, index[:, None]
        c0 = (torch.arange(blocks) + offset)[None] & mask
        c1, c2, c3 = torch.full_like(c0, stream), index & mask, (index >> 32) & mask
        k0, k1 = seed & mask, (seed >> 32) & mask
        for _ in range(rounds):
            p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c2 = ((p1 >> 32) & mask) ^ c1 ^ k0, ((p0 >> 32) & mask) ^ c3 ^ k1
            c1, c3 = p1 & mask, p0 & mask
            k0, k1 = (k0 + steps[0]) & mask, (k1 + steps[1]) & mask
        return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)

    return words


def generator(words=philox_words, pick=(0, 1, 2, 3), change=lambda x: x, **changes):
    """A generator of normals: its words, which of them serve as radius and angle, and what is done to the numbers."""

    def draw(index, numel, seed, stream, offset):
        arguments = {"index": index, "seed": seed, "stream": stream, "offset": offset}
        arguments.update({name: function(arguments[name]) for name, function in changes.items()})
        w = words(arguments["index"], numel // 4, arguments["seed"], arguments["stream"], arguments["offset"])
        w = w[..., list(pick)]
        normals = torch.stack(box_muller(w[..., 0::2], w[..., 1::2]), dim=-1)
        return change(normals.flatten(1))

    return draw


BROKEN = {
    "words swapped and used again": generator(pick=(0, 1, 1, 0)),
    "one angle for both pairs": generator(pick=(0, 1, 2, 1)),
    "one radius for both pairs": generator(pick=(0, 1, 0, 3)),
    "radius and angle from one word": generator(pick=(0, 0, 2, 2)),
    "three rounds": generator(words_of(rounds=3)),
    "a uniform of 16 bits": generator(lambda *a: philox_words(*a) & ~0xFFFF),
    "neighbours share": generator(index=lambda i: i // 2),
    "each chunk begins anew": generator(change=lambda x: x[:, :4096].repeat(1, 4)),
    "in half precision": generator(change=lambda x: x.half().float()),
    "one part in a hundred too wide": generator(change=lambda x: x * 1.01),
    "tails cut at 4": generator(change=lambda x: x.clamp(-4, 4)),
    "a little lower": generator(change=lambda x: x - 0.01),
    "every 16th positive": generator(change=lambda x: torch.where(torch.arange(ELEMENTS) % 16 == 0, x.abs(), x)),
}
FORGETFUL = {
    "index's high word": generator(index=lambda i: i & (2**32 - 1)),
    "seed's high word": generator(seed=lambda s: s & (2**32 - 1)),
    "stream": generator(stream=lambda s: 0),
    "offset": generator(offset=lambda o: 0),
}


def test_the_batterys_own_generator_is_ours():
    index = torch.arange(5)
    assert_same_bits(generator()(index, 64, 3, 2, 1), ours(index, 64, 3, 2, 1))
    assert_same_bits(generator(words_of())(index, 64, 3, 2, 1), ours(index, 64, 3, 2, 1))


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_generator_is_caught(name):
    with pytest.raises(AssertionError, match="of 1,048,576 numbers"):
        assert_normal(drawn(BROKEN[name], 1e6, compare=False))


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("name", FORGETFUL)
def test_a_generator_that_leaves_a_part_of_its_counter_out_is_caught(name):
    with pytest.raises(AssertionError, match="of 1,048,576 numbers"):
        assert_normal(drawn(FORGETFUL[name], 1e6))
    assert repeated(FORGETFUL[name])


def test_only_the_known_answers_tell_fewer_rounds():
    """Seven rounds with a key that stands still pass every statistic here, but not Random123's answer."""
    zero = (torch.zeros(1, dtype=torch.int64), 1, 0, 0, 0)
    assert [hex(w) for w in words_of()(*zero).flatten().tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    for broken in (words_of(rounds=7), words_of(rounds=7, steps=(0, 0)), words_of(steps=(0xBB67AE85, 0x9E3779B9))):
        pi = (torch.tensor([0x0370734413198A2E]), 1, 0x299F31D0A4093822, 0x85A308D3, 0x243F6A88)
        assert not torch.equal(broken(*pi), words_of()(*pi))


EDGES = (0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**33, 2**62, 2**63 - 1, -(2**63), 123_456_789_012)
STREAMS = (0, 1, 2, 5, 7, 2**16, 2**31, 2**32 - 1)
OFFSETS = (0, 64, 2**16, 2**31, 2**32 - 64)


def repeated(draw, seeds=EDGES, dense=128):
    """How many blocks of four numbers come twice, over the edges of seed, stream, index and offset, which are all
    different counters, and over a dense part of one stream."""
    index, blocks = torch.tensor(EDGES), []
    for seed in seeds:
        for stream in STREAMS:
            blocks += [draw(index, 256, seed, stream, offset) for offset in OFFSETS]
    blocks.append(draw(torch.arange(2, dense), ELEMENTS, 0, 0, 64))
    block = torch.cat([x.reshape(-1, 4) for x in blocks]).numpy().view(np.int32)
    order = np.lexsort(block.T)
    return int((block[order[1:]] == block[order[:-1]]).all(axis=1).sum())


def test_different_counters_give_different_numbers():
    """With 10^6 blocks of 126 bits or so, one pair alike has the probability 10^-26."""
    assert repeated(ours) == 0


def test_each_other_draw_of_the_battery_differs():
    base = {"index": torch.arange(3), "seed": 5, "stream": 1, "offset": 0}
    first = ours(numel=ELEMENTS, **base)
    for name, change in OTHERS.items():
        assert (ours(numel=ELEMENTS, **change(base)) == first).double().mean() < 1e-3, name


def many_draws():
    """Digests of draws whose seed, stream, samples, offset and length are anything."""
    generator = torch.Generator().manual_seed(99)

    def any_of(low, high, count=1):
        return torch.randint(low, high, (count,), generator=generator)

    for _ in range(2_000 if FULL else 100):
        index = any_of(-(2**62), 2**62, int(any_of(1, 5))) * 2 + 1
        numel, stream, offset = int(any_of(1, 4_000)), int(any_of(0, 2**32)), int(any_of(0, 2**32 - 1_000))
        x = ops.philox_normal(index, numel, int(any_of(-(2**62), 2**62)), stream, offset)
        yield hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]


def print_draws():
    with ops.use_backend("cpp", ops="philox_normal"):
        print(json.dumps(list(many_draws())))


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("level", LEVELS)
def test_any_draw_has_the_references_bits_at_every_level(level, library, tmp_path):
    code = "import test_noise_statistics as t; t.print_draws()"
    printed = run_child(
        code, tmp_path / "none", 600, LFM_FAST_CPU_LEVEL=level, LFM_FAST_SAMPLE="full" if FULL else "quick"
    )
    if printed is None:
        pytest.skip(f"this machine has no {level}")
    with ops.use_backend("reference"):
        assert json.loads(printed) == list(many_draws())
