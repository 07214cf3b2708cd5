// The gradient of softmax(scale q k^T) v in bfloat16 by the tile instructions (AMX): algorithm 2 of FlashAttention-2
// (arXiv 2307.08691). One item of work is one head, so that no sum crosses threads. Scores are made again, transposed:
// 32 keys by 32 queries at a time. The weights P^T and their gradient dS^T, rounded to bfloat16, are then rows as dV
// and dK want them, and dQ^T takes dS^T two keys at a time, whose tiles are made from the same registers.
#include "common/registration.h"
#include "cpu/attention_heads.h"

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)

constexpr int64_t kChunk = 256;              // queries whose dS^T is kept until dQ is made of it
constexpr int64_t kSide = 32;                // keys, and queries, that are taken at a time: two tiles by two
constexpr int64_t kProduct = kSide * kSide;  // numbers of one product

struct Backward : AttentionCall {
  Heads grad, out;
  const float* lse;  // (B, heads, T_q), contiguous
  Bf16* grads;       // (B, tokens, 3, heads, d), contiguous
  int64_t tokens;    // the larger of T_q and T_k

  int64_t padded_keys() const { return rounded_up(keys, kSide); }
  int64_t chunk() const { return queries < kChunk ? rounded_up(queries, kSide) : kChunk; }
  int64_t inner() const { return rounded_up(width, 32); }
  int64_t outer() const { return rounded_up(width, 16); }
  int64_t steps() const { return inner() / 32; }
  // Elements of dK, and of dV, that are kept: of one block of keys where one chunk holds all queries.
  int64_t sums() const { return (queries <= kChunk ? kSide : padded_keys()) * outer() + 16; }
  Bf16* grad_at(int64_t sample, int64_t token, int64_t which, int64_t head) const {
    return grads + (((sample * tokens + token) * 3 + which) * heads + head) * width;
  }
};

// What one thread works in.
struct Scratch {
  Workspace memory;
  Bf16 *k_rows, *v_rows, *k_turned;                       // of all keys
  Bf16 *q_columns, *grad_columns, *q_pairs, *grad_pairs;  // of a chunk of queries
  Bf16 *weights, *slopes, *slope_pairs;                   // P^T and dS^T of 32 keys; dS^T of all keys
  float *lse, *delta, *products, *grad_k, *grad_v;        // log2(e) lse, D; S^T and dP^T, twice; sums

  explicit Scratch(const Backward& a)
      : memory({2 * a.padded_keys() * a.inner(), 2 * a.padded_keys() * a.inner(), 2 * a.padded_keys() * a.outer(),
                2 * a.chunk() * a.inner(), 2 * a.chunk() * a.inner(), 2 * a.chunk() * a.outer(),
                2 * a.chunk() * a.outer(), 2 * kSide * a.chunk(), 2 * kSide * a.chunk(),
                2 * a.padded_keys() * a.chunk(), 4 * a.chunk(), 4 * a.chunk(), 4 * 4 * kProduct, 4 * a.sums(),
                4 * a.sums()}) {
    k_rows = memory.take<Bf16>(a.padded_keys() * a.inner());
    v_rows = memory.take<Bf16>(a.padded_keys() * a.inner());
    k_turned = memory.take<Bf16>(a.padded_keys() * a.outer());
    q_columns = memory.take<Bf16>(a.chunk() * a.inner());
    grad_columns = memory.take<Bf16>(a.chunk() * a.inner());
    q_pairs = memory.take<Bf16>(a.chunk() * a.outer());
    grad_pairs = memory.take<Bf16>(a.chunk() * a.outer());
    weights = memory.take<Bf16>(kSide * a.chunk());
    slopes = memory.take<Bf16>(kSide * a.chunk());
    slope_pairs = memory.take<Bf16>(a.padded_keys() * a.chunk());
    lse = memory.take<float>(a.chunk());
    delta = memory.take<float>(a.chunk());
    products = memory.take<float>(4 * kProduct);
    grad_k = memory.take<float>(a.sums());
    grad_v = memory.take<float>(a.sums());
  }
};

// What remains to be done of the products S^T and dP^T of 32 keys and 32 queries: some rows after every step of the
// next ones, since tiles and vectors are different units.
struct Finish {
  const float *scores = nullptr, *gains, *lse, *delta;  // nullptr: nothing
  Bf16 *weights, *slopes, *pairs;
  __mmask32 present;  // queries
  int64_t keys, next;
  float factor;

