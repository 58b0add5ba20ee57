// Drawing a token from a row of logits: the formulas of both backends.
//
// The row is cut into tiles of 128 ids, counted over the whole vocabulary. With x the logits, T the
// temperature, c = log2(e) / T and everything in base 2,
//     weight of id i in its tile    2^(c (x_i - tile's largest x))           <= 1
//     sum of a tile                 the weights in one fixed tree (see tree_sum)
//     score of a tile               c * largest x + log2(sum / E),  E = -log2(u), u uniform
// and the token is drawn in two steps: the tile with the highest score (a Gumbel maximum over the
// tiles' masses), then an id inside it by inversion in exact integer arithmetic. Both uniforms are
// bits of philox(seed, sequence, position, tile): they depend on nothing else, so a row gets the
// same token in any batch, row order or split of the vocabulary at tile edges.
//
// Everything up to the winning tile is fp32 with each rounding written down (fmaf where a product
// meets a sum), so that both backends compute the same bits.
#pragma once
#include <cmath>
#include <cstring>

#include "math/common.h"
#include "math/philox.h"

namespace megarlx::sampling {

constexpr int kTile = 128;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kMinusInfinity = -__builtin_huge_valf();

template <class To, class From>
MEGARLX_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

MEGARLX_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else  // no such instruction: two roundings, so a token may differ from other machines' near a tie
  return a * b + c;
#endif
}

// What a row needs of its temperature.
struct Scale {
  float c;           // log2(e) / T
  float floor;       // the most negative x - largest x that counts: its weight is about 2^-125
  double inverse_c;  // 1 / c
  bool greedy;       // T = 0
  bool valid;        // false: T is negative or not a number
  bool is_model;     // T = 1: the distribution sampled from is the model's (greedy rows too)
};

// 1 / v for a normal positive number, by Newton's iteration: a division would be a call on a GPU,
// with registers spilled around it.
MEGARLX_HD double reciprocal(double v) {
  double r = bits_as<double>(0x7fde623822fc16e6ull - bits_as<std::uint64_t>(v));  // to 12%
  for (int i = 0; i < 5; ++i) r = fma(r, fma(-v, r, 1.0), r);
  return r;
}

MEGARLX_HD Scale scale_of(float temperature) {
  Scale s;
  s.valid = temperature >= 0.0f && temperature <= 3.4e38f;
  s.greedy = temperature == 0.0f;
  s.is_model = temperature == 1.0f || s.greedy;
  // Beyond 1e+-30 a temperature changes nothing that fp32 logits can show.
  const float t = s.is_model || !s.valid ? 1.0f : fminf(fmaxf(temperature, 1e-30f), 1e30f);
  s.c = static_cast<float>(kLog2E * reciprocal(static_cast<double>(t)));
  s.inverse_c = static_cast<double>(t) * kLn2;
  s.floor = t * -86.643f;
  return s;
}

// 2^f for f in [-1/2, 1/2]
MEGARLX_HD float weight_polynomial(float f) {
  float p = 0x1.5bba14p-10f;
  p = fused(p, f, 0x1.3cea88p-7f);
  p = fused(p, f, 0x1.c6b752p-5f);
  p = fused(p, f, 0x1.ebf9bcp-3f);
  p = fused(p, f, 0x1.62e42ap-1f);
  return fused(p, f, 1.0f);
}

// 2^(d c), for floor <= d (or below: the weight of the floor, which vanishes beside 1). The result
// is a product so that NaN stays NaN.
MEGARLX_HD float weight(float d, const float c, const float floor) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(d), "f"(floor));
#else
  d = d < floor ? floor : d;
