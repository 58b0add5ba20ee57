// Rows rounded to e4m3 (4 bits of exponent, 3 of fraction, no infinity) with a scale for each.
#pragma once
#include <cmath>
#include <cstring>

#include "math/common.h"

namespace megarlx {

constexpr float kLargestE4m3 = 448.0f;

struct E4m3Args {
  Dtype dtype;  // of x
  std::int64_t rows, columns;
  const void* x;
  std::uint8_t* values;
  float* scales;
};

// Round to nearest, ties to even. Numbers are below 464, from where on nothing would be nearest.
MEGARLX_HD std::uint8_t to_e4m3(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint8_t>(sign | 0x7Fu);
  std::uint32_t code;
  if (magnitude < 0x3C800000u) {  // 2^-6: below it steps are 2^-9
    code = static_cast<std::uint32_t>(::rintf(::fabsf(value) * 512.0f));
  } else {
    const std::uint32_t rounded = magnitude + 0x7FFFFu + (magnitude >> 20 & 1u);
    code = (rounded >> 20) - (120u << 3);  // the biases of the exponents differ by 120
  }
  return static_cast<std::uint8_t>(sign | code);
}

// NaN where one of both is.
MEGARLX_HD float larger(float a, float b) { return a > b || a != a ? a : b; }

MEGARLX_HD float e4m3_scale(float largest) {
  return largest == 0.0f ? 1.0f : largest / kLargestE4m3;
}

}  // namespace megarlx
