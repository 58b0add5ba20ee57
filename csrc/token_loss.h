// What linear_token_loss uses of the token loss: one chunk of rows, and the sums of all of them.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace megarlx {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The dtype of sums, inputs and results: fp64 for fp64 inputs, else fp32.
inline at::ScalarType precision_of(const Tensor& inputs) {
  return inputs.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void token_loss_rows_(Tensor& logits, const OptionalTensor& partials, const Tensor& targets,
                      const OptionalTensor& mask, const OptionalTensor& advantages,
                      const OptionalTensor& old_logprobs, const OptionalTensor& ref_logprobs,
                      const OptionalTensor& token_weights, const Tensor& normalizer,
                      const Tensor& temperature, int64_t vocab_start, int64_t vocab_size,
                      c10::string_view mode, c10::string_view kl, double clip_low, double clip_high,
                      double dual_clip, double kl_coefficient, double entropy_coefficient,
                      const OptionalTensor& gradient, Tensor& logprobs, Tensor& entropy,
                      Tensor& fields);

// (loss, metrics) of fields [tokens, kFields].
std::tuple<Tensor, Tensor> token_loss_sums(const Tensor& fields);

}  // namespace megarlx
