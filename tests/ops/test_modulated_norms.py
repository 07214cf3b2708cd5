"""modulated_layer_norm and gated_residual_norm against F.layer_norm in float64 and PyTorch's own derivative of that."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS, arguments_of

from lfm_fast import ops
from lfm_fast.ops._norms import tokens

EPS = 1e-6
BATCH, LENGTH, WIDTH = 3, 35, 67  # more than one block of 32 rows, an incomplete block of 64 channels
FAST = ("modulated_layer_norm", "gated_residual_norm")


def plain_norm(x, shift, scale):
    """As a network without fused rows writes it."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def plain_gated(x, branch, gate, shift, scale):
    x_new = x + gate[:, None] * branch
    return x_new, plain_norm(x_new, shift, scale)


def inputs(dtype=torch.float32, state=torch.float32, shape=(BATCH, LENGTH, WIDTH)):
    """x, branch and a modulation (B, 6 D) to be cut into chunks."""
    g = torch.Generator().manual_seed(sum(shape))
    x, branch = (torch.randn(shape, generator=g, device="cpu") * 2 + 0.5 for _ in range(2))
    modulation = torch.randn(shape[0], 6 * shape[2], generator=g, device="cpu")
    device = torch.get_default_device()  # as the fixture `backend` sets it
    return x.to(device, state), branch.to(device, dtype), modulation.to(device, dtype)


def wide(values):
    return [v.detach().double().requires_grad_() for v in values]


def fused(name):
    """A function of x, branch and modulation: the op on the last chunks, as a list of outputs."""
    if name == "modulated_layer_norm":
        return lambda x, branch, m: [ops.modulated_layer_norm(x, *m.chunk(6, dim=-1)[:2], EPS)]
    return lambda x, branch, m: list(ops.gated_residual_norm(x, branch, *m.chunk(6, dim=-1)[2:5], EPS))


def plain(name):
    if name == "modulated_layer_norm":
        return lambda x, branch, m: [plain_norm(x, *m.chunk(6, dim=-1)[:2])]
    return lambda x, branch, m: list(plain_gated(x, branch, *m.chunk(6, dim=-1)[2:5]))


def weighted_sum(values):
    """A scalar in which every element counts differently."""
    total = 0.0
    for k, v in enumerate(values):
        factors = torch.linspace(-1.0, 1.0 + k, v.numel(), dtype=torch.float64).reshape(v.shape)
        total = total + (v.double() * factors).sum()
    return total


@pytest.mark.parametrize("name", FAST)
def test_result_and_gradient_are_those_of_layer_norm(name, backend):
    """Tolerance: elements below 50, about ten roundings of 2^-24; sums of 35 of them."""
    values = [v.requires_grad_() for v in inputs()]
    exact = wide(values)
    got, want = fused(name)(*values), plain(name)(*exact)
    for g, w in zip(got, want):
        assert_close(g, w, absolute=3e-5, relative=2e-6, what=f"{name} on {backend}")
    weighted_sum(got).backward()
    weighted_sum(want).backward()
    for what, v, e in zip(("x", "branch", "modulation"), values, exact):
        if v.grad is None:
            assert e.grad is None
            continue
        assert_close(v.grad, e.grad, absolute=35 * 50 * 2.0**-24, relative=2e-6, what=f"{name}: {what} on {backend}")


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAST)
def test_bfloat16_gradient_is_that_of_the_stored_numbers(name, state, backend):
    """The gradients of the fused op, from x_new as it was stored, are those of float64 there, rounded once.

    A gradient of modulation is rounded to bfloat16 (2^-9 of it); sums of 35 terms run in float32.
    """
    x, branch, modulation = inputs(torch.bfloat16, state)
    values = [x.requires_grad_(), branch.requires_grad_(), modulation.requires_grad_()]
    got = fused(name)(*values)
    weighted_sum(got).backward()
    exact = wide(values)
    if name == "modulated_layer_norm":
        want = plain(name)(*exact)
    else:
        unrounded, _ = plain(name)(*exact)
        stored = unrounded + (got[0].detach().double() - unrounded.detach())  # its value, and the sum's gradient
        want = [stored, plain_norm(stored, *exact[2].chunk(6, dim=-1)[3:5])]
    half_ulp = 2.0**-9  # of y's gradient, which autograd rounds on its way in
    weighted_sum(want).backward()
    for what, v, e in zip(("x", "branch", "modulation"), values, exact):
        if v.grad is not None:
            scale = e.grad.abs().max()
            assert_close(v.grad, e.grad, absolute=2 * half_ulp * scale, what=f"{name}: {what} on {backend}")
            assert v.grad.dtype == v.dtype


