// The token loss from hidden states, for CPU and CUDA: a chunk of rows at a time, three products.
// (The loop over vocabulary shards, with collectives between its steps, is in Python. This one is
// not, because at a hidden size of 64 the Python calls took a fifth of the whole.)
#include <torch/library.h>

#include "dispatch.h"
#include "math/token_loss.h"
#include "product.h"
#include "token_loss.h"

namespace megarlx {
namespace {

constexpr const char* kOp = "linear_token_loss";

template <typename Change>
TokenTensors each(const TokenTensors& tokens, const Change& change) {
  const auto optional = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(change(*tensor)) : std::nullopt;
  };
  return {change(tokens.targets),
          optional(tokens.mask),
          optional(tokens.advantages),
          optional(tokens.old_logprobs),
          optional(tokens.ref_logprobs),
          optional(tokens.token_weights),
          tokens.normalizer,
          tokens.temperature};
}

struct Outputs {
  Tensor loss, logprobs, entropy, metrics, grad_hidden;
};

// bf16 products with an fp32 result, which only CUDA has; elsewhere the inputs are widened first.
bool has_mixed_products(const Tensor& hidden) {
  return hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16;
}

void check(const Tensor& hidden, const Tensor& weight, const TokenTensors& tokens,
           int64_t vocab_size, int64_t rows_per_chunk) {
  MEGARLX_CHECK(kOp, hidden.dim() == 2, "hidden's shape", hidden.sizes(), "[tokens, hidden]");
  MEGARLX_CHECK(kOp, weight.dim() == 2 && weight.size(1) == hidden.size(1) && weight.size(0) > 0,
                "weight's shape", weight.sizes(), "[vocabulary, hidden]");
  const auto dtype = hidden.scalar_type();
  MEGARLX_CHECK(kOp, dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
                "hidden's dtype", dtype, "float32, float64, bfloat16");
  MEGARLX_CHECK(kOp, weight.scalar_type() == dtype, "weight's dtype", weight.scalar_type(), dtype);
  MEGARLX_CHECK(kOp, weight.device() == hidden.device(), "weight's device", weight.device(),
                hidden.device());
  MEGARLX_CHECK(kOp, rows_per_chunk > 0, "rows_per_chunk", rows_per_chunk, "an integer > 0");
  MEGARLX_CHECK(kOp, vocab_size <= weight.size(0), "vocab_size", vocab_size,
                "at most the rows of weight, " + std::to_string(weight.size(0)));
  // The others are checked chunk by chunk; these are sliced first.
  const auto check_rows = [&](const char* name, const OptionalTensor& tensor) {
    MEGARLX_CHECK(kOp, !tensor.has_value() || tensor->sizes() == at::IntArrayRef{hidden.size(0)},
                  std::string(name) + "'s shape", tensor->sizes(), hidden.size(0));
  };
  check_rows("targets", tokens.targets);
  check_rows("mask", tokens.mask);
  check_rows("advantages", tokens.advantages);
  check_rows("old_logprobs", tokens.old_logprobs);
  check_rows("ref_logprobs", tokens.ref_logprobs);
  check_rows("token_weights", tokens.token_weights);
}

// total [V, d] (+)= gradient [rows, V].T @ hidden [rows, d]
void add_product(Tensor& total, const Tensor& gradient, const Tensor& hidden, bool replace) {
  if (gradient.scalar_type() == total.scalar_type()) {
    product_(total, gradient.t(), hidden, /*add=*/!replace);
  } else if (replace) {
    at::mm_out(total, gradient.t(), hidden, total.scalar_type());
  } else {
    at::addmm_out(total, total, gradient.t(), hidden, total.scalar_type(), /*beta=*/1,
                  /*alpha=*/1);
  }
}

// grad_weight: undefined for no gradients at all, else [V, d] in fp32 (fp64): replaced or added to.
Outputs run_chunks(Tensor hidden, Tensor weight, TokenTensors tokens, int64_t vocab_size,
                   const SpecArguments& spec, int64_t rows_per_chunk, bool drop_masked,
                   Tensor grad_weight, bool replace) {
  check(hidden, weight, tokens, vocab_size, rows_per_chunk);
  const int64_t total = hidden.size(0), vocabulary = weight.size(0);
  Tensor kept;
  if (tokens.mask.has_value() && drop_masked) {
    kept = tokens.mask->nonzero().squeeze(1);
    if (kept.size(0) == total) {
      kept = Tensor();
    } else {
      hidden = hidden.index_select(0, kept);
      tokens = each(tokens, [&](const Tensor& tensor) { return tensor.index_select(0, kept); });
    }
    tokens.mask = std::nullopt;
  }

  const auto precision = precision_of(hidden);
  const auto options = hidden.options().dtype(precision);
  const bool mixed = has_mixed_products(hidden);
  const bool narrow = hidden.scalar_type() != precision;
  if (narrow && !mixed) weight = weight.to(precision);
  const int64_t count = hidden.size(0);
  const int64_t rows = std::min(rows_per_chunk, std::max<int64_t>(count, 1));
  const bool with_gradient = grad_weight.defined();
  const Tensor buffer = at::empty({rows, vocabulary}, options);
  Tensor gradient_buffer;
  if (with_gradient) gradient_buffer = mixed ? at::empty_like(buffer, hidden.options()) : buffer;
  Tensor logprobs = at::empty({count}, options), entropy = at::empty({count}, options);
  const Tensor fields = at::empty({count, kFields}, options);
  Tensor grad_hidden = with_gradient ? at::empty(hidden.sizes(), hidden.options())
                                     : at::empty({0}, hidden.options());
  const Tensor transposed = weight.t();

  for (int64_t begin = 0; begin < count; begin += rows) {
    const int64_t n = std::min(rows, count - begin);
    const auto chunk = [&](const Tensor& tensor) { return tensor.narrow(0, begin, n); };
    const TokenTensors in = each(tokens, chunk);
    Tensor logits = buffer.narrow(0, 0, n), chunk_hidden = chunk(hidden);
    // Their gradient is 0, and 0 times NaN would be NaN in the weight's.
    if (in.mask.has_value()) {
      chunk_hidden = chunk_hidden.masked_fill(in.mask->logical_not().unsqueeze(1), 0);
    }
    if (mixed) {
      at::mm_out(logits, chunk_hidden, transposed, precision);
    } else {
      chunk_hidden = chunk_hidden.to(precision);
      product_(logits, chunk_hidden, transposed);
    }
    OptionalTensor gradient;
    if (with_gradient) gradient = gradient_buffer.narrow(0, 0, n);
    Tensor of_logprobs = chunk(logprobs), of_entropy = chunk(entropy), of_fields = chunk(fields);
    token_loss_chunk(logits, in, vocab_size, spec, gradient, of_logprobs, of_entropy, of_fields);
    if (!with_gradient) continue;
    Tensor out = chunk(grad_hidden);
    if (narrow && !mixed) {
      out.copy_(at::mm(*gradient, weight));
    } else {
      product_(out, *gradient, weight);
    }
    add_product(grad_weight, *gradient, chunk_hidden, replace && begin == 0);
  }
  if (with_gradient && replace && count == 0) grad_weight.zero_();

  const auto [loss, metrics] = sum_fields(fields);
  if (kept.defined()) {
    logprobs = at::zeros({total}, options).index_copy_(0, kept, logprobs);
    entropy = at::zeros({total}, options).index_copy_(0, kept, entropy);
    if (with_gradient) {
      grad_hidden =
          at::zeros({total, hidden.size(1)}, hidden.options()).index_copy_(0, kept, grad_hidden);
    }
  }
  return {loss, logprobs, entropy, metrics, grad_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, int64_t rows_per_chunk, bool drop_masked,
    bool with_gradient) {
  Tensor grad_weight;
  if (with_gradient) {
    grad_weight = at::empty(weight.sizes(), weight.options().dtype(precision_of(weight)));
  }
  const Outputs out = run_chunks(
      hidden, weight,
      {targets, mask, advantages, old_logprobs, ref_logprobs, token_weights, normalizer,
       temperature},
      vocab_size,
      {mode, kl, clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss},
      rows_per_chunk, drop_masked, grad_weight, /*replace=*/true);
  grad_weight =
      with_gradient ? grad_weight.to(weight.scalar_type()) : at::empty({0}, weight.options());
  return {out.loss, out.logprobs, out.entropy, out.metrics, out.grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss_(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, int64_t rows_per_chunk, bool drop_masked,
    Tensor& grad_weight) {
  const Outputs out = run_chunks(
      hidden, weight,
      {targets, mask, advantages, old_logprobs, ref_logprobs, token_weights, normalizer,
       temperature},
      vocab_size,
      {mode, kl, clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss},
      rows_per_chunk, drop_masked, grad_weight, /*replace=*/false);
  return {out.loss, out.logprobs, out.entropy, out.metrics, out.grad_hidden};
}

void register_ops(torch::Library& m) {
  m.impl("linear_token_loss", linear_token_loss);
  m.impl("_linear_token_loss_", linear_token_loss_);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { register_ops(m); }

}  // namespace
}  // namespace megarlx
