// Autograd of the two token losses. Their forward has computed the gradients; backward scales them
// by the upstream gradient, and where it runs for the last time it gives them away uncopied: a
// gradient of logits is as large as the logits, and one more pass over it would be felt.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <string>

namespace megarlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Neither the tensor nor its memory.
bool nobody_else_has(const Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
}

Tensor take_scaled(const char* op, AutogradContext* context, const char* name,
                   const Tensor& upstream) {
  if (!upstream.defined()) return Tensor();
  TORCH_CHECK(!at::GradMode::is_enabled() || at::isTensorSubclassLike(upstream), "megarlx.", op,
              ": create_graph is True; allowed: False, its gradient has no derivative");
  Tensor gradient = context->saved_data[name].toTensor();
  TORCH_CHECK(gradient.defined(), "megarlx.", op,
              ": backward runs a second time; pass retain_graph=True to the first");
  TORCH_CHECK(gradient.dim() == 2, "megarlx.", op,
              ": with_gradient is False; allowed: True where backward follows");
  if (at::isTensorSubclassLike(upstream)) return gradient.mul(upstream.to(gradient.scalar_type()));
  if (!torch::autograd::get_current_graph_task_keep_graph()) {
    context->saved_data[name] = Tensor();
  }
  if (upstream.is_cpu() && upstream.item<double>() == 1) return gradient;
  if (!nobody_else_has(gradient)) return gradient.mul(upstream.to(gradient.scalar_type()));
  static const auto scale = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("megarlx::_scale_gradient_", "")
                                .typed<void(const Tensor&, const Tensor&)>();
  scale.call(gradient, upstream);
  return gradient;
}

bool graph_is_kept() { return torch::autograd::get_current_graph_task_keep_graph(); }

using TokenLossOp = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const Tensor&, int64_t, c10::string_view, c10::string_view, double, double, double, double,
    double, double, bool);
using LinearTokenLossOp = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const Tensor&, int64_t, c10::string_view, c10::string_view, double, double, double, double,
    double, double, int64_t, int64_t, bool, bool);

struct TokenLoss : torch::autograd::Function<TokenLoss> {
  template <typename... Arguments>
  static variable_list forward(AutogradContext* context, const Tensor& logits,
                               const Arguments&... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("megarlx::token_loss", "")
                               .typed<TokenLossOp>();
    auto [loss, logprobs, entropy, metrics, gradient] = op.call(logits, arguments...);
    context->saved_data["gradient"] = gradient;
    gradient = at::alias(gradient);  // Python's object of a tensor holds it: see nobody_else_has
    context->mark_non_differentiable({logprobs, entropy, metrics, gradient});
    context->set_materialize_grads(false);  // else zeros as large as each gradient are made
    context->saved_data["arguments"] = static_cast<int64_t>(sizeof...(arguments));
    return {loss, logprobs, entropy, metrics, gradient};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(1 + context->saved_data["arguments"].toInt());
    gradients[0] = take_scaled("token_loss", context, "gradient", upstream[0]);
    return gradients;
  }
};

struct LinearTokenLoss : torch::autograd::Function<LinearTokenLoss> {
  template <typename... Arguments>
  static variable_list forward(AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                               const Arguments&... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("megarlx::linear_token_loss", "")
                               .typed<LinearTokenLossOp>();
    auto [loss, logprobs, entropy, metrics, grad_hidden, grad_weight] =
        op.call(hidden, weight, arguments...);
    context->saved_data["grad_hidden"] = grad_hidden;
    context->saved_data["grad_weight"] = grad_weight;
    grad_hidden = at::alias(grad_hidden);
    grad_weight = at::alias(grad_weight);
    context->mark_non_differentiable({logprobs, entropy, metrics, grad_hidden, grad_weight});
    context->set_materialize_grads(false);  // else zeros as large as each gradient are made
    context->saved_data["arguments"] = static_cast<int64_t>(sizeof...(arguments));
    return {loss, logprobs, entropy, metrics, grad_hidden, grad_weight};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(2 + context->saved_data["arguments"].toInt());
    const char* op = "linear_token_loss";
    if (context->needs_input_grad(0)) {
      gradients[0] = take_scaled(op, context, "grad_hidden", upstream[0]);
    }
    if (context->needs_input_grad(1)) {
      gradients[1] = take_scaled(op, context, "grad_weight", upstream[0]);
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_loss(
    const Tensor& logits, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, bool with_gradient) {
  const auto out =
      TokenLoss::apply(logits, targets, mask, advantages, old_logprobs, ref_logprobs, token_weights,
                       normalizer, temperature, vocab_size, mode, kl, clip_low, clip_high,
                       dual_clip, kl_coefficient, entropy_coefficient, z_loss, with_gradient);
  return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, int64_t rows_per_chunk, int64_t kept_gradients_mib,
    bool drop_masked, bool with_gradient) {
  const auto out = LinearTokenLoss::apply(
      hidden, weight, targets, mask, advantages, old_logprobs, ref_logprobs, token_weights,
      normalizer, temperature, vocab_size, mode, kl, clip_low, clip_high, dual_clip, kl_coefficient,
      entropy_coefficient, z_loss, rows_per_chunk, kept_gradients_mib, drop_masked, with_gradient);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

TORCH_LIBRARY_IMPL(megarlx, Autograd, m) {
  m.impl("token_loss", token_loss);
  m.impl("linear_token_loss", linear_token_loss);
}
TORCH_LIBRARY_IMPL(megarlx, CompositeExplicitAutograd, m) {
  m.impl("_graph_is_kept", graph_is_kept);
}

}  // namespace
}  // namespace megarlx
