// average_adamw_ and the two halves of replica_average_ on the CPU.
// Buffers are walked in blocks that stay in the first-level cache, one objective after the other
// inside a block: any number of objectives costs one pass over memory, and what differs between
// them (skipped or not, gradient dtype) is decided once a block.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "math/adamw.h"
#include "math/bfloat16.h"
#include "math/replica_average.h"

namespace megarlx {

template <typename T>
struct Arithmetic<at::vec::Vectorized<T>> {
  using V = at::vec::Vectorized<T>;
  static MEGARLX_HD V fma(const V& a, const V& b, const V& c) {
#ifdef __FMA__
    return at::vec::fmadd(a, b, c);
#else
    // at::vec would round twice here, and the result would depend on the instruction set.
    T x[V::size()], y[V::size()], z[V::size()];
    a.store(x);
    b.store(y);
    c.store(z);
    for (int lane = 0; lane < V::size(); ++lane)
      z[lane] = Arithmetic<T>::fma(x[lane], y[lane], z[lane]);
    return V::loadu(z);
#endif
  }
  static MEGARLX_HD V sqrt(const V& a) { return a.sqrt(); }
};

namespace cpu {
namespace {

constexpr std::int64_t kAveragingBlock = 1024;
constexpr int kNormLanes = 32;  // several vectors of double, to hide the latency of an addition

// Elements [begin, begin + count) as T: where they lie, or widened into `scratch`.
template <typename T>
const T* read_block(const void* source, Dtype dtype, std::int64_t begin, std::int64_t count,
                    T* scratch) {
  if (dtype != Dtype::kBFloat16) return static_cast<const T*>(source) + begin;
  const auto* bits = static_cast<const std::uint16_t*>(source) + begin;
  for (std::int64_t e = 0; e < count; ++e) scratch[e] = static_cast<T>(from_bfloat16(bits[e]));
  return scratch;
}

template <typename T>
void write_block(void* target, Dtype dtype, std::int64_t begin, std::int64_t count,
                 const T* values) {
  if (dtype != Dtype::kBFloat16) {
    std::copy(values, values + count, static_cast<T*>(target) + begin);
    return;
  }
  auto* bits = static_cast<std::uint16_t*>(target) + begin;
  for (std::int64_t e = 0; e < count; ++e) bits[e] = to_bfloat16(static_cast<float>(values[e]));
}

// One objective over one block: moments in place, weight * delta added to `sum`.
template <typename T>
void adamw_block(std::int64_t count, const T* theta, const T* grad, T* exp_avg, T* exp_avg_sq,
                 T* sum, const AdamWCoefficients<T>& c) {
  using V = at::vec::Vectorized<T>;
  auto lanes = [&](std::int64_t e, std::int64_t n) __attribute__((always_inline)) {
    V m = V::loadu(exp_avg + e, n), v = V::loadu(exp_avg_sq + e, n);
    const V delta = adamw_delta(V::loadu(theta + e, n), V::loadu(grad + e, n), m, v, c);
    m.store(exp_avg + e, n);
    v.store(exp_avg_sq + e, n);
    if (c.contributes) add_delta(V::loadu(sum + e, n), delta, c).store(sum + e, n);
  };
  std::int64_t e = 0;
  for (; e + V::size() <= count; e += V::size()) lanes(e, V::size());
  if (e < count) lanes(e, count - e);
}

template <typename T>
void average_adamw_as(const AdamWArgs& args, const AdamWCoefficients<double>* coefficients,
                      std::int64_t begin, std::int64_t end) {
  AdamWCoefficients<T> c[kMaxObjectives];
  for (int i = 0; i < args.objectives; ++i) c[i] = coefficients[i].rounded<T>();
  T widened[kAveragingBlock], sum[kAveragingBlock];
  for (std::int64_t b = begin; b < end; b += kAveragingBlock) {
    const std::int64_t count = std::min(kAveragingBlock, end - b);
    T* theta = static_cast<T*>(args.master) + b;
    std::fill(sum, sum + count, T(-0.0));
    for (int i = 0; i < args.objectives; ++i) {
      if (c[i].skipped) continue;
      const T* grad = read_block(args.grads[i], args.grad_dtype, b, count, widened);
      adamw_block(count, theta, grad, static_cast<T*>(args.exp_avgs[i]) + b,
                  static_cast<T*>(args.exp_avg_sqs[i]) + b, sum, c[i]);
    }
    if (args.only_delta) {
      write_block(args.out, args.out_dtype, b, count, sum);
      continue;
    }
    for (std::int64_t e = 0; e < count; ++e) theta[e] += sum[e];
    if (args.out != nullptr) write_block(args.out, args.out_dtype, b, count, theta);
  }
}

void average_adamw(const AdamWArgs& args, const AdamWCoefficients<double>* coefficients,
                   std::int64_t begin, std::int64_t end) {
  if (args.dtype == Dtype::kFloat64)
    average_adamw_as<double>(args, coefficients, begin, end);
  else
    average_adamw_as<float>(args, coefficients, begin, end);
}

// Sum of squares in double, where the squares of floats are exact and cannot overflow. Lanes are
// summed in memory order, whatever the width of a vector.
template <typename T>
void add_squares(const T* x, std::int64_t count, double (&sums)[kNormLanes]) {
  using V = at::vec::Vectorized<double>;
  double wide[kAveragingBlock];
  const std::int64_t padded = (count + kNormLanes - 1) / kNormLanes * kNormLanes;
  for (std::int64_t e = 0; e < count; ++e) wide[e] = x[e];
  for (std::int64_t e = count; e < padded; ++e) wide[e] = 0;
  constexpr int kVectors = kNormLanes / V::size();
  V sum[kVectors];
  for (int k = 0; k < kVectors; ++k) sum[k] = V::loadu(sums + k * V::size());
  for (std::int64_t e = 0; e < padded; e += kNormLanes)
    for (int k = 0; k < kVectors; ++k) {
      const V value = V::loadu(wide + e + k * V::size());
      sum[k] = Arithmetic<V>::fma(value, value, sum[k]);
    }
  for (int k = 0; k < kVectors; ++k) sum[k].store(sums + k * V::size());
}

template <typename T>
void replica_average_pack_as(const PackArgs& args, std::int64_t begin_chunk,
                             std::int64_t end_chunk) {
  const bool skip = args.found_inf != nullptr && *args.found_inf;
  const T weight = static_cast<T>(*args.weight);
  T widened[kAveragingBlock], scaled[kAveragingBlock];
  for (std::int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    const std::int64_t end = std::min(args.count, (chunk + 1) * kPackChunk);
    double sums[kNormLanes] = {};
    for (std::int64_t b = chunk * kPackChunk; b < end; b += kAveragingBlock) {
      const std::int64_t count = std::min(kAveragingBlock, end - b);
      const T* x = read_block(args.input, args.input_dtype, b, count, widened);
      add_squares(x, count, sums);
      if (skip)
        std::fill(scaled, scaled + count, T(0));
      else
        for (std::int64_t e = 0; e < count; ++e) scaled[e] = weight * x[e];
      write_block(args.packed, args.wire_dtype, b, count, scaled);
    }
    double sum = 0;
    for (double lane : sums) sum += lane;
    args.partial_norms[chunk] = sum;
  }
}

void replica_average_pack(const PackArgs& args, std::int64_t begin_chunk, std::int64_t end_chunk) {
  if (args.input_dtype == Dtype::kFloat64)
    replica_average_pack_as<double>(args, begin_chunk, end_chunk);
  else
    replica_average_pack_as<float>(args, begin_chunk, end_chunk);
}

template <typename T>
void replica_average_apply_as(const ApplyArgs& args, std::int64_t begin, std::int64_t end) {
  T widened[kAveragingBlock];
  for (std::int64_t b = begin; b < end; b += kAveragingBlock) {
    const std::int64_t count = std::min(kAveragingBlock, end - b);
    T* target = static_cast<T*>(args.target) + b;
    const T* summed = read_block(args.summed, args.wire_dtype, b, count, widened);
    if (args.add)
      for (std::int64_t e = 0; e < count; ++e) target[e] += summed[e];
    else
      std::copy(summed, summed + count, target);
    if (args.out != nullptr) write_block(args.out, args.out_dtype, b, count, target);
  }
}

void replica_average_apply(const ApplyArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == Dtype::kFloat64)
    replica_average_apply_as<double>(args, begin, end);
  else
    replica_average_apply_as<float>(args, begin, end);
}

}  // namespace
}  // namespace cpu
}  // namespace megarlx
