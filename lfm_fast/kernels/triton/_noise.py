"""Counter-based normals made in registers, for every kernel that draws.

A mirror of csrc/common/philox.h, which with lfm_fast/ops/philox_normal.py defines the noise: the same float32
operations in the same order, each rounded once. Kernels that call this are launched with `enable_fp_fusion=False`,
which forbids contraction to fused multiply-adds, and `sqrt_rn` is the correctly rounded root: the bits agree too.
"""

import triton
import triton.language as tl

_LN2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_L0 = tl.constexpr(float.fromhex("0x1.555554p-2"))
_L1 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
_L2 = tl.constexpr(float.fromhex("0x1.99a008p-3"))
_L3 = tl.constexpr(float.fromhex("-0x1.547244p-3"))
_L4 = tl.constexpr(float.fromhex("0x1.22da1cp-3"))
_L5 = tl.constexpr(float.fromhex("-0x1.0d8542p-3"))
_L6 = tl.constexpr(float.fromhex("0x1.055b6ap-3"))
_L7 = tl.constexpr(float.fromhex("-0x1.38b580p-4"))
_S0 = tl.constexpr(float.fromhex("0x1.921fb6p-1"))
_S1 = tl.constexpr(float.fromhex("-0x1.4abbbap-4"))
_S2 = tl.constexpr(float.fromhex("0x1.465e92p-9"))
_S3 = tl.constexpr(float.fromhex("-0x1.2d9302p-15"))
_C0 = tl.constexpr(float.fromhex("-0x1.3bd3ccp-2"))
_C1 = tl.constexpr(float.fromhex("0x1.03c1dep-6"))
_C2 = tl.constexpr(float.fromhex("-0x1.55c5e0p-12"))
_C3 = tl.constexpr(float.fromhex("0x1.d9d57ep-19"))
_UNIT = tl.constexpr(2.0**-31)  # of the radius's word
_HALF_UNIT = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(2.0**-29)  # of the angle's word, in units of pi / 4


@triton.jit
def normals(index, seed, stream, first, COUNT: tl.constexpr):
    """COUNT standard normals from block `first` of a sample's sequence on; COUNT a multiple of four, the rest int64."""
    c0 = first.to(tl.uint32) + tl.arange(0, COUNT // 4).to(tl.uint32)
    c1 = stream.to(tl.uint32)
    c2 = index.to(tl.uint32)
    c3 = (index >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    # words 0 and 2 give radii, 1 and 3 angles: (COUNT / 4, 2) each
    a, b = tl.broadcast(tl.join(c0, c2), tl.join(c1, c3))

    # radius sqrt(-2 log u): u = 2^e m, m in [sqrt(1/2), sqrt(2)), log u = e log 2 + log(1 + f), f = m - 1
    u = (a >> 1).to(tl.int32, bitcast=True).to(tl.float32) * _UNIT + _HALF_UNIT
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    s = f * f
    p = f * _L7 + _L6
    p = p * f + _L5
    p = p * f + _L4
    p = p * f + _L3
    p = p * f + _L2
    p = p * f + _L1
    p = p * f + _L0
    y = (s * f) * p
    y = y + e * _LN2_LOW
    y = y - s * 0.5
    radius = tl.sqrt_rn(((f + y) + e * _LN2_HIGH) * -2.0)

    # angle 2 pi b / 2^32: the quadrant leaves as integer bits
    quadrant = tl.add(b, 0x20000000, sanitize_overflow=False) >> 30
    x = tl.sub(b, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    y = x * x
    p = y * _S3 + _S2
    p = p * y + _S1
    p = p * y + _S0
    sine = x * p
    p = y * _C3 + _C2
    p = p * y + _C1
    p = p * y + _C0
    cosine = y * p + 1.0
    odd = (quadrant & 1) == 1
    # signs by bit flip: Triton's unary minus subtracts from 0 and would lose that of a zero
    first_sign = ((quadrant + 1) & 2) << 30
    second_sign = (quadrant & 2) << 30
    first_bits = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ first_sign
    second_bits = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ second_sign
    cos_part = radius * first_bits.to(tl.float32, bitcast=True)
    sin_part = radius * second_bits.to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(cos_part, sin_part), (COUNT,))
