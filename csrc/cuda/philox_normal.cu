// philox_normal: (B, numel) standard normals, row b from (seed, stream, index_b).
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lfm_fast {
namespace {

struct PhiloxNormal {
  using Shared = NothingShared;
  static constexpr int64_t kMostBlocks = kManyBlocks;

  Chunks chunks;
  Noise noise;
  OutputRows out;

  LFM_DEVICE void item(int64_t item, Shared&, const Threads& threads) const {
    const int64_t sample = chunks.sample(item), begin = chunks.begin(item), n = chunks.end(item) - begin;
    threads.independently([&](int thread) {
      const PhiloxKey key = noise.key(sample);
      for (int i = 0; i < kQuadsPerThread; ++i) {
        const int start = quad_start(thread, i), count = quad_size(start, n);
        if (count == 0) return;
        float normal[kQuad];
        noise.quad(key, begin + start, normal);
        out.store(sample, begin + start, count, normal);
      }
    });
  }
};

Tensor philox_normal(const Tensor& index, int64_t numel, int64_t seed, int64_t stream, int64_t offset) {
  LFM_CHECK(numel >= 0, "numel must not be negative, got ", numel, ".");
  LFM_CHECK(index.dim() == 1, "index must have shape (B,), got ", shape_text(index), ".");
  check_counter(stream, offset, numel);
  Device device("philox_normal", index, "index");
  const int64_t samples = index.size(0);
  Tensor out = device.empty({samples, numel}, ScalarType::Float);
  const PhiloxNormal kernel{Chunks(samples, numel), noise_of(device, index, samples, seed, stream, offset),
                            output_rows(out, "out")};
  device.launch(kernel, kernel.chunks.count());
  return out;
}

}  // namespace

LFM_REGISTER_CUDA(philox_normal, philox_normal);

}  // namespace lfm_fast
