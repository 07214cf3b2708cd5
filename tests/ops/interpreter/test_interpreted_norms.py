"""The norms over tokens in Triton: widths of real networks, whole and cut spans of tokens, gradients by autograd."""

import itertools

import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import ROWS, arguments_of, in_float64, outputs

from lfm_fast import ops
from lfm_fast.kernels.triton import _tokens

PUBLIC = ["modulated_layer_norm", "gated_residual_norm"]
NORMS = [*PUBLIC, *(f"{name}_backward" for name in PUBLIC)]
SPAN = min(_tokens.SPANS)


@pytest.mark.parametrize("name", [f"{name}_backward" for name in PUBLIC])
@pytest.mark.parametrize("span", _tokens.SPANS)
def test_every_span_gives_the_same_sums(name, span, monkeypatch):
    """As many programs as there are would choose it; the last one of a sample has fewer tokens."""
    monkeypatch.setattr(_tokens, "SPANS", (span,))
    args = arguments_of(ROWS[name], {"shape": (2, 70, 9)})
    with ops.use_backend("triton", ops=name):
        got = outputs(ROWS[name](*args))
    tolerance = ROWS[name].tolerance
    for g, w in zip(got, ROWS[name].reference(*in_float64(args)), strict=True):
        assert_close(g, w, absolute=tolerance.absolute, relative=tolerance.relative, what=f"{name} {span}")


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "shape", [(2, SPAN - 1, 9), (2, SPAN, 9), (1, SPAN + 1, 1152), (1, 2, 2048), (1, 1, 8193)], ids=str
)
def test_widths_and_spans(name, shape):
    args = arguments_of(ROWS[name], {"shape": shape, "chunked": True, "dtype": torch.bfloat16})
    with ops.use_backend("triton", ops=name):
        got = outputs(ROWS[name](*args))
    tolerance = ROWS[name].tolerance
    for g, w in zip(got, ROWS[name].reference(*in_float64(args)), strict=True):
        assert_close(g, w, absolute=tolerance.absolute, relative=tolerance.relative, what=f"{name} {shape}")


@pytest.mark.parametrize(("name", "dtype"), itertools.product(PUBLIC, (torch.float32, torch.bfloat16)))
def test_autograd_runs_the_backward_kernels(name, dtype, monkeypatch):
    row = ROWS[name]
    ran = []
    for each in (row.name, f"{row.name}_backward"):
        kernel = ROWS[each].kernels["triton"]
        monkeypatch.setitem(ROWS[each].kernels, "triton", lambda *a, k=kernel, n=each: ran.append(n) or k(*a))
    args = arguments_of(row, {"shape": (3, 40, 21), "dtype": dtype})
    leaves = [x.requires_grad_() for x in args if isinstance(x, torch.Tensor)]
    count = len(outputs(getattr(ops, row.name)(*args)))

    def gradients(values, function):
        results = outputs(function(*values))[:count]
        factors = [torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in results]
        return torch.autograd.grad(results, [x for x in values if isinstance(x, torch.Tensor)], factors)

    with ops.use_backend("triton", ops=[row.name, f"{row.name}_backward"]):
        got = gradients(args, row)
    assert ran == [row.name, f"{row.name}_backward"]
    wide = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
    for leaf, g, w in zip(leaves, got, gradients(wide, row.reference), strict=True):
        low = 2.0**-8 * w.abs().max().item() if dtype is torch.bfloat16 else 0.0  # incoming gradients are rounded too
        assert_close(g, w, absolute=2e-4 + low, relative=1e-5, what=f"{row.name} {tuple(leaf.shape)}")


def test_the_norm_is_that_of_the_sum_as_stored():
    """Rounded to bf16, and not as it was in float32 before."""
    x, branch, gate, shift, scale, _ = arguments_of(ROWS["gated_residual_norm"], {"shape": (2, 3, 40)})
    with ops.use_backend("triton", ops=PUBLIC):
        x_new, y = ops.gated_residual_norm(x.bfloat16(), branch / 3, gate, shift, scale)
        assert_same_bits(y, ops.modulated_layer_norm(x_new, shift, scale))


def test_sums_over_tokens_take_no_room_of_their_size():
    """One row of sums for a span of tokens: few tokens where programs would be few, more in a large batch."""
    parts, span = _tokens.partial_sums(torch.empty(3, 256, 40), 2)
    assert (parts.shape, span) == ((3, 256 // 16, 2, 40), 16)
    assert [_tokens.span_of(batch, 256) for batch in (1, 128, 255, 256, 511, 512, 10_000)] == [
        16,
        16,
        16,
        32,
        32,
        64,
        64,
    ]
    assert [_tokens.span_of(batch, length) for batch, length in ((0, 5), (5, 0), (2048, 1), (2047, 1))] == [
        16,
        16,
        64,
        16,
    ]


def test_registers_are_limited_where_nothing_spills():
    low, wide = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    assert _tokens.registers(1152, 8, 64, low, low, None) == 64
    assert _tokens.registers(384, 16, 72, low) == 72
    assert _tokens.registers(1152, 8, 64, low, wide) is None
    assert _tokens.registers(8192, 8, 64, low) is None  # 16 channels to a thread, of which there are no more


def test_sums_are_added_in_the_order_of_the_tokens():
    parts = torch.randn(2, 7, 3, 150, generator=torch.Generator().manual_seed(0)) * 1e4
    results = [torch.empty(2, 150) for _ in range(3)]
    _tokens.add_up(parts, *results)
    for k, result in enumerate(results):
        want = torch.zeros(2, 150)
        for part in parts[:, :, k].unbind(1):
            want = want + part
        assert_same_bits(result, want)


def test_chunks_and_slices_are_read_where_they_lie():
    wide = torch.randn(2, 9, 60)
    x, *strides = _tokens.strided_tokens(wide[:, 1:, 20:40])
    assert (x.data_ptr(), strides) == (wide[:, 1:, 20:40].data_ptr(), [540, 60])
    vector = torch.randn(2, 60)[:, 10:20]
    assert _tokens.strided_vectors(vector)[0] is vector
    assert _tokens.strided_tokens(wide[..., ::2])[0].is_contiguous()


def test_more_channels_than_registers_are_refused():
    with ops.use_backend("triton", ops=NORMS):
        vectors = torch.ones(1, 16385)
        with pytest.raises(ValueError, match="more than 16384 channels do not fit"):
            ops.modulated_layer_norm(torch.ones(1, 1, 16385), vectors, vectors)
