// Causal attention over packed documents in fp32 on a CPU, and its autograd.
#include "math/attention.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace megarlx {
namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOp = "packed_attention";
constexpr double kCostPerThread = 1 << 14;  // scores for which a thread is worth waking

// [tokens, heads, dim] whose numbers of a head stand side by side
Tensor read_heads(const char* name, const Tensor& x, std::int64_t tokens, std::int64_t dim) {
  MEGARLX_CHECK(kOp, x.dim() == 3 && x.size(0) == tokens && x.size(2) == dim,
                std::string(name) + "'s shape", x.sizes(),
                c10::str("[", tokens, ", heads, ", dim, "]"));
  MEGARLX_CHECK(kOp, x.scalar_type() == at::kFloat, std::string(name) + "'s dtype", x.scalar_type(),
                "float32");
  return x.stride(2) == 1 ? x : x.contiguous();
}

Heads<const float> heads_of(const Tensor& x) {
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

Heads<float> written_heads(Tensor& x) {
  return {x.mutable_data_ptr<float>(), x.stride(0), x.stride(1)};
}

void check_offsets(const Tensor& offsets, std::int64_t tokens) {
  MEGARLX_CHECK(kOp, offsets.dim() == 1 && offsets.size(0) >= 2 && offsets.is_contiguous(),
                "offsets' shape", offsets.sizes(), "[documents + 1], contiguous");
  MEGARLX_CHECK(kOp, offsets.scalar_type() == at::kInt, "offsets' dtype", offsets.scalar_type(),
                "int32");
  const auto* begin = offsets.const_data_ptr<std::int32_t>();
  const auto* end = begin + offsets.size(0);
  MEGARLX_CHECK(kOp, *begin == 0 && end[-1] == tokens && std::is_sorted(begin, end), "offsets",
                offsets, c10::str("from 0 up to ", tokens));
}

struct Inputs {
  Tensor q, k, v, offsets;
  AttentionArgs args{};

  Inputs(const Tensor& of_q, const Tensor& of_k, const Tensor& of_v, const Tensor& of_documents,
         double scale) {
    MEGARLX_CHECK(kOp, of_q.dim() == 3, "q's shape", of_q.sizes(), "[tokens, heads, dim]");
    const std::int64_t tokens = of_q.size(0), dim = of_q.size(2);
    q = read_heads("q", of_q, tokens, dim);
    k = read_heads("k", of_k, tokens, dim);
    v = read_heads("v", of_v, tokens, dim);
    const std::int64_t heads = q.size(1), kv_heads = k.size(1);
    MEGARLX_CHECK(kOp, kv_heads > 0 && heads % kv_heads == 0, "k's heads", kv_heads,
                  c10::str("a divisor of q's ", heads));
    MEGARLX_CHECK(kOp, v.size(1) == kv_heads, "v's heads", v.size(1), kv_heads);
    check_offsets(of_documents, tokens);
    offsets = of_documents;
    args.heads = heads, args.kv_heads = kv_heads, args.dim = dim;
    args.offsets = offsets.const_data_ptr<std::int32_t>();
    args.scale = static_cast<float>(scale);
    args.q = heads_of(q), args.k = heads_of(k), args.v = heads_of(v);
  }
};

// Units, each a document's key head, dealt to threads so that each has about as many scores.
template <class Kernel>
void over_units(const Inputs& in, const Kernel& kernel) {
  const std::int64_t units = (in.offsets.size(0) - 1) * in.args.kv_heads;
  std::vector<double> before(units + 1, 0.0);
  for (std::int64_t unit = 0; unit < units; ++unit) {
    const auto* at = in.args.offsets + unit / in.args.kv_heads;
    const double length = at[1] - at[0];
    before[unit + 1] = before[unit] + length * (length + 16) * (in.args.heads / in.args.kv_heads);
  }
  const auto parts = std::min<std::int64_t>(
      at::get_num_threads(), 1 + static_cast<std::int64_t>(before.back() / kCostPerThread));
  const auto begin_of = [&](std::int64_t part) {
    if (part == parts) return units;
    const double from = before.back() * part / parts;
    return std::lower_bound(before.begin(), before.end(), from) - before.begin();
  };
  at::parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    kernel(in.args, begin_of(begin), std::min(begin_of(end), units));
  });
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& offsets, double scale) {
  Inputs in(q, k, v, offsets, scale);
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), q.size(1)}, q.options());
  in.args.out = written_heads(out);
  in.args.lse = lse.mutable_data_ptr<float>();
  over_units(in, cpu_kernels().attention);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& grad, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const Tensor& out, const Tensor& lse,
                                                             const Tensor& offsets, double scale) {
  Inputs in(q, k, v, offsets, scale);
  MEGARLX_CHECK(kOp, grad.sizes() == q.sizes(), "grad's shape", grad.sizes(), q.sizes());
  MEGARLX_CHECK(kOp, out.sizes() == q.sizes() && out.is_contiguous(), "out's shape", out.sizes(),
                c10::str(q.sizes(), ", contiguous"));
  MEGARLX_CHECK(kOp, lse.sizes() == q.sizes().slice(0, 2) && lse.is_contiguous(), "lse's shape",
                lse.sizes(), c10::str(q.sizes().slice(0, 2), ", contiguous"));
  const Tensor upstream = read_heads("grad", grad, q.size(0), q.size(2));
  Tensor by_q = at::empty(q.sizes(), q.options()), by_k = at::empty(k.sizes(), k.options());
  Tensor by_v = at::empty(v.sizes(), v.options());
  in.args.grad = heads_of(upstream);
  // read, not written, in backward
  in.args.out = {const_cast<float*>(out.const_data_ptr<float>()), out.stride(0), out.stride(1)};
  in.args.lse = const_cast<float*>(lse.const_data_ptr<float>());
  in.args.grad_q = written_heads(by_q);
  in.args.grad_k = written_heads(by_k);
  in.args.grad_v = written_heads(by_v);
  over_units(in, cpu_kernels().attention_backward);
  return {by_q, by_k, by_v};
}

