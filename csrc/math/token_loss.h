// The token loss: its arguments, and every formula of one token. A row of logits z = logits /
// temperature is reduced to four sums (RowSums). They and the token's own inputs give its loss and
// metrics, and the loss's derivatives by log-prob, entropy and log sum exp(z) (token_terms). With
// those (GradientTerms) each logit's gradient is
//   -exp(z - maximum) * (flat + slope * (z - maximum)), plus `at_target` at the target.
// A loss that is a function in Python (megarlx/ops/policy_loss.py) brings the derivatives along.
#pragma once
#include <cmath>

#include "math/common.h"

namespace megarlx {

enum class LossMode : std::int32_t { kNll = 0, kReinforce = 1, kPpoClip = 2, kCispo = 3 };
enum class KlEstimator : std::int32_t { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

struct LossSpec {
  LossMode mode;
  KlEstimator kl;
  double clip_low, clip_high;
  double dual_clip;  // 0: none
  double kl_coefficient, entropy_coefficient;
  double z_loss;  // times the square of log sum exp(z)
};

// Columns of the table of fields [tokens, kFields]. Their sums over tokens are the loss and, in
// this order, the metrics; the largest ratio is one metric more, at the end.
enum Field { kLoss, kTokens, kClipped, kKl, kOldKl, kRatio, kNll, kEntropy, kFields };

// Rows of the `partials` tensor [kPartials, tokens]: over vocabulary shards the first combines by
// maximum; the others by sum, after the two exponential sums were moved to the common maximum.
enum LossPartial { kMaximum, kExpSum, kExpZSum, kTarget, kPartials };

// What is done with rows of logits: all of it, or one half of it where shards, or a function in
// Python, stand between the sums and the gradient.
enum class LossStep { kWhole, kSums, kGradient };

template <typename T>
struct RowSums {
  T maximum;    // max z
  T exp_sum;    // sum exp(z - maximum)
  T exp_z_sum;  // sum exp(z - maximum) * (z - maximum)
  T target;     // z at the target; 0 where another shard owns it
};

// exp(z - maximum) is exactly 0 far above this in fp32 and fp64. Differences are limited to it so
// that a logit of -inf gives 0 and not 0 * inf.
constexpr double kLowestExponent = -1000;
// Log-ratios are limited to +-this, so that their exponentials stay finite in fp32.
constexpr double kLargestLogRatio = 80;

struct TokenLossArgs {
  const void* logits;  // [tokens, columns], rows `logits_stride` elements apart
  void* gradient;      // the same shape, or null; may be `logits` itself where the dtypes agree
  std::int64_t logits_stride, gradient_stride;
  Dtype logits_dtype, gradient_dtype;  // sums, inputs and results are fp64 if logits are, else fp32
  std::int64_t tokens, columns;
  std::int64_t vocab_start, vocab_size;  // global id of column 0; ids >= vocab_size are padding
  const std::int64_t* targets;           // [tokens], global ids
  const bool* mask;                      // [tokens] or null (all true)
  const void *advantages, *old_logprobs, *ref_logprobs, *token_weights;  // [tokens] or null
  const void *normalizer, *temperature;                                  // one number each
  const void *by_logprob, *by_entropy, *by_log_z;  // [tokens], derivatives of the loss
  void* partials;                                  // [kPartials, tokens] or null
  void *logprobs, *entropy, *fields;
  LossSpec spec;
};

MEGARLX_HD std::int64_t valid_columns(const TokenLossArgs& args) {
  const std::int64_t left = args.vocab_size - args.vocab_start;
  return left < 0 ? 0 : (left < args.columns ? left : args.columns);
}

template <typename T>
struct GradientTerms {
  T flat, slope, at_target;
};

template <typename T>
struct TokenTerms {
  T logprob, entropy;
  T fields[kFields];
  GradientTerms<T> gradient;
};

// What the token's own inputs are; the missing ones hold the values below.
template <typename T>
struct TokenInputs {
  T advantage = 1;
  T old_logprob = 0, ref_logprob = 0;
  bool has_old = false;
  T weight = 1;
  T normalizer = 1, temperature = 1;
};

template <typename T>
MEGARLX_HD T limited_exp(T log_ratio) {
  const T most = T(kLargestLogRatio);
  // Comparisons, not min and max: a NaN passes through.
  return std::exp(log_ratio > most ? most : (log_ratio < -most ? -most : log_ratio));
}

// d logprob / dz = [target] - p, dH / dz = -p (log p + H) and d log sum exp(z) / dz = p, where
// p = exp(z - maximum) / exp_sum.
template <typename T>
MEGARLX_HD GradientTerms<T> gradient_terms(const RowSums<T>& row, T temperature, T by_logprob,
                                           T by_entropy, T by_log_z) {
  by_logprob /= temperature;
  by_entropy /= temperature;
  by_log_z /= temperature;
  const T log_sum = std::log(row.exp_sum);
  const T entropy = log_sum - row.exp_z_sum / row.exp_sum;
  const T flat = by_logprob + by_entropy * (entropy - log_sum) - by_log_z;
  return {flat / row.exp_sum, by_entropy / row.exp_sum, by_logprob};
}

template <typename T>
MEGARLX_HD TokenTerms<T> token_terms(const LossSpec& spec, const RowSums<T>& row,
                                     const TokenInputs<T>& in) {
  TokenTerms<T> out;
  const T log_sum = std::log(row.exp_sum);
  const T entropy = log_sum - row.exp_z_sum / row.exp_sum;
  // Beside one large logit the others vanish, and rounding alone could leave this above 0.
  const T difference = row.target - row.maximum - log_sum;
  const T logprob = difference > T(0) ? T(0) : difference;  // NaN stays

  // The objective and its derivative by the log-prob. Without old log-probs the current policy is
  // its own old one: the ratio is 1 in value and still has a gradient.
  const T old_gap = in.has_old ? logprob - in.old_logprob : logprob - logprob;
  const T ratio = in.has_old ? limited_exp(old_gap) : 1 + old_gap;
  const T low = T(1 - spec.clip_low), high = T(1 + spec.clip_high);
  const T advantage = in.advantage;
  T objective = 0, slope = 0;
  bool clipped = false;
  switch (spec.mode) {
    case LossMode::kNll:
      objective = -logprob;
      slope = T(-1);
      break;
    case LossMode::kReinforce:
      objective = -advantage * logprob;
      slope = -advantage;
      break;
    case LossMode::kPpoClip: {
      // -min(r A, clip(r) A): the clip binds above for A > 0 and below for A < 0; on the edge
      // itself it does not. dual_clip bounds the loss of an unlikely bad token by -dual_clip A.
      T used = ratio;
      if (advantage > 0 && ratio > high) used = high;
      if (advantage < 0 && ratio < low) used = low;
      if (spec.dual_clip > 0 && advantage < 0 && ratio > T(spec.dual_clip)) {
        used = T(spec.dual_clip);
      }
      clipped = used != ratio && ratio == ratio;
      objective = -used * advantage;
      slope = clipped ? T(0) : -ratio * advantage;
      break;
    }
    case LossMode::kCispo: {
      const T used = ratio > high ? high : (ratio < low ? low : ratio);  // a constant: no gradient
      clipped = used != ratio && ratio == ratio;
      objective = -used * advantage * logprob;
      slope = -used * advantage;
      break;
    }
  }

  T kl = 0, kl_slope = 0;
  const T ref_gap = in.ref_logprob - logprob;
  switch (spec.kl) {
    case KlEstimator::kNone:
      break;
    case KlEstimator::kK1:
      kl = -ref_gap;
      kl_slope = T(1);
      break;
    case KlEstimator::kK2:
      kl = ref_gap * ref_gap / 2;
      kl_slope = -ref_gap;
      break;
    case KlEstimator::kK3: {
      const T ref_ratio = limited_exp(ref_gap);
      kl = ref_ratio - 1 - ref_gap;
      kl_slope = 1 - ref_ratio;
      break;
    }
  }

  // A normaliser of 0 belongs to a batch without tokens: nothing is learned, and nothing is NaN.
  const T scale = in.normalizer == 0 ? T(0) : in.weight / in.normalizer;
  const T log_z = row.maximum + log_sum;
  const T z_slope = spec.z_loss == 0 ? T(0) : T(spec.z_loss) * log_z;
  out.logprob = logprob;
  out.entropy = entropy;
  out.fields[kLoss] = scale * (objective + T(spec.kl_coefficient) * kl -
                               T(spec.entropy_coefficient) * entropy + z_slope * log_z);
  out.fields[kTokens] = T(1);
  out.fields[kClipped] = clipped ? T(1) : T(0);
  out.fields[kKl] = kl;
  out.fields[kOldKl] = ratio - 1 - old_gap;
  out.fields[kRatio] = ratio;
  out.fields[kNll] = -logprob;
  out.fields[kEntropy] = entropy;
  out.gradient =
      gradient_terms(row, in.temperature, scale * (slope + T(spec.kl_coefficient) * kl_slope),
                     -scale * T(spec.entropy_coefficient), 2 * scale * z_slope);
  return out;
}

template <typename T>
MEGARLX_HD T number(const void* values, std::int64_t i) {
  return static_cast<const T*>(values)[i];
}

template <typename T>
MEGARLX_HD TokenInputs<T> token_inputs(const TokenLossArgs& args, std::int64_t token) {
  TokenInputs<T> in;
  if (args.advantages != nullptr) in.advantage = number<T>(args.advantages, token);
  if (args.ref_logprobs != nullptr) in.ref_logprob = number<T>(args.ref_logprobs, token);
  if (args.token_weights != nullptr) in.weight = number<T>(args.token_weights, token);
  in.has_old = args.old_logprobs != nullptr;
  if (in.has_old) in.old_logprob = number<T>(args.old_logprobs, token);
  in.normalizer = number<T>(args.normalizer, 0);
  in.temperature = number<T>(args.temperature, 0);
  return in;
}

template <typename T>
MEGARLX_HD RowSums<T> stored_sums(const TokenLossArgs& args, std::int64_t token) {
  const T* partials = static_cast<const T*>(args.partials) + token;
  const std::int64_t n = args.tokens;
  return {partials[kMaximum * n], partials[kExpSum * n], partials[kExpZSum * n],
          partials[kTarget * n]};
}

template <typename T>
MEGARLX_HD void store_sums(const TokenLossArgs& args, std::int64_t token, const RowSums<T>& sums) {
  T* partials = static_cast<T*>(args.partials) + token;
  const std::int64_t n = args.tokens;
  partials[kMaximum * n] = sums.maximum;
  partials[kExpSum * n] = sums.exp_sum;
  partials[kExpZSum * n] = sums.exp_z_sum;
  partials[kTarget * n] = sums.target;
}

// A target outside the vocabulary poisons its token: everything of it becomes NaN. (The CPU has
// refused it before; a GPU would have to wait for itself to find it.)
MEGARLX_HD bool is_outside(const TokenLossArgs& args, std::int64_t token) {
  return args.targets[token] < 0 || args.targets[token] >= args.vocab_size;
}

template <typename T>
MEGARLX_HD TokenTerms<T> terms_of_token(const TokenLossArgs& args, std::int64_t token,
                                        RowSums<T> row) {
  const bool outside = is_outside(args, token);
  if (outside) row.target = T(NAN);
  TokenTerms<T> terms = token_terms(args.spec, row, token_inputs<T>(args, token));
  if (outside) terms.gradient.flat = T(NAN);  // nll's gradient does not look at the log-prob
  return terms;
}

// From sums and derivatives that were made elsewhere.
template <typename T>
MEGARLX_HD GradientTerms<T> given_terms(const TokenLossArgs& args, std::int64_t token,
                                        const RowSums<T>& row) {
  GradientTerms<T> terms =
      gradient_terms(row, number<T>(args.temperature, 0), number<T>(args.by_logprob, token),
                     number<T>(args.by_entropy, token), number<T>(args.by_log_z, token));
  if (is_outside(args, token)) terms.flat = T(NAN);
  return terms;
}

template <typename T>
MEGARLX_HD void store_terms(const TokenLossArgs& args, std::int64_t token,
                            const TokenTerms<T>& terms) {
  static_cast<T*>(args.logprobs)[token] = terms.logprob;
  static_cast<T*>(args.entropy)[token] = terms.entropy;
  T* fields = static_cast<T*>(args.fields) + token * kFields;
  for (int field = 0; field < kFields; ++field) fields[field] = terms.fields[field];
}

// A masked token: zero everywhere, whatever its logits, target and inputs are.
template <typename T>
MEGARLX_HD TokenTerms<T> no_terms() {
  TokenTerms<T> out;
  out.logprob = out.entropy = 0;
  out.gradient = {0, 0, 0};
  for (T& field : out.fields) field = 0;
  return out;
}

MEGARLX_HD bool is_masked(const TokenLossArgs& args, std::int64_t token) {
  return args.mask != nullptr && !args.mask[token];
}

}  // namespace megarlx
