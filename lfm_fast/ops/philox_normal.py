"""philox_normal: counter-based standard normals, the same to the bit whatever the batch, the rank or the CPU."""

import torch
from torch import Tensor

from lfm_fast.ops._cases import indices
from lfm_fast.ops._checks import INTEGER, check_counter, check_tensor
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, register
from lfm_fast.ops._triton import triton_backend

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1

# The polynomials ARE the definition of the noise: changing a bit of them changes every sample ever drawn. They are
# minimax fits, rounded to float32. Lowest power first.
_HEX = float.fromhex
_LOG = (
    _HEX("0x1.555554p-2"), _HEX("-0x1.000226p-2"), _HEX("0x1.99a008p-3"), _HEX("-0x1.547244p-3"),
    _HEX("0x1.22da1cp-3"), _HEX("-0x1.0d8542p-3"), _HEX("0x1.055b6ap-3"), _HEX("-0x1.38b580p-4"),
)  # fmt: skip
_SIN = (_HEX("0x1.921fb6p-1"), _HEX("-0x1.4abbbap-4"), _HEX("0x1.465e92p-9"), _HEX("-0x1.2d9302p-15"))
_COS = (_HEX("-0x1.3bd3ccp-2"), _HEX("0x1.03c1dep-6"), _HEX("-0x1.55c5e0p-12"), _HEX("0x1.d9d57ep-19"))
_LN2_HIGH, _LN2_LOW = _HEX("0x1.63p-1"), _HEX("-0x1.bd0106p-13")
_SQRT_HALF_BITS = 0x3F3504F3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * multiplier. By halves of the multiplier: the whole product would overflow int64,
    which wraps in eager PyTorch but is undefined in the C++ that torch.compile writes (it drew other numbers)."""
    low, high = word * (multiplier & 0xFFFF), word * (multiplier >> 16)  # each below 2^48
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(index: Tensor, num_blocks: int, seed: int, stream: int, offset: int) -> Tensor:
    """The 32-bit words of Philox4x32-10, (B, num_blocks, 4), each in an int64 of 0 .. 2^32 - 1."""
    block = torch.arange(num_blocks, device=index.device, dtype=torch.int64)
    index = index[:, None]
    c0 = ((block + offset) & _MASK)[None, :]
    c1 = torch.full_like(c0, stream & _MASK)
    c2, c3 = index & _MASK, (index >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient  # two roundings: eager PyTorch never fuses them
    return value


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 u in (0, 1], 0.9 ulp: u = 2^e m with m in [sqrt(1/2), sqrt(2))."""
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - exponent * (1 << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    square = f * f
    y = (square * f) * _horner(_LOG, f)
    y = y + e * _LN2_LOW
    y = y - square * 0.5
    return (f + y) + e * _LN2_HIGH


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words: radius sqrt(-2 log u(a)), angle 2 pi b / 2^32.

    Every operation is one IEEE float32 operation, so any backend that keeps the order agrees to the bit. Against
    float64 of the same u and angle: 3.6 ulp worst, 0.5 ulp mean over 2e7 pairs.
    """
    u = (a >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
    # sqrt in float64, rounded once more, is the correctly rounded float32 one; a vector library's may not be
    radius = (_log(u) * -2.0).to(torch.float64).sqrt().to(torch.float32)
    quadrant = ((b + (1 << 29)) & _MASK) >> 30
    x = (b - (quadrant << 30)).to(torch.int32).to(torch.float32) * 2.0**-29  # [-1, 1] times pi / 4
    y = x * x
    sine, cosine = x * _horner(_SIN, y), y * _horner(_COS, y) + 1.0
    odd = (quadrant & 1) == 1
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return radius * first, radius * second


def reference(index: Tensor, numel: int, seed: int, stream: int = 0, offset: int = 0) -> Tensor:
    words = philox_words(index, (numel + 3) // 4, seed, stream, offset)
    normals = torch.stack(box_muller(words[..., 0::2], words[..., 1::2]), dim=-1)  # (B, blocks, pair, cosine or sine)
    return normals.flatten(1)[:, :numel].clone(memory_format=torch.contiguous_format)


def _check(index, numel, seed, stream=0, offset=0) -> None:
    check_tensor("index", index, INTEGER)
    if index.dim() != 1:
        raise ValueError(f"index is {tuple(index.shape)}, expected (B,): one number per sample.")
    if not isinstance(numel, (int, torch.SymInt)):
        raise ValueError(f"numel is a {type(numel).__name__}: pass an int.")
    if numel < 0:
        raise ValueError(f"numel is {numel}, expected an int >= 0.")
    check_counter(numel, seed, stream, offset)


def _arguments(*, shape, device="cpu", seed=2**63 - 25, stream=0, offset=0) -> dict:
    batch, numel = shape
    return {"index": indices(batch, device), "numel": numel, "seed": seed, "stream": stream, "offset": offset}


def _cost(index, numel, seed, stream=0, offset=0) -> tuple[int, int]:
    # per number: 24 float operations of Box-Muller and 15 integer ones of Philox
    return 8 * index.numel() + 4 * index.numel() * numel, 39 * index.numel() * numel


_row = register(
    Op(
        name="philox_normal",
        schema="(Tensor index, SymInt numel, int seed, int stream=0, int offset=0) -> Tensor",
        reference=reference,
        check=_check,
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=lambda *args: None),
            cuda_backend(lambda *args: None),
            triton_backend("philox_normal", lambda *args: None),
        ),
        arguments=_arguments,
        cases=(
            {"shape": (3, 129)},
            {"shape": (0, 8)},
            {"shape": (2, 0)},
            {"shape": (1, 1), "seed": -1},
            {"shape": (5, 7), "stream": 2**32 - 1, "offset": 2**32 - 2},
            {"shape": (2, 65_537), "stream": 3, "offset": 11},
        ),
        sizes=({"shape": (64, 4096)}, {"shape": (256, 16_384)}),
        cost=_cost,
        tolerance=Tolerance(absolute=0.0, relative=0.0, origin="the order of the float32 operations is the definition"),
    )
)


def philox_normal(index: Tensor, numel: int, seed: int, stream: int = 0, offset: int = 0) -> Tensor:
    """Standard normals by counter: row b depends on (seed, stream, index[b]) alone, not on the batch.

    Element e of row b is word e % 4 of Philox4x32-10 with key (seed low, seed high) and counter
    (offset + e // 4, stream, index low, index high), by Box-Muller in float32; equal to the bit on every CPU.

    Args:
        index: (B,) int64, the numbers of the samples.
        numel: how many normals each sample gets.
        seed: signed 64-bit number.
        stream: what the numbers are for, 0 <= stream < 2^32.
        offset: first block of four of the sample's sequence.

    Returns:
        (B, numel) float32.

    Raises:
        ValueError: index is not (B,) int64; numel, seed, stream or offset out of range.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> alone = ops.philox_normal(torch.tensor([7]), 5, seed=1)
        >>> torch.equal(alone[0], ops.philox_normal(torch.tensor([3, 7]), 5, seed=1)[1])
        True

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """
    return _row(index, numel, seed, stream, offset)


def philox_uniform(index: Tensor, numel: int, seed: int, stream: int, offset: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) by counter: the upper 24 bits of word e % 4 of block e // 4, times 2^-24.

    index (B,) int64 -> (B, numel) float32. Plain PyTorch, no op: times, dropout and flips are a few numbers a sample.

    Raises:
        ValueError: as `philox_normal`.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> ops.philox_uniform(torch.arange(3), 2, seed=0, stream=1).shape
        torch.Size([3, 2])
    """
    _check(index, numel, seed, stream, offset)
    words = philox_words(index, (numel + 3) // 4, seed, stream, offset).flatten(1)[:, :numel]
    return (words >> 8).to(torch.float32) * 2.0**-24