struct PackedAttention : torch::autograd::Function<PackedAttention> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& offsets, double scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("megarlx::packed_attention", "")
            .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                              const Tensor&, double)>();
    auto [out, lse] = op.call(q, k, v, offsets, scale);
    context->mark_non_differentiable({lse});
    context->set_materialize_grads(false);
    // Detached: a checkpoint that stops recomputing by an exception, while these are saved, would
    // leave results behind that hold their own node.
    context->save_for_backward({q, k, v, out.detach(), lse.detach(), offsets});
    context->saved_data["scale"] = scale;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const Tensor& grad = upstream[0];
    if (!grad.defined()) return variable_list(5);
    TORCH_CHECK(!at::GradMode::is_enabled() || at::isTensorSubclassLike(grad),
                "megarlx.packed_attention: create_graph is True; allowed: False, its gradient has "
                "no derivative");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("megarlx::packed_attention_backward", "")
                               .typed<std::tuple<Tensor, Tensor, Tensor>(
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, const Tensor&, double)>();
    const auto in = context->get_saved_variables();
    auto [by_q, by_k, by_v] = op.call(grad, in[0], in[1], in[2], in[3], in[4], in[5],
                                      context->saved_data["scale"].toDouble());
    return {by_q, by_k, by_v, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> packed_attention_autograd(const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Tensor& offsets,
                                                     double scale) {
  const auto found = PackedAttention::apply(q, k, v, offsets, scale);
  return {found[0], found[1]};
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("packed_attention", packed_attention);
  m.impl("packed_attention_backward", packed_attention_backward);
}
TORCH_LIBRARY_IMPL(megarlx, Autograd, m) { m.impl("packed_attention", packed_attention_autograd); }

}  // namespace
}  // namespace megarlx