  // Two keys: P = 2^(S scale log2(e) - lse log2(e)), dS = P (dP - D).
  LFM_AMX_INLINE void two_keys() {
    __m512i slope[2];
    LFM_UNROLL_16
    for (int64_t n = 0; n < 2; ++n) {
      slope[n] = _mm512_setzero_si512();
      if (next + n >= keys) continue;
      __m512 p[2], g[2];
      LFM_UNROLL_16
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = (next + n) * kSide + 16 * half;
        const __m512 s = _mm512_load_ps(scores + at), sum = _mm512_load_ps(lse + 16 * half);
        p[half] = power_of_two(_mm512_fmsub_ps(s, _mm512_set1_ps(factor), sum));
        g[half] = _mm512_mul_ps(p[half], _mm512_sub_ps(_mm512_load_ps(gains + at), _mm512_load_ps(delta + 16 * half)));
      }
      const __m512i weight = reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(present, p[1], p[0]));
      slope[n] = reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(present, g[1], g[0]));
      _mm512_store_si512(weights + (next + n) * kSide, weight);
      _mm512_store_si512(slopes + (next + n) * kSide, slope[n]);
    }
    // the even queries in one tile, the odd ones in the other; in each word two keys
    const __m512i low = _mm512_set1_epi32(0xffff);
    constexpr int kSelect = 0xca;  // the first operand's bits choose between the other two
    const __m512i even = _mm512_ternarylogic_epi32(low, slope[0], _mm512_slli_epi32(slope[1], 16), kSelect);
    const __m512i odd = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(slope[0], 16), slope[1], kSelect);
    _mm512_store_si512(pairs + next * 16, even);
    _mm512_store_si512(pairs + next * 16 + kTile16, odd);
    next += 2;
  }
  LFM_AMX_INLINE void some(int64_t pairs_of_keys) {
    if (scores == nullptr) return;
    for (int64_t i = 0; i < pairs_of_keys && next < kSide; ++i) two_keys();
    if (next == kSide) scores = nullptr;
  }
};

// result (32 x 32) = left (32 x 32 steps) right (32 steps x 32), whose rows and columns from 16 on may be missing.
LFM_AMX_INLINE void multiply(const Bf16* left, const Bf16* right, int64_t steps, bool tall, bool wide, float* result,
                             Finish& last, int64_t share) {
  const int64_t half = steps * kTile16;
  before_tiles_read();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, left += kTile16, right += kTile16) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (wide) {
      _tile_loadd(7, right + half, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (tall) {
      _tile_loadd(5, left + half, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (wide) _tile_dpbf16ps(3, 5, 7);
    }
    last.some(share);
  }
  _tile_stored(0, result, 4 * kSide);
  if (wide) _tile_stored(1, result + 16, 4 * kSide);
  if (tall) _tile_stored(2, result + 16 * kSide, 4 * kSide);
  if (tall && wide) _tile_stored(3, result + 16 * kSide + 16, 4 * kSide);
}

// sums (32 keys x d) = or += left (32 keys x queries, P^T or dS^T) right (queries x d, in pairs).
LFM_AMX_INLINE void accumulate(const Backward& a, const Bf16* left, const Bf16* right, int64_t strips, bool tall,
                               bool add, float* sums) {
  const int64_t width = a.outer(), across = width / 16;
  before_tiles_read();
  for (int64_t channel = 0; channel < width; channel += 32) {
    const bool wide = channel + 16 < width;
    float* const at = sums + channel;
    if (add) {
      _tile_loadd(0, at, 4 * width);
      if (wide) _tile_loadd(1, at + 16, 4 * width);
      if (tall) _tile_loadd(2, at + 16 * width, 4 * width);
      if (tall && wide) _tile_loadd(3, at + 16 * width + 16, 4 * width);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t strip = 0; strip < strips; ++strip) {
      const Bf16* const packed = right + (strip * across + channel / 16) * kTile16;
      _tile_loadd(4, left + strip * kProduct, 64);
      _tile_loadd(6, packed, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) {
        _tile_loadd(7, packed + kTile16, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (tall) {
        _tile_loadd(5, left + strip * kProduct + kTile16, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (wide) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, at, 4 * width);
    if (wide) _tile_stored(1, at + 16, 4 * width);
    if (tall) _tile_stored(2, at + 16 * width, 4 * width);
    if (tall && wide) _tile_stored(3, at + 16 * width + 16, 4 * width);
  }
}

// Up to 32 channels of a token, times a factor, rounded.
LFM_AMX_INLINE void store_channels(__m512 low, __m512 high, float factor, int64_t count, Bf16* to) {
  const __m512 times = _mm512_set1_ps(factor);
  const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, times), _mm512_mul_ps(low, times));
  _mm512_mask_storeu_epi16(to, first_of_32(count), reinterpret_cast<__m512i>(rounded));
}

LFM_AMX_INLINE void store_keys(const Backward& a, const float* sums, int64_t count, float factor, Bf16* to) {
  const int64_t next = 3 * a.heads * a.width;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t n = 0; n < a.width; n += 32) {
      const float* const from = sums + i * a.outer() + n;
      store_channels(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), factor, a.width - n, to + i * next + n);
    }
}

// dQ of 32 queries: K^T dS^T, 32 channels at a time, turned when it is complete.
LFM_AMX_INLINE void store_queries(const Backward& a, const Scratch& s, int64_t strip, int64_t count, Bf16* to) {
  const int64_t blocks = a.padded_keys() / kSide, across = a.outer() / 16, next = 3 * a.heads * a.width;
  before_tiles_read();
  for (int64_t channel = 0; channel < a.width; channel += 32) {
    const bool tall = channel + 16 < a.width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < blocks; ++block) {
      const Bf16* const left = s.k_turned + (block * across + channel / 16) * kTile16;
      const Bf16* const right = s.slope_pairs + (strip * blocks + block) * kProduct;
      _tile_loadd(4, left, 64);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + kTile16, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (tall) {
        _tile_loadd(5, left + kTile16, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, s.products, 64);
    _tile_stored(1, s.products + 256, 64);
    _tile_stored(2, s.products + 512, 64);
    _tile_stored(3, s.products + 768, 64);
    for (int64_t odd = 0; odd < 2; ++odd) {
      __m512i low[16], high[16];
      LFM_UNROLL_16
      for (int64_t i = 0; i < 16; ++i) {
        low[i] = _mm512_load_si512(s.products + 256 * odd + 16 * i);
        high[i] = _mm512_load_si512(s.products + 512 + 256 * odd + 16 * i);
      }
      transpose(low);
      transpose(high);
      LFM_UNROLL_16
      for (int64_t i = 0; i < 16; ++i)
        if (2 * i + odd < count)
          store_channels(_mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]), a.scale, a.width - channel,
                         to + (2 * i + odd) * next + channel);
    }
  }
}

