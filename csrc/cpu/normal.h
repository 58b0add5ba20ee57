// normal_slice_ on the CPU: a group of 64 numbers at a time, its 16 lanes side by side.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "math/bfloat16.h"
#include "math/normal.h"

namespace megarlx::cpu {
namespace {

using normal::kLanes;

struct PhiloxLanes {
  std::uint32_t word[4][kLanes];
};

PhiloxLanes philox_lanes(std::uint64_t counter, std::uint64_t key) {
  PhiloxLanes c;
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::uint64_t at = counter + lane;
    c.word[0][lane] = static_cast<std::uint32_t>(at);
    c.word[1][lane] = static_cast<std::uint32_t>(at >> 32);
    c.word[2][lane] = c.word[3][lane] = 0;
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < kLanes; ++lane)
      philox_round(c.word[0][lane], c.word[1][lane], c.word[2][lane], c.word[3][lane], k0, k1);
    next_philox_key(k0, k1);
  }
  return c;
}

// Through at::vec: a compiler keeps sqrtf out of vectors, because it may set errno.
void square_roots(float (&x)[kLanes]) {
  using V = at::vec::Vectorized<float>;
  static_assert(kLanes % V::size() == 0);
  for (int lane = 0; lane < kLanes; lane += V::size()) V::loadu(x + lane).sqrt().store(x + lane);
}

void normal_group(const normal::Args& args, std::int64_t counter, float (&out)[normal::kGroup]) {
  const PhiloxLanes random = philox_lanes(static_cast<std::uint64_t>(counter), args.key);
  for (int half = 0; half < 2; ++half) {
    float radius[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      radius[lane] = normal::squared_radius(random.word[2 * half][lane]);
    square_roots(radius);
    float* pair = out + 2 * half * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const normal::Direction to = normal::direction(random.word[2 * half + 1][lane]);
      pair[lane] = radius[lane] * to.cosine * args.std;
      pair[kLanes + lane] = radius[lane] * to.sine * args.std;
    }
  }
}

template <typename T>
void store_numbers(const float* numbers, const normal::Place& place, T* out) {
  for (std::int64_t i = place.begin; i < place.end; ++i) {
    if constexpr (std::is_same_v<T, std::uint16_t>)
      out[place.at + i] = to_bfloat16(numbers[i]);
    else
      out[place.at + i] = static_cast<T>(numbers[i]);
  }
}

void normal_slice(const normal::Args& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t item = begin; item < end; ++item) {
    const normal::Place place = normal::place_of(args, item);
    if (place.begin >= place.end) continue;
    float numbers[normal::kGroup];
    normal_group(args, place.counter, numbers);
    switch (args.dtype) {
      case Dtype::kFloat32:
        store_numbers(numbers, place, static_cast<float*>(args.out));
        break;
      case Dtype::kFloat64:
        store_numbers(numbers, place, static_cast<double*>(args.out));
        break;
      case Dtype::kBFloat16:
        store_numbers(numbers, place, static_cast<std::uint16_t*>(args.out));
        break;
    }
  }
}

}  // namespace
}  // namespace megarlx::cpu
