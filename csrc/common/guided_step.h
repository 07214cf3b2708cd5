// What the kernels of guided_step have in common on every device: limits, the noise's stream, and which arguments go
// together.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace lfm_fast {

constexpr size_t kMostStored = 16;
constexpr int64_t kNoiseStream = 5;  // the stochastic solvers' stream

inline void check_guided_step(const Tensor& z, const std::optional<Tensor>& unconditional,
                              const std::optional<Tensor>& scale, const std::vector<Tensor>& stored,
                              const std::optional<Tensor>& noise_scale, const std::optional<Tensor>& index) {
  check_dtype(z, "z", ScalarType::Float);
  LFM_CHECK(unconditional.has_value() == scale.has_value(), "unconditional and scale go together, one is missing.");
  LFM_CHECK(noise_scale.has_value() == index.has_value(), "noise_scale and index go together: one is missing.");
  LFM_CHECK(stored.size() <= kMostStored, "stored holds ", stored.size(), " velocities, at most ", kMostStored,
            " fit.");
}

}  // namespace lfm_fast