// lse log2(e) and D, the sum of grad out over the channels, of a chunk of queries.
LFM_AMX_INLINE void read_sums(const Backward& a, const HeadTokens& grad, const HeadTokens& out, const float* lse,
                              Scratch& s) {
  for (int64_t i = 0; i < grad.count; ++i) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < a.width; n += 32)
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(grad.channels(i, n)),
                             reinterpret_cast<__m512bh>(out.channels(i, n)));
    s.delta[i] = _mm512_reduce_add_ps(sum) + 0.0f * lse[i];  // NaN where the scores are not finite
    s.lse[i] = lse[i] * kLog2E;
  }
}

// The rows that the gradients of a block will be written to lie far apart: they are fetched while it is computed.
LFM_AMX_INLINE void fetch_rows(const Backward& a, int64_t sample, int64_t head, int64_t first, int64_t count) {
  for (int64_t i = 0; i < 3 * count; ++i) {
    const Bf16* const row = a.grad_at(sample, first + i / 3, i % 3, head);
    for (int64_t n = 0; n < a.width; n += 32) __builtin_prefetch(row + n, 1, 2);
  }
}

// dK and dV of all keys for a chunk of `count` queries, added to those of earlier ones, and its dS^T.
LFM_AMX_INLINE void run_keys(const Backward& a, int64_t sample, int64_t head, int64_t first, int64_t count,
                             Scratch& s) {
  const int64_t steps = a.steps(), strips = (count + kSide - 1) / kSide, blocks = a.padded_keys() / kSide;
  const bool keep = a.queries > kChunk, last_chunk = first + count == a.queries;
  const int64_t share = (kSide / 2 + 2 * steps - 1) / (2 * steps);
  Finish last;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t keys = a.keys - block * kSide < kSide ? a.keys - block * kSide : kSide;
    const bool tall = keys > 16;
    const int64_t left = block * 2 * steps * kTile16;
    if (last_chunk && blocks >= 4) fetch_rows(a, sample, head, block * kSide, keys);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t queries = count - strip * kSide, right = strip * 2 * steps * kTile16;
      float* const scores = s.products + (strip % 2) * 2 * kProduct;
      multiply(s.k_rows + left, s.q_columns + right, steps, tall, queries > 16, scores, last, share);
      multiply(s.v_rows + left, s.grad_columns + right, steps, tall, queries > 16, scores + kProduct, last, share);
      last.some(kSide);
      last.scores = scores, last.gains = scores + kProduct;
      last.lse = s.lse + strip * kSide, last.delta = s.delta + strip * kSide;
      last.weights = s.weights + strip * kProduct, last.slopes = s.slopes + strip * kProduct;
      last.pairs = s.slope_pairs + (strip * blocks + block) * kProduct;
      last.present = first_of_32(queries);
      last.keys = keys, last.next = 0, last.factor = a.scale * kLog2E;
    }
    last.some(kSide);
    float* const grad_k = s.grad_k + (keep ? block * kSide * a.outer() : 0);
    float* const grad_v = s.grad_v + (keep ? block * kSide * a.outer() : 0);
    accumulate(a, s.weights, s.grad_pairs, strips, tall, first > 0, grad_v);
    accumulate(a, s.slopes, s.q_pairs, strips, tall, first > 0, grad_k);
    if (!last_chunk) continue;
    store_keys(a, grad_k, keys, a.scale, a.grad_at(sample, block * kSide, 1, head));
    store_keys(a, grad_v, keys, 1.0f, a.grad_at(sample, block * kSide, 2, head));
  }
}

