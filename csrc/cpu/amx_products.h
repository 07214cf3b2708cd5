// left (rows x inner) times right (inner x outer) in bfloat16 by the tile instructions (AMX), sums in float32.
//
// The left factor comes in strips of 32 rows, the right one in panels of 32 columns, packed: for every 32 inner numbers
// (a step) two tiles side by side. A block of strips meets a group of panels that stays in the second cache. The result
// of 32 x 32 is finished (a bias, GELU, rounding, ...) a few rows at a time between the products of the next, which
// other units do.
#pragma once

#include <algorithm>

#include "common/activations.h"
#include "common/low_precision.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/amx.h"

namespace lfm_fast {

constexpr int64_t kStrip = 32;  // rows of a strip, columns of a panel, inner numbers of a step
constexpr int64_t kSquare = kStrip * kStrip;
constexpr int64_t kMostSteps = 32;        // with more of them, a product of 32 x 32 is made in parts
constexpr int64_t kPartSteps = 12;        // of so many steps, whose tiles stay in the innermost cache
constexpr int64_t kMostStrips = 8;        // of a block
constexpr int64_t kGroupBytes = 3 << 18;  // of the panels that a block meets one after the other
constexpr double kLeastWork = 1e7;        // operations that are worth a second thread

inline int64_t in_strips(int64_t count) { return (count + kStrip - 1) / kStrip; }

// Elements of a factor in tiles: `count` rows or columns of `inner` numbers.
inline int64_t packed_size(int64_t count, int64_t inner) { return in_strips(count) * in_strips(inner) * 2 * kTile16; }

// The factor (rows x inner) of a product as its rows lie in memory.
struct LeftRows {
  const Bf16* data;
  int64_t stride;  // elements from one row to the next
};

// The factor (rows x inner) in tiles, strip by strip: for each step the upper 16 rows, then the lower.
struct LeftTiles {
  const Bf16* data;
};

struct Sizes {
  int64_t rows, inner, outer;
  int64_t block = 1, groups = 1;  // strips that are taken together, ranges into which the panels are split

  int64_t strips() const { return in_strips(rows); }
  int64_t panels() const { return in_strips(outer); }
  int64_t steps() const { return in_strips(inner); }
  int64_t blocks() const { return (strips() + block - 1) / block; }
  int64_t first_panel(int64_t group) const { return panels() * group / groups; }
  bool in_one() const { return steps() <= kMostSteps; }  // whether a product of 32 x 32 is made in one go
  int64_t steps_at_once() const { return in_one() ? std::max<int64_t>(steps(), 1) : kPartSteps; }
  int64_t panels_together() const {
    return std::max<int64_t>(1, kGroupBytes / (4 * kTile16 * steps_at_once()));
  }

  // Blocks, and ranges of panels where there are fewer blocks, for every thread.
  void divide(int64_t threads) {
    block = std::min(kMostStrips, (strips() + threads - 1) / threads);
    groups = std::min(panels(), std::max<int64_t>(1, threads / blocks()));
  }
};

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

// 32 rows of the left factor.
struct Strip {
  const Bf16 *upper, *lower;
  int64_t stride, step;  // bytes between two rows of a tile, elements between two tiles
};

// Rows from `first` on. They are copied into tiles where some are missing, where a tile would read beyond their ends,
// and where their distance puts them all into a few sets of the cache.
LFM_AMX_INLINE Strip strip_at(const LeftRows& left, const Sizes& sizes, int64_t first, Bf16* copy) {
  if (first + kStrip <= sizes.rows && sizes.inner % 32 == 0 && left.stride % 1024 != 0) {
    const Bf16* const upper = left.data + first * left.stride;
    return {upper, upper + 16 * left.stride, 2 * left.stride, 32};
  }
  for (int64_t i = 0; i < kStrip; ++i) {
    const bool present = first + i < sizes.rows;
    const Bf16* row = left.data + (present ? (first + i) * left.stride : 0);
    Bf16* to = copy + i / 16 * kTile16 + i % 16 * 32;
    for (int64_t k = 0; k < sizes.inner; k += 32, to += 2 * kTile16)
      _mm512_store_si512(to, load_32(row + (present ? k : 0), present ? first_of_32(sizes.inner - k) : 0));
  }
  return {copy, copy + kTile16, 64, 2 * kTile16};
}

LFM_AMX_INLINE Strip strip_at(const LeftTiles& left, const Sizes& sizes, int64_t first, Bf16*) {
  const Bf16* const tiles = left.data + first / kStrip * sizes.steps() * 2 * kTile16;
  return {tiles, tiles + kTile16, 64, 2 * kTile16};
}

// A product of 32 x 32 whose rows are yet to be finished: four after every step of the next product.
template <typename Finish>
struct Pending {
  Finish finish_row;
  const float* result = nullptr;
  int64_t rows = 0;  // that are left

