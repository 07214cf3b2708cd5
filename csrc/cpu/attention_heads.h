// What attention's forward and backward share: where the heads lie, their tokens in the tiles' orders, the checks.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/amx.h"
#include "cpu/rows.h"

namespace lfm_fast {

constexpr int64_t kMostKeys = 4096;  // with more, a head's packed keys and weights leave the second cache
constexpr int64_t kMostWidth = 256;

// (B, heads, T, d) with any strides but that of the channels, which lie side by side.
struct Heads {
  const Bf16* data;
  int64_t sample, head, token;  // strides in elements

  const Bf16* at(int64_t of_sample, int64_t of_head) const { return data + of_sample * sample + of_head * head; }
};

// What a kernel reads of a call. Tensors whose channels do not lie side by side are copied, and live here.
struct AttentionCall {
  std::vector<Tensor> owners;
  Heads q, k, v;
  int64_t batch, heads, queries, keys, width;
  float scale;

  const Tensor& dense(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    owners.push_back(x.stride(last) == 1 || x.size(last) == 1 ? x : torch::stable::contiguous(x));
    return owners.back();
  }
  Heads heads_of(const Tensor& x) {
    const Tensor& y = dense(x);
    return {static_cast<const Bf16*>(y.const_data_ptr()), y.stride(0), y.stride(1), y.stride(2)};
  }
};

inline void check_heads(const Tensor& x, const char* name) {
  check_on_cpu(x, name);
  check_dtype(x, name, ScalarType::BFloat16);
  LFM_CHECK(x.dim() == 4, name, " must be (B, heads, T, d), got ", shape_text(x), ".");
}

inline void read_three(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  check_same_shape(v, "v", k, "k");
  call.batch = q.size(0), call.heads = q.size(1), call.queries = q.size(2), call.keys = k.size(2);
  call.width = q.size(3);
  LFM_CHECK(k.size(0) == call.batch && k.size(1) == call.heads && k.size(3) == call.width,
            "k must have the shape of q, ", shape_text(q), ", but for the number of tokens, got ", shape_text(k), ".");
  call.q = call.heads_of(q), call.k = call.heads_of(k), call.v = call.heads_of(v);
}

inline void read_fused(AttentionCall& call, const Tensor& qkv) {
  check_on_cpu(qkv, "q");
  check_dtype(qkv, "q", ScalarType::BFloat16);
  LFM_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "q without k and v must be (B, T, 3, heads, d), got ", shape_text(qkv),
            ".");
  call.batch = qkv.size(0), call.heads = qkv.size(3), call.queries = call.keys = qkv.size(1), call.width = qkv.size(4);
  const Tensor& x = call.dense(qkv);
  const Bf16* const data = static_cast<const Bf16*>(x.const_data_ptr());
  Heads* const parts[] = {&call.q, &call.k, &call.v};
  for (int64_t i = 0; i < 3; ++i) *parts[i] = {data + i * x.stride(2), x.stride(0), x.stride(3), x.stride(1)};
}

// q, k and v, or in q alone the (B, T, 3, heads, d) that they are slices of.
inline AttentionCall read_call(const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v,
                               std::optional<double> scale) {
  AttentionCall call{};
  call.owners.reserve(8);  // heads_of gives out references
  LFM_CHECK(k.has_value() == v.has_value(), "k and v go together: one of them is missing.");
  if (k)
    read_three(call, q, *k, *v);
  else
    read_fused(call, q);
  LFM_CHECK(call.keys >= 1 && call.keys <= kMostKeys, "k must have 1 to ", kMostKeys, " tokens, got ", call.keys, ".");
  LFM_CHECK(call.width >= 1 && call.width <= kMostWidth, "q must have 1 to ", kMostWidth, " channels, got ", call.width,
            ".");
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(call.width)));
  LFM_CHECK(factor > 0.0 && std::isfinite(factor), "scale must be a positive number, got ", factor, ".");
  LFM_CHECK(has_tiles(), "attention needs a processor with AMX for bfloat16.");
  call.scale = static_cast<float>(factor);
  return call;
}

#if defined(LFM_AMX)

constexpr float kLog2E = 1.4426950408889634f;

// Tokens of one head, from the first on; packed, those beyond `count` and channels beyond `width` are zeros.
struct HeadTokens {
  const Bf16* data;
  int64_t stride, count, width;

  LFM_AMX_INLINE __m512i channels(int64_t token, int64_t channel) const {
    const __mmask32 present = token < count ? first_of_32(width - channel) : 0;
    return _mm512_maskz_loadu_epi16(present, data + (present ? token * stride + channel : 0));
  }
};

// Tiles of the left factor: (16 tokens, 32 channels), as they are.
LFM_AMX_INLINE void pack_rows(const HeadTokens& x, Bf16* packed) {
  for (int64_t token = 0; token < x.count; token += 16)
    for (int64_t channel = 0; channel < x.width; channel += 32, packed += kTile16)
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, x.channels(token + i, channel));
}

// Tiles of the right factor in a product over channels: (16 tokens, 32 channels), row r holds the channels 2 r and
// 2 r + 1 of each token.
LFM_AMX_INLINE void pack_columns(const HeadTokens& x, Bf16* packed) {
  for (int64_t token = 0; token < x.count; token += 16)
    for (int64_t channel = 0; channel < x.width; channel += 32, packed += kTile16) {
      __m512i rows[16];
      LFM_UNROLL_16
      for (int64_t i = 0; i < 16; ++i) rows[i] = x.channels(token + i, channel);
      transpose(rows);
      LFM_UNROLL_16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, rows[i]);
    }
}

// Two tokens of 16 channels, one beside the other.
LFM_AMX_INLINE __m512i token_pair(const HeadTokens& x, int64_t token, int64_t channel) {
  __m512i pair[2];
  for (int64_t n = 0; n < 2; ++n) {
    const __mmask16 present = token + n < x.count ? first_of_16(x.width - channel) : 0;
    const Bf16* row = x.data + (present ? (token + n) * x.stride + channel : 0);
    pair[n] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, row));
  }
  return _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16));
}

// Tiles of the right factor in a product over tokens: (32 tokens, 16 channels), row r holds the tokens 2 r and 2 r + 1
// of each channel.
LFM_AMX_INLINE void pack_pairs(const HeadTokens& x, Bf16* packed) {
  for (int64_t token = 0; token < x.count; token += 32)
    for (int64_t channel = 0; channel < x.width; channel += 16, packed += kTile16)
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, token_pair(x, token + 2 * i, channel));
}

// Tiles of the left factor in such a product: row c holds the 32 tokens of channel c.
LFM_AMX_INLINE void pack_turned(const HeadTokens& x, Bf16* packed) {
  for (int64_t token = 0; token < x.count; token += 32)
    for (int64_t channel = 0; channel < x.width; channel += 16, packed += kTile16) {
      __m512i rows[16];
      LFM_UNROLL_16
      for (int64_t i = 0; i < 16; ++i) rows[i] = token_pair(x, token + 2 * i, channel);
      transpose(rows);
      LFM_UNROLL_16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + 32 * i, rows[i]);
    }
}

#endif

}  // namespace lfm_fast
