// Token loss on the CPU: rows [begin, end). A row is walked in blocks that stay in the L1 cache:
// each block's maximum first, then its exponential sums, so that the row is read from memory once
// for its sums, and once more (from the L2 cache) for the gradient.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>

#include "math/token_loss.h"

namespace megarlx::cpu {
namespace {

constexpr std::int64_t kLossBlock = 1024;

// 20 ulp instead of 1 for fp32, an error of 2e-6 relative to p; inlined, not a call.
inline at::vec::Vectorized<float> fast_exp(at::vec::Vectorized<float> x) { return x.exp_u20(); }
inline at::vec::Vectorized<double> fast_exp(at::vec::Vectorized<double> x) { return x.exp(); }

// Elements [i, i + n) of a row in the precision of the sums: in place, or converted to `buffer`.
template <typename T>
const T* read_block(const T* row, std::int64_t i, std::int64_t, T*) {
  return row + i;
}
inline const float* read_block(const c10::BFloat16* row, std::int64_t i, std::int64_t n,
                               float* buffer) {
  at::vec::convert(row + i, buffer, n);
  return buffer;
}

// Calls visit(vector, i, lanes) over x[0, n). The lanes of the last one that lie beyond n hold
// -inf: they add nothing to any sum.
template <typename T, typename Visit>
inline void for_each_vector(const T* x, std::int64_t n, const Visit& visit) {
  using Vec = at::vec::Vectorized<T>;
  constexpr std::int64_t kLanes = Vec::size();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(Vec::loadu(x + i), i, kLanes);
  if (i == n) return;
  __at_align__ T lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<T>::infinity());
  std::copy_n(x + i, n - i, lanes);
  visit(Vec::loadu(lanes), i, n - i);
}

template <typename T>
T horizontal_sum(at::vec::Vectorized<T> x) {
  return at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return a + b; }, x);
}

template <typename T, typename Logit>
RowSums<T> row_sums(const Logit* row, std::int64_t valid, T inverse_temperature) {
  using Vec = at::vec::Vectorized<T>;
  const Vec scale(inverse_temperature), lowest{T(kLowestExponent)};
  T maximum = std::numeric_limits<T>::lowest();
  Vec exp_sum(T(0)), exp_z_sum(T(0));
  __at_align__ T buffer[kLossBlock];
  for (std::int64_t i = 0; i < valid; i += kLossBlock) {
    const std::int64_t n = std::min(kLossBlock, valid - i);
    const T* block = read_block(row, i, n, buffer);
    Vec top(std::numeric_limits<T>::lowest());
    for_each_vector(block, n, [&](Vec x, std::int64_t, std::int64_t) {
      top = at::vec::clamp_min(x * scale, top);
    });
    // maximum(), unlike clamp_min, would keep a NaN here; the sums below do that.
    const T block_top =
        at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return at::vec::clamp_min(a, b); }, top);
    if (i == 0) {
      maximum = block_top;
    } else if (block_top > maximum) {
      // Moves the sums to the new maximum: z - new = (z - old) + (old - new).
      const T step = std::max(maximum - block_top, T(kLowestExponent));
      const Vec factor(std::exp(step));
      exp_z_sum = factor * at::vec::fmadd(exp_sum, Vec(step), exp_z_sum);
      exp_sum = exp_sum * factor;
      maximum = block_top;
    }
    const Vec top_of_all(maximum);
    for_each_vector(block, n, [&](Vec x, std::int64_t, std::int64_t) {
      const Vec gap = at::vec::clamp_min(at::vec::fmsub(x, scale, top_of_all), lowest);
      const Vec e = fast_exp(gap);
      exp_sum = exp_sum + e;
      exp_z_sum = at::vec::fmadd(e, gap, exp_z_sum);
    });
  }
  RowSums<T> sums{maximum, horizontal_sum(exp_sum), horizontal_sum(exp_z_sum), T(0)};
  // The fast exponential of a NaN is a number; the product with the gap is not.
  if (std::isnan(sums.exp_z_sum)) sums.exp_sum = sums.exp_z_sum;
  return sums;
}

template <typename T, typename Logit>
void write_gradient(const Logit* row, Logit* gradient, std::int64_t valid, std::int64_t columns,
                    T inverse_temperature, T maximum, const GradientTerms<T>& terms) {
  using Vec = at::vec::Vectorized<T>;
  const Vec scale(inverse_temperature), top(maximum), lowest{T(kLowestExponent)};
  const Vec flat(-terms.flat), slope(-terms.slope);
  __at_align__ T buffer[kLossBlock];
  __at_align__ T results[kLossBlock];
  for (std::int64_t i = 0; i < valid; i += kLossBlock) {
    const std::int64_t n = std::min(kLossBlock, valid - i);
    const T* block = read_block(row, i, n, buffer);
    T* out;
    if constexpr (std::is_same_v<T, Logit>) {
      out = gradient + i;
    } else {
      out = results;
    }
    for_each_vector(block, n, [&](Vec x, std::int64_t j, std::int64_t lanes) {
      const Vec gap = at::vec::clamp_min(at::vec::fmsub(x, scale, top), lowest);
      const Vec value = fast_exp(gap) * at::vec::fmadd(slope, gap, flat);
      if (lanes == Vec::size()) {
        value.store(out + j);
      } else {
        value.store(out + j, static_cast<int>(lanes));
      }
    });
    if constexpr (!std::is_same_v<T, Logit>) at::vec::convert(results, gradient + i, n);
  }
  std::fill(gradient + valid, gradient + columns, Logit(T(0)));
}

