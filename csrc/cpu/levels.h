// Function multiversioning: each kernel body is compiled for AVX-512, AVX2 and the baseline, one is chosen at load.
//
// A kernel is a struct with `template <Level> void run(int64_t first, int64_t last) const`, forced inline together with
// all it calls, so that its loops are vectorised with the instructions of the function it ends up in. Results are the
// same to the bit at every level: no contraction (-ffp-contract=off), and every reduction has a lane structure of its
// own.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LFM_X86_LEVELS 1
#if defined(__clang__)
#define LFM_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,fma,f16c"), min_vector_width(512)))
#else
#define LFM_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,fma,f16c,prefer-vector-width=512")))
#endif
#define LFM_AVX2 __attribute__((target("avx2,bmi,bmi2,fma,f16c")))
#endif

namespace lfm_fast {

enum class Level { baseline, avx2, avx512 };

// The level in use: the machine's best, or the one LFM_FAST_CPU_LEVEL named when the library was loaded.
// Throws where the variable names no level, or one that this machine does not have.
Level active_level();

template <typename Kernel>
__attribute__((noinline)) void run_baseline(const Kernel& kernel, int64_t first, int64_t last) {
  kernel.template run<Level::baseline>(first, last);
}

#if defined(LFM_X86_LEVELS)
template <typename Kernel>
LFM_AVX2 __attribute__((noinline)) void run_avx2(const Kernel& kernel, int64_t first, int64_t last) {
  kernel.template run<Level::avx2>(first, last);
}

template <typename Kernel>
LFM_AVX512 __attribute__((noinline)) void run_avx512(const Kernel& kernel, int64_t first, int64_t last) {
  kernel.template run<Level::avx512>(first, last);
}
#endif

// kernel.run over [0, count) at the active level, in parallel; `grain` is the least number of items worth a thread.
template <typename Kernel>
void run_kernel(const Kernel& kernel, int64_t count, int64_t grain) {
  auto run = &run_baseline<Kernel>;
#if defined(LFM_X86_LEVELS)
  switch (active_level()) {
    case Level::avx512: run = &run_avx512<Kernel>; break;
    case Level::avx2: run = &run_avx2<Kernel>; break;
    case Level::baseline: break;
  }
#endif
  parallel_for(0, count, grain, [&kernel, run](int64_t first, int64_t last) { run(kernel, first, last); });
}

}  // namespace lfm_fast
