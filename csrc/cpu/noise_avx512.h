// Sixteen blocks of the noise at a time, from counters to normals without leaving the registers.
//
// The bits are those of common/philox.h: every operation below is the one written there, another one with the same
// exact result (a product by a power of two, a sum of one that is exact and fused, a sign or a choice by its bits), or
// left out because its operands are the same for all blocks of a sample.
#pragma once

#include "cpu/levels.h"

#if defined(LFM_X86_LEVELS)
#include <immintrin.h>

#include <cstdint>

#include "common/philox.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined pass-through operand inside its own AVX-512 intrinsics for a mistake of ours (GCC bug
// 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define LFM_INSIDE LFM_AVX512 inline __attribute__((always_inline))

namespace lfm_fast {

// Counters of eight blocks, each word in the low half of a 64-bit lane. The multiply reads low halves only, so the
// upper halves may carry rubbish.
struct Lanes8 {
  __m512i c0, c1, c2, c3;
};

struct Words16 {
  __m512i w[4];
};

// Every step is done for four vectors in turn: an operation's result is ready four cycles after it began, and in that
// time eight others can begin.
constexpr int kAbreast = 4;
#define LFM_ABREAST(k) _Pragma("GCC unroll 4") for (int k = 0; k < kAbreast; ++k)

LFM_INSIDE __m512i wide(uint32_t word) { return _mm512_set1_epi64(word); }
LFM_INSIDE __m512i high(__m512i product) { return _mm512_srli_epi64(product, 32); }
LFM_INSIDE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// What all streams of a sample share: in the first round all counter words but one are the same for all blocks, in the
// second all but two, and the stream reaches the words that differ between blocks only in the third.
struct FirstRounds {
  __m512i low0;      // of the first round's product of the block
  __m512i w0, w1;    // words 0 and 1 after the second round
  __m512i product0;  // of the third round
};

LFM_INSIDE FirstRounds first_rounds(const PhiloxKey& key, __m512i blocks) {
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * key.index_low;
  FirstRounds out;
  out.low0 = _mm512_mul_epu32(wide(kPhiloxMultiplier0), blocks);
  const __m512i c2 = _mm512_xor_si512(high(out.low0), wide(key.index_high ^ key.seed_high));
  out.w1 = _mm512_mul_epu32(wide(kPhiloxMultiplier1), c2);
  out.w0 = _mm512_xor_si512(high(out.w1), wide(static_cast<uint32_t>(product1) ^ (key.seed_low + kPhiloxWeyl0)));
  out.product0 = _mm512_mul_epu32(wide(kPhiloxMultiplier0), out.w0);
  return out;
}

LFM_INSIDE Lanes8 third_round(const PhiloxKey& key, uint32_t stream, const FirstRounds& first) {
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * key.index_low;
  const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ stream ^ key.seed_low;
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
  const uint32_t second_key = key.seed_high + kPhiloxWeyl1, third_key = key.seed_high + 2 * kPhiloxWeyl1;
  const __m512i c2 = _mm512_xor_si512(first.low0, wide(static_cast<uint32_t>(product0 >> 32) ^ second_key));
  const __m512i third = _mm512_mul_epu32(wide(kPhiloxMultiplier1), c2);
  return {xor3(high(third), first.w1, wide(key.seed_low + 2 * kPhiloxWeyl0)), third,
          _mm512_xor_si512(high(first.product0), wide(static_cast<uint32_t>(product0) ^ third_key)), first.product0};
}

LFM_INSIDE void other_rounds(const PhiloxKey& key, Lanes8 (&c)[kAbreast]) {
  uint32_t k0 = key.seed_low + 2 * kPhiloxWeyl0, k1 = key.seed_high + 2 * kPhiloxWeyl1;
  _Pragma("GCC unroll 7") for (int round = 3; round < kPhiloxRounds; ++round) {
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
    const __m512i key0 = wide(k0), key1 = wide(k1);
    __m512i product0[kAbreast], product1[kAbreast];
    LFM_ABREAST(k) product0[k] = _mm512_mul_epu32(wide(kPhiloxMultiplier0), c[k].c0);
    LFM_ABREAST(k) product1[k] = _mm512_mul_epu32(wide(kPhiloxMultiplier1), c[k].c2);
    LFM_ABREAST(k) {
      c[k] = {xor3(high(product1[k]), c[k].c1, key0), product1[k], xor3(high(product0[k]), c[k].c3, key1), product0[k]};
    }
  }
}

// Blocks in the order in which unpacking the normals puts them side by side: lane i has block 4 (i % 4) + i / 4.
LFM_INSIDE __m512i blocks_of(uint32_t first, int half) {
  const __m512i even = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i odd = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  return _mm512_add_epi32(wide(first), half == 0 ? even : odd);
}

LFM_INSIDE __m512i both(__m512i even, __m512i odd) {
  return _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(even), 0xAAAA, _mm512_castsi512_ps(odd)));
}

