// Sums of squares over a sample, in the order that the CPU library has: 256 accumulators a chunk, folded in halves; the
// chunks of a sample in double, one after the other. No atomics, so the same bits come out every time.
#pragma once

#include <cstdint>

#include "common/chunks.h"
#include "common/flow_math.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lfm_fast {

constexpr int kFolded = 32;
static_assert(kThreads == kTile && kTile % (2 * kFolded) == 0);

struct SumShared {
  alignas(16) float terms[kChunk];  // each element's own, to be squared
  float lanes[kTile];
  float folded[kFolded];
  double total;
};

// A thread's quad of terms: always whole, what lies beyond the chunk's end is not read.
LFM_DEVICE void put_terms(SumShared& shared, int start, const Quad32& quad) {
  *reinterpret_cast<Quad32*>(&shared.terms[start]) = quad;
}

// values[0 .. 2 half) fold into values[0]: halves are added until one is left. By recursion, because a loop over `half`
// is not unrolled, and then the values live in memory instead of registers.
template <int half>
LFM_DEVICE float fold(float* values) {
  LFM_UNROLL
  for (int j = 0; j < half; ++j) values[j] += values[j + half];
  if constexpr (half > 1) return fold<half / 2>(values);
  return values[0];
}

// How the work of a call is cut into items: a sample each where that is enough for the device, and then its result is
// written by the same launch; else a chunk each, whose sums a second launch finishes.
struct SumPlan {
  Chunks chunks;
  bool whole_samples;
  float* sums;  // one per chunk, unless whole_samples

  int64_t items() const { return whole_samples ? chunks.samples : chunks.count(); }
};

inline SumPlan plan_sums(Device& device, int64_t samples, int64_t elements) {
  SumPlan plan{Chunks(samples, elements), false, nullptr};
  plan.whole_samples = plan.chunks.per_sample <= 1 || (samples >= 1024 && plan.chunks.per_sample <= 64);
  if (!plan.whole_samples)
    plan.sums = device.keep(device.empty({plan.chunks.count()}, ScalarType::Float)).mutable_data_ptr<float>();
  return plan;
}

// result(sum of squares of shared.terms[0 .. n)), called by thread 0.
template <typename Result>
LFM_DEVICE void sum_of_chunk(SumShared& shared, int n, const Threads& threads, const Result& result) {
  threads.each([&](int thread) {
    float sum = 0.0f;
    for (int j = thread; j < n; j += kThreads) sum = add_square(sum, shared.terms[j]);
    shared.lanes[thread] = sum;
  });
  threads.each([&](int thread) {
    if (thread >= kFolded) return;
    float values[kTile / kFolded];
    LFM_UNROLL
    for (int m = 0; m < kTile / kFolded; ++m) values[m] = shared.lanes[thread + kFolded * m];
    shared.folded[thread] = fold<kTile / kFolded / 2>(values);
  });
  threads.each([&](int thread) {
    if (thread != 0) return;
    float values[kFolded];
    LFM_UNROLL
    for (int m = 0; m < kFolded; ++m) values[m] = shared.folded[m];
    result(fold<kFolded / 2>(values));
  });
}

// One item of `plan`: terms(sample, begin, n, thread) puts a thread's elements of a chunk into shared.terms;
// finish(sample, mean) writes the result of a sample.
template <typename Terms, typename Finish>
LFM_DEVICE void sum_item(const SumPlan& plan, int64_t item, SumShared& shared, const Threads& threads,
                         const Terms& terms, const Finish& finish) {
  const Chunks& chunks = plan.chunks;
  if (!plan.whole_samples) {
    const int64_t sample = chunks.sample(item), begin = chunks.begin(item);
    const int n = static_cast<int>(chunks.end(item) - begin);
    threads.each([&](int thread) { terms(sample, begin, n, thread); });
    sum_of_chunk(shared, n, threads, [&](float sum) { plan.sums[item] = sum; });
    return;
  }
  for (int64_t begin = 0; begin < chunks.elements; begin += kChunk) {
    const int64_t left = chunks.elements - begin;
    const int n = static_cast<int>(left < kChunk ? left : kChunk);
    threads.each([&](int thread) { terms(item, begin, n, thread); });
    sum_of_chunk(shared, n, threads, [&](float sum) { shared.total = (begin == 0 ? 0.0 : shared.total) + sum; });
  }
  threads.each([&](int thread) {
    if (thread == 0) finish(item, mean_of_total(chunks.elements == 0 ? 0.0 : shared.total, chunks.elements));
  });
}

// The second launch: a thread per sample. finish is a struct with operator()(sample, mean).
template <typename Finish>
struct FinishSums {
  using Shared = NothingShared;
  static constexpr int64_t kMostBlocks = kManyBlocks;

  SumPlan plan;
  Finish finish;

  LFM_DEVICE void item(int64_t item, Shared&, const Threads& threads) const {
    threads.independently([&](int thread) {
      const int64_t sample = item * kThreads + thread;
      if (sample < plan.chunks.samples) finish(sample, mean_of_chunks(plan.sums, sample, plan.chunks));
    });
  }
};

template <typename Finish>
void finish_sums(const Device& device, const SumPlan& plan, const Finish& finish) {
  if (plan.whole_samples) return;
  device.launch(FinishSums<Finish>{plan, finish}, (plan.chunks.samples + kThreads - 1) / kThreads);
}

}  // namespace lfm_fast