  LFM_AMX_INLINE void set(const Sizes& sizes, const float* product, int64_t row, int64_t column) {
    result = product;
    rows = sizes.rows - row < kStrip ? sizes.rows - row : kStrip;
    finish_row.start(row, column, first_of_32(sizes.outer - column));
  }

  LFM_AMX_INLINE void one() {
    finish_row(_mm512_load_ps(result), _mm512_load_ps(result + 16));
    result += kStrip;
  }

  LFM_AMX_INLINE void four() {
    if (rows < 4) return;
    one();
    one();
    one();
    one();
    rows -= 4;
  }

  LFM_AMX_INLINE void all() {
    for (; rows > 0; --rows) one();
  }
};

// result (32 x 32) = or += strip (32 x 32 steps) panel (32 steps x 32); `wide`: there are columns from 16 on. A panel
// is read by tile loads that leave the innermost cache to the strip.
template <bool wide, typename Finish>
LFM_AMX_INLINE void multiply(Strip strip, const Bf16* panel, int64_t steps, bool add, float* result,
                             Pending<Finish>& last) {
  if (add) {
    _tile_loadd(0, result, 4 * kStrip);
    _tile_loadd(2, result + 16 * kStrip, 4 * kStrip);
    if (wide) _tile_loadd(1, result + 16, 4 * kStrip);
    if (wide) _tile_loadd(3, result + 16 * kStrip + 16, 4 * kStrip);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, strip.upper, strip.stride);
    _tile_stream_loadd(6, panel, 64);
    LFM_TILE_PRODUCT(0, 4, 6);
    _tile_loadd(5, strip.lower, strip.stride);
    LFM_TILE_PRODUCT(2, 5, 6);
    if (wide) {
      _tile_stream_loadd(7, panel + kTile16, 64);
      LFM_TILE_PRODUCT(1, 4, 7);
      LFM_TILE_PRODUCT(3, 5, 7);
    }
    strip.upper += strip.step, strip.lower += strip.step, panel += 2 * kTile16;
    last.four();
  }
  last.all();
  _tile_stored(0, result, 4 * kStrip);
  _tile_stored(2, result + 16 * kStrip, 4 * kStrip);
  if (wide) _tile_stored(1, result + 16, 4 * kStrip);
  if (wide) _tile_stored(3, result + 16 * kStrip + 16, 4 * kStrip);
}

// The strips of a block meet the panels from `first` to `past`, at most kMostSteps of inner numbers at a time.
template <typename Finish>
LFM_AMX_INLINE void multiply_group(const Sizes& sizes, const Strip* strips, int64_t count, int64_t row,
                                   const Bf16* right, int64_t first, int64_t past, float* results,
                                   Pending<Finish>& last) {
  const int64_t steps = sizes.steps();
  const int64_t most = sizes.steps_at_once();
  for (int64_t step = 0; step == 0 || step < steps; step += most) {
    const int64_t taken = steps - step < most ? steps - step : most;
    for (int64_t i = 0; i < count; ++i) {
      Strip left = strips[i];
      left.upper += step * left.step, left.lower += step * left.step;
      for (int64_t panel = first; panel < past; ++panel) {
        const Bf16* const tiles = right + (panel * steps + step) * 2 * kTile16;
        float* const result = results + (sizes.in_one() ? 0 : i * (past - first) + panel - first) * kSquare;
        if (sizes.outer - panel * kStrip > 16)
          multiply<true>(left, tiles, taken, step > 0, result, last);
        else
          multiply<false>(left, tiles, taken, step > 0, result, last);
        if (step + taken == steps) last.set(sizes, result, row + i * kStrip, panel * kStrip);
      }
    }
  }
}