#endif
  const float shifted = fused(d, c, kShift);
  const float p = weight_polynomial(fused(d, c, -(shifted - kShift)));
  return p * bits_as<float>((bits_as<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

// weight() of a d that is no NaN: a result that is never denormal needs no product, only its
// exponent.
MEGARLX_HD float weight_of_number(float d, const float c, const float floor) {
  constexpr float kShift = 12582912.0f;
  d = fmaxf(d, floor);
  const float shifted = fused(d, c, kShift);
  return bits_as<float>(
      bits_as<std::uint32_t>(weight_polynomial(fused(d, c, -(shifted - kShift)))) +
      (bits_as<std::uint32_t>(shifted) << 23));
}

// log2(1 + f) / f for 1 + f in [sqrt(1/2), sqrt(2)]
MEGARLX_HD float log2_series(float f) {
  float p = -0.109949484f;
  p = fused(p, f, 0.18617493f);
  p = fused(p, f, -0.19106276f);
  p = fused(p, f, 0.20460063f);
  p = fused(p, f, -0.2396174f);
  p = fused(p, f, 0.2885674f);
  p = fused(p, f, -0.36069664f);
  p = fused(p, f, 0.48089823f);
  p = fused(p, f, -0.72134733f);
  return fused(p, f, 1.442695f);
}

// log2 of a normal positive number
MEGARLX_HD float log2_of(float v) {
  const std::uint32_t bits = bits_as<std::uint32_t>(v);
  const std::uint32_t offset = bits - 0x3f3504f3u;  // sqrt(1/2)
  const std::int32_t exponent = static_cast<std::int32_t>(offset) >> 23;
  const float f = bits_as<float>((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  return fused(log2_series(f), f, static_cast<float>(exponent));
}

// log2 of a normal positive number to 1e-7: that of the nearest fp32, and of what is left. Written
// here so that both backends agree.
MEGARLX_HD double log2_of_double(double v) {
  const auto bits = bits_as<std::uint64_t>(v);
  const auto exponent = static_cast<std::int64_t>(bits >> 52) - 1023;
  const double mantissa = bits_as<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  const float near = static_cast<float>(mantissa);
  const double rest = mantissa - static_cast<double>(near);
  const double inverse = 1.457 - 0.5 * static_cast<double>(near);  // of near in [1, 2], roughly
  return static_cast<double>(log2_of(near)) + rest * inverse * kLog2E +
         static_cast<double>(exponent);
}

// 2^v to 1e-7, for v in [-1000, 1000]
MEGARLX_HD double exp2_of_double(double v) {
  const double whole = floor(v);
  const auto exponent = static_cast<std::uint64_t>(static_cast<std::int64_t>(whole) + 1023);
  return static_cast<double>(weight(static_cast<float>(v - whole), 1.0f, -125.0f)) *
         bits_as<double>(exponent << 52);
}

// -log2(u) for u = (the upper 63 bits + 1/2) / 2^63. Near u = 1 it is taken from 1 - u, which the
// complement of the bits gives to full relative precision: both tails reach to 2^-64.
MEGARLX_HD float exponential_base2(std::uint64_t bits) {
  constexpr float kUnit = 0x1p-63f;
  const float u = (static_cast<float>(static_cast<std::int64_t>(bits >> 1)) + 0.5f) * kUnit;
  const float v = (static_cast<float>(static_cast<std::int64_t>(~bits >> 1)) + 0.5f) * kUnit;
  const bool near_one = u > 0.75f;
  const float far = -log2_of(near_one ? 0.5f : u);
  const float f = near_one ? -v : 0.0f;
  return near_one ? -(f * log2_series(f)) : far;
}

// What a row's noise is made from; then a tile's: bits for its Gumbel (low), for the draw inside it
// (high).
struct RowKey {
  Random128 key;
};

MEGARLX_HD RowKey row_key(std::int64_t seed, std::int64_t sequence, std::int64_t position) {
  const auto s = static_cast<std::uint64_t>(seed);
  const auto a = static_cast<std::uint64_t>(sequence);
  const auto b = static_cast<std::uint64_t>(position);
  return {philox(std::uint32_t(a), std::uint32_t(a >> 32), std::uint32_t(b), std::uint32_t(b >> 32),
                 std::uint32_t(s), std::uint32_t(s >> 32))};
}

MEGARLX_HD Random128 tile_noise(const RowKey& row, std::int64_t tile) {
  return philox(std::uint32_t(tile), std::uint32_t(static_cast<std::uint64_t>(tile) >> 32),
                row.key.word[2], row.key.word[3], row.key.word[0], row.key.word[1]);
}

// A sum of weights mantissa * 2^exponent that does not depend on the order or the grouping of its
// terms: integers on a fixed grid of exponents (steps of 2^20), of which the top three steps are
// kept. What falls below them is less than 2^-40 of the largest term.
struct Mass {
  static constexpr int kStep = 20;
  static constexpr std::int64_t kEmpty = INT64_MIN / 4;
  std::int64_t top;
  std::int64_t sum[3];

  MEGARLX_HD void clear() {
    top = kEmpty;
    sum[0] = sum[1] = sum[2] = 0;
  }
  MEGARLX_HD void raise(std::int64_t to) {
    if (to <= top) return;
    const std::int64_t by = to - top;
    sum[2] = by == 1 ? sum[1] : by == 2 ? sum[0] : 0;
    sum[1] = by == 1 ? sum[0] : 0;
    sum[0] = 0;
    top = to;
  }
  MEGARLX_HD void add(const Mass& other) {
    if (other.top == kEmpty) return;
    raise(other.top);
    const std::int64_t below = top - other.top;
    // Written without an index that varies, which would put the array into memory on a GPU.
    if (below == 0) {
      sum[0] += other.sum[0];
      sum[1] += other.sum[1];
      sum[2] += other.sum[2];
    } else if (below == 1) {
      sum[1] += other.sum[0];
      sum[2] += other.sum[1];
    } else if (below == 2) {
      sum[2] += other.sum[0];
    }
  }
  // tile_sum * 2^(c * largest)
  MEGARLX_HD void add_tile(double base, float tile_sum) {
    constexpr double kLimit = 1125899906842624.0;  // 2^50: beyond it fp32 logits have no fraction
    base = base > kLimit ? kLimit : base < -kLimit ? -kLimit : base;
    const double whole = floor(base);
    const float fraction = static_cast<float>(base - whole);
    const float value = tile_sum * weight(fraction, 1.0f, -125.0f);
    const std::uint32_t bits = bits_as<std::uint32_t>(value);
    const std::int64_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
    const std::int64_t exponent = static_cast<std::int64_t>(whole) + (bits >> 23) - 150;
    // Division that rounds down.
    const std::int64_t step = (exponent >= 0 ? exponent : exponent - (kStep - 1)) / kStep;
    raise(step);
    const std::int64_t term = mantissa << (exponent - step * kStep);
    const std::int64_t below = top - step;
    sum[0] += below == 0 ? term : 0;
    sum[1] += below == 1 ? term : 0;
    sum[2] += below == 2 ? term : 0;
  }
  MEGARLX_HD double log2() const {
    const double total = static_cast<double>(sum[0]) + static_cast<double>(sum[1]) * 0x1p-20 +
                         static_cast<double>(sum[2]) * 0x1p-40;
    return log2_of_double(total) + static_cast<double>(top) * kStep;
  }
};

// A tile's score as an exact sum high + low, so that equal huge logits still differ by their noise.
struct Score {
  double high;
  double low;
  MEGARLX_HD bool operator>(const Score& other) const {
    return high > other.high || (high == other.high && low > other.low);
  }
};

// log2 of the tile's sum, and its Gumbel (in base 2)
MEGARLX_HD float tile_gumbel(float tile_sum, std::uint64_t noise) {
  return log2_of(tile_sum / exponential_base2(noise));
}

MEGARLX_HD Score tile_score(double base, float gumbel_of_sum) {
  const double gumbel = static_cast<double>(gumbel_of_sum);
  const double high = base + gumbel;
  const double rounded = high - base;
  return {high, (base - (high - rounded)) + (gumbel - rounded)};
}

// The draw inside a tile: weights as integers, and the first id whose running sum passes the
// target. Exact whatever the order of the additions.
MEGARLX_HD std::int64_t integer_weight(float w) { return static_cast<std::int64_t>(w * 0x1p55f); }

MEGARLX_HD std::int64_t inversion_target(std::uint64_t noise, std::uint64_t total) {
#ifdef __CUDA_ARCH__
  return static_cast<std::int64_t>(__umul64hi(noise, total));
#else
  return static_cast<std::int64_t>((static_cast<unsigned __int128>(noise) * total) >> 64);
#endif
}

// What a shard knows of a row: 13 words of 64 bits, all that is ever sent.
struct Partial {
  std::int64_t invalid;  // 1: a NaN, a +inf or a bad temperature was seen
  Score score;
  std::int64_t token;  // -1: no id with a finite logit
  double logit;
  Mass model;    // temperature 1, no filter
  Mass sampled;  // temperature and filters; unused where both are the same

  MEGARLX_HD void clear() {
    invalid = 0;
    score = {static_cast<double>(kMinusInfinity), 0.0};
    token = -1;
    logit = 0.0;
    model.clear();
    sampled.clear();
  }
  // Of equal scores the lower id stays, whatever the order of merging.
  MEGARLX_HD void merge(const Partial& other) {
    invalid |= other.invalid;
    const bool tie = !(other.score > score) && !(score > other.score);
    if (other.token >= 0 && (token < 0 || other.score > score || (tie && other.token < token))) {
      score = other.score;
      token = other.token;
      logit = other.logit;
    }
    model.add(other.model);
    sampled.add(other.sampled);
  }
};
constexpr int kPartialWords = sizeof(Partial) / 8;
static_assert(kPartialWords == 13);

struct Drawn {
  std::int64_t token;
  float logprob;
  float sampled_logprob;
};

MEGARLX_HD double clamped_base(double logit, float c) {
  constexpr double kLimit = 1125899906842624.0;
  const double base = logit * static_cast<double>(c);
  return base > kLimit ? kLimit : base < -kLimit ? -kLimit : base;
}

// `one_mass`: the two distributions are the same, and only `model` was summed.
MEGARLX_HD Drawn finish(const Partial& p, const Scale& scale, bool one_mass) {
  const float nan = bits_as<float>(0x7fc00000u);
  if (p.invalid || p.token < 0 || !scale.valid) return {-1, nan, nan};
  const Scale model = scale_of(1.0f);
  Drawn drawn;
  drawn.token = p.token;
  drawn.logprob = static_cast<float>((clamped_base(p.logit, model.c) - p.model.log2()) * kLn2);
  drawn.sampled_logprob = drawn.logprob;
  if (scale.greedy)
    drawn.sampled_logprob = 0.0f;
  else if (!one_mass)
    drawn.sampled_logprob =
        static_cast<float>((clamped_base(p.logit, scale.c) - p.sampled.log2()) * kLn2);
  return drawn;
}

// Arguments of a call: strides of 0 where one value serves all rows; filters that are off are null.
struct SampleArgs {
  const void* logits;
  Dtype dtype;
  std::int64_t rows;
  std::int64_t columns;  // ids that may be drawn; the rest of a row is padding and is not read
  std::int64_t row_stride;
  std::int64_t first_id;  // of this shard; a multiple of kTile
  const std::int64_t* seed;
  const std::int64_t* keys;  // [rows, 2]
  const float* temperature;
  std::int64_t temperature_stride;
  const std::int64_t* top_k;
  std::int64_t top_k_stride;
  const float* top_p;
  std::int64_t top_p_stride;
  const float* min_p;
  std::int64_t min_p_stride;
  Partial* partials;  // [rows]: where this is given, nothing else is written
  std::int64_t* token;
  float* logprob;
  float* sampled_logprob;
};

MEGARLX_HD void store_drawn(const SampleArgs& args, std::int64_t row, const Drawn& drawn) {
  args.token[row] = drawn.token;
  args.logprob[row] = drawn.logprob;
  args.sampled_logprob[row] = drawn.sampled_logprob;
}

}  // namespace megarlx::sampling
