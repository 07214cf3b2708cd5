// 2^x from a polynomial and the bits of a float, without a call to a mathematical library.
#pragma once

#include <bit>
#include <cstdint>

#include "common/macros.h"

namespace lfm_fast {

// The bits of 2^x to a unit in the last place, for x from -126 to 128, where they are infinity's. Of other numbers they
// mean nothing, of NaN neither: what is made of them is for the caller to see to.
LFM_HD uint32_t bits_of_power_of_two(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);  // exact
  // 2^f on [-1/2, 1/2], a minimax fit: 2^-27
  float p = 0x1.41fb2ep-13f;
  p = p * f + 0x1.5f3f30p-10f;
  p = p * f + 0x1.3b2e38p-7f;
  p = p * f + 0x1.c6af2ap-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23);
}

}  // namespace lfm_fast
