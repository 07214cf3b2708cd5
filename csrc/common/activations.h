// GELU in its tanh form, SiLU and their derivatives, one element at a time, without a call to a mathematical library.
//
// Both are x times a logistic function, and that is computed from exp of a number that is never positive: no overflow,
// and no 1 + tanh whose digits cancel where tanh is near -1. Every line rounds as written, so that all instruction sets
// agree to the bit; selections are values, not branches, so that loops vectorise.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/power_of_two.h"

namespace lfm_fast {

// 2^x for x <= 0 to a unit in the last place, 0 below 2^-125 (what is smaller still would cost a hundred cycles each as
// a subnormal number). For NaN the result is any number: what it is multiplied by must be NaN too.
LFM_HD float exp2_of_negative(float x) {
  constexpr float kLowest = -125.0f;
  // a mask of bits and not a choice between numbers, of which compilers make two ways through all that follows
  const uint32_t large_enough = 0u - static_cast<uint32_t>(!(x < kLowest));
  return std::bit_cast<float>(bits_of_power_of_two(x) & large_enough);
}

LFM_HD float minus_magnitude(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) | 0x80000000u); }

// sigmoid(w) and its derivative from w / log 2. With e = exp(-|w|) and d = 1 / (1 + e) they are (w < 0 ? e : 1) d and
// e d^2. The rounding of w / log 2 moves the result as much as a rounding of w would.
struct Logistic {
  float value, slope;
};

LFM_HD float logistic(float w) {
  const float e = exp2_of_negative(minus_magnitude(w));
  return (w < 0.0f ? e : 1.0f) / (1.0f + e);
}

LFM_HD Logistic logistic_with_slope(float w) {
  const float e = exp2_of_negative(minus_magnitude(w));
  const float d = 1.0f / (1.0f + e);
  return {(w < 0.0f ? e : 1.0f) * d, (e * d) * d};
}

// 0.5 (1 + tanh(u)) = sigmoid(2 u), 2 u = x (linear + cubic x^2) with linear = 2 sqrt(2 / pi), cubic = 0.044715 linear;
// both divided by log 2 as well.
constexpr float kGeluLinear = 0x1.988454p0f, kGeluLinear2 = 0x1.26aec2p1f;
constexpr float kGeluThreeCubic = 0x1.b6676cp-3f, kGeluCubic2 = 0x1.a5a7d0p-4f;
constexpr float kLog2E = 0x1.715476p0f;

LFM_HD float gelu(float x) { return x * logistic(x * (kGeluLinear2 + kGeluCubic2 * (x * x))); }

LFM_HD float gelu_derivative(float x) {
  const float square = x * x;
  const Logistic s = logistic_with_slope(x * (kGeluLinear2 + kGeluCubic2 * square));
  // the slope is 0 where this bound matters, and must not meet an infinity there
  const float bounded = square > 0x1p60f ? 0x1p60f : square;
  return s.value + (s.slope * x) * (kGeluLinear + kGeluThreeCubic * bounded);
}

LFM_HD float silu(float x) { return x * logistic(kLog2E * x); }

// The same for a result that is rounded to float16: 2^-18 of it, in two thirds of the operations.
LFM_HD float silu_to_float16(float x) {
  constexpr float kRound = 0x1.8p23f;
  // Bounds of the exponent, of which 2^128 is infinity in what follows and the result 0. Bits are in order of magnitude,
  // the negative ones above all others as unsigned numbers. They are exchanged by masks: of a choice compilers make ways
  // through all that follows, the division among it.
  constexpr uint32_t kLowest = std::bit_cast<uint32_t>(-126.0f), kHighest = std::bit_cast<uint32_t>(128.0f);
  uint32_t bits = std::bit_cast<uint32_t>(-kLog2E * x);
  bits ^= (bits ^ kLowest) & (0u - static_cast<uint32_t>(bits > kLowest));
  const int32_t above = static_cast<int32_t>(bits) > static_cast<int32_t>(kHighest);
  bits ^= (bits ^ kHighest) & (0u - static_cast<uint32_t>(above));
  const float w = std::bit_cast<float>(bits);
  const float shifted = w + kRound;
  const float f = w - (shifted - kRound);
  float p = 0x1.3a1804p-7f;  // 2^f on [-1/2, 1/2], a minimax fit that is 1 at 0: 2^-18
  p = p * f + 0x1.c9fcb2p-5f;
  p = p * f + 0x1.ec0326p-3f;
  p = p * f + 0x1.62e12cp-1f;
  p = p * f + 1.0f;
  const float e = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
  return x / (1.0f + e);
}

LFM_HD float silu_derivative(float x) {
  const Logistic s = logistic_with_slope(kLog2E * x);
  return s.value + x * s.slope;
}

}  // namespace lfm_fast
