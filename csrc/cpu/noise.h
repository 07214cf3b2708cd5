// A tile of counter-based normals at a time.
//
// The ten rounds of Philox are two 32 x 32 -> 64 multiplications each, which compilers vectorise poorly, so x86's
// widening multiply is called by name; all else is common/philox.h, vectorised by the compiler.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/macros.h"
#include "common/philox.h"
#include "cpu/levels.h"
#include "cpu/noise_avx512.h"
#include "cpu/tiles.h"

#if defined(LFM_X86_LEVELS)
#include <immintrin.h>
#endif

namespace lfm_fast {

constexpr int kTileBlocks = kTile / 4;

// The four words of consecutive blocks, word by word.
struct TileWords {
  alignas(64) uint32_t words[4][kTileBlocks];
};

LFM_HD void philox_words_portable(const PhiloxKey& key, uint32_t block, int blocks, TileWords& out) {
  for (int i = 0; i < blocks; ++i) {
    uint32_t words[4];
    philox4x32_10(block + static_cast<uint32_t>(i), key, words);
    for (int w = 0; w < 4; ++w) out.words[w][i] = words[w];
  }
}

#if defined(LFM_X86_LEVELS)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined pass-through operand inside its own AVX-512 intrinsics for a mistake of ours (GCC bug
// 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Even blocks in one vector, odd blocks in another, each counter word in the low half of a 64-bit lane. The multiply
// reads low halves only, so the upper halves may carry rubbish from round to round; the last step keeps the low halves
// alone.

LFM_AVX2 inline void philox_words_avx2(const PhiloxKey& key, uint32_t block, int blocks, TileWords& out) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxMultiplier0), m1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  for (int i = 0; i < blocks; i += 8) {
    const __m256i first =
        _mm256_add_epi32(_mm256_set1_epi64x(block + static_cast<uint32_t>(i)), _mm256_setr_epi64x(0, 2, 4, 6));
    __m256i c[2][4];
    for (int h = 0; h < 2; ++h) {
      c[h][0] = _mm256_add_epi32(first, _mm256_set1_epi64x(h));
      c[h][1] = _mm256_set1_epi64x(key.stream);
      c[h][2] = _mm256_set1_epi64x(key.index_low);
      c[h][3] = _mm256_set1_epi64x(key.index_high);
    }
    uint32_t k0 = key.seed_low, k1 = key.seed_high;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int h = 0; h < 2; ++h) {
        const __m256i product0 = _mm256_mul_epu32(m0, c[h][0]), product1 = _mm256_mul_epu32(m1, c[h][2]);
        c[h][0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c[h][1]), key0);
        c[h][1] = product1;
        c[h][2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c[h][3]), key1);
        c[h][3] = product0;
      }
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    for (int w = 0; w < 4; ++w)
      _mm256_store_si256(reinterpret_cast<__m256i*>(&out.words[w][i]),
                         _mm256_blend_epi32(c[0][w], _mm256_slli_epi64(c[1][w], 32), 0xAA));
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // LFM_X86_LEVELS

// `blocks` blocks from `block` on; writes whole groups of 16, so `out` may end in words nobody asked for.
template <Level level>
LFM_HD void philox_words(const PhiloxKey& key, uint32_t block, int blocks, TileWords& out) {
  const int padded = (blocks + 15) / 16 * 16;
#if defined(LFM_X86_LEVELS)
  if constexpr (level == Level::avx2) return philox_words_avx2(key, block, padded, out);
#endif
  philox_words_portable(key, block, padded, out);
}

// Normals of `blocks` consecutive blocks: out[0 .. 4 * blocks).
template <Level level>
LFM_HD void normal_blocks(const PhiloxKey& key, uint32_t block, int blocks, float* __restrict out) {
  TileWords tile;
  philox_words<level>(key, block, blocks, tile);
  for (int i = 0; i < blocks; ++i) {
    box_muller(tile.words[0][i], tile.words[1][i], out[4 * i], out[4 * i + 1]);
    box_muller(tile.words[2][i], tile.words[3][i], out[4 * i + 2], out[4 * i + 3]);
  }
}

#if defined(LFM_X86_LEVELS)
template <>
LFM_HD void normal_blocks<Level::avx512>(const PhiloxKey& key, uint32_t block, int blocks, float* __restrict out) {
  normal_blocks_avx512(key, block, blocks, out);
}
#endif

// The noise of a call: nothing but a seed, a stream and the samples' indices.
struct Noise {
  std::vector<int64_t> index;  // empty: no noise
  int64_t seed = 0, stream = 0, offset = 0;

  explicit operator bool() const { return !index.empty(); }

  // Elements [start, start + n) of a sample into `buffer`; start is a multiple of 4, n at most a tile.
  template <Level level>
  LFM_HD const float* tile(int64_t sample, int64_t start, int64_t n, float* __restrict buffer) const {
    const PhiloxKey key = philox_key(seed, stream, index[static_cast<size_t>(sample)]);
    normal_blocks<level>(key, static_cast<uint32_t>(offset + start / 4), static_cast<int>((n + 3) / 4), buffer);
    return buffer;
  }
};

// The same tile of two streams: `noise` into `buffer`, and the stream `other` of the same seed and samples.
template <Level level>
LFM_HD void tile_of_two(const Noise& noise, int64_t other, int64_t sample, int64_t start, int64_t n,
                        float* __restrict buffer, float* __restrict other_buffer) {
  const int64_t index = noise.index[static_cast<size_t>(sample)];
  const PhiloxKey key = philox_key(noise.seed, noise.stream, index);
  const auto block = static_cast<uint32_t>(noise.offset + start / 4);
  const int blocks = static_cast<int>((n + 3) / 4);
#if defined(LFM_X86_LEVELS)
  if constexpr (level == Level::avx512) {
    return normal_blocks_of_two_avx512(key, static_cast<uint32_t>(other), block, blocks, buffer, other_buffer);
  }
#endif
  normal_blocks<level>(key, block, blocks, buffer);
  normal_blocks<level>(philox_key(noise.seed, other, index), block, blocks, other_buffer);
}

}  // namespace lfm_fast
