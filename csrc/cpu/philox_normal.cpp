// philox_normal: (B, numel) standard normals, row b from (seed, stream, index_b).
#include "common/registration.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

struct PhiloxNormal {
  Chunks chunks;
  Noise noise;
  float* out;  // (B, numel)

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = chunks.sample(item), end = chunks.end(item);
      for (int64_t start = chunks.begin(item); start < end; start += kTile) {
        const int64_t n = std::min(kTile, end - start);
        float* row = out + sample * chunks.elements + start;
        if (n % 4 == 0) {
          noise.tile<level>(sample, start, n, row);
        } else {  // the last block is cut: whole blocks must not run over the row's end
          TileBuffer buffer;
          std::memcpy(row, noise.tile<level>(sample, start, n, buffer.values), static_cast<size_t>(n) * sizeof(float));
        }
      }
    }
  }
};

Tensor philox_normal(const Tensor& index, int64_t numel, int64_t seed, int64_t stream, int64_t offset) {
  LFM_CHECK(numel >= 0, "numel must not be negative, got ", numel, ".");
  LFM_CHECK(index.dim() == 1, "index must have shape (B,), got ", shape_text(index), ".");
  check_counter(stream, offset, numel);
  const int64_t samples = index.size(0);
  Tensor out = new_tensor({samples, numel}, ScalarType::Float);
  const PhiloxNormal kernel{Chunks(samples, numel), Noise{read_index(index, samples), seed, stream, offset},
                            static_cast<float*>(out.mutable_data_ptr())};
  run_kernel(kernel, kernel.chunks.count(), kernel.chunks.grain(1 << 14));
  return out;
}

}  // namespace

LFM_REGISTER(CPU, philox_normal, philox_normal);

}  // namespace lfm_fast
