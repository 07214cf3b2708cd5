// softmax(scale q k^T) v in bfloat16 by the tile instructions (AMX). One item of work is one head: k and
// v are packed once into the tiles' order, then 32 queries at a time meet all keys, so that a row of weights is whole
// and its softmax needs no second look. Weights are rounded to bfloat16 before they meet v, their sum is taken before.
#include <tuple>

#include "common/registration.h"
#include "cpu/attention_heads.h"

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)

struct Attention : AttentionCall {
  Bf16* out;   // (B, T_q, heads, d), contiguous
  float* lse;  // (B, heads, T_q), contiguous; or nullptr

  // Sizes rounded up to what tiles hold: 32 of a product's inner dimension, 16 columns of its result.
  int64_t padded_keys() const { return rounded_up(keys, 32); }
  int64_t inner_width() const { return rounded_up(width, 32); }
  int64_t outer_width() const { return rounded_up(width, 16); }
};

// What one thread works in.
struct Scratch {
  Workspace memory;
  Bf16 *k, *v, *weights, *q;
  float *scores, *result;

  explicit Scratch(const Attention& a)
      : memory({2 * a.padded_keys() * a.inner_width(), 2 * a.padded_keys() * a.outer_width(), 2 * 32 * a.padded_keys(),
                2 * 32 * a.inner_width(), 4 * 32 * a.padded_keys(), 4 * 32 * a.outer_width()}) {
    k = memory.take<Bf16>(a.padded_keys() * a.inner_width());
    v = memory.take<Bf16>(a.padded_keys() * a.outer_width());
    weights = memory.take<Bf16>(32 * a.padded_keys());
    q = memory.take<Bf16>(32 * a.inner_width());
    scores = memory.take<float>(32 * a.padded_keys());
    result = memory.take<float>(32 * a.outer_width());
  }
};

// Scores of 32 queries, of which those from 16 on may be missing.
LFM_AMX_INLINE void multiply_keys(const Attention& a, const Bf16* q, int64_t stride, bool both, Scratch& s) {
  const int64_t row = a.padded_keys(), steps = a.inner_width() / 32;
  before_tiles_read();
  for (int64_t key = 0; key < a.keys; key += 32) {
    const Bf16* packed = s.k + key / 16 * steps * kTile16;
    const bool wide = key + 16 < a.keys;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, q + 32 * step, stride * 2);
      _tile_loadd(6, packed + step * kTile16, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) {
        _tile_loadd(7, packed + (steps + step) * kTile16, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (both) {
        _tile_loadd(5, q + 16 * stride + 32 * step, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (wide) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, s.scores + key, row * 4);
    if (wide) _tile_stored(1, s.scores + key + 16, row * 4);
    if (both) _tile_stored(2, s.scores + 16 * row + key, row * 4);
    if (both && wide) _tile_stored(3, s.scores + 16 * row + key + 16, row * 4);
  }
}

// The weights of one query, not yet divided by their sum, which is returned; `most` is its highest score.
LFM_AMX_INLINE float weigh(const Attention& a, float* scores, Bf16* weights, float& most) {
  const int64_t padded = a.padded_keys();
  for (int64_t n = a.keys; n < padded; ++n) scores[n] = -INFINITY;  // weight 0, or NaN in a row that is NaN
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < padded; n += 16) top = _mm512_max_ps(top, _mm512_load_ps(scores + n));
  most = _mm512_reduce_max_ps(top);
  const __m512 factor = _mm512_set1_ps(a.scale * kLog2E), highest = _mm512_set1_ps(most);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t n = 0; n < padded; n += 32) {
    __m512 w[2];
    LFM_UNROLL_16
    for (int64_t i = 0; i < 2; ++i) {
      const __m512 below = _mm512_sub_ps(_mm512_load_ps(scores + n + 16 * i), highest);
      w[i] = power_of_two(_mm512_mul_ps(below, factor));
      sums[i] = _mm512_add_ps(sums[i], w[i]);
    }
    _mm512_store_si512(weights + n, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0])));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