LFM_INSIDE Words16 words_of(const Lanes8& even, const Lanes8& odd) {
  return {{both(even.c0, odd.c0), both(even.c1, odd.c1), both(even.c2, odd.c2), both(even.c3, odd.c3)}};
}

LFM_INSIDE void times_plus(__m512 (&p)[kAbreast], const __m512 (&x)[kAbreast], float c) {
  LFM_ABREAST(k) p[k] = _mm512_mul_ps(p[k], x[k]);
  LFM_ABREAST(k) p[k] = _mm512_add_ps(p[k], _mm512_set1_ps(c));
}

LFM_INSIDE __m512 with_sign(__m512 value, __m512i bits) {  // value ^ (bits & the sign's)
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), bits, sign, 0x78));
}

LFM_INSIDE void radii_of(const __m512i (&word)[kAbreast], __m512 (&radius)[kAbreast]) {
  constexpr int kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  __m512 f[kAbreast], e[kAbreast], s[kAbreast], p[kAbreast];
  LFM_ABREAST(k) {
    // 2^31 u, and all that follows shifted with it
    const __m512 u = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(word[k], 1)), _mm512_set1_ps(0.5f));
    const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(u), _mm512_set1_epi32(kSqrtHalf + (31 << 23)));
    const __m512i fraction = _mm512_and_epi32(shifted, _mm512_set1_epi32(0x7fffff));
    const __m512 m = _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_set1_epi32(kSqrtHalf)));
    f[k] = _mm512_sub_ps(m, _mm512_set1_ps(1.0f));
    e[k] = _mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23));
    s[k] = _mm512_mul_ps(f[k], f[k]);
    p[k] = _mm512_set1_ps(-0x1.38b580p-4f);
  }
  times_plus(p, f, 0x1.055b6ap-3f);
  times_plus(p, f, -0x1.0d8542p-3f);
  times_plus(p, f, 0x1.22da1cp-3f);
  times_plus(p, f, -0x1.547244p-3f);
  times_plus(p, f, 0x1.99a008p-3f);
  times_plus(p, f, -0x1.000226p-2f);
  times_plus(p, f, 0x1.555554p-2f);
  LFM_ABREAST(k) {
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(s[k], f[k]), p[k]);
    y = _mm512_add_ps(y, _mm512_mul_ps(e[k], _mm512_set1_ps(-0x1.bd0106p-13f)));
    // the products of these two are exact
    y = _mm512_fnmadd_ps(_mm512_set1_ps(0.5f), s[k], y);
    const __m512 l = _mm512_fmadd_ps(e[k], _mm512_set1_ps(0x1.63p-1f), _mm512_add_ps(f[k], y));
    radius[k] = _mm512_sqrt_ps(_mm512_mul_ps(l, _mm512_set1_ps(-2.0f)));
  }
}

LFM_INSIDE void directions_of(const __m512i (&word)[kAbreast], __m512 (&first)[kAbreast], __m512 (&second)[kAbreast]) {
  __m512 x[kAbreast], y[kAbreast], sine[kAbreast], cosine[kAbreast];
  LFM_ABREAST(k) {
    // the lower 30 bits with their sign: what is left of the angle without its quadrant
    x[k] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_slli_epi32(word[k], 2)), _mm512_set1_ps(0x1p-31f));
    y[k] = _mm512_mul_ps(x[k], x[k]);
    sine[k] = _mm512_set1_ps(-0x1.2d9302p-15f);
    cosine[k] = _mm512_set1_ps(0x1.d9d57ep-19f);
  }
  times_plus(sine, y, 0x1.465e92p-9f);
  times_plus(cosine, y, -0x1.55c5e0p-12f);
  times_plus(sine, y, -0x1.4abbbap-4f);
  times_plus(cosine, y, 0x1.03c1dep-6f);
  times_plus(sine, y, 0x1.921fb6p-1f);
  times_plus(cosine, y, -0x1.3bd3ccp-2f);
  LFM_ABREAST(k) sine[k] = _mm512_mul_ps(x[k], sine[k]);
  times_plus(cosine, y, 1.0f);
  LFM_ABREAST(k) {
    const __m512i quadrant = _mm512_add_epi32(word[k], _mm512_set1_epi32(0x20000000));  // its bits: the upper two
    const __mmask16 odd = _mm512_test_epi32_mask(quadrant, _mm512_set1_epi32(0x40000000));
    const __m512i next = _mm512_add_epi32(word[k], _mm512_set1_epi32(0x60000000));
    first[k] = with_sign(_mm512_mask_blend_ps(odd, cosine[k], sine[k]), next);
    second[k] = with_sign(_mm512_mask_blend_ps(odd, sine[k], cosine[k]), quadrant);
  }
}

