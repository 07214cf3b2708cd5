// Factors of a product in the order in which the tile instructions (AMX) read them.
#pragma once

#include <algorithm>

#include "common/activations.h"
#include "common/low_precision.h"
#include "cpu/amx.h"

namespace lfm_fast {

constexpr int64_t kStrip = 32;  // rows of a strip, columns of a panel, inner numbers of a step
constexpr int64_t kSquare = kStrip * kStrip;

inline int64_t in_strips(int64_t count) { return (count + kStrip - 1) / kStrip; }

// Elements of a factor in tiles: `count` rows or columns of `inner` numbers.
inline int64_t packed_size(int64_t count, int64_t inner) { return in_strips(count) * in_strips(inner) * 2 * kTile16; }

#if defined(LFM_AMX)

// 16 numbers of a row as float32, of which `there` are in memory.
LFM_AMX_INLINE __m512 load_floats(const float* row, __mmask16 there) { return _mm512_maskz_loadu_ps(there, row); }
LFM_AMX_INLINE __m512 load_floats(const Bf16* row, __mmask16 there) {
  return reinterpret_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row)), 16));
}

// 32, or 16, numbers of a row in bfloat16.
LFM_AMX_INLINE __m512i load_32(const Bf16* row, __mmask32 there) { return _mm512_maskz_loadu_epi16(there, row); }
LFM_AMX_INLINE __m512i load_32(const float* row, __mmask32 there) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), row);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), row + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
LFM_AMX_INLINE __m512i load_16(const Bf16* row, __mmask16 there) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row));
}
LFM_AMX_INLINE __m512i load_16(const float* row, __mmask16 there) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, row))));
}

// Lanes (a[n], b[n]) of 16 numbers of two rows; the numbers are in bfloat16.
template <typename Number>
LFM_AMX_INLINE __m512i pair_of(const Number* a, const Number* b, __mmask16 there_a, __mmask16 there_b) {
  return _mm512_or_si512(load_16(a, there_a), _mm512_slli_epi32(load_16(b, there_b), 16));
}

// 1 / (1 + e^-2u) of GELU to 1.5e-4, a thirteenth of the distance between two bfloat16. A division would take longer
// than the products.
LFM_AMX_INLINE __m512 gelu_logistic(__m512 x) {
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(-kGeluCubic2), _mm512_set1_ps(-kGeluLinear2));
  const __m512 e = power_of_two(_mm512_mul_ps(x, slope));
  return _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

// The same of GELU(a[n]) and GELU(b[n]).
template <typename Number>
LFM_AMX_INLINE __m512i gelu_pair(const Number* a, const Number* b, __mmask16 there_a, __mmask16 there_b) {
  const __m512 x = load_floats(a, there_a), y = load_floats(b, there_b);
  const __m512i both = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(_mm512_mul_ps(y, gelu_logistic(y)), _mm512_mul_ps(x, gelu_logistic(x))));
  const __m256i low = _mm512_castsi512_si256(both), high = _mm512_extracti64x4_epi64(both, 1);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Panels [first, last) of the right factor whose columns are the rows of `data` (outer x inner).
template <typename Number>
LFM_AMX_CODE void pack_right_of_rows(const Number* data, int64_t outer, int64_t inner, Bf16* packed, int64_t first,
                                     int64_t last) {
  Bf16* to = packed + first * in_strips(inner) * 2 * kTile16;
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t k = 0; k < inner; k += 32)
      for (int64_t half = 0; half < 2; ++half, to += kTile16) {
        const int64_t column = panel * kStrip + 16 * half;
        const __mmask32 inside = first_of_32(inner - k);
        __m512i rows[16];
        LFM_UNROLL_16
        for (int64_t i = 0; i < 16; ++i) {
          const bool present = column + i < outer;
          rows[i] = load_32(data + (present ? (column + i) * inner + k : 0), present ? inside : 0);
        }
        transpose(rows);
        LFM_UNROLL_16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, rows[i]);
      }
}

// Steps [first, last) of all panels of the right factor `data` (inner x outer) itself: some rows of it at a time, since
// that is how they lie in memory. With `gelu`, of GELU(data).
template <bool gelu, typename Number>
LFM_AMX_CODE void pack_right(const Number* data, int64_t inner, int64_t outer, Bf16* packed, int64_t first,
                             int64_t last) {
  for (int64_t step = first; step < last; ++step)
    for (int64_t panel = 0; panel < in_strips(outer); ++panel) {
      Bf16* to = packed + (panel * in_strips(inner) + step) * 2 * kTile16;
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t row = step * 32; row < step * 32 + 32; row += 2, to += 32) {
          const int64_t column = panel * kStrip + 16 * half;
          const __mmask16 inside = first_of_16(outer - column);
          const __mmask16 a = row < inner ? inside : 0, b = row + 1 < inner ? inside : 0;
          const Number* const upper = data + (a ? row * outer + column : 0);
          const Number* const lower = data + (b ? (row + 1) * outer + column : 0);
          _mm512_store_si512(to, gelu ? gelu_pair(upper, lower, a, b) : pair_of(upper, lower, a, b));
        }
    }
}

constexpr int64_t kSummedSteps = 4;  // whose column sums are taken together, whatever the number of threads

// Chunks [first, last) of kSummedSteps of all strips of the left factor whose rows are the columns of `data`
// (inner x rows); sums (chunk, rows): of each column.
LFM_AMX_CODE inline void pack_left_of_columns(const Bf16* data, int64_t inner, int64_t rows, Bf16* packed, float* sums,
                                              int64_t first, int64_t last) {
  const int64_t steps = in_strips(inner);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float* const total = sums + chunk * rows;
    for (int64_t n = 0; n < rows; ++n) total[n] = 0.0f;
    const int64_t past = std::min((chunk + 1) * kSummedSteps, steps);
    for (int64_t step = chunk * kSummedSteps; step < past; ++step)
      for (int64_t column = 0; column < rows; column += 16) {
        const __mmask16 inside = first_of_16(rows - column);
        __m512 even = _mm512_maskz_loadu_ps(inside, total + column), odd = _mm512_setzero_ps();
        __m512i pairs[16];
        LFM_UNROLL_16
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t row = step * 32 + 2 * i;
          const __mmask16 a = row < inner ? inside : 0, b = row + 1 < inner ? inside : 0;
          pairs[i] = pair_of(data + (a ? row * rows + column : 0), data + (b ? (row + 1) * rows + column : 0), a, b);
          even = _mm512_add_ps(even, reinterpret_cast<__m512>(_mm512_slli_epi32(pairs[i], 16)));
          odd = _mm512_add_ps(odd, reinterpret_cast<__m512>(_mm512_and_si512(pairs[i], _mm512_set1_epi32(-65536))));
        }
        _mm512_mask_storeu_ps(total + column, inside, _mm512_add_ps(even, odd));
        transpose(pairs);
        Bf16* const to = packed + ((column / kStrip * steps + step) * 2 + column / 16 % 2) * kTile16;
        LFM_UNROLL_16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, pairs[i]);
      }
  }
}

#endif

}  // namespace lfm_fast
