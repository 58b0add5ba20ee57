// Bindings of the elementwise parts of a layer: checks, allocation, then the CPU kernels over
// threads or the CUDA ones, which take bfloat16 too.
#include "math/elementwise.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <string>

#include "dispatch.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t kMostHeads = 1 << 20;  // so that no product with them overflows
constexpr const char* kHeads = "1 to 1048576";
constexpr std::int64_t kGrain = 1 << 14;  // elements for which another thread is worth waking

Dtype read_dtype(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool narrow = dtype == at::kBFloat16 && !tensor.is_cpu();
  MEGARLX_CHECK(op, dtype == at::kFloat || dtype == at::kDouble || narrow,
                std::string(name) + "'s dtype", dtype, "float32, float64, and on CUDA bfloat16");
  return narrow ? Dtype::kBFloat16 : dtype == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

// What norms, their sums and the gradients of their weights are computed and kept in.
at::TensorOptions precision_of(const Tensor& like) {
  return like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Of this shape and type, where `like` is; made contiguous where it is not.
Tensor read_as(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape,
               const at::TensorOptions& like) {
  const std::string argument(name);
  MEGARLX_CHECK(op, tensor.dtype() == like.dtype(), argument + "'s dtype", tensor.scalar_type(),
                c10::typeMetaToScalarType(like.dtype()));
  MEGARLX_CHECK(op, tensor.device() == like.device(), argument + "'s device", tensor.device(),
                like.device());
  MEGARLX_CHECK(op, tensor.sizes() == shape, argument + "'s shape", tensor.sizes(), shape);
  return tensor.contiguous();
}

Tensor read(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape,
            const Tensor& like) {
  return read_as(op, name, tensor, shape, like.options());
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

// How many blocks sum the gradient of a norm's weight over so many rows.
std::int64_t blocks_on(const Tensor& like, std::int64_t rows) {
#ifdef MEGARLX_CUDA
  if (!like.is_cpu()) return cuda::norm_blocks(rows);
#endif
  return blocks_of(rows);
}

// The sums of all blocks, added in their order: [blocks, width] to [width].
Tensor summed(const Tensor& sums, std::int64_t width) {
  Tensor out = at::empty({width}, sums.options());
  const Dtype dtype = sums.scalar_type() == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
  const std::int64_t blocks = width == 0 ? 0 : sums.numel() / width;
#ifdef MEGARLX_CUDA
  if (!sums.is_cpu()) {
    const cuda::OnDevice device(sums.device());
    cuda::sum_blocks(dtype, sums.const_data_ptr(), blocks, width, out.mutable_data_ptr(),
                     device.stream());
    device.check("sum_blocks");
    return out;
  }
#endif
  cpu_kernels().sum_blocks(dtype, sums.const_data_ptr(), blocks, width, out.mutable_data_ptr());
  return out;
}

#ifdef MEGARLX_CUDA
template <typename Args>
void launch(const char* op, const Tensor& like, const Args& args,
            void (*launcher)(const Args&, cudaStream_t)) {
  const cuda::OnDevice device(like.device());
  launcher(args, device.stream());
  device.check(op);
}
#define MEGARLX_LAUNCH(op, like, args, name) \
  if (!like.is_cpu()) return launch(op, like, args, cuda::name)
#else
#define MEGARLX_LAUNCH(op, like, args, name)                            \
  MEGARLX_CHECK(op, like.is_cpu(), "the inputs' device", like.device(), \
                "cpu (this build has no CUDA)")
#endif

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

void compute(const char* op, const Tensor& like, const RmsNormArgs& args) {
  MEGARLX_LAUNCH(op, like, args, rms_norm);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().rms_norm(args, begin, end);
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const OptionalTensor& residual) {
  const char* op = "rms_norm";
  RmsNormArgs args = read_norm(op, x);
  MEGARLX_CHECK(op, eps >= 0, "eps", eps, "a number >= 0");
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor added =
      residual.has_value() ? read(op, "residual", *residual, x.sizes(), x) : Tensor();
  Tensor y = at::empty(x.sizes(), x.options()), inverse = at::empty({args.rows}, precision_of(x));
  args.eps = eps;
  args.x = data(x_rows);
  args.weight = data(weights);
  args.residual = added.defined() ? data(added) : nullptr;
  args.y = written(y);
  args.inverse = written(inverse);
  compute(op, x, args);
  return {y, inverse};
}

void compute_backward(const char* op, const Tensor& like, const RmsNormArgs& args) {
  MEGARLX_LAUNCH(op, like, args, rms_norm_backward);
  over_rows(blocks_of(args.rows), args.width * kRowsPerBlock,
            [&](std::int64_t begin, std::int64_t end) {
              cpu_kernels().rms_norm_backward(args, begin, end);
            });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& inverse,
                                             bool with_weight) {
  const char* op = "rms_norm_backward";
  RmsNormArgs args = read_norm(op, x);
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor upstream = read(op, "grad", grad, x.sizes(), x);
  Tensor inverses = read_as(op, "inverse", inverse, {args.rows}, precision_of(x));
  Tensor grad_x = at::empty(x.sizes(), x.options());
  const std::int64_t summed_width = with_weight ? args.width : 0;
  Tensor sums = at::empty({blocks_on(x, args.rows), summed_width}, precision_of(x));
  args.x = data(x_rows);
  args.weight = data(weights);
  args.inverse = const_cast<void*>(data(inverses));
  args.grad = data(upstream);
  args.grad_x = written(grad_x);
  args.weight_sums = with_weight ? written(sums) : nullptr;
  compute_backward(op, x, args);
  return {grad_x, summed(sums, summed_width)};
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

void compute(const char* op, const Tensor& like, const SwiGluArgs& args) {
  MEGARLX_LAUNCH(op, like, args, swiglu);
  over_rows(args.rows, args.width,
            [&](std::int64_t begin, std::int64_t end) { cpu_kernels().swiglu(args, begin, end); });
}

Tensor swiglu(const Tensor& gate_up) {
  SwiGluArgs args = read_swiglu("swiglu", gate_up);
  const Tensor halves = rows_of(gate_up);
  Tensor out = at::empty({args.rows, args.width}, gate_up.options());
  args.gate_up = data(halves);
  args.gate_up_stride = halves.stride(0);
  args.out = written(out);
  compute("swiglu", gate_up, args);
  return out;
}

void compute_backward(const char* op, const Tensor& like, const SwiGluArgs& args) {
  MEGARLX_LAUNCH(op, like, args, swiglu_backward);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().swiglu_backward(args, begin, end);
  });
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
  compute_backward(op, gate_up, args);
  return out;
}

// Tensors made contiguous that must live as long as the kernel runs.
struct HeadsInputs {
  HeadsArgs args{};
  Tensor qkv, q_weight, k_weight, cos, sin, sums, grad_q, grad_k;
};

void read_projection(const char* op, const Tensor& qkv, std::int64_t heads, std::int64_t kv_heads,
                     HeadsInputs& in) {
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
  args.ranks = 1;
  in.qkv = rows_of(qkv);
  args.qkv = data(in.qkv);
  args.qkv_stride = in.qkv.stride(0);
}

void read_turn(const char* op, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
               HeadsInputs& in) {
  HeadsArgs& args = in.args;
  in.cos = read(op, "cos", cos, {args.tokens, 1, args.head_dim / 2}, qkv);
  in.sin = read(op, "sin", sin, {args.tokens, 1, args.head_dim / 2}, qkv);
  args.cos = data(in.cos);
  args.sin = data(in.sin);
}

void read_weights(const char* op, const Tensor& qkv, const OptionalTensor& q_weight,
                  const OptionalTensor& k_weight, HeadsInputs& in) {
  HeadsArgs& args = in.args;
  MEGARLX_CHECK(op, q_weight.has_value() == k_weight.has_value(), "k_weight",
                k_weight.has_value() ? "given" : "missing", "given exactly when q_weight is");
  if (!q_weight.has_value()) return;
  // one head is both: its norm is then the same either way
  const bool full = q_weight->numel() == args.heads * args.head_dim &&
                    k_weight->numel() == args.kv_heads * args.head_dim;
  args.norm = full ? HeadNorm::kFull : HeadNorm::kPerHead;
  in.q_weight = read(op, "q_weight", *q_weight, {norm_width(args, args.heads)}, qkv);
  in.k_weight = read(op, "k_weight", *k_weight, {norm_width(args, args.kv_heads)}, qkv);
  args.q_weight = data(in.q_weight);
  args.k_weight = data(in.k_weight);
}

void read_sums(const char* op, const Tensor& qkv, const OptionalTensor& sums, std::int64_t ranks,
               HeadsInputs& in) {
  HeadsArgs& args = in.args;
  MEGARLX_CHECK(op, ranks > 0, "ranks", ranks, "an integer > 0");
  args.ranks = ranks;
  if (!sums.has_value()) return;
  MEGARLX_CHECK(op, args.norm == HeadNorm::kFull, "sums", "given",
                "none where no norm spans the heads");
  in.sums = read_as(op, "sums", *sums, {args.tokens, 2}, precision_of(qkv));
  args.sums = data(in.sums);
}

HeadsInputs read_heads(const char* op, const Tensor& qkv, const OptionalTensor& q_weight,
                       const OptionalTensor& k_weight, const Tensor& cos, const Tensor& sin,
                       std::int64_t heads, std::int64_t kv_heads) {
  HeadsInputs in;
  read_projection(op, qkv, heads, kv_heads, in);
  read_turn(op, qkv, cos, sin, in);
  read_weights(op, qkv, q_weight, k_weight, in);
  return in;
}

// The heads of the projection whose gradients are given.
HeadsInputs read_upstream(const char* op, const Tensor& grad_q, const Tensor& grad_k,
                          const Tensor& qkv, const OptionalTensor& q_weight,
                          const OptionalTensor& k_weight, const Tensor& cos, const Tensor& sin) {
  MEGARLX_CHECK(op, grad_q.dim() == 3, "grad_q's shape", grad_q.sizes(),
                "[tokens, heads, head_dim]");
  MEGARLX_CHECK(op, grad_k.dim() == 3, "grad_k's shape", grad_k.sizes(),
                "[tokens, kv_heads, head_dim]");
  HeadsInputs in =
      read_heads(op, qkv, q_weight, k_weight, cos, sin, grad_q.size(1), grad_k.size(1));
  HeadsArgs& args = in.args;
  in.grad_q = read(op, "grad_q", grad_q, {args.tokens, args.heads, args.head_dim}, qkv);
  in.grad_k = read(op, "grad_k", grad_k, {args.tokens, args.kv_heads, args.head_dim}, qkv);
  args.grad_q = data(in.grad_q);
  args.grad_k = data(in.grad_k);
  return in;
}

void compute(const char* op, const Tensor& like, const HeadsArgs& args) {
  MEGARLX_LAUNCH(op, like, args, heads);
  over_rows(args.tokens, (args.heads + args.kv_heads) * args.head_dim,
            [&](std::int64_t begin, std::int64_t end) { cpu_kernels().heads(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> heads_forward(const Tensor& qkv, const OptionalTensor& q_weight,
                                                 const OptionalTensor& k_weight, const Tensor& cos,
                                                 const Tensor& sin, std::int64_t heads,
                                                 std::int64_t kv_heads, double eps,
                                                 const OptionalTensor& sums, std::int64_t ranks) {
  const char* op = "_heads";
  HeadsInputs in = read_heads(op, qkv, q_weight, k_weight, cos, sin, heads, kv_heads);
  read_sums(op, qkv, sums, ranks, in);
  HeadsArgs& args = in.args;
  MEGARLX_CHECK(op, eps >= 0, "eps", eps, "a number >= 0");
  args.eps = eps;
  Tensor q = at::empty({args.tokens, heads, args.head_dim}, qkv.options());
  Tensor k = at::empty({args.tokens, kv_heads, args.head_dim}, qkv.options());
  Tensor inverse = at::empty({args.tokens, norms_of_token(args)}, precision_of(qkv));
  args.q = written(q);
  args.k = written(k);
  args.inverse = written(inverse);
  compute(op, qkv, args);
  return {q, k, inverse};
}

void compute_sums(const char* op, const Tensor& like, const HeadsArgs& args) {
  MEGARLX_LAUNCH(op, like, args, heads_sums);
  over_rows(
      args.tokens, (args.heads + args.kv_heads) * args.head_dim,
      [&](std::int64_t begin, std::int64_t end) { cpu_kernels().heads_sums(args, begin, end); });
}

Tensor heads_sums(const Tensor& qkv, std::int64_t heads, std::int64_t kv_heads) {
  const char* op = "_heads_sums";
  HeadsInputs in;
  read_projection(op, qkv, heads, kv_heads, in);
  in.args.norm = HeadNorm::kFull;
  Tensor sums = at::empty({in.args.tokens, 2}, precision_of(qkv));
  in.args.own_sums = written(sums);
  compute_sums(op, qkv, in.args);
  return sums;
}

Tensor heads_backward_sums(const Tensor& grad_q, const Tensor& grad_k, const Tensor& qkv,
                           const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos,
                           const Tensor& sin) {
  const char* op = "_heads_backward_sums";
  HeadsInputs in = read_upstream(op, grad_q, grad_k, qkv, q_weight, k_weight, cos, sin);
  MEGARLX_CHECK(op, in.args.norm == HeadNorm::kFull, "q_weight's shape", q_weight.sizes(),
                "[heads × head_dim], the norm that spans the heads");
  Tensor sums = at::empty({in.args.tokens, 2}, precision_of(qkv));
  in.args.own_sums = written(sums);
  compute_sums(op, qkv, in.args);
  return sums;
}

void compute_backward(const char* op, const Tensor& like, const HeadsArgs& args) {
  MEGARLX_LAUNCH(op, like, args, heads_backward);
  over_rows(blocks_of(args.tokens),
            (args.heads + 2 * args.kv_heads) * args.head_dim * kRowsPerBlock,
            [&](std::int64_t begin, std::int64_t end) {
              cpu_kernels().heads_backward(args, begin, end);
            });
}

std::tuple<Tensor, Tensor, Tensor> heads_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                  const Tensor& grad_v, const Tensor& qkv,
                                                  const OptionalTensor& q_weight,
                                                  const OptionalTensor& k_weight, const Tensor& cos,
                                                  const Tensor& sin, const Tensor& inverse,
                                                  bool with_weights, const OptionalTensor& sums,
                                                  std::int64_t ranks) {
  const char* op = "_heads_backward";
  HeadsInputs in = read_upstream(op, grad_q, grad_k, qkv, q_weight, k_weight, cos, sin);
  read_sums(op, qkv, sums, ranks, in);
  HeadsArgs& args = in.args;
  const Tensor upstream_v =
      read(op, "grad_v", grad_v, {args.tokens, args.kv_heads, args.head_dim}, qkv);
  const Tensor inverses =
      read_as(op, "inverse", inverse, {args.tokens, norms_of_token(args)}, precision_of(qkv));
  MEGARLX_CHECK(op, !with_weights || q_weight.has_value(), "with_weights", "true",
                "false where there are no weights");
  const std::int64_t q_width = with_weights ? norm_width(args, args.heads) : 0;
  const std::int64_t k_width = with_weights ? norm_width(args, args.kv_heads) : 0;
  const std::int64_t blocks = blocks_on(qkv, args.tokens);
  Tensor grad_qkv = at::empty(qkv.sizes(), qkv.options());
  Tensor weight_sums = at::empty({blocks * (q_width + k_width)}, precision_of(qkv));
  args.grad_v = data(upstream_v);
  args.inverse = const_cast<void*>(data(inverses));
  args.grad_qkv = written(grad_qkv);
  args.weight_sums = with_weights ? written(weight_sums) : nullptr;
  compute_backward(op, qkv, args);
  const Tensor both = summed(weight_sums, q_width + k_width);
  return {grad_qkv, both.slice(0, 0, q_width).clone(), both.slice(0, q_width).clone()};
}

void implement(torch::Library& m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("_heads", heads_forward);
  m.impl("_heads_sums", heads_sums);
  m.impl("_heads_backward", heads_backward);
  m.impl("_heads_backward_sums", heads_backward_sums);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace megarlx
