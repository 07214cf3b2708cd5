// softmax(scale q k^T) v in bfloat16 by the tile instructions (AMX), forward alone. One item of work is one head: k and
// v are packed once into the tiles' order, then 32 queries at a time meet all keys, so that a row of weights is whole
// and its softmax needs no second look. Weights are rounded to bfloat16 before they meet v, their sum is taken before.
#include <cmath>
#include <memory>

#include "common/registration.h"
#include "cpu/amx.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

constexpr int64_t kMostKeys = 4096;  // with more, a head's packed keys and weights leave the second cache
constexpr int64_t kMostWidth = 256;

#if defined(LFM_AMX)

struct Heads {
  const Bf16* data;
  int64_t sample, head, token;  // strides in elements

  explicit Heads(const Tensor& x)
      : data(static_cast<const Bf16*>(x.const_data_ptr())),
        sample(x.stride(0)),
        head(x.stride(1)),
        token(x.stride(2)) {}
};

struct Attention {
  Heads q, k, v;
  Bf16* out;  // (B, T_q, heads, d), contiguous
  int64_t heads, queries, keys, width;
  float scale;

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

// Tile (16 keys, 32 channels) of k^T: row r holds the channels 2 r and 2 r + 1 of each key.
LFM_AMX_INLINE void pack_keys(const Attention& a, const Bf16* k, Bf16* packed) {
  for (int64_t key = 0; key < a.padded_keys(); key += 16)
    for (int64_t channel = 0; channel < a.width; channel += 32, packed += kTile16) {
      const __mmask32 inside = first_of_32(a.width - channel);
      __m512i rows[16];
      LFM_UNROLL_16
      for (int64_t i = 0; i < 16; ++i) {
        const __mmask32 present = key + i < a.keys ? inside : 0;
        rows[i] = _mm512_maskz_loadu_epi16(present, k + (present ? (key + i) * a.k.token + channel : 0));
      }
      transpose(rows);
      LFM_UNROLL_16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, rows[i]);
    }
}

// Tile (32 keys, 16 channels) of v: row r holds the keys 2 r and 2 r + 1 of each channel.
LFM_AMX_INLINE void pack_values(const Attention& a, const Bf16* v, Bf16* packed) {
  for (int64_t key = 0; key < a.padded_keys(); key += 32)
    for (int64_t channel = 0; channel < a.width; channel += 16, packed += kTile16) {
      const __mmask16 inside = first_of_16(a.width - channel);
      for (int64_t i = 0; i < 32; i += 2) {
        __m512i pair[2];
        for (int64_t n = 0; n < 2; ++n) {
          const __mmask16 present = key + i + n < a.keys ? inside : 0;
          const Bf16* row = v + (present ? (key + i + n) * a.v.token + channel : 0);
          pair[n] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, row));
        }
        _mm512_store_si512(packed + 16 * i, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
      }
    }
}

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

// The weights of one query, not yet divided by their sum, which is returned.
LFM_AMX_INLINE float weigh(const Attention& a, float* scores, Bf16* weights) {
  const int64_t padded = a.padded_keys();
  for (int64_t n = a.keys; n < padded; ++n) scores[n] = -INFINITY;  // weight 0, or NaN in a row that is NaN
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < padded; n += 16) top = _mm512_max_ps(top, _mm512_load_ps(scores + n));
  const float log2e = 1.4426950408889634f, slope = a.scale * log2e;
  const __m512 factor = _mm512_set1_ps(slope), highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
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

LFM_AMX_CODE void run_heads(const Attention& a, int64_t begin, int64_t end) {
  Scratch s(a);
  const Tiles tiles;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / a.heads, head = item % a.heads;
    const Bf16* q = a.q.data + sample * a.q.sample + head * a.q.head;
    pack_keys(a, a.k.data + sample * a.k.sample + head * a.k.head, s.k);
    pack_values(a, a.v.data + sample * a.v.sample + head * a.v.head, s.v);
    for (int64_t first = 0; first < a.queries; first += 32) {
      const int64_t count = a.queries - first < 32 ? a.queries - first : 32, row = a.padded_keys();
      int64_t stride = 0;
      const Bf16* rows = queries_at(a, q, first, s, stride);
      multiply_keys(a, rows, stride, count > 16, s);
      float sums[32];
      for (int64_t i = 0; i < count; ++i) sums[i] = weigh(a, s.scores + i * row, s.weights + i * row);
      multiply_values(a, count > 16, s);
      for (int64_t i = 0; i < count; ++i) {
        Bf16* out = a.out + ((sample * a.queries + first + i) * a.heads + head) * a.width;
        divide(a, s.result + i * a.outer_width(), sums[i], out);
      }
    }
  }
}

#endif

Tensor with_dense_channels(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  const Tensor* tensors[] = {&q, &k, &v};
  const char* names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    check_on_cpu(*tensors[i], names[i]);
    check_dtype(*tensors[i], names[i], ScalarType::BFloat16);
    LFM_CHECK(tensors[i]->dim() == 4, names[i], " must be (B, heads, T, d), got ", shape_text(*tensors[i]), ".");
  }
  check_same_shape(v, "v", k, "k");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), width = q.size(3);
  LFM_CHECK(k.size(0) == batch && k.size(1) == heads && k.size(3) == width, "k must have the shape of q, ",
            shape_text(q), ", but for the number of tokens, got ", shape_text(k), ".");
  LFM_CHECK(keys >= 1 && keys <= kMostKeys, "k must have 1 to ", kMostKeys, " tokens, got ", keys, ".");
  LFM_CHECK(width >= 1 && width <= kMostWidth, "q must have 1 to ", kMostWidth, " channels, got ", width, ".");
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(width)));
  LFM_CHECK(factor > 0.0 && std::isfinite(factor), "scale must be a positive number, got ", factor, ".");
  LFM_CHECK(has_tiles(), "attention needs a processor with AMX for bfloat16.");
  Tensor out = new_tensor({batch, queries, heads, width}, ScalarType::BFloat16);
#if defined(LFM_AMX)
  const Tensor dense[] = {with_dense_channels(q), with_dense_channels(k), with_dense_channels(v)};
  Bf16* const result = static_cast<Bf16*>(out.mutable_data_ptr());
  const Attention a{Heads(dense[0]), Heads(dense[1]), Heads(dense[2]), result, heads, queries, keys, width,
                    static_cast<float>(factor)};
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) / (rounded_up(queries, 32) * keys * width));
  parallel_for(0, queries ? batch * heads : 0, grain, [&a](int64_t first, int64_t last) { run_heads(a, first, last); });
#endif
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

LFM_REGISTER(CPU, attention, attention);

}  // namespace lfm_fast
