// Products of bfloat16 matrices by the tile instructions (AMX): what their kernels share. A tile of the left factor is
// 16 rows of 32 numbers, one of the right factor 16 columns of 32 numbers, two by two: row r holds the numbers 2 r and
// 2 r + 1 of each column. Both are 1 KiB; a tile of the result is 16 x 16 in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/levels.h"

#if defined(LFM_X86_LEVELS) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && __GNUC__ >= 12))
#define LFM_AMX 1
#if !defined(__clang__)  // its own header's "undefined" vectors, which nothing reads
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define LFM_AMX_CODE \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")))
#define LFM_AMX_INLINE LFM_AMX_CODE __attribute__((always_inline)) inline
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LFM_UNROLL_16
#else
#define LFM_UNROLL_16 _Pragma("GCC unroll 16")
#endif
#endif

namespace lfm_fast {

// Whether this processor has tiles, its system hands them out, and the level in use is the one they belong to.
bool has_tiles();

inline int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

using Bf16 = uint16_t;
constexpr int64_t kTile16 = 512;  // elements of a 16-bit tile

// Parts of one piece of memory, each on a cache line of its own; uninitialised on purpose.
class Workspace {
 public:
  explicit Workspace(std::initializer_list<int64_t> bytes) {
    int64_t total = 64;
    for (const int64_t size : bytes) total += rounded_up(size, 64);
    memory_.reset(new char[static_cast<size_t>(total)]);
    next_ = memory_.get() + 63 - (reinterpret_cast<uintptr_t>(memory_.get()) + 63) % 64;
  }
  // The parts in the order and of the sizes that were asked for.
  template <typename T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(next_);
    next_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* next_;
};

#if defined(LFM_AMX)

// While it lives the tiles are 16 rows of 64 bytes; then they are again what they were, since oneDNN may use its own.
class Tiles {
 public:
  LFM_AMX_INLINE Tiles() {
    Shapes shapes;
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
    _tile_storeconfig(&before_);
    _tile_loadconfig(&shapes);
  }
  LFM_AMX_INLINE ~Tiles() { _tile_loadconfig(&before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before_;
};

// GCC does not know that a tile is loaded from memory: without this, what was stored there may still be on its way.
LFM_AMX_INLINE void before_tiles_read() { __asm__ volatile("" ::: "memory"); }

// Whether a product that is finished so is one of int8, four numbers in the place of two, summed in int32.
template <typename Finish>
constexpr bool kOfIntegers = false;

// Tile `to` of the result, plus tiles a and b multiplied.
#define LFM_TILE_PRODUCT(to, a, b)       \
  do {                                   \
    if constexpr (kOfIntegers<Finish>)   \
      _tile_dpbssd(to, a, b);            \
    else                                 \
      _tile_dpbf16ps(to, a, b);          \
  } while (false)

// The first `count` lanes; all where there are more, none where there are fewer than one.
LFM_AMX_INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
LFM_AMX_INLINE __mmask16 first_of_16(int64_t count) { return static_cast<__mmask16>(first_of_32(count)); }

// 16 x 16 numbers of 32 bits.
LFM_AMX_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  LFM_UNROLL_16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  LFM_UNROLL_16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  LFM_UNROLL_16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  LFM_UNROLL_16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2^x to 8e-5, a fiftieth of what rounding to bfloat16 costs: a cubic of x - floor(x). 0 for -infinity, NaN for NaN.
LFM_AMX_INLINE __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802456673811986f), f, _mm512_set1_ps(0.22606719922589233f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958334665649448f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252325331928f));
  return _mm512_scalef_ps(p, x);
}

#endif

}  // namespace lfm_fast
