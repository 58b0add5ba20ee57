// Bindings of the attention's heads, QK-norm and rotation: as those of elementwise.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elementwise.h"

namespace megarlx {
namespace {

constexpr std::int64_t kMostHeads = 1 << 20;  // so that no product with them overflows
constexpr const char* kHeads = "1 to 1048576";

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