def test_y_is_the_norm_of_x_new_as_stored(backend):
    x, branch, modulation = inputs(torch.bfloat16, torch.bfloat16)
    gate, shift, scale = modulation.chunk(6, dim=-1)[2:5]
    x_new, y = ops.gated_residual_norm(x, branch, gate, shift, scale, EPS)
    unrounded, of_unrounded = plain_gated(*(v.double() for v in (x, branch, gate, shift, scale)))
    assert_close(x_new, unrounded, absolute=1e-6, relative=2.0**-23)
    assert_close(y, plain_norm(x_new.double(), shift.double(), scale.double()), absolute=2e-5, relative=1e-5)
    assert not torch.allclose(y.double(), of_unrounded, atol=2e-5, rtol=2.0**-9), "too few digits to tell"


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_a_gradient(used, backend):
    """Autograd hands None for the other one."""
    values = [v.requires_grad_() for v in inputs()]
    exact = wide(values)
    weighted_sum([fused("gated_residual_norm")(*values)[used]]).backward()
    weighted_sum([plain("gated_residual_norm")(*exact)[used]]).backward()
    for v, e in zip(values, exact):
        assert_close(v.grad, e.grad, absolute=35 * 50 * 2.0**-24, relative=2e-6)


@pytest.mark.parametrize("name", FAST)
def test_a_large_mean_costs_no_more_than_its_own_rounding(name, backend):
    """Mean 1000, deviation 1: the mean is known to a few 2^-24 of itself, which is an error of as many in y.

    64 running sums and their halving round 22 times; together far less than that worst case, 22 2^-24 1000.
    """
    x, branch, modulation = inputs(shape=(2, 8, 1024))
    x = (x + 1000).contiguous()
    for g, w in zip(fused(name)(x, branch, modulation), plain(name)(*wide((x, branch, modulation)))):
        assert_close(g, w, absolute=6 * 2.0**-24 * 1000 * 4, relative=1e-6, what=f"{name} on {backend}")


def test_the_test_of_a_large_mean_sees_a_one_pass_variance():
    """E[x^2] - E[x]^2 in float32, which is what such a test is there to keep out."""
    x, _, modulation = inputs(shape=(2, 8, 1024))
    x = x + 1000
    shift, scale = modulation.chunk(6, dim=-1)[:2]
    mean = x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) - mean.square() + EPS).rsqrt()
    y = (x - mean) * rstd * (1 + scale[:, None]) + shift[:, None]
    want = plain_norm(x.double(), shift.double(), scale.double())
    assert not (y - want).abs().max() < 6 * 2.0**-24 * 1000 * 4


@pytest.mark.parametrize("width", [1, 2, 63, 65, 5003])
def test_other_widths(width, backend):
    values = inputs(shape=(2, 33, width))
    for name in FAST:
        got, want = fused(name)(*values), plain(name)(*wide(values))
        # two channels may be so close that rounding their mean is a large part of their distance: 1 / sqrt(eps) times
        absolute = 1e-3 if width == 2 else 3e-5
        for g, w in zip(got, want):
            assert_close(g, w, absolute=absolute, relative=2e-6, what=f"{name} {width}")


def copies_during(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]


def test_chunks_and_rows_that_lie_apart_are_not_copied(library):
    x = tokens((BATCH, LENGTH, WIDTH), 1, layout="rows")
    branch = tokens((BATCH, LENGTH, WIDTH), 2, layout="rows")
    _, _, modulation = inputs()
    gate, shift, scale = modulation.chunk(6, dim=-1)[2:5]
    assert not x.is_contiguous()
    assert not shift.is_contiguous()
    inner = tokens((BATCH, LENGTH, WIDTH), 1, layout="sliced")
    with torch.no_grad(), ops.use_backend("cpp", ops=FAST):
        assert copies_during(lambda: ops.modulated_layer_norm(x, shift, scale)) == []
        assert copies_during(lambda: ops.gated_residual_norm(x, branch, gate, shift, scale)) == []
        assert copies_during(lambda: ops.modulated_layer_norm(inner, shift, scale)) != [], "the profiler sees copies"


