// Bindings of the elementwise parts of a layer: checks, allocation, then the CPU kernels over
// threads. There is no CUDA kernel: there the framework's own are used
// (megarlx/ops/elementwise.py).
#include "math/elementwise.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <string>

#include "dispatch.h"

namespace megarlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t kMostHeads = 1 << 20;  // so that no product with them overflows
constexpr const char* kHeads = "1 to 1048576";
constexpr std::int64_t kGrain = 1 << 14;  // elements for which another thread is worth waking

Dtype read_dtype(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  MEGARLX_CHECK(op, dtype == at::kFloat || dtype == at::kDouble, std::string(name) + "'s dtype",
                dtype, "float32, float64");
  return dtype == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

// Of this shape, in the dtype of `like`; made contiguous where it is not.
Tensor read(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape,
            const Tensor& like) {
  const std::string argument(name);
  MEGARLX_CHECK(op, tensor.scalar_type() == like.scalar_type(), argument + "'s dtype",
                tensor.scalar_type(), like.scalar_type());
  MEGARLX_CHECK(op, tensor.sizes() == shape, argument + "'s shape", tensor.sizes(), shape);
  return tensor.contiguous();
}

// A matrix whose rows may stand apart.
Tensor rows_of(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

void over_rows(std::int64_t rows, std::int64_t width,
               const std::function<void(std::int64_t, std::int64_t)>& kernel) {
  if (width == 0) return;  // rows without elements may be more than can ever be walked
  at::parallel_for(0, rows, std::max<std::int64_t>(kGrain / std::max<std::int64_t>(width, 1), 1),
                   kernel);
}

Tensor weight_sums(std::int64_t rows, std::int64_t width, const Tensor& like, bool wanted) {
  return at::empty({wanted ? blocks_of(rows) : 0, width}, like.options());
}

// The sums of all blocks, added in their order.
Tensor finish(const Tensor& sums, const Tensor& like, bool wanted) {
  if (!wanted) return at::empty({0}, sums.options());
  Tensor out = at::empty({sums.size(1)}, sums.options());
  const Dtype dtype = like.scalar_type() == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
  cpu_kernels().sum_blocks(dtype, sums.const_data_ptr(), sums.size(0), sums.size(1),
                           out.mutable_data_ptr());
  return out;
}

void* written(Tensor& tensor) { return tensor.mutable_data_ptr(); }
const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }

RmsNormArgs read_norm(const char* op, const Tensor& x) {
  RmsNormArgs args{};
  args.dtype = read_dtype(op, "x", x);
  MEGARLX_CHECK(op, x.dim() == 2 && x.size(1) > 0, "x's shape", x.sizes(),
                "[rows, width] with a width of at least 1");
  args.rows = x.size(0);
  args.width = x.size(1);
  return args;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const OptionalTensor& residual) {
  const char* op = "rms_norm";
  RmsNormArgs args = read_norm(op, x);
  MEGARLX_CHECK(op, eps >= 0, "eps", eps, "a number >= 0");
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor added =
      residual.has_value() ? read(op, "residual", *residual, x.sizes(), x) : Tensor();
  Tensor y = at::empty(x.sizes(), x.options()), inverse = at::empty({args.rows}, x.options());
  args.eps = eps;
  args.x = data(x_rows);
  args.weight = data(weights);
  args.residual = added.defined() ? data(added) : nullptr;
  args.y = written(y);
  args.inverse = written(inverse);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().rms_norm(args, begin, end);
  });
  return {y, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& inverse,
                                             bool with_weight) {
  const char* op = "rms_norm_backward";
  RmsNormArgs args = read_norm(op, x);
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor upstream = read(op, "grad", grad, x.sizes(), x);
  Tensor inverses = read(op, "inverse", inverse, {args.rows}, x);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor sums = weight_sums(args.rows, args.width, x, with_weight);
  args.x = data(x_rows);
  args.weight = data(weights);
  args.inverse = const_cast<void*>(data(inverses));
  args.grad = data(upstream);
  args.grad_x = written(grad_x);
  args.weight_sums = with_weight ? written(sums) : nullptr;
  over_rows(blocks_of(args.rows), args.width * kRowsPerBlock,
            [&](std::int64_t begin, std::int64_t end) {
              cpu_kernels().rms_norm_backward(args, begin, end);
            });
  return {grad_x, finish(sums, x, with_weight)};
}

