// Counter-based standard normals: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
// followed by Box-Muller with our own log, sin and cos.
//
// This file and its mirror in lfm_fast/ops/philox_normal.py DEFINE the noise: every operation is rounded once to
// float32, in the order written, and must be compiled without contraction to fused multiply-adds. Changing a constant
// or an order changes every sample that anybody has drawn.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace lfm_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// What all blocks of one sample share: the key is the seed, the upper three counter words are stream and sample index.
struct PhiloxKey {
  uint32_t seed_low, seed_high, stream, index_low, index_high;
};

LFM_HD PhiloxKey philox_key(int64_t seed, int64_t stream, int64_t index) {
  const auto s = static_cast<uint64_t>(seed);
  const auto i = static_cast<uint64_t>(index);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(stream),
          static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32)};
}

// words[0..3] of one block; its elements are 4 * block .. 4 * block + 3 (plus the offset the caller has added).
LFM_HD void philox4x32_10(uint32_t block, const PhiloxKey& key, uint32_t (&words)[4]) {
  uint32_t c0 = block, c1 = key.stream, c2 = key.index_low, c3 = key.index_high;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// sqrt(-2 log u) with u in (0, 1] from the upper 31 bits of a word. Signed conversions only: the unsigned one is
// a different instruction sequence on every instruction set.
LFM_HD float box_muller_radius(uint32_t word) {
  float u = static_cast<float>(static_cast<int32_t>(word >> 1)) * 0x1p-31f;
  u = u + 0x1p-32f;
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)); log u = e log 2 + log(1 + f), f = m - 1 (exact).
  const uint32_t bits = std::bit_cast<uint32_t>(u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = std::bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23));
  const float f = m - 1.0f;
  const float e = static_cast<float>(exponent);
  const float s = f * f;
  float p = -0x1.38b580p-4f;
  p = p * f + 0x1.055b6ap-3f;
  p = p * f + -0x1.0d8542p-3f;
  p = p * f + 0x1.22da1cp-3f;
  p = p * f + -0x1.547244p-3f;
  p = p * f + 0x1.99a008p-3f;
  p = p * f + -0x1.000226p-2f;
  p = p * f + 0x1.555554p-2f;
  float y = (s * f) * p;
  y = y + e * -0x1.bd0106p-13f;  // log 2 in two parts, the low one first
  y = y - 0.5f * s;
  float l = f + y;
  l = l + e * 0x1.63p-1f;  // exact product: the high part has 9 significant bits
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(-2.0f * l);
#else
  return std::sqrt(-2.0f * l);
#endif
}

// cos and sin of 2 pi word / 2^32. The quadrant leaves as integer bits, what remains is exact to float32's last place.
LFM_HD void box_muller_angle(uint32_t word, float& cosine, float& sine) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(word - (quadrant << 30))) * 0x1p-29f;  // in units of pi / 4
  const float y = x * x;
  float p = -0x1.2d9302p-15f;
  p = p * y + 0x1.465e92p-9f;
  p = p * y + -0x1.4abbbap-4f;
  p = p * y + 0x1.921fb6p-1f;
  const float sn = x * p;
  p = 0x1.d9d57ep-19f;
  p = p * y + -0x1.55c5e0p-12f;
  p = p * y + 0x1.03c1dep-6f;
  p = p * y + -0x1.3bd3ccp-2f;
  const float cs = 1.0f + y * p;
  // Selection by masks, sign by bit flip: no branch, so that the compiler can do sixteen at a time.
  const uint32_t sn_bits = std::bit_cast<uint32_t>(sn), cs_bits = std::bit_cast<uint32_t>(cs);
  const uint32_t swap = (sn_bits ^ cs_bits) & (0u - (quadrant & 1u));
  cosine = std::bit_cast<float>((cs_bits ^ swap) ^ (((quadrant + 1u) & 2u) << 30));
  sine = std::bit_cast<float>((sn_bits ^ swap) ^ ((quadrant & 2u) << 30));
}

// Two words to two independent standard normals.
LFM_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float radius = box_muller_radius(radius_word);
  float cosine, sine;
  box_muller_angle(angle_word, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

// The four normals of one block.
LFM_HD void normal_block(uint32_t block, const PhiloxKey& key, float (&normals)[4]) {
  uint32_t words[4];
  philox4x32_10(block, key, words);
  box_muller(words[0], words[1], normals[0], normals[1]);
  box_muller(words[2], words[3], normals[2], normals[3]);
}

}  // namespace lfm_fast