BFLOAT16_NANS = torch.tensor([0x7F81, 0x7FC0, 0x7FFF, 0xFF81 - 2**16, 0xFFFF - 2**16], dtype=torch.int16)
FLOAT32_NANS = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF - 2**32], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nans", [BFLOAT16_NANS, FLOAT32_NANS], ids=["bfloat16", "float32"])
def test_every_nan_stays_a_nan_in_its_token(nans, dtype, backend):
    """Rounding to bfloat16 could carry a payload over into a number."""
    state = torch.bfloat16 if nans.dtype is torch.int16 else torch.float32
    for bits in nans:
        x, branch, modulation = inputs(dtype, state)
        clean = {name: fused(name)(x, branch, modulation) for name in FAST}
        x[1, 33, 5] = bits.view(state)
        for name in FAST:
            dirty = fused(name)(x, branch, modulation)
            assert dirty[-1][1, 33].isnan().all()
            for d, c in zip(dirty, clean[name]):
                other = torch.ones(BATCH, LENGTH, dtype=torch.bool)
                other[1, 33] = False
                assert_same_bits(d[other], c[other], name)


@pytest.mark.parametrize("name", ["mean", "rstd"])
def test_a_nan_in_the_saved_statistics_is_not_lost(name, backend):
    for row in (ROWS[f"{fast}_backward"] for fast in FAST):
        for bits in FLOAT32_NANS:
            case = {"shape": (BATCH, LENGTH, WIDTH), "dtype": torch.bfloat16, "state": torch.bfloat16}
            arguments = arguments_of(row, case)
            arguments[row.argument_names.index(name)][1, 33] = bits.view(torch.float32)
            grad_x = row(*arguments)[0]
            assert grad_x[1, 33].isnan().all()
            assert not grad_x[1, :33].isnan().any()


@pytest.mark.parametrize("name", FAST)
def test_transforms_of_torch_func(name):
    """Forward mode, vmap and the Hessian go by PyTorch's own rules and agree with those of plain layer norm."""
    values = wide(inputs(shape=(2, 3, 4)))
    tangents = tuple(torch.randn(v.shape, dtype=torch.float64) for v in values)
    single = tuple(v.detach().float() for v in values)
    want = torch.func.jvp(plain(name), tuple(values), tangents)[1]
    got = torch.func.jvp(fused(name), single, tuple(t.float() for t in tangents))[1]
    for g, w in zip(got, want):
        assert_close(g, w, absolute=1e-4, relative=1e-4, what="jvp")
    batched = torch.func.vmap(fused(name))(*(torch.stack((v, v + 1)) for v in single))
    for g, w in zip(batched, fused(name)(*(v + 1 for v in single))):
        assert_close(g[1], w, absolute=1e-5, relative=1e-5, what="vmap")
    hessians = [
        torch.func.hessian(lambda x, f=f, rest=rest: weighted_sum(f(x, *rest)))(x)
        for f, (x, *rest) in ((fused(name), single), (plain(name), values))
    ]
    assert_close(hessians[0], hessians[1], absolute=1e-3, relative=1e-3, what="hessian")


def test_second_derivatives_below_float64(backend):
    """The row's own gradient is not differentiated: asked for a graph, the backward is made of PyTorch's operations."""
    values = [v.requires_grad_() for v in inputs(shape=(2, 3, 8))]
    exact = wide(values)
    results = []
    for f, arguments in ((fused("gated_residual_norm"), values), (plain("gated_residual_norm"), exact)):
        first = torch.autograd.grad(weighted_sum(f(*arguments)), arguments, create_graph=True)
        results.append(torch.autograd.grad(sum(g.double().square().sum() for g in first), arguments))
    for g, w in zip(*results):
        assert_close(g, w, absolute=1e-4 * w.abs().max(), what=backend)


def test_the_backward_rows_refuse_a_gradient_of_their_own():
    for name in FAST:
        row = ROWS[f"{name}_backward"]
        arguments = row.arguments(**row.cases[0])
        arguments["scale"].requires_grad_()
        with pytest.raises(ValueError, match=f"{name}_backward has no gradient for scale, which requires one"):
            row(*row.bind(**arguments))


class Block(torch.nn.Module):
    """The part of a transformer block that these rows serve."""

    def __init__(self, width=16):
        super().__init__()
        self.modulation = torch.nn.Linear(width, 6 * width)
        self.inner = torch.nn.Linear(width, width)

    def forward(self, x, c):
        shift, scale, gate, next_shift, next_scale, _ = self.modulation(c).chunk(6, dim=-1)
        branch = self.inner(ops.modulated_layer_norm(x, shift, scale))
        return ops.gated_residual_norm(x, branch, gate, next_shift, next_scale)


