"""posterior_interpolate beyond what every row is tested for: its parts, its tables, its exponential, rows not there."""

import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import ROWS, in_float64

from lfm_fast import ops
from lfm_fast.autoencoder import Posterior
from lfm_fast.ops.streams import STREAM_NOISE, STREAM_POSTERIOR

ROW = ROWS["posterior_interpolate"]
INDEX = torch.tensor([2**40 + 7, 0, 3, 3, 12])
ITEMS = torch.tensor([8, 0, 3, 3, 1])
SHAPE = (4, 6, 7)


def table(seed, items=9, shape=SHAPE, dtype=torch.float32):
    return torch.randn(items, *shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype)


def straight(count=5):
    t = torch.linspace(0.05, 0.95, count, device="cpu")
    return torch.stack((1 - t, 1e-5 + (1 - 1e-5) * t, 0 * t - 1, 0 * t + 1 - 1e-5))


def here(args):
    """On the device that the fixture `backend` chose."""
    return [x.to(torch.get_default_device()) if isinstance(x, torch.Tensor) else x for x in args]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fixed", [False, True])
def test_it_is_gather_draw_and_interpolate_in_turn(dtype, fixed, backend):
    """Those as they stand elsewhere in the library. 5 units of 2^-24 of a draw below 20, and 3 of the sums below 20."""
    mean, log_variance, coefficients = table(1, dtype=dtype), None if fixed else table(2, dtype=dtype) - 2, straight()
    z_t, target = ops.posterior_interpolate(*here((mean, ITEMS, INDEX, coefficients, log_variance, 11)))
    z_0 = mean[ITEMS].float()
    if not fixed:
        z_0 = Posterior(z_0, log_variance[ITEMS].float()).sample(INDEX.to("cpu"), 11)
    want = ops.interpolate(z_0, coefficients, index=INDEX, seed=11)
    for g, w in zip((z_t, target), want):
        assert g.dtype == torch.float32
        assert_close(g.cpu(), w, absolute=1e-5)


def test_each_of_its_noises_has_the_bits_of_its_stream(backend):
    """A draw of N(0, 1) is the noise itself: exp(0) is 1. 2,500 elements are more than a tile, and than a block."""
    zeros, ones, nothing = torch.zeros(3, 2500), torch.ones(3), torch.zeros(3)
    index, pick = torch.tensor([2**34 + 5, -3, 7]), torch.stack((ones, nothing, nothing, ones))
    drawn, noise = ops.posterior_interpolate(*here((zeros, torch.arange(3), index, pick, zeros, -(2**62))))
    for got, stream in ((drawn, STREAM_POSTERIOR), (noise, STREAM_NOISE)):
        want = ops.philox_normal(index.to(got.device), 2500, seed=-(2**62), stream=stream)
        assert_same_bits(got + 0.0, want + 0.0, f"stream {stream}")  # -0 from a product with 0


def test_the_exponential_over_all_of_its_range(backend):
    """|x| + 3 units of 2^-24, one of them the product's with the noise, where float32 holds the result; 0 and infinity
    beyond; NaN stays."""
    inside = torch.cat((torch.linspace(-170, 170, 4001), torch.tensor([0.0, -0.0, 1e-30, 88.0 * 2, -87.0 * 2])))
    beyond = torch.tensor([400.0, math.inf, -math.inf, -500.0, math.nan])
    x = torch.cat((inside, beyond)).cpu()[None]
    args = (0 * x.nan_to_num(), torch.tensor([0]), torch.tensor([5]), torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    got = ops.posterior_interpolate(*here((*args, x, 3)))[0].cpu()[0]
    want = ROW.reference(*in_float64((*args, x)), seed=3)[0][0]
    error, count = (got.double() - want).abs() / want.abs(), len(inside)
    assert float((error / (x[0].double().abs() + 3))[:count].max()) < 2.0**-24
    above, below, bad = got[count : count + 2], got[count + 2 : -1], got[-1]
    assert (bool(above.isinf().all()), bool((below.abs() < 1e-36).all()), bool(bad.isnan())) == (True, True, True)


def test_the_exponential_at_both_of_its_bounds(library, emulated):
    """In the compiled kernels the deviation is 2^-126 at the least, and goes up to the largest there is."""
    beyond = torch.tensor([-400.0, -math.inf, 400.0, math.inf])
    x = torch.cat((torch.linspace(-178, -173, 101), torch.linspace(174, 177.4, 101), beyond))[None]
    zeros, row, index = torch.zeros_like(x), torch.tensor([0]), torch.tensor([5])
    noise = ops.philox_normal(index, x.numel(), seed=3, stream=STREAM_POSTERIOR)[0].double()
    want = (x[0].double() / (2 * math.log(2))).clamp(min=-126).exp2() * noise
    held = want.abs() < torch.finfo(torch.float32).max
    assert held.sum() > 170
    for kernel in (ROW.kernels["cpp"], emulated.kernel_of(ROW)):
        got = kernel(zeros, row, index, torch.tensor([[1.0], [0.0], [0.0], [0.0]]), x, 3)[0][0].double()
        # |x| + 3 units of 2^-24 of it, and a rounding among the numbers below 2^-126
        bound = (x[0].double().abs() + 3) * 2.0**-24 * want.abs() + 2.0**-149
        assert bool(((got - want).abs() <= bound)[held].all())
        assert torch.equal(got[-2:], math.inf * noise[-2:])


def test_a_nan_of_any_bits_stays_a_nan(library):
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, 0x7FFFFFFF, -0x3FFE00], dtype=torch.int32)
    bad = bits.view(torch.float32)[None]
    assert bad.isnan().all()
    zeros, one = torch.zeros(1, 5), torch.tensor([0])
    assert ops.posterior_interpolate(zeros, one, one, torch.ones(4, 1), bad)[0].isnan().all()
    assert ops.posterior_interpolate(bad, one, one, torch.ones(4, 1), zeros)[0].isnan().all()


