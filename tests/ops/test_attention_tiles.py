"""attention's compiled kernels on the processor's matrix tiles: bfloat16, the forward."""

import itertools
import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from test_attention import ROW, SIZES, arguments, nothing_remembered  # noqa: F401

from lfm_fast import _library, ops

TILES = ROW.named("cpp").available()  # why there are none
with_tiles = pytest.mark.skipif(TILES is not None, reason=str(TILES))
# whole and cut tiles of queries, keys and channels
EDGES = (((1, 2, 16, 64), 15), ((3, 1, 48, 32), 1), ((1, 1, 31, 256), 97), ((2, 1, 17, 33), 31), ((1, 1, 1, 2), 4096))


@pytest.mark.parametrize("layout", ["contiguous", "fused", "transposed", "sliced", "expanded", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "keys"),
    [*SIZES, *EDGES],
    ids=str,
)
@with_tiles
def test_is_right(shape, keys, layout):
    """Errors of a weight are those of bf16: 2^-9 each, of weights that sum up to 1, times a v below 5; twice that."""
    q, k, v, _ = arguments(shape, keys=None if layout == "fused" else keys, dtype=torch.bfloat16, layout=layout)
    for scale in (None, 0.3):
        with ops.use_backend("cpp", ops="attention"):
            got = ops.attention(q, k, v, scale)
        want = ROW.reference(q.double(), k.double(), v.double(), scale)
        assert got.transpose(1, 2).is_contiguous()
        assert_close(got, want, absolute=0.02, what=f"scale {scale}")


@with_tiles
def test_rounds_weights_alone():
    """Against the same in float64: what is left is the exponential's 8e-5, which moves a weight over a rounding."""
    q, k, v, _ = arguments((2, 3, 70, 72), dtype=torch.bfloat16)
    scores = q.double() @ k.double().transpose(-2, -1) * 72**-0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    want = (weights.bfloat16().double() @ v.double()) / weights.sum(-1, keepdim=True)
    got = ROW.kernels["cpp"](q, k, v, None)
    share = ((got.double() - want).abs() > 2.0**-8 * want.abs() + 2e-3).double().mean().item()
    assert share == 0


@with_tiles
@pytest.mark.parametrize("factor", [50.0, -50.0])
def test_large_scores_neither_overflow_nor_vanish(factor):
    """Scores of several hundreds, all of one sign in the second half."""
    q, k, v, _ = arguments((1, 2, 40, 32), dtype=torch.bfloat16)
    q, k = torch.cat((q, q.abs())) * factor, torch.cat((k, k.abs()))
    v = torch.cat((v, v))
    got, want = ROW.kernels["cpp"](q, k, v, None), ROW.reference(q.double(), k.double(), v.double())
    assert_close(got, want, absolute=0.02)


@with_tiles
def test_passes_on_what_is_not_finite():
    for which, value in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        for keys in (1, 5, 16, 40):
            tensors = arguments((2, 1, 35, 8), keys=keys, dtype=torch.bfloat16)
            tensors[which][1, 0, -1, 0] = value
            got = ROW.kernels["cpp"](*tensors)
            want = ROW.reference(*(x.double() for x in tensors[:3]))
            assert torch.equal(got.isfinite(), want.isfinite()), (which, value, keys)


@with_tiles
def test_has_the_same_bits_for_any_threads_and_batch():
    q, k, v, _ = arguments((3, 5, 67, 40), dtype=torch.bfloat16, layout="fused")
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ROW.kernels["cpp"](q, k, v, None))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])
    assert_same_bits(ROW.kernels["cpp"](q[1:2], k[1:2], v[1:2], None), found[0][1:2])


@with_tiles
def test_matrix_products_in_between_keep_their_own_tiles():
    """PyTorch's bf16 products use the same registers of the processor."""
    q, k, v, _ = arguments((2, 2, 64, 64), dtype=torch.bfloat16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, attended = x @ x, ROW.kernels["cpp"](q, k, v, None)
    for _ in range(3):
        assert_same_bits(ROW.kernels["cpp"](q, k, v, None), attended)
        assert_same_bits(x @ x, first)


@with_tiles
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_inside_a_compiled_graph(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: ops.attention(*x), fullgraph=True, backend=compiler, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 2, 20, 8), (3, 2, 33, 8)):
            tensors = arguments(shape, layout="fused", dtype=torch.bfloat16)[:3]
            with torch.profiler.profile() as profile:
                got = compiled(*tensors)
            assert "lfm_fast_cpp::attention" in {event.key for event in profile.key_averages()}
            assert_same_bits(got, ops.attention(*tensors))
            assert got.stride() == ops.attention(*tensors).stride()


@pytest.mark.parametrize(
    ("dtype", "keys", "width", "gradient", "sentence"),
    [
        (torch.bfloat16, 4096, 256, False, None),
        (torch.float32, 16, 8, False, "it computes in bfloat16 alone"),
        (torch.float16, 16, 8, False, "it computes in bfloat16 alone"),
        (torch.bfloat16, 4097, 8, False, "it takes at most 4096 keys of 256 channels"),
        (torch.bfloat16, 16, 257, False, "it takes at most 4096 keys of 256 channels"),
        (torch.bfloat16, 0, 8, False, "there is nothing to compute"),
        (torch.bfloat16, 4096, 256, True, None),
    ],
)
def test_why_not(dtype, keys, width, gradient, sentence):
    q, k, v, _ = arguments((1, 1, 2, width), keys=keys, dtype=dtype)
    reason = ROW.named("cpp").why_not(q, k.requires_grad_(gradient), v)
    assert reason is None if sentence is None else reason.startswith(sentence)
    with torch.no_grad():
        assert not gradient or ROW.named("cpp").why_not(q, k, v) is None


def test_without_tiles_another_backend_runs(monkeypatch):
    monkeypatch.setattr(_library, "has_tiles", lambda: False)
    tensors = arguments((1, 1, 20, 8), dtype=torch.bfloat16)
    explanation = ops.explain("attention", *tensors)
    assert explanation.backend == "sdpa"
    assert explanation.refused["cpp"] in ("this processor, or its system, has no AMX to give", _library.load())


WRONG = [
    (lambda q, k, v: (q.float(), k, v, None), "q must be bfloat16, got float32"),
    (lambda q, k, v: (q[0], k, v, None), r"q must be \(B, heads, T, d\), got \(2, 20, 8\)"),
    (lambda q, k, v: (q, k[:, :1], v[:, :1], None), r"k must have the shape of q, \(2, 2, 20, 8\), but for the number"),
    (lambda q, k, v: (q, k, v[:, :, 1:], None), "v must have the shape of k"),
    (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0], None), "k must have 1 to 4096 tokens, got 0"),
    (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0], None), "q must have 1 to 256 channels, got 0"),
    (lambda q, k, v: (q, k, v, -1.0), "scale must be a positive number, got -1"),
    (lambda q, k, v: (q, k, v, math.nan), "scale must be a positive number, got nan"),
]


@pytest.mark.parametrize(("spoil", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_the_operator_itself_looks_before_it_reads(spoil, sentence, library):
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.lfm_fast_cpp.attention(*spoil(*arguments(dtype=torch.bfloat16)[:3]))