def test_autocast_keeps_the_residual_stream_in_float32(backend):
    torch.manual_seed(0)
    block, x, c = Block(), torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 16)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        x_new, y = block(x, c)
    assert (x_new.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    (x_new.sum() + y.float().square().sum()).backward()
    assert x.grad.dtype is torch.float32
    assert block.modulation.weight.grad.isfinite().all()
    exact_x_new, exact_y = block.double()(x.double(), c.double())
    assert_close(x_new, exact_x_new, absolute=0.05, what="bfloat16's two matrix products")
    assert_close(y, exact_y, absolute=0.1, relative=0.05)


def test_compiles_into_one_graph_with_its_gradient():
    """fullgraph=True raises at a graph break. Another batch size and length through dynamic shapes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((3, 5), (2, 40)):
        x, c = torch.randn(batch, length, 16), torch.randn(batch, 16)
        results = []
        for f in (block, compiled):
            block.zero_grad()
            leaf = x.clone().requires_grad_()
            out = f(leaf, c)
            weighted_sum(out).backward()
            results.append([*out, leaf.grad, *(p.grad.clone() for p in block.parameters())])
        for g, w in zip(*results):
            assert_close(g, w.detach(), absolute=1e-4, relative=1e-4)


def test_inductor_keeps_the_strides_of_chunks():
    torch._dynamo.reset()
    compiled = torch.compile(fused("gated_residual_norm"), fullgraph=True, backend="inductor")
    results = []
    for f in (fused("gated_residual_norm"), compiled):
        values = [v.requires_grad_() for v in inputs()]
        out = f(*values)
        torch.autograd.backward(out, [torch.ones_like(y) for y in out])
        results.append([*out, *(v.grad for v in values)])
    for g, w in zip(*results):
        assert_same_bits(g, w)


X, SHIFT = torch.ones(3, 5, 4), torch.ones(3, 4)
WRONG = [
    ("modulated_layer_norm", {"x": torch.ones(5, 4)}, r"x is \(5, 4\), expected tokens \(B, T, D\)"),
    ("modulated_layer_norm", {"x": X.long()}, "x is int64, expected float32"),
    ("modulated_layer_norm", {"shift": SHIFT[:2]}, r"shift is \(2, 4\), expected \(3, 4\) for x"),
    ("modulated_layer_norm", {"scale": SHIFT[:, None]}, r"scale is \(3, 1, 4\), expected \(3, 4\)"),
    ("modulated_layer_norm", {"scale": SHIFT.bfloat16()}, "scale is bfloat16 but shift is float32"),
    ("modulated_layer_norm", {"shift": SHIFT.double(), "scale": SHIFT.double()}, "shift is float64 but x is not"),
    ("modulated_layer_norm", {"eps": -1.0}, "eps is -1.0, expected a number >= 0"),
    ("modulated_layer_norm", {"eps": math.nan}, "eps is nan, expected a number >= 0"),
    ("gated_residual_norm", {"branch": X[:, :1]}, r"branch is \(3, 1, 4\) but x is \(3, 5, 4\)"),
    ("gated_residual_norm", {"branch": X.bfloat16()}, "branch is bfloat16 but gate is float32"),
    ("gated_residual_norm", {"gate": SHIFT[:, :1]}, r"gate is \(3, 1\), expected \(3, 4\)"),
    ("modulated_layer_norm_backward", {"grad_y": X.bfloat16()}, "grad_y is bfloat16 but scale is float32"),
    ("modulated_layer_norm_backward", {"mean": X[..., 0].bfloat16()}, "mean is bfloat16, expected float32"),
    ("modulated_layer_norm_backward", {"rstd": SHIFT}, r"rstd is \(3, 4\), expected \(3, 5\)"),
    ("gated_residual_norm_backward", {"grad_x_new": None, "grad_y": None}, "grad_x_new and grad_y are both None"),
    ("gated_residual_norm_backward", {"grad_x_new": X.bfloat16()}, "grad_x_new is bfloat16 but x_new is float32"),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_argument_is_named(name, changes, sentence):
    row = ROWS[name]
    arguments = {**row.arguments(shape=(3, 5, 4)), **changes}
    with pytest.raises(ValueError, match=sentence) as caught:
        row(*row.bind(**arguments))
    assert str(caught.value).endswith(".")
