// Words that let one source serve the host and a device compiler.
#pragma once

#if defined(__CUDACC__)
#define LFM_HD __host__ __device__ __forceinline__
#else
// Forced: a kernel body is compiled once per instruction set by being inlined into a function of that instruction set
// (cpu/levels.h). A helper left out of line would stay at the baseline, several times slower.
#define LFM_HD inline __attribute__((always_inline))
#endif
