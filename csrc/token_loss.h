// What linear_token_loss uses of the token loss: one chunk of rows, and the sums of all of them.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace megarlx {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The dtype of sums, inputs and results: fp64 for fp64 inputs, else fp32.
inline at::ScalarType precision_of(const Tensor& inputs) {
  return inputs.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// As the ops' schemas have them.
struct SpecArguments {
  c10::string_view mode, kl;
  double clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss;
};

struct TokenTensors {
  Tensor targets;
  OptionalTensor mask, advantages, old_logprobs, ref_logprobs, token_weights;
  Tensor normalizer, temperature;
};

// Fills log-probs, entropy and fields of a chunk's rows; the gradient may be the logits themselves.
void token_loss_chunk(const Tensor& logits, const TokenTensors& tokens, int64_t vocab_size,
                      const SpecArguments& spec, const OptionalTensor& gradient, Tensor& logprobs,
                      Tensor& entropy, Tensor& fields);

// (loss, metrics) of fields [tokens, kFields].
std::tuple<Tensor, Tensor> sum_fields(const Tensor& fields);

}  // namespace megarlx
