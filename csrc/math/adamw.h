// AdamW of n objectives from one snapshot (PAPER: parallel averaging):
//   theta <- snapshot + sum_i weight_i * delta_i,  delta_i = the AdamW update of objective i.
// Every multiplication that feeds an addition is an explicit fused multiply-add, so that no
// compiler is free to round differently: one element gives the same bits in the vector loop, in its
// tail, under any number of threads, with any instruction set and on the GPU.
#pragma once
#include <cmath>

#include "math/common.h"

namespace megarlx {

constexpr int kMaxObjectives = 8;

struct AdamWArgs {
  std::int64_t count;  // elements of each flat buffer
  int objectives;
  Dtype dtype;       // of the master and of the moments
  Dtype grad_dtype;  // dtype, or bfloat16
  Dtype out_dtype;   // dtype, or bfloat16
  void* master;      // the snapshot; written unless only_delta
  const void* grads[kMaxObjectives];
  void* exp_avgs[kMaxObjectives];
  void* exp_avg_sqs[kMaxObjectives];
  void* out;        // may be null: a copy of the new master, or sum_i weight_i * delta_i
  bool only_delta;  // the master is read, not written, and `out` gets the sum
  // One number an objective each, on the device of the buffers.
  const double* lrs;
  const double* weight_decays;
  const double* clips;    // multiplied into the gradient
  const double* weights;  // null: all 1
  std::int64_t* steps;    // finished steps; advanced where the objective is not skipped
  const bool* found_inf;  // null: none is skipped
  double beta1[kMaxObjectives];
  double beta2[kMaxObjectives];
  double eps[kMaxObjectives];
};

// What an element needs to know about an objective. Computed in double, rounded to T once.
template <typename T>
struct AdamWCoefficients {
  T clip, beta1, one_minus_beta1, beta2, one_minus_beta2;
  T inverse_root_correction2;  // 1 / sqrt(1 - beta2^step)
  T eps;
  T step_size;  // -lr / (1 - beta1^step)
  T decay;      // -lr * weight_decay
  T weight;
  bool skipped;      // moments stay as they are
  bool contributes;  // not skipped, and weight is not 0

  template <typename U>
  MEGARLX_HD AdamWCoefficients<U> rounded() const {
    return {static_cast<U>(clip),
            static_cast<U>(beta1),
            static_cast<U>(one_minus_beta1),
            static_cast<U>(beta2),
            static_cast<U>(one_minus_beta2),
            static_cast<U>(inverse_root_correction2),
            static_cast<U>(eps),
            static_cast<U>(step_size),
            static_cast<U>(decay),
            static_cast<U>(weight),
            skipped,
            contributes};
  }
};

// Call once an objective and step: it advances the step.
MEGARLX_HD AdamWCoefficients<double> adamw_coefficients(const AdamWArgs& args, int i) {
  const bool skipped = args.found_inf != nullptr && args.found_inf[i];
  const std::int64_t step = args.steps[i] + (skipped ? 0 : 1);
  args.steps[i] = step;
  const double correction1 = 1.0 - pow(args.beta1[i], static_cast<double>(step));
  const double correction2 = 1.0 - pow(args.beta2[i], static_cast<double>(step));
  const double weight = args.weights == nullptr ? 1.0 : args.weights[i];
  return {args.clips[i],
          args.beta1[i],
          1.0 - args.beta1[i],
          args.beta2[i],
          1.0 - args.beta2[i],
          1.0 / sqrt(correction2),
          args.eps[i],
          -args.lrs[i] / correction1,
          -args.lrs[i] * args.weight_decays[i],
          weight,
          skipped,
          !skipped && weight != 0.0};
}

// The operations of the formula on V: here a number, in cpu/averaging.h a vector of them.
template <typename V>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  static MEGARLX_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  static MEGARLX_HD float sqrt(float a) { return ::sqrtf(a); }
};

template <>
struct Arithmetic<double> {
  static MEGARLX_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
  static MEGARLX_HD double sqrt(double a) { return ::sqrt(a); }
};

// Moves the moments of one objective and returns its delta at the snapshot `theta`.
template <typename V, typename T>
MEGARLX_HD V adamw_delta(V theta, V grad, V& exp_avg, V& exp_avg_sq,
                         const AdamWCoefficients<T>& c) {
  using A = Arithmetic<V>;
  const V g = V(c.clip) * grad;
  exp_avg = A::fma(V(c.beta1), exp_avg, V(c.one_minus_beta1) * g);
  exp_avg_sq = A::fma(V(c.beta2), exp_avg_sq, V(c.one_minus_beta2) * g * g);
  const V denominator = A::fma(A::sqrt(exp_avg_sq), V(c.inverse_root_correction2), V(c.eps));
  return A::fma(V(c.decay), theta, V(c.step_size) * (exp_avg / denominator));
}

// The sum over objectives starts at -0, which is neutral for every number, +0 and -0 included: an
// objective that is skipped or has weight 0 leaves no trace, not even in the sign of a zero.
template <typename V, typename T>
MEGARLX_HD V add_delta(V sum, V delta, const AdamWCoefficients<T>& c) {
  return Arithmetic<V>::fma(V(c.weight), delta, sum);
}

}  // namespace megarlx
