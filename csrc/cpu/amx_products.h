// left (rows x inner) times right (inner x outer) by the tile instructions (AMX), sums in float32.
//
// The left factor comes in strips of 32 rows, the right one in panels of 32 columns, packed: for every 32 inner numbers
// (a step) two tiles side by side. A block of strips meets a group of panels that stays in the second cache. The result
// of 32 x 32 is finished (a bias, GELU, rounding, ...) a few rows at a time between the products of the next, which
// other units do.
//
// The tiles multiply bfloat16. A number in float32 is the sum of three of them, x_0 + x_1 + x_2, each 2^-8 of the one
// before, and a product of two such sums is made of the six products whose share is more than 2^-24 of it; with two
// parts of each, three products leave out 2^-17.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/amx_packing.h"

namespace lfm_fast {

constexpr int64_t kMostSteps = 32;        // with more of them, a product of 32 x 32 is made in sections
constexpr int64_t kSectionSteps = 12;     // of so many steps, whose tiles stay in the innermost cache
constexpr int64_t kMostOfParts = 48, kSectionOfParts = 36;  // the same of numbers in parts, times their number
constexpr int64_t kMostStrips = 8;        // of a block
constexpr int64_t kGroupBytes = 3 << 18;  // of the panels that a block meets one after the other
constexpr double kLeastWork = 1e7;        // operations that are worth a second thread

// The factor (rows x inner) of a product as its rows lie in memory.
struct LeftRows {
  static constexpr int kParts = 1;
  const Bf16* data;
  int64_t stride;  // elements from one row to the next
};

// The same in float32, to be taken as sums of so many bfloat16.
template <int parts>
struct LeftFloats {
  static constexpr int kParts = parts;
  const float* data;
  int64_t stride;
};

// The factor (rows x inner) in tiles, strip by strip: for each step the upper 16 rows, then the lower.
struct LeftTiles {
  static constexpr int kParts = 1;
  const Bf16* data;
};

struct Sizes {
  int64_t rows, inner, outer;
  int64_t parts = 1;              // bfloat16 numbers whose sum a number is
  int64_t block = 1, groups = 1;  // strips that are taken together, ranges into which the panels are split

  int64_t strips() const { return in_strips(rows); }
  int64_t panels() const { return in_strips(outer); }
  int64_t steps() const { return in_strips(inner); }
  int64_t blocks() const { return (strips() + block - 1) / block; }
  int64_t first_panel(int64_t group) const { return panels() * group / groups; }
  int64_t step_size() const { return 2 * kTile16 * parts; }  // elements of a step of a strip, or of a panel
  // Whether a product of 32 x 32 is made in one go.
  bool in_one() const { return steps() <= (parts == 1 ? kMostSteps : kMostOfParts / parts); }
  int64_t steps_at_once() const {
    return in_one() ? std::max<int64_t>(steps(), 1) : parts == 1 ? kSectionSteps : kSectionOfParts / parts;
  }
  int64_t panels_together() const {
    return std::max<int64_t>(1, kGroupBytes / (2 * step_size() * steps_at_once()));
  }

  // Blocks, and ranges of panels where there are fewer blocks, for every thread.
  void divide(int64_t threads) {
    block = std::min(parts > 1 ? kMostStrips / 2 : kMostStrips, (strips() + threads - 1) / threads);
    groups = std::min(panels(), std::max<int64_t>(1, threads / blocks()));
  }
};

#if defined(LFM_AMX)

// 32 rows of the left factor. The tiles of a step's parts, where there are several, lie 2 kTile16 apart.
struct Strip {
  const Bf16 *upper, *lower;
  int64_t stride, step;  // bytes between two rows of a tile, elements between two tiles
};

// Some steps of 32 rows: where they begin in the left factor, and room for a copy in tiles.
struct Section {
  int64_t row, step, steps;
  Bf16* copy;
};

// The rows are copied into tiles where some are missing, where a tile would read beyond their ends, and where their
// distance puts them all into a few sets of the cache.
LFM_AMX_INLINE Strip strip_at(const LeftRows& left, const Sizes& sizes, const Section& at) {
  const int64_t begin = at.step * 32;
  if (at.row + kStrip <= sizes.rows && sizes.inner % 32 == 0 && left.stride % 1024 != 0) {
    const Bf16* const upper = left.data + at.row * left.stride + begin;
    return {upper, upper + 16 * left.stride, 2 * left.stride, 32};
  }
  for (int64_t i = 0; i < kStrip; ++i) {
    const bool present = at.row + i < sizes.rows;
    const Bf16* row = left.data + (present ? (at.row + i) * left.stride : 0);
    Bf16* to = at.copy + i / 16 * kTile16 + i % 16 * 32;
    for (int64_t k = begin; k < begin + 32 * at.steps; k += 32, to += 2 * kTile16)
      _mm512_store_si512(to, load_32(row + (present ? k : 0), present ? first_of_32(sizes.inner - k) : 0));
  }
  return {at.copy, at.copy + kTile16, 64, 2 * kTile16};
}

// The next part of 32 numbers, which is taken off them.
LFM_AMX_INLINE __m512i take_part(__m512& low, __m512& high) {
  const __m512i part = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const __m256i lower = _mm512_castsi512_si256(part), upper = _mm512_extracti64x4_epi64(part, 1);
  low = _mm512_sub_ps(low, reinterpret_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16)));
  high = _mm512_sub_ps(high, reinterpret_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16)));
  return part;
}

