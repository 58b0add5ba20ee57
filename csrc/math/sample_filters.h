// What is kept of a row's logits before a token is drawn (sample.h).
#pragma once
#include "math/sample.h"

namespace megarlx::sampling {

// Filters. Each of them, ties kept, is a threshold on the logit: keep x >= threshold.
//     top-k: the k-th largest logit
//     top-p: the largest value v such that ids with x >= v hold at least p of what top-k left
//     min-p: probability >= min_p * the largest probability
// Weights are then integers relative to the row's largest logit: sums of them are exact.
constexpr float kFilterUnit = 0x1p40f;

MEGARLX_HD std::uint64_t filter_weight(float x, float largest, const Scale& scale) {
  return static_cast<std::uint64_t>(weight(x - largest, scale.c, scale.floor) * kFilterUnit);
}

// Unsigned keys in the order of the floats (-0 and +0 alike).
MEGARLX_HD std::uint32_t ordered_key(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MEGARLX_HD float from_ordered_key(std::uint32_t key) {
  return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The smallest float that is at least `bound`.
MEGARLX_HD float at_least(double bound) {
  if (!(bound > -3.4028234663852886e38)) return kMinusInfinity;
  const float f = static_cast<float>(bound);
  if (static_cast<double>(f) >= bound) return f;
  return from_ordered_key(ordered_key(f) + 1);
}

MEGARLX_HD float min_p_threshold(float min_p, float largest, const Scale& scale) {
  if (!(min_p > 0.0f)) return kMinusInfinity;
  if (min_p >= 1.0f) return largest;
  return at_least(static_cast<double>(largest) +
                  log2_of_double(static_cast<double>(min_p)) * scale.inverse_c);
}

// Ids below this logit hold, all `count` of them together, less than (1 - p) of `total` (in units
// of the largest weight): the top-p threshold is not among them.
MEGARLX_HD float top_p_lower_bound(float p, double total, std::int64_t count, float largest,
                                   const Scale& scale) {
  const double left = (1.0 - static_cast<double>(p)) * total;
  if (!(left > 1e-7)) return kMinusInfinity;
  const double each = log2_of_double(left) - log2_of_double(static_cast<double>(count)) - 1e-5;
  const double bound = static_cast<double>(largest) + each * scale.inverse_c -
                       1e-6 * fabs(static_cast<double>(largest));
  const float f = static_cast<float>(bound);
  return f < largest ? f : largest;
}

}  // namespace megarlx::sampling
