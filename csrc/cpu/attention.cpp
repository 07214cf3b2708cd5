// softmax(scale q k^T) v in bfloat16 by the tile instructions (AMX), forward alone. One item of work is one head: k and
// v are packed once into the tiles' order, then 32 queries at a time meet all keys, so that a row of weights is whole
// and its softmax needs no second look. Weights are rounded to bfloat16 before they meet v, their sum is taken before.
#include <cmath>
#include <memory>

#include "common/registration.h"
#include "cpu/levels.h"
#include "cpu/rows.h"

#if defined(LFM_X86_LEVELS) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && __GNUC__ >= 12))
#define LFM_AMX 1
#if !defined(__clang__)  // its own header's "undefined" vectors, which nothing reads
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LFM_AMX_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LFM_UNROLL_16
#else
#define LFM_UNROLL_16 _Pragma("GCC unroll 16")
#endif
#endif

namespace lfm_fast {
namespace {

constexpr int64_t kMostKeys = 4096;  // with more, a head's packed keys and weights leave the second cache
constexpr int64_t kMostWidth = 256;

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

#if defined(LFM_AMX)

using Bf16 = uint16_t;
constexpr int64_t kTile = 512;  // elements of a tile: 16 rows of 32

// Linux hands the tiles' registers out on request; a kernel or sandbox may refuse.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

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
class Scratch {
 public:
  explicit Scratch(const Attention& a) {
    const int64_t keys = a.padded_keys(), inner = a.inner_width(), outer = a.outer_width();
    const int64_t sizes[] = {2 * keys * inner, 2 * keys * outer, 4 * 32 * keys, 2 * 32 * keys, 2 * 32 * inner,
                             4 * 32 * outer};
    int64_t total = 64;
    for (const int64_t size : sizes) total += rounded_up(size, 64);
    memory_.reset(new char[total]);
    char* next = memory_.get() + 63 - (reinterpret_cast<uintptr_t>(memory_.get()) + 63) % 64;
    char* places[6];
    for (int i = 0; i < 6; next += rounded_up(sizes[i++], 64)) places[i] = next;
    k = reinterpret_cast<Bf16*>(places[0]);
    v = reinterpret_cast<Bf16*>(places[1]);
    scores = reinterpret_cast<float*>(places[2]);
    weights = reinterpret_cast<Bf16*>(places[3]);
    q = reinterpret_cast<Bf16*>(places[4]);
    result = reinterpret_cast<float*>(places[5]);
  }
  Bf16 *k, *v, *weights, *q;
  float *scores, *result;

 private:
  std::unique_ptr<char[]> memory_;
};

#define LFM_AMX_INLINE LFM_AMX_CODE __attribute__((always_inline)) inline

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

// The first `count` lanes; all where there are more.
LFM_AMX_INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }
LFM_AMX_INLINE __mmask16 first_of_16(int64_t count) { return static_cast<__mmask16>(first_of_32(count)); }

// Tile (16 keys, 32 channels) of k^T: row r holds the channels 2 r and 2 r + 1 of each key.
LFM_AMX_INLINE void pack_keys(const Attention& a, const Bf16* k, Bf16* packed) {
  for (int64_t key = 0; key < a.padded_keys(); key += 16)
    for (int64_t channel = 0; channel < a.width; channel += 32, packed += kTile) {
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
    for (int64_t channel = 0; channel < a.width; channel += 16, packed += kTile) {
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
  for (int64_t key = 0; key < a.keys; key += 32) {
    const Bf16* packed = s.k + key / 16 * steps * kTile;
    const bool wide = key + 16 < a.keys;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, q + 32 * step, stride * 2);
      _tile_loadd(6, packed + step * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) {
        _tile_loadd(7, packed + (steps + step) * kTile, 64);
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

// 2^x to 8e-5, a fiftieth of what rounding to bfloat16 costs: a cubic of x - floor(x). 0 for -infinity, NaN for NaN.
LFM_AMX_INLINE __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802456673811986f), f, _mm512_set1_ps(0.22606719922589233f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958334665649448f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252325331928f));
  return _mm512_scalef_ps(p, x);
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
  for (int64_t channel = 0; channel < width; channel += 32) {
    const bool wide = channel + 16 < width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t key = 0; key < row; key += 32) {
      const Bf16* packed = s.v + (key / 32 * across + channel / 16) * kTile;
      _tile_loadd(4, s.weights + key, row * 2);
      _tile_loadd(6, packed, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) {
        _tile_loadd(7, packed + kTile, 64);
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
  TileShapes before, shapes;
  _tile_storeconfig(&before);  // oneDNN may have its own in use
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
  _tile_loadconfig(&shapes);
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
  _tile_loadconfig(&before);
}

#else

bool may_use_tiles() { return false; }

#endif

bool has_tiles() {
  static const bool has = may_use_tiles();
  return has && active_level() == Level::avx512;
}

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

extern "C" __attribute__((visibility("default"))) bool lfm_fast_cpu_has_tiles() { return lfm_fast::has_tiles(); }