template <int parts>
LFM_AMX_INLINE Strip strip_at(const LeftFloats<parts>& left, const Sizes& sizes, const Section& at) {
  Bf16* to = at.copy;  // tile by tile: one row's numbers lie 2 KiB apart, which is two sets of the innermost cache
  for (int64_t k = at.step * 32; k < 32 * (at.step + at.steps); k += 32, to += parts * 2 * kTile16) {
    const __mmask32 inside = first_of_32(sizes.inner - k);
    for (int64_t i = 0; i < kStrip; ++i) {
      const bool present = at.row + i < sizes.rows;
      const __mmask32 there = present ? inside : 0;
      const float* const from = left.data + (present ? (at.row + i) * left.stride + k : 0);
      __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
      __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
      for (int part = 0; part < parts; ++part)
        _mm512_store_si512(to + part * 2 * kTile16 + i * 32, take_part(low, high));
    }
  }
  return {at.copy, at.copy + kTile16, 64, parts * 2 * kTile16};
}

LFM_AMX_INLINE Strip strip_at(const LeftTiles& left, const Sizes& sizes, const Section& at) {
  const Bf16* const tiles = left.data + (at.row / kStrip * sizes.steps() + at.step) * 2 * kTile16;
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

// The factors' tiles of a step: 4 and 5 of the strip, 6 and 7 of the panel, of which 7 where there are columns from 16
// on. A panel is read by tile loads that leave the innermost cache to the strip.
LFM_AMX_INLINE void load_strip(const Strip& strip, int64_t part) {
  _tile_loadd(4, strip.upper + part * 2 * kTile16, strip.stride);
  _tile_loadd(5, strip.lower + part * 2 * kTile16, strip.stride);
}

template <bool wide>
LFM_AMX_INLINE void load_panel(const Bf16* panel, int64_t part) {
  _tile_stream_loadd(6, panel + part * 2 * kTile16, 64);
  if (wide) _tile_stream_loadd(7, panel + part * 2 * kTile16 + kTile16, 64);
}

template <bool wide>
LFM_AMX_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if (wide) _tile_dpbf16ps(1, 4, 7);
  if (wide) _tile_dpbf16ps(3, 5, 7);
}

// The sums += the products of a step. Of several parts, one factor at a time is exchanged.
template <bool wide, int parts, typename Finish>
LFM_AMX_INLINE void multiply_step(const Strip& strip, const Bf16* panel) {
  if constexpr (parts == 1) {  // between the products, not before them all: 5 % faster
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
    return;
  }
  load_panel<wide>(panel, 0);
  for (int part = parts - 1; part >= 0; --part) {
    load_strip(strip, part);
    add_products<wide>();
  }
  for (int part = parts - 1; part >= 1; --part) {
    load_panel<wide>(panel, part);
    add_products<wide>();
  }
  if constexpr (parts == 3) {
    load_strip(strip, 1);  // the panel's middle part is there
    add_products<wide>();
  }
}

// result (32 x 32) = or += strip (32 x 32 steps) panel (32 steps x 32); `wide`: there are columns from 16 on.
template <bool wide, int parts, typename Finish>
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
    multiply_step<wide, parts, Finish>(strip, panel);
    strip.upper += strip.step, strip.lower += strip.step, panel += parts * 2 * kTile16;
    last.four();
  }
  last.all();
  _tile_stored(0, result, 4 * kStrip);
  _tile_stored(2, result + 16 * kStrip, 4 * kStrip);
  if (wide) _tile_stored(1, result + 16, 4 * kStrip);
  if (wide) _tile_stored(3, result + 16 * kStrip + 16, 4 * kStrip);
}

// Strips that are taken together, some steps of them at a time.
template <typename Left>
struct Block {
  const Sizes& sizes;
  const Left& left;
  Bf16* copies;
  int64_t row = 0, count = 0;  // the first row, strips
  Strip strips[kMostStrips] = {};