LFM_INSIDE void store_quads(__m512 a, __m512 b, __m512 c, __m512 d, int blocks, float* out) {
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
  const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
  const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  const __m512d quads[4] = {_mm512_unpacklo_pd(ab_low, cd_low), _mm512_unpackhi_pd(ab_low, cd_low),
                            _mm512_unpacklo_pd(ab_high, cd_high), _mm512_unpackhi_pd(ab_high, cd_high)};
  if (blocks >= 16) {
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; ++q) _mm512_storeu_ps(out + 16 * q, _mm512_castpd_ps(quads[q]));
  } else if (blocks > 0) {
    const uint64_t places = (uint64_t{1} << (4 * blocks)) - 1;
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; ++q) {
      const auto inside = static_cast<__mmask16>(places >> (16 * q));
      _mm512_mask_storeu_ps(out + 16 * q, inside, _mm512_castpd_ps(quads[q]));
    }
  }
}

// The normals of two times sixteen blocks, of which the first `blocks` and `more_blocks` are stored.
LFM_INSIDE void store_normals(const Words16& one, const Words16& two, int blocks, float* out, int more_blocks,
                              float* more_out) {
  const __m512i radius_words[kAbreast] = {one.w[0], one.w[2], two.w[0], two.w[2]};
  const __m512i angle_words[kAbreast] = {one.w[1], one.w[3], two.w[1], two.w[3]};
  __m512 radius[kAbreast], first[kAbreast], second[kAbreast];
  radii_of(radius_words, radius);
  directions_of(angle_words, first, second);
  LFM_ABREAST(k) first[k] = _mm512_mul_ps(radius[k], first[k]);
  LFM_ABREAST(k) second[k] = _mm512_mul_ps(radius[k], second[k]);
  store_quads(first[0], second[0], first[1], second[1], blocks, out);
  store_quads(first[2], second[2], first[3], second[3], more_blocks, more_out);
}

// The normals of blocks `block`, `block` + 1, ... of a sample's stream.
LFM_AVX512 inline void normal_blocks_avx512(const PhiloxKey& key, uint32_t block, int blocks, float* out) {
  for (int i = 0; i < blocks; i += 32) {
    Lanes8 c[kAbreast];
    LFM_ABREAST(k) {
      const __m512i numbers = blocks_of(block + static_cast<uint32_t>(i + 16 * (k / 2)), k % 2);
      c[k] = third_round(key, key.stream, first_rounds(key, numbers));
    }
    other_rounds(key, c);
    store_normals(words_of(c[0], c[1]), words_of(c[2], c[3]), blocks - i, out + 4 * i, blocks - i - 16,
                  out + 4 * i + 64);
  }
}

// The same of two streams of one sample: `other` is the second one's stream.
LFM_AVX512 inline void normal_blocks_of_two_avx512(const PhiloxKey& key, uint32_t other, uint32_t block, int blocks,
                                                   float* out, float* other_out) {
  for (int i = 0; i < blocks; i += 16) {
    FirstRounds first[2];
    for (int h = 0; h < 2; ++h) first[h] = first_rounds(key, blocks_of(block + static_cast<uint32_t>(i), h));
    Lanes8 c[kAbreast];
    LFM_ABREAST(k) c[k] = third_round(key, k < 2 ? key.stream : other, first[k % 2]);
    other_rounds(key, c);
    const int count = blocks - i;
    store_normals(words_of(c[0], c[1]), words_of(c[2], c[3]), count, out + 4 * i, count, other_out + 4 * i);
  }
}

}  // namespace lfm_fast

#undef LFM_INSIDE
#undef LFM_ABREAST

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // LFM_X86_LEVELS