// Items are (block of strips, range of panels).
template <typename Left, typename Finish>
LFM_AMX_CODE void run_products(const Sizes& sizes, const Left& left, const Bf16* right, const Finish& finish,
                               int64_t begin, int64_t end) {
  const int64_t size = 2 * kTile16 * sizes.steps(), together = sizes.panels_together();
  const int64_t copied = std::is_same_v<Left, LeftTiles> ? 0 : size * sizes.block;
  Workspace memory({2 * copied, 4 * kSquare * (sizes.in_one() ? 1 : together * sizes.block)});
  Bf16* const copies = memory.take<Bf16>(copied);
  float* const results = memory.take<float>(0);
  Strip strips[kMostStrips];
  const Tiles tiles;
  Pending<Finish> last{finish};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / sizes.groups * sizes.block, group = item % sizes.groups;
    const int64_t count = sizes.strips() - first < sizes.block ? sizes.strips() - first : sizes.block;
    for (int64_t i = 0; i < count; ++i) strips[i] = strip_at(left, sizes, (first + i) * kStrip, copies + i * size);
    before_tiles_read();
    const int64_t past = sizes.first_panel(group + 1);
    for (int64_t panel = sizes.first_panel(group); panel < past; panel += together)
      multiply_group(sizes, strips, count, first * kStrip, right, panel,
                     panel + together < past ? panel + together : past, results, last);
  }
  last.all();
}

// finish(left right), in parallel.
template <typename Left, typename Finish>
void run_product(Sizes sizes, const Left& left, const Bf16* right, const Finish& finish) {
  if (sizes.rows == 0 || sizes.outer == 0) return;
  const double columns = static_cast<double>(sizes.inner) * static_cast<double>(sizes.outer);
  const double work = 2.0 * static_cast<double>(sizes.rows) * columns;
  sizes.divide(work < kLeastWork ? 1 : torch::stable::get_num_threads());
  parallel_for(0, sizes.blocks() * sizes.groups, 1, [&](int64_t first, int64_t last) {
    run_products(sizes, left, right, finish, first, last);
  });
}

LFM_AMX_INLINE void store_bf16(Bf16* to, __mmask32 inside, __m512 low, __m512 high) {
  _mm512_mask_storeu_epi16(to, inside, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// y = product + bias in bfloat16, or GELU of that; `before` also takes what GELU is made of, where it is not nullptr.
template <bool gelu, bool keep>
struct FinishLinear {
  const float* bias;  // whole panels of it, or nullptr
  Bf16 *y, *before;
  int64_t stride, at = 0;
  __mmask32 inside = 0;
  __m512 low_bias{}, high_bias{};

  LFM_AMX_INLINE void start(int64_t row, int64_t column, __mmask32 columns) {
    at = row * stride + column, inside = columns;
    if (bias == nullptr) return;
    low_bias = _mm512_loadu_ps(bias + column), high_bias = _mm512_loadu_ps(bias + column + 16);
  }
  LFM_AMX_INLINE void operator()(__m512 low, __m512 high) {
    low = _mm512_add_ps(low, low_bias), high = _mm512_add_ps(high, high_bias);
    if (keep) store_bf16(before + at, inside, low, high);
    if (gelu) low = _mm512_mul_ps(low, gelu_logistic(low)), high = _mm512_mul_ps(high, gelu_logistic(high));
    store_bf16(y + at, inside, low, high);
    at += stride;
  }
};

// y = product in float32, or y += product.
struct FinishFloat {
  float* y;
  int64_t stride;
  bool add;
  int64_t at = 0;
  __mmask32 inside = 0;

  LFM_AMX_INLINE void start(int64_t row, int64_t column, __mmask32 columns) {
    at = row * stride + column, inside = columns;
  }
  LFM_AMX_INLINE void operator()(__m512 low, __m512 high) {
    const __mmask16 first = static_cast<__mmask16>(inside), second = static_cast<__mmask16>(inside >> 16);
    if (add) {
      low = _mm512_add_ps(low, load_floats(y + at, first));
      high = _mm512_add_ps(high, load_floats(y + at + 16, second));
    }
    _mm512_mask_storeu_ps(y + at, first, low);
    _mm512_mask_storeu_ps(y + at + 16, second, high);
    at += stride;
  }
};

#endif

}  // namespace lfm_fast