  LFM_AMX_INLINE void take(int64_t step, int64_t steps) {
    const int64_t size = sizes.step_size() * sizes.steps_at_once();
    for (int64_t i = 0; i < count; ++i)
      strips[i] = strip_at(left, sizes, Section{row + i * kStrip, step, steps, copies + i * size});
    before_tiles_read();
  }
};

// The strips of a block meet the panels from `first` to `past`, a section of the inner numbers at a time; one that is
// the whole has been taken already.
template <typename Left, typename Finish>
LFM_AMX_INLINE void multiply_group(Block<Left>& block, const Bf16* right, int64_t first, int64_t past, float* results,
                                   Pending<Finish>& last) {
  const Sizes& sizes = block.sizes;
  const int64_t steps = sizes.steps(), most = sizes.steps_at_once();
  for (int64_t step = 0; step == 0 || step < steps; step += most) {
    const int64_t taken = steps - step < most ? steps - step : most;
    if (!sizes.in_one()) block.take(step, taken);
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t panel = first; panel < past; ++panel) {
        const Bf16* const tiles = right + (panel * steps + step) * sizes.step_size();
        float* const result = results + (sizes.in_one() ? 0 : i * (past - first) + panel - first) * kSquare;
        if (sizes.outer - panel * kStrip > 16)
          multiply<true, Left::kParts>(block.strips[i], tiles, taken, step > 0, result, last);
        else
          multiply<false, Left::kParts>(block.strips[i], tiles, taken, step > 0, result, last);
        if (step + taken == steps) last.set(sizes, result, block.row + i * kStrip, panel * kStrip);
      }
  }
}

// Items are (block of strips, range of panels).
template <typename Left, typename Finish>
LFM_AMX_CODE void run_products(const Sizes& sizes, const Left& left, const Bf16* right, const Finish& finish,
                               int64_t begin, int64_t end) {
  const int64_t together = sizes.panels_together();
  const int64_t copied =
      std::is_same_v<Left, LeftTiles> ? 0 : sizes.step_size() * sizes.steps_at_once() * sizes.block;
  Workspace memory({2 * copied, 4 * kSquare * (sizes.in_one() ? 1 : together * sizes.block)});
  Block<Left> block{sizes, left, memory.take<Bf16>(copied)};
  float* const results = memory.take<float>(0);
  const Tiles tiles;
  Pending<Finish> last{finish};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / sizes.groups * sizes.block, group = item % sizes.groups;
    block.row = first * kStrip;
    block.count = sizes.strips() - first < sizes.block ? sizes.strips() - first : sizes.block;
    if (sizes.in_one()) block.take(0, sizes.steps());
    const int64_t past = sizes.first_panel(group + 1);
    for (int64_t panel = sizes.first_panel(group); panel < past; panel += together)
      multiply_group(block, right, panel, panel + together < past ? panel + together : past, results, last);
  }
  last.all();
}

// finish(left right), in parallel.
template <typename Left, typename Finish>
void run_product(Sizes sizes, const Left& left, const Bf16* right, const Finish& finish) {
  if (sizes.rows == 0 || sizes.outer == 0) return;
  const double columns = static_cast<double>(sizes.inner) * static_cast<double>(sizes.outer);
  const double work = 2.0 * static_cast<double>(sizes.rows) * columns;
  sizes.parts = Left::kParts;
  sizes.divide(work < kLeastWork ? 1 : torch::stable::get_num_threads());
  parallel_for(0, sizes.blocks() * sizes.groups, 1, [&](int64_t first, int64_t last) {
    run_products(sizes, left, right, finish, first, last);
  });
}

LFM_AMX_INLINE void store(Bf16* to, __mmask32 inside, __m512 low, __m512 high) {
  _mm512_mask_storeu_epi16(to, inside, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
LFM_AMX_INLINE void store(float* to, __mmask32 inside, __m512 low, __m512 high) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(inside), low);
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(inside >> 16), high);
}

// GELU to what the numbers that are stored can tell.
LFM_AMX_INLINE __m512 gelu_for(const Bf16*, __m512 x) { return _mm512_mul_ps(x, gelu_logistic(x)); }
LFM_AMX_INLINE __m512 gelu_for(const float*, __m512 x) {
  alignas(64) float values[16];
  _mm512_store_ps(values, x);
  for (float& value : values) value = gelu(value);
  return _mm512_load_ps(values);
}

// y = product + bias, or GELU of that; `before` also takes what GELU is made of, where it is not nullptr.
template <bool gelu, bool keep, typename Number = Bf16>
struct FinishLinear {
  const float* bias;  // whole panels of it, or nullptr
  Number *y, *before;
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
    if (keep) store(before + at, inside, low, high);
    if (gelu) low = gelu_for(y, low), high = gelu_for(y, high);
    store(y + at, inside, low, high);
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
    store(y + at, inside, low, high);
    at += stride;
  }
};

#endif

}  // namespace lfm_fast
