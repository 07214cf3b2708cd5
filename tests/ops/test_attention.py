"""attention: every backend's result and gradient, autocast, compiled graphs, and CUDA's backends without a GPU."""

import itertools
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from torch.autograd import forward_ad, gradgradcheck

from lfm_fast import ops
from lfm_fast.ops import _attention, _measured
from lfm_fast.ops._registry import row

ROW = row("attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = ("sdpa", "math", "reference")
CUDA = ("flash", "cudnn", "efficient", "xformers")
# (batch, heads, T_q, head size), T_k: heads of DiT-XL, odd ones, cross-attention, more keys than a block of the kernel
SIZES = (((2, 2, 33, 72), 33), ((1, 3, 5, 7), 19), ((2, 1, 70, 1), 16), ((1, 2, 1, 64), 257), ((1, 1, 20, 16), 530))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    """The table of whoever runs the tests has no part in them."""
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("LFM_FAST_MEASURE", raising=False)
    monkeypatch.setattr(_measured, "_known", {})


def arguments(shape=(2, 2, 20, 8), **case):
    return list(ROW.arguments(shape=shape, **case).values())


def gradients(function, tensors, factors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, factors.to(y.dtype))


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "keys"), SIZES, ids=str)
def test_result_and_gradient_are_those_of_float64(shape, keys, dtype, name):
    """16 bits: the weights, and in the two products also the scores, are rounded; gradients sum up to 530 of them."""
    *tensors, _ = arguments(shape, keys=keys, dtype=dtype)
    factors = torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)
    with ops.use_backend(name, ops="attention"):
        y, computed = gradients(lambda *x: ops.attention(*x, scale=0.3), tensors, factors)
    want, expected = gradients(lambda *x: ROW.reference(*x, scale=0.3), [x.double() for x in tensors], factors)
    low = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype, 1e-12 if dtype is torch.float64 else 2e-5)
    assert y.dtype == dtype
    assert_close(y, want, absolute=low, what=f"result on {name}")
    for g, w, x in zip(computed, expected, "qkv"):
        biggest = max(1.0, w.abs().max().item())
        assert_close(g, w, absolute=low * biggest, relative=1e-5, what=f"gradient of {x} on {name}")


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("layout", ["fused", "transposed", "sliced", "expanded", "channels_last"])
def test_any_strides(layout, name):
    tensors = arguments((2, 3, 20, 16), layout=layout)
    with ops.use_backend(name, ops="attention"):
        got = ops.attention(*tensors)
    packed = [x.double().contiguous() for x in tensors[:3]]
    assert_close(got, F.scaled_dot_product_attention(*packed), absolute=1e-6, relative=1e-6)


def test_slices_of_one_projection_are_read_where_they_lie():
    """No copy of q, k or v, a result whose heads lie side by side, and one gradient of the projection's output."""
    fused = torch.randn(2, 64, 3, 3, 32, requires_grad=True)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = ops.attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}
    y.square().sum().backward()
    other = fused.detach().double().requires_grad_()
    ROW.reference(*other.permute(2, 0, 3, 1, 4)).square().sum().backward()
    assert_close(fused.grad, other.grad, absolute=1e-4)


