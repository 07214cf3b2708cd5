"""philox_normal: counter-based standard normals, the same to the bit whatever the batch, the rank or the CPU."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1

# The polynomials ARE the definition of the noise: changing a bit of them changes every sample ever drawn. They are
# minimax fits, rounded to float32. Lowest power first.
_LOG = tuple(
    map(
        float.fromhex,
        [
            "0x1.555554p-2",
            "-0x1.000226p-2",
            "0x1.99a008p-3",
            "-0x1.547244p-3",
            "0x1.22da1cp-3",
            "-0x1.0d8542p-3",
            "0x1.055b6ap-3",
            "-0x1.38b580p-4",
        ],
    )
)
_SIN = tuple(map(float.fromhex, ["0x1.921fb6p-1", "-0x1.4abbbap-4", "0x1.465e92p-9", "-0x1.2d9302p-15"]))
_COS = tuple(map(float.fromhex, ["-0x1.3bd3ccp-2", "0x1.03c1dep-6", "-0x1.55c5e0p-12", "0x1.d9d57ep-19"]))
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.63p-1"), float.fromhex("-0x1.bd0106p-13")
_SQRT_HALF_BITS = 0x3F3504F3


def philox_words(index: Tensor, num_blocks: int, seed: int, stream: int, offset: int) -> Tensor:
    """The 32-bit words of Philox4x32-10, (B, num_blocks, 4), each in an int64 of 0 .. 2^32 - 1."""
    block = torch.arange(num_blocks, device=index.device, dtype=torch.int64)
    index = index[:, None]
    c0 = ((block + offset) & _MASK)[None, :]
    c1 = torch.full_like(c0, stream & _MASK)
    c2, c3 = index & _MASK, (index >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # 32 x 32 -> 64 bits wraps in int64; the arithmetic shift plus the mask give the high word all the same
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
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


def philox_uniform(index: Tensor, numel: int, seed: int, stream: int, offset: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) by counter: element e of row b is word e % 4 of block e // 4, its upper 24 bits.

    index (B,) int64 -> (B, numel) float32. Plain PyTorch: for times, dropout and flips, a few numbers per sample.
    """
    words = philox_words(index, (numel + 3) // 4, seed, stream, offset).flatten(1)[:, :numel]
    return (words >> 8).to(torch.float32) * 2.0**-24


def _reference(index: Tensor, numel: int, seed: int, stream: int = 0, offset: int = 0) -> Tensor:
    words = philox_words(index, (numel + 3) // 4, seed, stream, offset)
    n0, n1 = box_muller(words[..., 0], words[..., 1])
    n2, n3 = box_muller(words[..., 2], words[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).flatten(1)[:, :numel].contiguous()


def philox_normal(index: Tensor, numel: int, seed: int, stream: int = 0, offset: int = 0) -> Tensor:
    """Standard normals by counter: index (B,) int64 -> (B, numel) float32."""
    return _reference(index, numel, seed, stream, offset)