def test_a_table_is_read_where_it_lies(library):
    """Mean and log-variance side by side, one sample for all, items with gaps: the bits of contiguous tables."""
    both = torch.stack((table(1), table(2) - 2), dim=1)
    gaps = torch.full((9, 4, 6, 14), math.nan)
    gaps[..., ::2], sliced = both[:, 0], gaps[..., ::2]
    want = ops.posterior_interpolate(table(1), ITEMS, INDEX, straight(), table(2) - 2, 4)
    for mean, log_variance in ((both[:, 0], both[:, 1]), (sliced, both[:, 1])):
        for g, w in zip(ops.posterior_interpolate(mean, ITEMS, INDEX, straight(), log_variance, 4), want):
            assert_same_bits(g, w)
    one = table(1)[:1].expand(9, *SHAPE)
    for g, w in zip(
        ops.posterior_interpolate(one, ITEMS, INDEX, straight(), None, 4),
        ops.posterior_interpolate(table(1), 0 * ITEMS, INDEX, straight(), None, 4),
    ):
        assert_same_bits(g, w)


def test_rows_of_an_empty_table_are_refused():
    with pytest.raises(
        ValueError, match=r"^rows goes from 0 to 0, but mean has no row: pass a table of one or more\.$"
    ):
        ops.posterior_interpolate(table(1)[:0], torch.zeros(2, dtype=torch.int64), INDEX[:2], straight(2), None, 4)


@pytest.mark.parametrize("bad", [[0, 9], [-1, 0], [2**40, 0]])
def test_rows_that_are_not_there_are_refused(bad, library, emulated):
    args = (table(1), torch.tensor(bad), INDEX[:2], straight(2), table(2), 4)
    for name in ("reference", "cpp"):
        with ops.use_backend(name), pytest.raises(ValueError, match=r"rows goes from .* mean has rows 0 to 8: pass"):
            ops.posterior_interpolate(*args)
    with pytest.raises(RuntimeError, match=r"rows holds .*, but mean has rows 0 to 8\."):
        ROW.kernels["cpp"](*args)
    good = [0 <= row < 9 for row in bad]
    for part in emulated.kernel_of(ROW)(*args):  # the host of a GPU does not look
        assert [bool(x.isnan().all()) for x in part] == [not there for there in good]
        assert [bool(x.isfinite().all()) for x in part] == good


def test_rows_of_nothing(backend):
    empty = torch.zeros(0, *SHAPE)
    none = torch.zeros(0, dtype=torch.int64)
    for part in ops.posterior_interpolate(*here((empty, none, none, torch.zeros(4, 0), empty))):
        assert part.shape == (0, *SHAPE)


@pytest.mark.parametrize("name", ["mean", "coefficients", "log_variance"])
@pytest.mark.parametrize("operator", [ops.posterior_interpolate, torch.ops.lfm_fast.posterior_interpolate])
def test_a_gradient_is_refused(name, operator, library):
    args = dict(zip(ROW.argument_names, (table(1), ITEMS, INDEX, straight(), table(2))))
    args[name].requires_grad_()
    with pytest.raises(ValueError, match=f"no gradient for {name}, which requires one"):
        operator(**args)
    with torch.no_grad():
        operator(**args)
