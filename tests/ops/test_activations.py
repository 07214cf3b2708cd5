"""The compiled arithmetic of GELU and its derivative: over all floats, and against PyTorch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS

from lfm_fast import ops

ULP = 2.0**-23
FLUSHED = 2.0**-125  # a logistic function below it counts as 0
ALL_FLOATS = (
    torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
)  # a million, NaN and infinities too
ONES = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149), 3.4e38, -3.4e38])
POINTS = torch.cat((ALL_FLOATS, ONES, torch.linspace(-15.0, 15.0, 200_001)))


def gelu_parts(x):
    """The logistic function's argument 2 u, its derivative, the logistic function and that of -2 u, in float64."""
    linear, cubic = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    w = linear * x + cubic * x**3
    return w, linear + 3 * cubic * x**2, torch.sigmoid(w), torch.sigmoid(-w)


def assert_within_ulps(got, want, ulps, condition, factor, what):
    """|got - want| in units of the last place of want, and as many of its argument's, which move it by `condition`.

    `factor`: what a logistic function that counts as 0 is multiplied by at most."""
    got = got.double()
    finite = want.isfinite() & (want.abs() < torch.finfo(torch.float32).max)
    allowed = ulps * ULP * (1.0 + condition.nan_to_num(posinf=0.0)) * want.abs() + factor * FLUSHED
    fails = finite & ~((got - want).abs() <= allowed)
    assert not fails.any(), f"{what}: {int(fails.sum())} of {fails.numel()}, first at {POINTS[fails][0].item()!r}"
    assert torch.equal(got.isnan(), want.isnan()), what
    assert torch.equal(got.isinf(), want.float().isinf()), what


def test_gelu_of_all_floats(library):
    """A rounding of x moves the result by up to |w| + 1 of its own roundings where the logistic function vanishes."""
    x = POINTS.double()
    w, _, s, _ = gelu_parts(x)
    with ops.use_backend("cpp", ops="gelu_tanh"):
        assert_within_ulps(ops.gelu_tanh(POINTS), x * s, 2.0, w.abs(), 11.0, "gelu")


def test_derivative_of_gelu_of_all_floats(library):
    """Within 3 roundings of the sum of its two terms, which have different signs below -0.75."""
    x = POINTS.double()
    w, slope, s, t = gelu_parts(x)
    second = torch.where(x.isfinite() & (s * t == 0), 0.0, x * s * t * slope)  # 0 times infinity
    want = torch.where(x.isinf(), math.nan, s + second)
    got = ROWS["gelu_tanh_backward"].kernels["cpp"](torch.ones_like(POINTS), POINTS)
    condition = (1.0 + w.abs()) * (s + second.abs()) / want.abs()
    assert_within_ulps(got, want, 3.0, condition, 250.0, "derivative")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gelu_is_pytorchs(dtype, backend):
    x = torch.randn(7, 513, dtype=dtype, generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.mul_(3).to(torch.get_default_device()).requires_grad_()
    y = ops.gelu_tanh(x)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    wide = x.detach().double().requires_grad_()
    want = F.gelu(wide, approximate="tanh")
    assert_close(y, want, absolute=6e-7)  # of PyTorch's own float32
    factor = torch.linspace(-1.0, 1.0, 513).to(dtype)
    (y * factor).sum().backward()
    (want * factor.double()).sum().backward()
    assert_close(x.grad, wide.grad, absolute=1e-6)
    assert x.grad.dtype is dtype


def test_gelu_of_a_slice_reads_only_the_slice(backend):
    wide = torch.full((4, 6, 20), math.nan)
    wide[:, 1:, 3:10] = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), device="cpu")
    part = wide[:, 1:, 3:10]
    assert_same_bits(ops.gelu_tanh(part), ops.gelu_tanh(part.contiguous()))