// What the walks over rows share.
template <typename T, typename Logit>
struct LossRows {
  const TokenLossArgs& args;
  const std::int64_t valid = valid_columns(args);
  const T inverse_temperature = T(1) / number<T>(args.temperature, 0);

  const Logit* logits(std::int64_t token) const {
    return static_cast<const Logit*>(args.logits) + token * args.logits_stride;
  }

  Logit* gradient(std::int64_t token) const {
    auto* gradient = static_cast<Logit*>(args.gradient);
    return gradient == nullptr ? nullptr : gradient + token * args.gradient_stride;
  }

  bool owns_target(std::int64_t token) const {
    const std::int64_t column = args.targets[token] - args.vocab_start;
    return column >= 0 && column < valid;
  }

  T target_logit(std::int64_t token) const {
    const std::int64_t column = args.targets[token] - args.vocab_start;
    return owns_target(token) ? T(logits(token)[column]) * inverse_temperature : T(0);
  }

  RowSums<T> sums(std::int64_t token) const {
    RowSums<T> sums = row_sums<T>(logits(token), valid, inverse_temperature);
    sums.target = target_logit(token);
    return sums;
  }

  // The gradient may be the logits themselves.
  void write(std::int64_t token, T maximum, const GradientTerms<T>& terms) const {
    Logit* out = gradient(token);
    const T z_target = target_logit(token);
    write_gradient<T>(logits(token), out, valid, args.columns, inverse_temperature, maximum, terms);
    if (!owns_target(token)) return;
    // Added before rounding to the gradient's own type: p near 1 would cancel badly.
    const T gap = std::max(z_target - maximum, T(kLowestExponent));
    out[args.targets[token] - args.vocab_start] =
        Logit(terms.at_target - std::exp(gap) * (terms.flat + terms.slope * gap));
  }

  void write_zeros(std::int64_t token) const {
    std::fill_n(gradient(token), args.columns, Logit(T(0)));
  }
};

template <typename T, typename Logit>
void whole_loss(const TokenLossArgs& args, std::int64_t begin, std::int64_t end) {
  const LossRows<T, Logit> rows{args};
  const bool with_gradient = args.gradient != nullptr;
  for (std::int64_t token = begin; token < end; ++token) {
    if (is_masked(args, token)) {
      store_terms(args, token, no_terms<T>());
      if (with_gradient) rows.write_zeros(token);
      continue;
    }
    const RowSums<T> sums = rows.sums(token);
    const TokenTerms<T> terms = terms_of_token(args, token, sums);
    store_terms(args, token, terms);
    if (with_gradient) rows.write(token, sums.maximum, terms.gradient);
  }
}

template <typename T, typename Logit>
void only_sums(const TokenLossArgs& args, std::int64_t begin, std::int64_t end) {
  const LossRows<T, Logit> rows{args};
  for (std::int64_t token = begin; token < end; ++token) {
    const RowSums<T> none{T(0), T(0), T(0), T(0)};
    store_sums(args, token, is_masked(args, token) ? none : rows.sums(token));
  }
}

template <typename T, typename Logit>
void only_gradient(const TokenLossArgs& args, std::int64_t begin, std::int64_t end) {
  const LossRows<T, Logit> rows{args};
  for (std::int64_t token = begin; token < end; ++token) {
    if (is_masked(args, token)) {
      rows.write_zeros(token);
      continue;
    }
    const RowSums<T> sums = stored_sums<T>(args, token);
    rows.write(token, sums.maximum, given_terms(args, token, sums));
  }
}

// Rows [begin, end). The gradient has the dtype of the logits.
void token_loss(const TokenLossArgs& args, LossStep step, std::int64_t begin, std::int64_t end) {
  const auto run = [&](auto precision, auto logit) {
    using T = decltype(precision);
    using Logit = decltype(logit);
    switch (step) {
      case LossStep::kWhole:
        return whole_loss<T, Logit>(args, begin, end);
      case LossStep::kSums:
        return only_sums<T, Logit>(args, begin, end);
      case LossStep::kGradient:
        return only_gradient<T, Logit>(args, begin, end);
    }
  };
  switch (args.logits_dtype) {
    case Dtype::kFloat32:
      return run(float(), float());
    case Dtype::kFloat64:
      return run(double(), double());
    case Dtype::kBFloat16:
      return run(float(), c10::BFloat16());
  }
}

}  // namespace
}  // namespace megarlx::cpu
