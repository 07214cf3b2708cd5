"""Noise, times and label dropout by sample number."""

import pytest
import torch

import lfm_fast
from lfm_fast.flow.noise import label_dropout_mask
from lfm_fast.flow.time_samplers import TIME_SAMPLERS, draw

SHAPE = (4, 5, 3)


@pytest.mark.parametrize("batch_size", [64, 16, 7, 1])
def test_sample_i_has_the_same_bits_for_any_batch_size(batch_size):
    whole = lfm_fast.noise(64, SHAPE, seed=11)
    parts = [
        lfm_fast.noise(min(batch_size, 64 - first), SHAPE, seed=11, first_index=first)
        for first in range(0, 64, batch_size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_indices_name_the_samples_in_any_order():
    order = torch.tensor([5, 0, 63, 7, 5])
    assert torch.equal(lfm_fast.noise(5, SHAPE, seed=11, indices=order), lfm_fast.noise(64, SHAPE, seed=11)[order])


def test_huge_sample_numbers_stay_different_and_agree_with_first_index():
    first = 2**63 - 4
    rows = lfm_fast.noise(4, SHAPE, seed=2**63 - 1, first_index=first)
    assert torch.equal(rows, lfm_fast.noise(4, SHAPE, seed=2**63 - 1, indices=torch.arange(4) + first))
    low_words = lfm_fast.noise(4, SHAPE, seed=2**63 - 1, indices=(torch.arange(4) + first) & 0xFFFFFFFF)
    for one, other in ((rows[0], rows[1]), (rows[0], low_words[0])):  # both halves of the number count
        assert (one != other).float().mean() > 0.9


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"first_index": 8}])
def test_another_seed_or_sample_is_other_noise(other):
    a, b = lfm_fast.noise(8, (64,)), lfm_fast.noise(8, (64,), **other)
    assert (a != b).float().mean() > 0.99
    # 512 products of independent normals: standard error 0.044, so five of them
    assert abs(float((a * b).mean())) < 0.22


def test_it_is_standard_normal():
    z = lfm_fast.noise(100, (1000,), seed=5).double()
    n = z.numel()
    # standard errors of mean, variance and fourth moment of n normals: 1, sqrt(2), sqrt(96) over sqrt(n); five of each
    for moment, expected, deviation in ((z, 0, 1), (z**2, 1, 2**0.5), (z**4, 3, 96**0.5)):
        assert abs(float(moment.mean()) - expected) < 5 * deviation / n**0.5


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 3)])
def test_shapes(shape):
    assert lfm_fast.noise(3, shape).shape == (3, *shape)
    assert lfm_fast.noise(0, shape).shape == (0, *shape)


def test_dtypes_are_rounded_from_float32():
    z = lfm_fast.noise(2, SHAPE)
    assert z.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(lfm_fast.noise(2, SHAPE, dtype=dtype), z.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": -1}, "num_samples is -1"),
        ({"num_samples": 2.5}, "num_samples is 2.5"),
        ({"shape": (3, -1)}, "shape is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "below 2"),
        ({"seed": None}, "seed is None"),
        ({"first_index": 2**63 - 1}, "passes the last number"),
        ({"indices": torch.arange(3)}, r"\(3,\) torch.int64, expected a \(2,\) int64"),
        ({"indices": torch.zeros(2)}, "torch.float32, expected"),
        ({"indices": [0, 1]}, "'list', expected"),
        ({"indices": torch.arange(2), "first_index": 1}, "give one of them"),
        ({"indices": torch.tensor([3, -1])}, "indices holds -1, expected sample numbers from 0 on"),
        ({"dtype": torch.int32}, "expected a floating type"),
        ({"dtype": "float32"}, "dtype is 'float32', expected a floating type"),
        ({"shape": None}, "shape is None, expected that of one sample"),
        ({"shape": 3}, "shape is 3, expected that of one sample"),
        ({"shape": "ab"}, "shape is 'a'"),
        ({"device": "gpu"}, "device is 'gpu', which cannot be used"),
        ({"device": 1.5}, "device is 1.5, which cannot be used"),
    ],
)
def test_noise_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        lfm_fast.noise(**{"num_samples": 2, "shape": (3,), **arguments})


@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_times_belong_to_the_sample_and_fill_their_range(name):
    index = torch.arange(4000)
    t = draw(name, index, seed=3)
    assert t.dtype == torch.float32
    assert t.shape == (4000,)
    assert torch.equal(draw(name, index[17:40].flip(0), seed=3), t[17:40].flip(0))
    assert t.unique().numel() > 3900  # one t per sample; 24 bits repeat half a time among 4000
    inside = draw(name, index, seed=3, t_min=0.25, t_max=0.5)
    assert inside.min() >= 0.25
    assert inside.max() <= 0.5
    torch.testing.assert_close(inside, 0.25 + 0.25 * t)


def test_time_samplers_have_their_distributions():
    index = torch.arange(20000)
    for name, restore in (("uniform", lambda t: t), ("logit_normal", lambda t: torch.special.ndtr(torch.logit(t)))):
        u = restore(draw(name, index, seed=9).double()).sort().values
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in 1000 seeds; this seed is fixed
        distance = (u - (torch.arange(20000) + 0.5) / 20000).abs().max()
        assert distance < 1.95 / 20000**0.5


def test_a_callable_is_a_time_sampler_and_an_unknown_name_is_refused():
    assert torch.equal(draw(lambda index, seed: index / 4 + seed, torch.arange(2), 0), torch.tensor([0.0, 0.25]))
    with pytest.raises(ValueError, match="Unknown time sampler 'cosine'; there are uniform, logit_normal"):
        draw("cosine", torch.arange(2), 0)


def test_label_dropout_belongs_to_the_sample_at_its_rate():
    index = torch.arange(10000)
    dropped = label_dropout_mask(index, 4, 0.1)
    assert dropped.dtype == torch.bool
    # binomial: 1000 +- 30; five deviations
    assert 850 < int(dropped.sum()) < 1150
    assert torch.equal(label_dropout_mask(index[100:200], 4, 0.1), dropped[100:200])
    assert not label_dropout_mask(index, 4, 0.0).any()
    assert label_dropout_mask(index, 4, 1.0).all()
    # its stream is not that of the times: among the dropped, t is still uniform (standard error 0.009)
    assert abs(float(draw("uniform", index, 4)[dropped].mean()) - 0.5) < 0.045
    with pytest.raises(ValueError, match="label_dropout is 1"):
        label_dropout_mask(index, 4, 1.5)
