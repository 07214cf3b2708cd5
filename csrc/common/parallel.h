// Splits a range over PyTorch's own threads: follows torch.set_num_threads, runs serially inside an outer parallel
// region, and brings no second OpenMP runtime beside the one torch has.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

#if defined(__SANITIZE_THREAD__)
#include <algorithm>
#include <thread>
#include <vector>
#endif

namespace lfm_fast {

// body(first, last) over disjoint ranges that cover [begin, end), each at least `grain` long where there is more than
// one.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
#if defined(__SANITIZE_THREAD__)
  // The thread sanitizer cannot see the barriers of an uninstrumented OpenMP runtime and reports races that are none.
  // It is to see threads at work in small calls too, hence no regard to the grain.
  static_cast<void>(grain);
  const int64_t ranges = std::min<int64_t>(torch::stable::get_num_threads(), end - begin);
  const int64_t length = (end - begin + ranges - 1) / ranges;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += length)
    threads.emplace_back([&body, first, last = std::min(first + length, end)] { body(first, last); });
  for (auto& thread : threads) thread.join();
#else
  torch::stable::parallel_for(begin, end, grain, body);
#endif
}

}  // namespace lfm_fast
