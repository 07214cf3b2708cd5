"""The gradient of attention's compiled kernels on the processor's matrix tiles, and self_attention."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS
from test_attention import SIZES, arguments, gradients, nothing_remembered  # noqa: F401
from test_attention_tiles import EDGES, with_tiles

from lfm_fast import ops
from lfm_fast.ops import _attention

ROW, WITH_LSE, BACKWARD = (ROWS[name] for name in ("attention", "attention_with_lse", "attention_backward"))
# beyond those of the forward: several chunks of 256 queries, the last of them cut; fewer keys than queries; XL's heads
MORE = (((1, 1, 290, 40), 290), ((1, 2, 600, 33), 70), ((2, 1, 257, 8), 1), ((1, 2, 256, 72), 256))
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "channels_last")


def exact_gradients(tensors, factors, scale=None):
    """By autograd in float64, of the same 16-bit numbers."""
    return gradients(lambda *x: ROW.reference(*x, scale), [x.double() for x in tensors], factors)[1]


def factors_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).bfloat16()


def compiled_gradients(tensors, factors, scale=None):
    with ops.use_backend("cpp", ops="attention"):
        return gradients(lambda *x: ops.attention(*x, scale), tensors, factors)[1]


@with_tiles
@pytest.mark.parametrize(("shape", "keys"), [*SIZES, *EDGES, *MORE], ids=str)
def test_is_as_near_to_float64_as_pytorchs_own(shape, keys):
    """Each gradient, in its root mean square, is nearer than that of the two products, and as near as that of PyTorch's
    fused kernel; a fifth is left for the one rounding of the result that both have, which falls out as it falls."""
    tensors, factors = arguments(shape, keys=keys, dtype=torch.bfloat16)[:3], factors_of(shape)
    want = exact_gradients(tensors, factors, 0.3)
    got = compiled_gradients(tensors, factors, 0.3)
    contenders = {"math": _attention.two_products, "sdpa": F.scaled_dot_product_attention}
    others = [gradients(lambda *x, f=f: f(*x, scale=0.3), tensors, factors)[1] for f in contenders.values()]
    for i, name in enumerate("qkv"):
        off, *theirs = (((g[i].double() - want[i]).square().mean()).sqrt() for g in (got, *others))
        # keys so few that a gradient vanishes are off by the roundings of what cancels
        assert off <= 1.2 * max(theirs) + 1e-3 * want[2].abs().max(), (name, off, theirs)


@with_tiles
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "keys"), [*SIZES, *EDGES, *MORE], ids=str)
def test_is_right_in_any_layout(shape, keys, layout):
    """Weights and their gradients are rounded to 2^-9, sums of up to 530 of them; on grad's side too any strides."""
    tensors = arguments(shape, keys=keys, dtype=torch.bfloat16, layout=layout)[:3]
    factors = arguments(shape, dtype=torch.bfloat16, layout=layout)[0]
    got, want = compiled_gradients(tensors, factors), exact_gradients(tensors, factors)
    biggest = max(1.0, *(w.abs().max().item() for w in want))
    for g, w, x, name in zip(got, want, tensors, "qkv"):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        assert_close(g, w, absolute=0.01 * biggest, what=f"gradient of {name}, {layout}")