SwiGluArgs read_swiglu(const char* op, const Tensor& gate_up) {
  SwiGluArgs args{};
  args.dtype = read_dtype(op, "gate_up", gate_up);
  MEGARLX_CHECK(op, gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up's shape",
                gate_up.sizes(), "[rows, 2 × width]");
  args.rows = gate_up.size(0);
  args.width = gate_up.size(1) / 2;
  return args;
}

Tensor swiglu(const Tensor& gate_up) {
  SwiGluArgs args = read_swiglu("swiglu", gate_up);
  const Tensor halves = rows_of(gate_up);
  Tensor out = at::empty({args.rows, args.width}, gate_up.options());
  args.gate_up = data(halves);
  args.gate_up_stride = halves.stride(0);
  args.out = written(out);
  over_rows(args.rows, args.width,
            [&](std::int64_t begin, std::int64_t end) { cpu_kernels().swiglu(args, begin, end); });
  return out;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "swiglu_backward";
  SwiGluArgs args = read_swiglu(op, gate_up);
  const Tensor halves = rows_of(gate_up);
  const Tensor upstream = read(op, "grad", grad, {args.rows, args.width}, gate_up);
  Tensor out = at::empty(gate_up.sizes(), gate_up.options());
  args.gate_up = data(halves);
  args.gate_up_stride = halves.stride(0);
  args.grad = data(upstream);
  args.grad_gate_up = written(out);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().swiglu_backward(args, begin, end);
  });
  return out;
}

// Tensors made contiguous that must live as long as the kernel runs.
struct HeadsInputs {
  HeadsArgs args{};
  Tensor qkv, q_weight, k_weight, cos, sin;
};

HeadsInputs read_heads(const char* op, const Tensor& qkv, const OptionalTensor& q_weight,
                       const OptionalTensor& k_weight, const Tensor& cos, const Tensor& sin,
                       std::int64_t heads, std::int64_t kv_heads) {
  HeadsInputs in;
  HeadsArgs& args = in.args;
  args.dtype = read_dtype(op, "qkv", qkv);
  MEGARLX_CHECK(op, heads > 0 && heads <= kMostHeads, "heads", heads, kHeads);
  MEGARLX_CHECK(op, kv_heads > 0 && kv_heads <= kMostHeads, "kv_heads", kv_heads, kHeads);
  const std::int64_t all = heads + 2 * kv_heads;
  MEGARLX_CHECK(op, qkv.dim() == 2 && qkv.size(1) > 0 && qkv.size(1) % (2 * all) == 0,
                "qkv's shape", qkv.sizes(),
                "[tokens, (heads + 2 × kv_heads) × head_dim] with an even head_dim");
  args.tokens = qkv.size(0);
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = qkv.size(1) / all;
  in.qkv = rows_of(qkv);
  args.qkv = data(in.qkv);
  args.qkv_stride = in.qkv.stride(0);
  in.cos = read(op, "cos", cos, {args.tokens, 1, args.head_dim / 2}, qkv);
  in.sin = read(op, "sin", sin, {args.tokens, 1, args.head_dim / 2}, qkv);
  args.cos = data(in.cos);
  args.sin = data(in.sin);
  MEGARLX_CHECK(op, q_weight.has_value() == k_weight.has_value(), "k_weight",
                k_weight.has_value() ? "given" : "missing", "given exactly when q_weight is");
  if (q_weight.has_value()) {
    // one head is both: its norm is then the same either way
    const bool full =
        q_weight->numel() == heads * args.head_dim && k_weight->numel() == kv_heads * args.head_dim;
    args.norm = full ? HeadNorm::kFull : HeadNorm::kPerHead;
    in.q_weight = read(op, "q_weight", *q_weight, {norm_width(args, heads)}, qkv);
    in.k_weight = read(op, "k_weight", *k_weight, {norm_width(args, kv_heads)}, qkv);
    args.q_weight = data(in.q_weight);
    args.k_weight = data(in.k_weight);
  }
  return in;
}

