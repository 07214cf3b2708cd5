// AdamW (Loshchilov and Hutter 2019, algorithm 2) and the moving average of the weights, one element at a time, shared
// by every device. Each line rounds as written.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace lfm_fast {

// What all elements of a step share; made in double from the schedule (learning rate, step from 1 on, decay of the
// average).
struct AdamW {
  float keep;                  // 1 - learning_rate weight_decay
  float step_size;             // learning_rate / (1 - beta1^step)
  float correction;            // 1 / sqrt(1 - beta2^step)
  float beta2, first, second;  // first = 1 - beta1, second = 1 - beta2
  float eps;
  float average;         // 1 - ema_decay
  float gradient_scale;  // 1 without one
  float smallest;        // moments below it become 0
};

LFM_HD AdamW adamw_of(double learning_rate, double step, double ema_decay, double beta1, double beta2, double eps,
                      double weight_decay, float gradient_scale) {
  AdamW w;
  w.keep = static_cast<float>(1.0 - learning_rate * weight_decay);
  w.step_size = static_cast<float>(learning_rate / (1.0 - std::pow(beta1, step)));
  w.correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  w.beta2 = static_cast<float>(beta2);
  w.first = static_cast<float>(1.0 - beta1);
  w.second = static_cast<float>(1.0 - beta2);
  w.eps = static_cast<float>(eps);
  w.average = static_cast<float>(1.0 - ema_decay);
  w.gradient_scale = gradient_scale;
  // Where gradients are 0 (the rows of labels that a batch lacks), moments decay into subnormal numbers and stay there:
  // on a CPU each of them costs a hundred cycles, in every step from then on. Beside this eps they move nothing.
  w.smallest = eps > 1e-15 ? 0x1p-126f : 0.0f;
  return w;
}

LFM_HD float at_least(float smallest, float x) { return std::fabs(x) < smallest ? 0.0f : x; }

// Parameter p and its moments m and v after a step with this gradient.
LFM_HD void adamw_element(const AdamW& w, float gradient, float& p, float& m, float& v) {
  const float g = gradient * w.gradient_scale;
  m = at_least(w.smallest, m + (g - m) * w.first);
  v = at_least(w.smallest, v * w.beta2 + (g * g) * w.second);
  const float denominator = std::sqrt(v) * w.correction + w.eps;
  p = p * w.keep - (m / denominator) * w.step_size;
}

LFM_HD float averaged_element(const AdamW& w, float averaged, float p) { return averaged + (p - averaged) * w.average; }

}  // namespace lfm_fast
