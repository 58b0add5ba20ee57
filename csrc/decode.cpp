// The steps of cached decoding between its matrix products, in place and into given buffers. CPU
// only: on CUDA the whole step is a graph over the model's own layers and flash-attn.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dispatch.h"

namespace megarlx {
namespace {
using at::Tensor;

constexpr std::int64_t kGrain =
    1 << 15;  // multiplications for which another thread is worth waking

Dtype checked_dtype(const char* op, const Tensor& like) {
  const auto type = like.scalar_type();
  MEGARLX_CHECK(op, type == at::kFloat || type == at::kDouble, "dtype", type, "Float or Double");
  return type == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

void check(const char* op, const char* name, const Tensor& t, const Tensor& like,
           at::IntArrayRef shape) {
  MEGARLX_CHECK(op, t.scalar_type() == like.scalar_type(), name, t.scalar_type(),
                like.scalar_type());
  MEGARLX_CHECK(op, t.sizes() == shape, name, c10::str("of shape ", t.sizes()), shape);
  MEGARLX_CHECK(op, t.is_contiguous(), name, c10::str("strided ", t.strides()), "contiguous");
}

void check_indices(const char* op, const char* name, const Tensor& t, std::int64_t rows,
                   std::int64_t limit) {
  MEGARLX_CHECK(op, t.scalar_type() == at::kLong, name, t.scalar_type(), "Long");
  MEGARLX_CHECK(op, t.dim() == 1 && t.size(0) >= rows && t.is_contiguous(), name,
                c10::str("of shape ", t.sizes()), c10::str("[", rows, "] or longer, contiguous"));
  const auto* values = t.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < rows; ++i)
    MEGARLX_CHECK(op, values[i] >= 0 && values[i] < limit, name, values[i],
                  c10::str("0 to ", limit - 1));
}

// Only the first `rows` rows are worked on; those behind them are padding of the products.
void decode_attention_(const Tensor& qkv, Tensor keys, Tensor values, const Tensor& slots,
                       const Tensor& positions, const Tensor& cosines, const Tensor& sines,
                       const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                       const std::optional<Tensor>& inverse, double eps, double scale,
                       std::int64_t rows, Tensor out) {
  const char* op = "decode_attention_";
  DecodeAttentionArgs args = {};
  args.dtype = checked_dtype(op, qkv);
  MEGARLX_CHECK(op, keys.dim() == 4, "keys", c10::str("of shape ", keys.sizes()),
                "[slots, places, kv_heads, head_dim]");
  const auto kv_heads = keys.size(2), dim = keys.size(3);
  MEGARLX_CHECK(op, out.dim() == 2 && out.size(1) % dim == 0 && out.size(1) / dim % kv_heads == 0,
                "out", c10::str("of shape ", out.sizes()),
                c10::str("[rows, a multiple of ", kv_heads * dim, "]"));
  const auto batch = out.size(0), heads = out.size(1) / dim;
  MEGARLX_CHECK(op, rows >= 0 && rows <= batch, "rows", rows, c10::str("0 to ", batch));
  check(op, "qkv", qkv, qkv, {batch, (heads + 2 * kv_heads) * dim});
  check(op, "out", out, qkv, {batch, heads * dim});
  check(op, "keys", keys, qkv, keys.sizes());
  check(op, "values", values, qkv, keys.sizes());
  MEGARLX_CHECK(op, cosines.dim() == 2 && cosines.size(0) >= keys.size(1), "cosines",
                c10::str("of shape ", cosines.sizes()),
                c10::str("[", keys.size(1), " or more, ", dim / 2, "]"));
  check(op, "cosines", cosines, qkv, {cosines.size(0), dim / 2});
  check(op, "sines", sines, qkv, cosines.sizes());
  check_indices(op, "slots", slots, rows, keys.size(0));
  check_indices(op, "positions", positions, rows, keys.size(1));
  MEGARLX_CHECK(op, q_weight.has_value() == k_weight.has_value(), "k_weight",
                k_weight.has_value() ? "given" : "missing", "both norm weights or neither");
  if (q_weight) {
    args.full_norm = q_weight->numel() == heads * dim;  // of one head: the same either way
    check(op, "q_weight", *q_weight, qkv, {args.full_norm ? heads * dim : dim});
    check(op, "k_weight", *k_weight, qkv, {args.full_norm ? kv_heads * dim : dim});
    args.q_weight = q_weight->const_data_ptr();
    args.k_weight = k_weight->const_data_ptr();
  }
  if (inverse) {
    check(op, "inverse", *inverse, qkv, {batch, 2});
    args.inverse = inverse->const_data_ptr();
  }
  args.qkv = qkv.const_data_ptr();
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  args.slots = slots.const_data_ptr<std::int64_t>();
  args.positions = positions.const_data_ptr<std::int64_t>();
  args.cosines = cosines.const_data_ptr();
  args.sines = sines.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.eps = eps;
  args.scale = scale;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = dim;
  args.places = keys.size(1);
  std::int64_t seen = 0;
  for (std::int64_t i = 0; i < rows; ++i) seen += args.positions[i] + 1;
  const auto cost = 2 * heads * dim * seen / std::max<std::int64_t>(rows, 1);
  at::parallel_for(0, rows, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(cost, 1)),
                   [&](std::int64_t begin, std::int64_t end) {
                     cpu_kernels().decode_attention(args, begin, end);
                   });
}

void decode_norm_(Tensor x, const std::optional<Tensor>& y, const Tensor& weight, double eps,
                  const std::optional<Tensor>& out) {
  const char* op = "decode_norm_";
  MEGARLX_CHECK(op, x.dim() == 2, "x", c10::str("of shape ", x.sizes()), "[rows, width]");
  DecodeNormArgs args = {};
  args.dtype = checked_dtype(op, x);
  check(op, "x", x, x, x.sizes());
  check(op, "weight", weight, x, {x.size(1)});
  if (y) check(op, "y", *y, x, x.sizes());
  if (out) check(op, "out", *out, x, x.sizes());
  MEGARLX_CHECK(op, y || out, "y", "missing", "a tensor where out is not given");
  args.x = x.mutable_data_ptr();
  args.y = y ? y->const_data_ptr() : nullptr;
  args.weight = weight.const_data_ptr();
  args.out = out ? out->mutable_data_ptr() : nullptr;
  args.eps = eps;
  args.width = x.size(1);
  at::parallel_for(
      0, x.size(0), std::max<std::int64_t>(1, kGrain / (x.size(1) + 1)),
      [&](std::int64_t begin, std::int64_t end) { cpu_kernels().decode_norm(args, begin, end); });
}

void decode_swiglu_(const Tensor& gate_up, Tensor out) {
  const char* op = "decode_swiglu_";
  MEGARLX_CHECK(op, out.dim() == 2, "out", c10::str("of shape ", out.sizes()), "[rows, width]");
  DecodeSwigluArgs args = {};
  args.dtype = checked_dtype(op, gate_up);
  check(op, "out", out, gate_up, out.sizes());
  check(op, "gate_up", gate_up, gate_up, {out.size(0), 2 * out.size(1)});
  args.gate_up = gate_up.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.width = out.size(1);
  at::parallel_for(
      0, out.size(0), std::max<std::int64_t>(1, kGrain / (4 * out.size(1) + 1)),
      [&](std::int64_t begin, std::int64_t end) { cpu_kernels().decode_swiglu(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("decode_attention_", decode_attention_);
  m.impl("decode_norm_", decode_norm_);
  m.impl("decode_swiglu_", decode_swiglu_);
}

}  // namespace megarlx