def test_the_fused_kernel_keeps_no_weights():
    """What autograd keeps is of the size of q, k, v and the result."""
    tensors = [x.requires_grad_() for x in arguments((1, 2, 256, 8))[:3]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ops.attention(*tensors)
    assert max(kept) == tensors[0].numel()


@pytest.mark.parametrize(
    ("name", "keys"), [*itertools.product(CPU[1:], (1, 2, 15, 16, 17)), ("sdpa", 16), ("sdpa", 40)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_comes_out(name, keys, dtype):
    """PyTorch's CPU kernel gives 0 for it below 16 keys: there the two products run instead."""
    for position, which in enumerate("qkv"):
        tensors = arguments((2, 1, 3, 8), keys=keys, dtype=dtype)
        tensors[position][1, 0, 0, 0] = math.nan
        with ops.use_backend(name, ops="attention"):
            y = ops.attention(*tensors)
        assert y[0].isfinite().all()
        assert y[1].isnan().any(), which


def test_below_sixteen_keys_the_fused_kernel_is_refused():
    few = ops.explain("attention", *arguments((1, 1, 8, 4), keys=15))
    assert few.backend == "math"
    assert "NaN" in few.refused["sdpa"]
    assert ops.explain("attention", *arguments((1, 1, 8, 4), keys=16)).backend == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "tokens", "gradient", "backend"),
    [
        (torch.bfloat16, 64, True, "cpp"),
        (torch.bfloat16, 4097, True, "sdpa"),
        (torch.bfloat16, 64, False, "cpp"),
        (torch.bfloat16, 4097, False, "sdpa"),
        (torch.float16, 64, True, "sdpa"),
        (torch.float32, 64, True, "sdpa"),
        (torch.float32, 64, False, "sdpa"),
    ],
)
def test_default_choice_on_the_cpu(dtype, tokens, gradient, backend):
    q, k, v, _ = arguments((1, 1, 16, 4), keys=tokens, dtype=dtype)
    if backend == "cpp" and ROW.named("cpp").available() is not None:
        backend = "math" if gradient else "sdpa"
    assert ops.explain("attention", q, k, v.requires_grad_(gradient)).backend == backend
    with torch.no_grad():
        assert ops.explain("attention", q, k, v).backend == ops.explain("attention", q, k, v.detach()).backend


def test_autocast_casts_as_for_a_matrix_product():
    q, k, v, _ = arguments()
    q.requires_grad_()
    for name in CPU:
        with ops.use_backend(name, ops="attention"):
            plain = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for y in (ops.attention(q, k.bfloat16(), v), torch.ops.lfm_fast.attention(q, k, v)):
                    assert y.dtype is torch.bfloat16
                    assert_close(y, plain, absolute=0.02)
                assert torch.autograd.grad(y.sum(), q)[0].dtype is torch.float32
                assert ops.attention(q.double(), k.double(), v.double()).dtype is torch.float64
    with pytest.raises(ValueError, match="k is bfloat16 but q is float32"):
        ops.attention(q, k.bfloat16(), v)


# Inductor finds two products in float32 and makes the fused kernel of them
@pytest.mark.parametrize(("compiler", "name"), [*itertools.product(["aot_eager"], CPU), ("inductor", "sdpa")])
def test_compiles_into_one_graph_with_the_backend_of_the_trace(name, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: ops.attention(*x), fullgraph=True, backend=compiler, dynamic=True)
    for shape in ((2, 2, 20, 8), (3, 2, 33, 8)):
        tensors = arguments(shape, layout="fused")[:3]
        factors = torch.linspace(-1.0, 2.0, math.prod(shape)).reshape(shape)
        with ops.use_backend(name, ops="attention"), torch.profiler.profile() as profile:
            y, computed = gradients(compiled, tensors, factors)
        ran = {event.key for event in profile.key_averages()}
        want, expected = gradients(ops.attention, tensors, factors)
        for g, w in zip((y, *computed), (want, *expected)):
            assert_close(g, w, absolute=2e-5, relative=1e-5, what=f"{name} by {compiler}")
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in ran) == (name == "sdpa")


def test_forward_mode_and_transforms_run_the_reference():
    q, k, v, _ = arguments((2, 2, 17, 4), dtype=torch.float64)
    step, h = torch.sin(torch.arange(q.numel(), dtype=torch.float64)).reshape(q.shape), 1e-5
    want = (ops.attention(q + h * step, k, v) - ops.attention(q - h * step, k, v)) / (2 * h)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ops.attention(forward_ad.make_dual(q, step), k, v)).tangent
    assert_close(tangent, want, absolute=1e-9)
    assert_close(torch.func.jvp(lambda x: ops.attention(x, k, v), (q,), (step,))[1], want, absolute=1e-9)
    batched = torch.func.vmap(lambda x: ops.attention(x, k, v))(torch.stack((q, 2 * q)))
    assert_close(batched, torch.stack((ops.attention(q, k, v), ops.attention(2 * q, k, v))), absolute=1e-12)