std::tuple<Tensor, Tensor, Tensor> heads_forward(const Tensor& qkv, const OptionalTensor& q_weight,
                                                 const OptionalTensor& k_weight, const Tensor& cos,
                                                 const Tensor& sin, std::int64_t heads,
                                                 std::int64_t kv_heads, double eps) {
  const char* op = "_heads";
  HeadsInputs in = read_heads(op, qkv, q_weight, k_weight, cos, sin, heads, kv_heads);
  HeadsArgs& args = in.args;
  MEGARLX_CHECK(op, eps >= 0, "eps", eps, "a number >= 0");
  args.eps = eps;
  Tensor q = at::empty({args.tokens, heads, args.head_dim}, qkv.options());
  Tensor k = at::empty({args.tokens, kv_heads, args.head_dim}, qkv.options());
  Tensor inverse = at::empty({args.tokens, norms_of_token(args)}, qkv.options());
  args.q = written(q);
  args.k = written(k);
  args.inverse = written(inverse);
  over_rows(args.tokens, (heads + kv_heads) * args.head_dim,
            [&](std::int64_t begin, std::int64_t end) { cpu_kernels().heads(args, begin, end); });
  return {q, k, inverse};
}

std::tuple<Tensor, Tensor, Tensor> heads_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                  const Tensor& grad_v, const Tensor& qkv,
                                                  const OptionalTensor& q_weight,
                                                  const OptionalTensor& k_weight, const Tensor& cos,
                                                  const Tensor& sin, const Tensor& inverse,
                                                  bool with_weights) {
  const char* op = "_heads_backward";
  MEGARLX_CHECK(op, grad_q.dim() == 3, "grad_q's shape", grad_q.sizes(),
                "[tokens, heads, head_dim]");
  MEGARLX_CHECK(op, grad_k.dim() == 3, "grad_k's shape", grad_k.sizes(),
                "[tokens, kv_heads, head_dim]");
  HeadsInputs in =
      read_heads(op, qkv, q_weight, k_weight, cos, sin, grad_q.size(1), grad_k.size(1));
  HeadsArgs& args = in.args;
  const std::int64_t kv_shape[] = {args.tokens, args.kv_heads, args.head_dim};
  const Tensor upstream_q =
      read(op, "grad_q", grad_q, {args.tokens, args.heads, args.head_dim}, qkv);
  const Tensor upstream_k = read(op, "grad_k", grad_k, kv_shape, qkv);
  const Tensor upstream_v = read(op, "grad_v", grad_v, kv_shape, qkv);
  const Tensor inverses = read(op, "inverse", inverse, {args.tokens, norms_of_token(args)}, qkv);
  MEGARLX_CHECK(op, !with_weights || q_weight.has_value(), "with_weights", "true",
                "false where there are no weights");
  const std::int64_t q_width = norm_width(args, args.heads);
  const std::int64_t k_width = norm_width(args, args.kv_heads);
  Tensor grad_qkv = at::empty(qkv.sizes(), qkv.options());
  Tensor sums = weight_sums(args.tokens, q_width + k_width, qkv, with_weights);
  args.grad_q = data(upstream_q);
  args.grad_k = data(upstream_k);
  args.grad_v = data(upstream_v);
  args.inverse = const_cast<void*>(data(inverses));
  args.grad_qkv = written(grad_qkv);
  args.weight_sums = with_weights ? written(sums) : nullptr;
  over_rows(blocks_of(args.tokens), qkv.size(1) * kRowsPerBlock,
            [&](std::int64_t begin, std::int64_t end) {
              cpu_kernels().heads_backward(args, begin, end);
            });
  const Tensor both = finish(sums, qkv, with_weights);
  if (!with_weights) return {grad_qkv, both, at::empty({0}, qkv.options())};
  return {grad_qkv, both.slice(0, 0, q_width).clone(), both.slice(0, q_width).clone()};
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("_heads", heads_forward);
  m.impl("_heads_backward", heads_backward);
}

}  // namespace
}  // namespace megarlx
