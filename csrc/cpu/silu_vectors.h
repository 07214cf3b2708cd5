// SiLU of what is rounded to bfloat16, in vectors: to 2^-17 of it, without a division, which takes a core longer than
// all the rest.
#pragma once

#include "cpu/vectors.h"

namespace lfm_fast {

// SiLU(h) = h / (1 + 2^-w) from w = h / log 2, to 2^-17 of it; 0 where w <= -128, infinite where w is (from h = 2.3e38
// on), NaN for NaN.
//
// The polynomials are minimax fits divided by their leading coefficients, which saves a product in each. That of 2^-g
// on [-1/2, 1/2], to 2^-18.1, makes c 2^-w, c = 2^-11 / 0.00937609; that of a reciprocal makes log 2 / (1 + 2^-w) of
// d = c + c 2^-w. It begins with the difference between the bits of a number and of d, which is 1 / d times 0.31 to
// 0.34.
template <Level level>
LFM_HD void silu_of_exponent(const typename Vectors<level>::Float& w, typename Vectors<level>::Float& out) {
  using Float = typename Vectors<level>::Float;
  using Bits = typename Vectors<level>::Bits;
  constexpr float kRound = 0x1.8p23f - 11.0f;  // adding it leaves the nearest integer, less 11, in the low bits
  const Float highest = Float{} + 64.0f, lowest = Float{} - 128.0f;
  const Float bounded = w < highest ? w : highest;  // 2^-64 beside 1 is nothing
  const Float shifted = kRound - bounded;
  const Float g = bounded + (shifted - kRound);  // exact
  const Float power = (((g - 5.96606544f) * g + 25.62721435f) * g - 73.92176584f) * g + 106.65072684f;
  const Float d = (Float)((Bits)power + ((Bits)shifted << 23)) + 0.0520756f;
  const Float guess = (Float)(0x7e2535f4u - (Bits)d);
  const Float t = d * guess;
  const Float silu = w * (guess * ((t - 0.99160168f) * t + 0.32771028f));
  out = w <= lowest ? Float{} : silu;
}

// Rounded to nearest, the larger of two that are as near: a number that is itself rounded is halfway by chance alone.
template <Level level>
LFM_HD void store_rounded_up(char* place, const Pair<level>& in) {
  using Bits = typename Vectors<level>::Bits;
  const Bits words = (((Bits)in.a + 0x8000u) >> 16) | (((Bits)in.b + 0x8000u) & 0xffff0000u);
  std::memcpy(place, &words, sizeof words);
}

}  // namespace lfm_fast
