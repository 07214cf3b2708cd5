// The arithmetic of the flow ops, one element at a time, shared by every device. Each line rounds as written.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/power_of_two.h"

namespace lfm_fast {

// z_t = alpha z_0 + sigma z_1, and with the derivatives the target d_alpha z_0 + d_sigma z_1.
LFM_HD float combine(float a, float x, float b, float y) { return a * x + b * y; }

// exp(x / 2) is power_of_two(at_most_128(exponent_of_half(x))): to (|x| + 2) 2^-24 of it, from 2^-126 up to infinity,
// and NaN for NaN. In three steps, because a loop over all of it becomes several ways through the whole (GCC 12); one
// over each bound does not.
LFM_HD float exponent_of_half(float x) {
  const float y = x * 0x1.715476p-1f;  // log2(e) / 2
  return y < -126.0f ? -126.0f : y;
}

LFM_HD float at_most_128(float y) { return y > 128.0f ? 128.0f : y; }

LFM_HD float power_of_two(float y) {
  const float power = std::bit_cast<float>(bits_of_power_of_two(y));
  return power + (y - y);  // the bits of a NaN are no number's, and adding to them may make them one
}

// z_0 = mean + exp(log_variance / 2) normal, of the exponent of that.
LFM_HD float draw(float mean, float exponent, float normal) { return mean + power_of_two(exponent) * normal; }

// One more term of a linear combination.
LFM_HD float add_term(float total, float weight, float term) { return total + weight * term; }

LFM_HD float add_square(float total, float x) { return total + x * x; }

// v = scale v_cond + (1 - scale) v_uncond; one_minus_scale is computed once per sample.
LFM_HD float blend(float scale, float one_minus_scale, float conditional, float unconditional) {
  return scale * conditional + one_minus_scale * unconditional;
}

// max(|z|, |z_next|), NaN if either is: a solver must see a sample that has left the numbers.
LFM_HD float magnitude(float z, float z_next) {
  const float a = std::fabs(z), b = std::fabs(z_next);
  return ((a > b) | (a != a)) ? a : b;
}

// The error of one element in units of its tolerance.
LFM_HD float error_ratio(float error, float atol, float rtol, float z, float z_next) {
  return error / (atol + rtol * magnitude(z, z_next));
}

// sqrt(mean) of squared error ratios, from their sum.
LFM_HD float root_mean(double mean) { return static_cast<float>(std::sqrt(mean)); }

// loss = weight mean (velocity - target)^2, hence d loss / d velocity = slope (velocity - target).
LFM_HD float loss_slope(float weight, int64_t elements) {
  return static_cast<float>(2.0 * weight / static_cast<double>(elements > 1 ? elements : 1));
}

LFM_HD float weighted_loss(float weight, double mean) { return static_cast<float>(weight * mean); }

}  // namespace lfm_fast
