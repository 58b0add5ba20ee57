// The ops of our own products, which a CPU alone has: a product in place, and a linear layer.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"
#include "product.h"

namespace megarlx {
namespace {
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// As a matrix: all sides but the last are one.
Tensor flat(const Tensor& t) {
  return t.dim() == 2
             ? t
             : t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  MEGARLX_CHECK("linear", x.dim() > 0, "x's shape", x.sizes(), "[..., columns of weight]");
  MEGARLX_CHECK("linear", weight.dim() == 2, "weight's shape", weight.sizes(), "a matrix");
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  Tensor out = at::empty(sizes, x.options());
  if (bias) out.copy_(*bias);
  own_product_(flat(out), flat(x), weight.t(), bias.has_value());
  return out;
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value();
    return call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor& grad = upstream[0];
    TORCH_CHECK(
        !at::GradMode::is_enabled() || at::isTensorSubclassLike(grad),
        "megarlx.linear: create_graph is True; allowed: False, its gradient has no derivative");
    const auto saved = context->get_saved_variables();
    Tensor by_x, by_weight, by_bias;
    if (context->needs_input_grad(0)) by_x = call(grad, saved[1].t(), std::nullopt);
    if (context->needs_input_grad(1))
      by_weight = call(flat(grad).t(), flat(saved[0]).t(), std::nullopt);
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2))
      by_bias = flat(grad).sum(0);
    return {by_x, by_weight, by_bias};
  }

  static Tensor call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("megarlx::linear", "")
            .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>();
    return op.call(x, weight, bias);
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return Linear::apply(x, weight, bias);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("product_", own_product_);
  m.impl("linear", linear);
}
TORCH_LIBRARY_IMPL(megarlx, Autograd, m) { m.impl("linear", linear_autograd); }

}  // namespace
}  // namespace megarlx
