// Normal numbers that are a function of (key, index) alone: an endless row of them for each key, of
// which anyone computes any part.
//
// Numbers are made in groups of 64, so that a vector of lanes is a run of neighbours. With i an
// index, lane l = i mod 16 and quarter j = (i mod 64) / 16, the 128 bits are those of
//     philox(counter = 16 (i / 64) + l, key),
// words 0 and 1 make the quarters 0 and 1, words 2 and 3 the quarters 2 and 3, by Box and Muller:
//     radius^2 = -2 ln((w + 1/2) / 2^32)    angle = (w' + 1/2) / 2^32 of a turn
// So |number| < 6.77; a true normal number is beyond that once in 8e10.
//
// All of it is fp32 arithmetic whose roundings IEEE 754 fixes (no exp, log or cos of a library; a
// product that meets a sum is a written fma; nothing a compiler may contract is left), so every
// machine and backend computes the same bits. The numbers are within 1e-6 of the exact formula's.
#pragma once
#include <cmath>
#include <cstring>

#include "math/common.h"
#include "math/philox.h"

namespace megarlx::normal {

constexpr int kLanes = 16;
constexpr int kGroup = 4 * kLanes;

MEGARLX_HD float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }

MEGARLX_HD float as_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
MEGARLX_HD std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -2 ln(1 + f) / f, for 1 + f in [sqrt(1/2), sqrt(2)], to 1e-8 before rounding
MEGARLX_HD float minus_two_log_series(float f) {
  float p = 0x1.31335ap-3f;
  p = fma_of(p, f, -0x1.064786p-2f);
  p = fma_of(p, f, 0x1.0fb036p-2f);
  p = fma_of(p, f, -0x1.22cf10p-2f);
  p = fma_of(p, f, 0x1.5423b0p-2f);
  p = fma_of(p, f, -0x1.999e86p-2f);
  p = fma_of(p, f, 0x1.000424p-1f);
  p = fma_of(p, f, -0x1.55555ep-1f);
  p = fma_of(p, f, 0x1.fffff8p-1f);
  return fma_of(p, f, -2.0f);
}

// -2 ln(u) for u = (w + 1/2) / 2^32. Near 1 it is taken from 1 - u, which the complement of w gives
// to full relative precision.
MEGARLX_HD float squared_radius(std::uint32_t w) {
  constexpr float kMinusTwoLn2 = -0x1.62e430p+0f;
  const float units = static_cast<float>(w) + 0.5f;  // u 2^32
  const std::uint32_t offset = as_bits(units) - 0x3f3504f3u;
  const std::int32_t exponent = (static_cast<std::int32_t>(offset) >> 23) - 32;
  const float far = as_float((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float near = (static_cast<float>(~w) + 0.5f) * -0x1p-32f;
  // A selection by bits: of two values a compiler makes a branch, and no vectors.
  const std::uint32_t near_one = 0u - (((w >> 30) + 1u) >> 2);  // all bits where u >= 3/4
  const float f = as_float((as_bits(near) & near_one) | (as_bits(far) & ~near_one));
  const float whole = static_cast<float>(exponent) * kMinusTwoLn2;
  return fma_of(minus_two_log_series(f), f, as_float(as_bits(whole) & ~near_one));
}

struct Direction {
  float cosine, sine;
};

// Cosine and sine of w / 2^32 of a turn: of the rest of the nearest quarter, then turned by it.
MEGARLX_HD Direction direction(std::uint32_t w) {
  const std::uint32_t shifted = w + 0x20000000u, quarter = shifted >> 30;
  const auto rest = static_cast<std::int32_t>(shifted & 0x3fffffffu) - 0x20000000;
  const float x = static_cast<float>(2 * rest + 1) * 0x1p-31f;  // quarters of a turn, within 1/2
  const float square = x * x;
  float s = -0x1.2d9b40p-8f;
  s = fma_of(s, square, 0x1.465ec4p-4f);
  s = fma_of(s, square, -0x1.4abbbap-1f);
  s = fma_of(s, square, 0x1.921fb6p+0f);
  s = s * x;
  float c = 0x1.db6490p-11f;
  c = fma_of(c, square, -0x1.55cb98p-6f);
  c = fma_of(c, square, 0x1.03c1eap-2f);
  c = fma_of(c, square, -0x1.3bd3ccp+0f);
  c = fma_of(c, square, 1.0f);
  const bool odd = (quarter & 1u) != 0;
  const std::uint32_t flip_cosine = ((quarter + 1u) & 2u) << 30, flip_sine = (quarter & 2u) << 30;
  return {as_float(as_bits(odd ? s : c) ^ flip_cosine), as_float(as_bits(odd ? c : s) ^ flip_sine)};
}

// Element [r, c] of `out` becomes std times the number at first + r step + c.
struct Args {
  void* out;
  Dtype dtype;
  std::int64_t rows, columns, row_stride;
  std::int64_t first, step;
  std::uint64_t key;
  float std;
  std::int64_t groups;  // that a row may touch
};

MEGARLX_HD std::int64_t most_groups(std::int64_t columns) {
  return (columns + 2 * (kGroup - 1)) / kGroup;
}

// One group of a row: its numbers [begin, end) are wanted, number i at out[at + i].
struct Place {
  std::int64_t counter;  // of lane 0
  std::int64_t at;
  std::int64_t begin, end;
};

MEGARLX_HD Place place_of(const Args& args, std::int64_t item) {
  const std::int64_t row = item / args.groups;
  const std::int64_t start = args.first + row * args.step;
  const std::int64_t group = start / kGroup + (item - row * args.groups);
  const std::int64_t before = group * kGroup - start;  // negative: the row starts inside
  const std::int64_t left = args.columns - before;
  return {group * kLanes, row * args.row_stride + before, before < 0 ? -before : 0,
          left < kGroup ? left : kGroup};
}

}  // namespace megarlx::normal