def test_a_second_derivative_is_right_or_refused():
    tensors = [x.requires_grad_() for x in arguments((1, 1, 16, 2), dtype=torch.float64)[:3]]
    for name in ("math", "reference"):
        with ops.use_backend(name, ops="attention"):
            assert gradgradcheck(ops.attention, tensors)
    with ops.use_backend("sdpa", ops="attention"):
        first = torch.autograd.grad(ops.attention(*tensors).sum(), tensors, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"derivative for .* not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("width", [64, 72, 13, 1])
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_cuda_operators_take_what_they_are_given(name, width):
    """Shapes, dtypes and gradients of the calls, on meta tensors."""
    fused = torch.empty(2, 20, 3, 3, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    y = ROW.kernels[name](q, k, v)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert {"flash": "Flash", "cudnn": "Cudnn", "efficient": "Efficient"}[name] in operators_behind(y)
    y.sum().backward()
    assert fused.grad.shape == fused.shape
    with torch.no_grad():
        assert ROW.kernels[name](q, k[:, :, :5], v[:, :, :5], 0.3).shape == q.shape


def operators_behind(y):
    names, nodes = "", [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names += type(node).__name__
        nodes += [n for n, _ in node.next_functions if n is not None and "Attention" not in type(node).__name__]
    return names


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("width", [8, 13])
def test_zeros_beside_odd_heads_change_nothing(width, scale):
    q, k, v, _ = arguments((2, 2, 20, width))
    seen = []
    padded = _attention._padded_to_eights(lambda *a: seen.append(a[0].shape[-1]) or _attention.two_products(*a))
    assert_close(padded(q, k, v, scale), ROW.reference(q, k, v, scale), absolute=1e-6)
    assert seen == [8 if width == 8 else 16]


@pytest.mark.parametrize("name", CUDA)
def test_cuda_backends_say_why_they_do_not_run_here(name):
    tensors = arguments()
    assert "it runs on cuda, the tensors are on cpu" in ops.explain("attention", *tensors).refused[name]
    with ops.use_backend(name, ops="attention"), pytest.raises(ValueError, match=f"{name!r}: it runs on cuda"):
        ops.attention(*tensors)
    with ops.use_backend(name):
        ops.attention(*tensors)


class OnCuda:
    """A tensor's facts, as a backend's why_not asks for them."""

    def __init__(self, dtype=torch.bfloat16, width=64):
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, torch.Size((2, 2, 20, width))
        self.requires_grad = False


def test_flash_refuses_float32_with_the_reason():
    q = OnCuda(torch.float32)
    assert ROW.named("flash").why_not(q, q, q) == "it has no kernel for float32"
    assert ROW.named("flash").opt_in
    assert ROW.named("xformers").opt_in
    assert not ROW.named("sdpa").opt_in


def test_xformers_is_imported_for_cuda_tensors_alone():
    code = (
        "import sys, torch; from lfm_fast import ops; q = torch.ones(1, 1, 16, 4);"
        "ops.attention(q, q, q); ops.explain('attention', q, q, q); assert 'xformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_tokens_that_overlap_in_memory_are_right():
    """A sliding window: PyTorch 2.13's fused CPU kernel is off by anything there, without an error."""
    q = torch.linspace(-2, 2, 200).sin().as_strided((1, 2, 33, 8), (1, 1, 1, 1))
    k = torch.linspace(-1, 3, 200).cos().as_strided((1, 2, 65, 8), (1, 1, 1, 1))
    for args in ((q, k, k), (q, k.contiguous(), k.contiguous()), (q.contiguous(), k, k)):
        want = ops.attention(*(x.double().contiguous() for x in args))
        assert_close(ops.attention(*args), want, absolute=1e-5)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ModuleNotFoundError("No module named 'xformers'"), "xformers is not installed (pip install xformers)"),
        (OSError("libcudart.so.12: cannot open\nmore"), "xformers cannot be imported (libcudart.so.12: cannot open)"),
    ],
)
def test_an_xformers_that_does_not_import_is_a_reason(monkeypatch, error, sentence):
    def fail():
        raise error

    monkeypatch.setattr(_attention, "_import_xformers", fail)
    assert _attention._xformers_available.__wrapped__() == sentence


def stand_in(monkeypatch, forward=(), backward=()):
    """An xformers whose kernels have these reasons to refuse."""

    def kernels(reasons):
        return [types.SimpleNamespace(not_supported_reasons=lambda inputs, r=r: r) for r in reasons]

    fmha = types.SimpleNamespace(Inputs=lambda *x, scale: x, ALL_FW_OPS=kernels(forward), ALL_BW_OPS=kernels(backward))
    module = types.SimpleNamespace(
        fmha=fmha,
        memory_efficient_attention=lambda q, k, v, scale: ROW.reference(
            *(x.transpose(1, 2) for x in (q, k, v)), scale
        ).transpose(1, 2),
    )
    monkeypatch.setattr(_attention, "_import_xformers", lambda: module)


class PretendCuda(torch.nn.Parameter):
    """A parameter that says it is on CUDA, for a why_not that asks nothing else of the device."""

    device = torch.device("cuda")


def test_xformers_says_which_of_its_kernels_do_not_take_a_call(monkeypatch):
    monkeypatch.setattr(_attention, "Tensor", PretendCuda)
    q = PretendCuda(torch.ones(1, 2, 16, 4), requires_grad=False)
    why_not = ROW.named("xformers").why_not
    stand_in(monkeypatch, forward=[["operator wasn't built"], []], backward=[["no backward."]])
    assert why_not(q, q, q) is None
    assert why_not(q.requires_grad_(), q, q) == "none of its kernels takes this (no backward)"
    monkeypatch.setattr(_attention, "_import_xformers", types.SimpleNamespace)
    assert "xformers cannot say whether it takes this" in why_not(q, q, q)


def test_xformers_gets_tokens_before_heads(monkeypatch):
    stand_in(monkeypatch)
    q, k, v, _ = arguments((2, 3, 20, 8), keys=5)
    assert_same_bits(ROW.kernels["xformers"](q, k, v, 0.4), ROW.reference(q, k, v, 0.4))


WRONG = [
    ({"q": torch.ones(2, 3, 4)}, r"q is \(2, 3, 4\), expected \(B, heads, T, d\)"),
    ({"q": 1.5}, "q is a float: pass a torch.Tensor"),
    ({"k": torch.ones(1, 2, 20, 8)}, r"k is \(1, 2, 20, 8\) but q is \(2, 2, 20, 8\): only the number of tokens"),
    ({"v": torch.ones(2, 2, 19, 8)}, r"v is \(2, 2, 19, 8\) but k is \(2, 2, 20, 8\)"),
    ({"v": torch.ones(2, 2, 20, 8).bfloat16()}, "v is bfloat16 but q is float32"),
    ({"q": torch.ones(2, 2, 20, 8).long()}, "q is int64, expected float32"),
    ({"k": torch.ones(2, 2, 20, 8, device="meta")}, "k is on meta but q is on cpu"),
    ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
    ({"scale": math.nan}, "scale is nan, expected a positive number"),
    ({"scale": True}, "scale is a bool: pass a number"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=str)
def test_a_wrong_argument_is_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        ops.attention(**{**dict(zip(("q", "k", "v", "scale"), arguments())), **changes})
    assert str(caught.value).count(". ") == 0