LFM_AMX_INLINE void multiply_values(const Attention& a, bool both, Scratch& s) {
  const int64_t row = a.padded_keys(), width = a.outer_width(), across = width / 16;
  before_tiles_read();
  for (int64_t channel = 0; channel < width; channel += 32) {
    const bool wide = channel + 16 < width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t key = 0; key < row; key += 32) {
      const Bf16* packed = s.v + (key / 32 * across + channel / 16) * kTile16;
      _tile_loadd(4, s.weights + key, row * 2);
      _tile_loadd(6, packed, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) {
        _tile_loadd(7, packed + kTile16, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (both) {
        _tile_loadd(5, s.weights + 16 * row + key, row * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (wide) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, s.result + channel, width * 4);
    if (wide) _tile_stored(1, s.result + channel + 16, width * 4);
    if (both) _tile_stored(2, s.result + 16 * width + channel, width * 4);
    if (both && wide) _tile_stored(3, s.result + 16 * width + channel + 16, width * 4);
  }
}

// Queries from `first` on: where a tile would read beyond them or their channels, a copy of them between zeros.
LFM_AMX_INLINE const Bf16* queries_at(const Attention& a, const Bf16* q, int64_t first, Scratch& s, int64_t& stride) {
  const int64_t count = a.queries - first, inner = a.inner_width();
  stride = a.q.token;
  if ((count == 16 || count >= 32) && a.width % 32 == 0) return q + first * stride;
  for (int64_t i = 0; i < 32; ++i)
    for (int64_t channel = 0; channel < inner; channel += 32) {
      const __mmask32 present = i < count ? first_of_32(a.width - channel) : 0;
      const Bf16* row = q + (present ? (first + i) * stride + channel : 0);
      _mm512_store_si512(s.q + i * inner + channel, _mm512_maskz_loadu_epi16(present, row));
    }
  stride = inner;
  return s.q;
}

LFM_AMX_INLINE void divide(const Attention& a, const float* result, float sum, Bf16* out) {
  const __m512 share = _mm512_set1_ps(1.0f / sum);
  for (int64_t n = 0; n < a.width; n += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(result + n), share));
    _mm256_mask_storeu_epi16(out + n, first_of_16(a.width - n), reinterpret_cast<__m256i>(rounded));
  }
}

// ln x for x of 1 or more, to 2e-7 of it or of 1: 2 artanh((m - 1) / (m + 1)) of the mantissa m.
LFM_AMX_INLINE __m512 logarithm(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(t, t);
  __m512 p = _mm512_set1_ps(1.0f / 13.0f);
  for (const float divisor : {11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f})
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.0f / divisor));
  const __m512 whole = _mm512_mul_ps(_mm512_getexp_ps(x), _mm512_set1_ps(0.6931471805599453f));
  return _mm512_fmadd_ps(_mm512_add_ps(t, t), p, whole);
}

// ln of the sum of e^(scale score) over the keys.
LFM_AMX_INLINE void store_lse(const Attention& a, const float* most, const float* sums, int64_t count, float* lse) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 top = _mm512_mul_ps(_mm512_loadu_ps(most + i), _mm512_set1_ps(a.scale));
    const __m512 sum = _mm512_add_ps(top, logarithm(_mm512_loadu_ps(sums + i)));
    const __mmask16 infinite = _mm512_cmp_ps_mask(top, _mm512_set1_ps(INFINITY), _CMP_EQ_OQ);
    _mm512_mask_storeu_ps(lse + i, first_of_16(count - i), _mm512_mask_mov_ps(sum, infinite, top));
  }
}

LFM_AMX_CODE void run_heads(const Attention& a, int64_t begin, int64_t end) {
  Scratch s(a);
  const Tiles tiles;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / a.heads, head = item % a.heads;
    const Bf16* q = a.q.at(sample, head);
    pack_columns({a.k.at(sample, head), a.k.token, a.keys, a.width}, s.k);
    pack_pairs({a.v.at(sample, head), a.v.token, a.keys, a.width}, s.v);
    for (int64_t first = 0; first < a.queries; first += 32) {
      const int64_t count = a.queries - first < 32 ? a.queries - first : 32, row = a.padded_keys();
      int64_t stride = 0;
      const Bf16* rows = queries_at(a, q, first, s, stride);
      multiply_keys(a, rows, stride, count > 16, s);
      float sums[32] = {}, most[32] = {};
      for (int64_t i = 0; i < count; ++i) sums[i] = weigh(a, s.scores + i * row, s.weights + i * row, most[i]);
      if (a.lse != nullptr) store_lse(a, most, sums, count, a.lse + item * a.queries + first);
      multiply_values(a, count > 16, s);
      for (int64_t i = 0; i < count; ++i) {
        Bf16* out = a.out + ((sample * a.queries + first + i) * a.heads + head) * a.width;
        divide(a, s.result + i * a.outer_width(), sums[i], out);
      }
    }
  }
}

#endif

// The heads of a token side by side: (B, T_q, heads, d) in memory.
Tensor attend(const AttentionCall& call, float* lse) {
  Tensor out = new_tensor({call.batch, call.queries, call.heads, call.width}, ScalarType::BFloat16);
#if defined(LFM_AMX)
  const Attention a{call, static_cast<Bf16*>(out.mutable_data_ptr()), lse};
  const int64_t work = rounded_up(call.queries, 32) * call.keys * call.width;
  const int64_t items = call.queries ? call.batch * call.heads : 0;
  parallel_for(0, items, std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, work)),
               [&a](int64_t first, int64_t last) { run_heads(a, first, last); });
#else
  static_cast<void>(lse);
#endif
  return torch::stable::transpose(out, 1, 2);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  return attend(read_call(q, k, v, scale), nullptr);
}

std::tuple<Tensor, Tensor> attention_with_lse(const Tensor& q, const std::optional<Tensor>& k,
                                              const std::optional<Tensor>& v, std::optional<double> scale) {
  const AttentionCall call = read_call(q, k, v, scale);
  Tensor lse = new_tensor({call.batch, call.heads, call.queries}, ScalarType::Float);
  Tensor out = attend(call, static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

}  // namespace

LFM_REGISTER(CPU, attention, attention);
LFM_REGISTER(CPU, attention_with_lse, attention_with_lse);

}  // namespace lfm_fast
