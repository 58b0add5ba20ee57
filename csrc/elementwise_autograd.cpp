// Autograd of RMSNorm and SwiGLU in C++: a small model waits for the time it takes in Python.
// Backward reads what forward saved and never writes it: schedules may run it twice.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace megarlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void refuse_second_derivative(const char* op, const Tensor& upstream) {
  TORCH_CHECK(!at::GradMode::is_enabled() || at::isTensorSubclassLike(upstream), "megarlx.", op,
              ": create_graph is True; allowed: False, its gradient has no derivative");
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                               double eps, const OptionalTensor& residual) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, double, const OptionalTensor&)>("megarlx::rms_norm");
    auto [y, inverse] = op.call(x, weight, eps, residual);
    context->mark_non_differentiable({inverse});
    context->set_materialize_grads(false);
    context->save_for_backward({x, weight, inverse});
    context->saved_data["residual"] = residual.has_value();
    return {y, inverse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor& grad = upstream[0];
    if (!grad.defined()) return variable_list(4);
    refuse_second_derivative("rms_norm", grad);
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        bool)>("megarlx::rms_norm_backward");
    const auto saved = context->get_saved_variables();
    const bool with_weight = context->needs_input_grad(1);
    auto [grad_x, grad_weight] = op.call(grad, saved[0], saved[1], saved[2], with_weight);
    const bool added = context->saved_data["residual"].toBool();
    return {grad_x, with_weight ? grad_weight : Tensor(), Tensor(), added ? grad : Tensor()};
  }
};

struct SwiGlu : torch::autograd::Function<SwiGlu> {
  static Tensor forward(AutogradContext* context, const Tensor& gate_up) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<Tensor(const Tensor&)>("megarlx::swiglu");
    context->save_for_backward({gate_up});
    return op.call(gate_up);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    refuse_second_derivative("swiglu", upstream[0]);
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("megarlx::swiglu_backward");
    return {op.call(upstream[0], context->get_saved_variables()[0])};
  }
};

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const OptionalTensor& residual) {
  const auto out = RmsNorm::apply(x, weight, eps, residual);
  return {out[0], out[1]};
}

Tensor swiglu(const Tensor& gate_up) { return SwiGlu::apply(gate_up); }

TORCH_LIBRARY_IMPL(megarlx, Autograd, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("swiglu", swiglu);
}

}  // namespace
}  // namespace megarlx