@with_tiles
@pytest.mark.parametrize("shape", [(3, 2, 17, 8), (2, 3, 64, 64), (1, 2, 300, 40), (2, 1, 1, 1)], ids=str)
def test_of_the_slices_of_one_tensor_is_one_tensor(shape):
    """The same bits as for three tensors, and not a copy on the way into the tensor that q, k and v are slices of."""
    batch, heads, tokens, width = shape
    fused = torch.randn(batch, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(1)).bfloat16()
    factors = factors_of((batch, tokens, heads, width)).transpose(1, 2)
    three = [x.transpose(1, 2) for x in fused.view(batch, tokens, 3, heads, width).unbind(2)]
    want = compiled_gradients(three, factors, 0.4)
    leaf = fused.requires_grad_()
    y = ops.self_attention(leaf.unflatten(-1, (3, heads, width)), 0.4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (got,) = torch.autograd.grad(y, leaf, factors)
    assert not {"aten::copy_", "aten::clone", "aten::cat"} & {event.key for event in profile.key_averages()}
    assert_same_bits(got, torch.stack([x.transpose(1, 2) for x in want], dim=2).view(fused.shape))
    assert_same_bits(y, ops.attention(*three, 0.4))


@with_tiles
def test_the_log_sum_exp_is_that_of_float64():
    """Up to the exponential's 8e-5, also of scores that would overflow."""
    for factor in (1.0, 40.0):
        q, k, v, _ = arguments((2, 3, 33, 40), keys=70, dtype=torch.bfloat16)
        q = q * factor
        out, lse = WITH_LSE.kernels["cpp"](q, k, v, 0.5)
        want = torch.logsumexp(q.double() @ k.double().transpose(-2, -1) * 0.5, dim=-1)
        assert_close(lse, want, absolute=1e-4, relative=1e-6)
        assert_same_bits(out, ROW.kernels["cpp"](q, k, v, 0.5), "the result beside it")


@with_tiles
def test_large_scores_neither_overflow_nor_vanish():
    tensors = arguments((2, 2, 40, 32), dtype=torch.bfloat16)[:3]
    tensors = [tensors[0] * 30, tensors[1], tensors[2]]
    factors = factors_of((2, 2, 40, 32))
    got, want = compiled_gradients(tensors, factors), exact_gradients(tensors, factors)
    for g, w in zip(got, want):
        assert_close(g, w, absolute=0.01 * w.abs().max().item())


@with_tiles
def test_what_is_not_finite_stays_in_its_sample():
    for which, value in itertools.product(range(4), (math.nan, math.inf, -math.inf)):
        for keys in (1, 5, 33):
            tensors = arguments((3, 1, 35, 8), keys=keys, dtype=torch.bfloat16)[:3]
            tensors = [*tensors, factors_of((3, 1, 35, 8))]
            tensors[which][1, 0, -1, 0] = value
            got, want = compiled_gradients(tensors[:3], tensors[3]), exact_gradients(tensors[:3], tensors[3])
            for g, w, name in zip(got, want, "qkv"):
                assert torch.equal(g.isfinite()[::2], w.isfinite()[::2])
                assert g[::2].isfinite().all()
                assert w[1].isfinite().all() or not g[1].isfinite().all(), (which, value, keys, name)


@with_tiles
def test_has_the_same_bits_for_any_threads_and_batch():
    q, k, v, _ = arguments((3, 5, 300, 40), dtype=torch.bfloat16, layout="fused")
    out, lse = WITH_LSE.kernels["cpp"](q, k, v)
    call = [factors_of(q.shape), q, k, v, out, lse]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(BACKWARD.kernels["cpp"](*call))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert_same_bits(BACKWARD.kernels["cpp"](*(x[1:2] for x in call)), found[0][1:2])


@with_tiles
def test_a_second_derivative_is_right():
    """By PyTorch's own operations, in float32: the first derivative's differences to float64, once more."""
    tensors, factors = arguments((2, 1, 20, 8), keys=17, dtype=torch.bfloat16)[:3], factors_of((2, 1, 20, 8))

    def penalty(function, leaves):
        leaves = [x.requires_grad_() for x in leaves]
        y = function(*leaves)
        first = torch.autograd.grad(y, leaves, factors.to(y.dtype), create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)

    with ops.use_backend("cpp", ops="attention"):
        got = penalty(ops.attention, [x.clone() for x in tensors])
    want = penalty(ROW.reference, [x.double() for x in tensors])
    for g, w in zip(got, want):
        assert_close(g, w, absolute=0.03 * w.abs().max().item())


@with_tiles
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_inside_a_compiled_graph(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.self_attention(x), fullgraph=True, backend=compiler, dynamic=True)
    for batch, tokens in ((2, 20), (3, 33)):
        leaf = torch.randn(batch, tokens, 3, 2, 8, generator=torch.Generator().manual_seed(batch)).bfloat16()
        factors = factors_of((batch, 2, tokens, 8))
        with torch.profiler.profile() as profile:
            y, got = gradients(compiled, [leaf], factors)
        ran = {event.key for event in profile.key_averages()}
        assert {"lfm_fast_cpp::attention_with_lse", "lfm_fast_cpp::attention_backward"} <= ran
        want_y, want = gradients(ops.self_attention, [leaf], factors)
        assert_same_bits(y, want_y)
        assert_same_bits(got[0], want[0])


@with_tiles
def test_autocast_gives_a_gradient_of_the_arguments_dtype():
    leaf = torch.randn(2, 20, 3, 2, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    want = torch.autograd.grad(ops.self_attention(leaf.double()).square().sum(), leaf)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.use_backend("cpp", ops="attention"):
        for y in (ops.self_attention(leaf), ops.attention(*(x.transpose(1, 2) for x in leaf.unbind(2)))):
            assert y.dtype is torch.bfloat16
            (got,) = torch.autograd.grad(y.float().square().sum(), leaf)
            assert got.dtype is torch.float32
            assert_close(got, want, absolute=0.03 * want.abs().max().item())


def test_self_attention_takes_what_attention_takes():
    qkv = torch.randn(2, 20, 3, 2, 8)
    for name in ("sdpa", "math", "reference"):
        for which in ("attention", "self_attention"):
            with ops.use_backend(name, ops=which):
                assert ops.explain("self_attention", qkv).backend == name
                three = (x.transpose(1, 2) for x in qkv.unbind(2))
                with ops.use_backend(name, ops="attention"):
                    assert_same_bits(ops.self_attention(qkv), ops.attention(*three))
    with ops.use_backend("cpp", ops="attention"), pytest.raises(ValueError, match=r"attention cannot run .*bfloat16"):
        ops.self_attention(qkv)


@pytest.mark.parametrize(
    ("qkv", "sentence"),
    [
        (torch.ones(2, 4, 3, 2), r"qkv is \(2, 4, 3, 2\), expected \(B, T, 3, heads, d\)"),
        (torch.ones(2, 3, 4, 2, 8), r"qkv is \(2, 3, 4, 2, 8\), expected \(B, T, 3, heads, d\)"),
        (torch.ones(2, 4, 3, 2, 8).int(), "qkv is int32, expected float32"),
        (None, "qkv is a NoneType: pass a torch.Tensor"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_self_attention_is_named(qkv, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.self_attention(qkv)


WRONG = {
    "grad must have shape": lambda g, q, k, v, out, lse: (g[:, :, 1:], q, k, v, out, lse),
    "out must have shape": lambda g, q, k, v, out, lse: (g, q, k, v, out[..., :1], lse),
    "lse must have shape": lambda g, q, k, v, out, lse: (g, q, k, v, out, lse[:1]),
    "lse must be float32, got bfloat16": lambda g, q, k, v, out, lse: (g, q, k, v, out, lse.bfloat16()),
    "grad must be bfloat16, got float32": lambda g, q, k, v, out, lse: (g.float(), q, k, v, out, lse),
    "k and v go together": lambda g, q, k, v, out, lse: (g, q, k, None, out, lse),
    r"q without k and v must be \(B, T, 3, heads, d\)": lambda g, q, k, v, out, lse: (g, q, None, None, out, lse),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_the_operator_itself_looks_before_it_reads(sentence, library):
    q, k, v, _ = arguments(dtype=torch.bfloat16)
    call = WRONG[sentence](torch.ones_like(q), q, k, v, torch.ones_like(q), torch.ones(q.shape[:3]))
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.lfm_fast_cpp.attention_backward(*call)