LFM_AMX_CODE void run_heads(const Backward& a, int64_t begin, int64_t end) {
  Scratch s(a);
  const Tiles tiles;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / a.heads, head = item % a.heads;
    const HeadTokens k{a.k.at(sample, head), a.k.token, a.keys, a.width};
    pack_rows(k, s.k_rows);
    pack_turned(k, s.k_turned);
    pack_rows({a.v.at(sample, head), a.v.token, a.keys, a.width}, s.v_rows);
    for (int64_t first = 0; first < a.queries; first += kChunk) {
      const int64_t count = a.queries - first < kChunk ? a.queries - first : kChunk;
      const HeadTokens q{a.q.at(sample, head) + first * a.q.token, a.q.token, count, a.width};
      const HeadTokens grad{a.grad.at(sample, head) + first * a.grad.token, a.grad.token, count, a.width};
      const HeadTokens out{a.out.at(sample, head) + first * a.out.token, a.out.token, count, a.width};
      pack_columns(q, s.q_columns);
      pack_columns(grad, s.grad_columns);
      pack_pairs(q, s.q_pairs);
      pack_pairs(grad, s.grad_pairs);
      read_sums(a, grad, out, a.lse + item * a.queries + first, s);
      run_keys(a, sample, head, first, count, s);
      for (int64_t i = 0; i < count; i += kSide)
        store_queries(a, s, i / kSide, count - i, a.grad_at(sample, first + i, 0, head));
    }
  }
}

#endif

// Where q has fewer tokens than k, or k than q, the rows that are nobody's are 0; without queries all are.
void clear_rest(const AttentionCall& call, int64_t tokens, uint16_t* grads) {
  const int64_t row = call.heads * call.width;
  for (int64_t sample = 0; sample < call.batch; ++sample)
    for (int64_t which = 0; which < 3; ++which)
      for (int64_t token = which && call.queries ? call.keys : call.queries; token < tokens; ++token)
        std::fill_n(grads + ((sample * tokens + token) * 3 + which) * row, row, uint16_t{0});
}

// (B, T, 3, heads, d), T the larger number of tokens: the gradients of q, k and v.
Tensor attention_backward(const Tensor& grad, const Tensor& q, const std::optional<Tensor>& k,
                          const std::optional<Tensor>& v, const Tensor& out, const Tensor& lse,
                          std::optional<double> scale) {
  AttentionCall call = read_call(q, k, v, scale);
  const std::vector<int64_t> shape{call.batch, call.heads, call.queries, call.width};
  check_on_cpu(grad, "grad");
  check_on_cpu(out, "out");
  check_on_cpu(lse, "lse");
  check_table(grad, "grad", ScalarType::BFloat16, shape);
  check_table(out, "out", ScalarType::BFloat16, shape);
  check_table(lse, "lse", ScalarType::Float, {call.batch, call.heads, call.queries});
  const int64_t tokens = std::max(call.queries, call.keys);
  Tensor grads = new_tensor({call.batch, tokens, 3, call.heads, call.width}, ScalarType::BFloat16);
  uint16_t* const result = static_cast<uint16_t*>(grads.mutable_data_ptr());
  clear_rest(call, tokens, result);
#if defined(LFM_AMX)
  const Heads of_grad = call.heads_of(grad), of_out = call.heads_of(out);
  const Tensor sums = lse.is_contiguous() ? lse : torch::stable::contiguous(lse);
  const Backward a{call, of_grad, of_out, static_cast<const float*>(sums.const_data_ptr()), result, tokens};
  const int64_t items = call.queries ? call.batch * call.heads : 0;
  const int64_t work = 3 * std::max<int64_t>(1, rounded_up(call.queries, kSide) * call.keys * call.width);
  parallel_for(0, items, std::max<int64_t>(1, (int64_t{1} << 20) / work),
               [&a](int64_t first, int64_t last) { run_heads(a, first, last); });
#endif
  return grads;
}

}  // namespace

LFM_REGISTER(CPU, attention_backward, attention_backward);

}  // namespace lfm_fast
