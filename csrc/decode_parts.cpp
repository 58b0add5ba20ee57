// The parts of a cached decode step between its products and its attention, into given buffers.
// Values on a GPU are not looked at: nothing waits for them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "dispatch.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t kGrain = 1 << 15;  // numbers for which another thread is worth waking

Dtype checked_dtype(const char* op, const Tensor& like) {
  const auto type = like.scalar_type();
  const bool narrow = type == at::kBFloat16 && !like.is_cpu();
  MEGARLX_CHECK(op, type == at::kFloat || type == at::kDouble || narrow, "dtype", type,
                "Float, Double, and on CUDA BFloat16");
  return narrow ? Dtype::kBFloat16 : type == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

at::ScalarType precision_of(const Tensor& like) {
  return like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_apart(const char* op, const char* name, const Tensor& t, at::ScalarType type,
                 at::IntArrayRef shape, const Tensor& like) {
  MEGARLX_CHECK(op, t.scalar_type() == type, name, t.scalar_type(), type);
  MEGARLX_CHECK(op, t.device() == like.device(), name, t.device(), like.device());
  MEGARLX_CHECK(op, t.sizes() == shape, name, c10::str("of shape ", t.sizes()), shape);
}

void check(const char* op, const char* name, const Tensor& t, at::ScalarType type,
           at::IntArrayRef shape, const Tensor& like) {
  check_apart(op, name, t, type, shape, like);
  MEGARLX_CHECK(op, t.is_contiguous(), name, c10::str("strided ", t.strides()), "contiguous");
}

void check(const char* op, const char* name, const Tensor& t, const Tensor& like,
           at::IntArrayRef shape) {
  check(op, name, t, like.scalar_type(), shape, like);
}

#ifdef MEGARLX_CUDA
template <typename Args>
void launch(const char* op, const Tensor& like, const Args& args,
            void (*launcher)(const Args&, cudaStream_t)) {
  const cuda::OnDevice device(like.device());
  launcher(args, device.stream());
  device.check(op);
}

// x += norm(y), or with `out` x += y and out = norm(x), as a norm with a residual or an addend.
RmsNormArgs as_norm(const DecodeNormArgs& args, std::int64_t rows) {
  RmsNormArgs norm{};
  norm.dtype = args.dtype;
  norm.rows = rows;
  norm.width = args.width;
  norm.eps = args.eps;
  norm.weight = args.weight;
  const bool behind = args.out == nullptr;
  norm.x = behind ? args.y : args.x;
  norm.residual = behind ? args.x : nullptr;
  norm.addend = behind ? nullptr : args.y;
  norm.sum = norm.addend == nullptr ? nullptr : args.x;
  norm.y = behind ? args.x : args.out;
  return norm;
}
#endif

void decode_norm_(Tensor x, const OptionalTensor& y, const Tensor& weight, double eps,
                  const OptionalTensor& out) {
  const char* op = "decode_norm_";
  MEGARLX_CHECK(op, x.dim() == 2, "x", c10::str("of shape ", x.sizes()), "[rows, width]");
  DecodeNormArgs args = {};
  args.dtype = checked_dtype(op, x);
  check(op, "x", x, x, x.sizes());
  check(op, "weight", weight, x, {x.size(1)});
  MEGARLX_CHECK(op, x.size(1) > 0, "x", c10::str("of shape ", x.sizes()), "a width above 0");
  if (y) check(op, "y", *y, x, x.sizes());
  if (out) check(op, "out", *out, x, x.sizes());
  MEGARLX_CHECK(op, y || out, "y", "missing", "a tensor where out is not given");
  args.x = x.mutable_data_ptr();
  args.y = y ? y->const_data_ptr() : nullptr;
  args.weight = weight.const_data_ptr();
  args.out = out ? out->mutable_data_ptr() : nullptr;
  args.eps = eps;
  args.width = x.size(1);
#ifdef MEGARLX_CUDA
  if (!x.is_cpu()) return launch(op, x, as_norm(args, x.size(0)), cuda::rms_norm);
#endif
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
  MEGARLX_CHECK(op, out.size(1) > 0, "out", c10::str("of shape ", out.sizes()), "a width above 0");
  check(op, "gate_up", gate_up, gate_up, {out.size(0), 2 * out.size(1)});
  args.gate_up = gate_up.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.width = out.size(1);
#ifdef MEGARLX_CUDA
  if (!out.is_cpu()) {
    SwiGluArgs rows{};
    rows.dtype = args.dtype;
    rows.rows = out.size(0);
    rows.width = args.width;
    rows.gate_up = args.gate_up;
    rows.gate_up_stride = 2 * args.width;
    rows.out = args.out;
    return launch(op, out, rows, cuda::swiglu);
  }
#endif
  at::parallel_for(
      0, out.size(0), std::max<std::int64_t>(1, kGrain / (4 * out.size(1) + 1)),
      [&](std::int64_t begin, std::int64_t end) { cpu_kernels().decode_swiglu(args, begin, end); });
}

void read_cache(const char* op, const Tensor& keys, const Tensor& values,
                const OptionalTensor& table, const Tensor& qkv, HeadsArgs& args) {
  MEGARLX_CHECK(op, keys.dim() == 4, "keys", c10::str("of shape ", keys.sizes()),
                "[pages, page_size, kv_heads, head_dim]");
  check(op, "keys", keys, qkv, keys.sizes());
  check(op, "values", values, qkv, keys.sizes());
  args.pages = keys.size(0);
  args.page_size = keys.size(1);
  args.kv_heads = keys.size(2);
  args.head_dim = keys.size(3);
  args.pages_of_slot = 1;
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  if (!table) return;
  MEGARLX_CHECK(op, table->dim() == 2 && table->size(1) % 2 == 1 && table->size(1) > 1, "table",
                c10::str("of shape ", table->sizes()), "[slots, 1 + 2 pages of a slot]");
  check(op, "table", *table, at::kInt, table->sizes(), qkv);
  args.table = table->const_data_ptr<std::int32_t>();
  args.pages_of_slot = table->size(1) / 2;
}

void read_norm(const char* op, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
               const OptionalTensor& sums, std::int64_t ranks, const Tensor& qkv, HeadsArgs& args) {
  MEGARLX_CHECK(op, q_weight.has_value() == k_weight.has_value(), "k_weight",
                k_weight ? "given" : "missing", "both norm weights or neither");
  MEGARLX_CHECK(op, ranks > 0, "ranks", ranks, "an integer > 0");
  args.ranks = ranks;
  if (q_weight) {
    const auto q_width = args.heads * args.head_dim, k_width = args.kv_heads * args.head_dim;
    const bool full = q_weight->numel() == q_width && k_weight->numel() == k_width;
    args.norm = full ? HeadNorm::kFull : HeadNorm::kPerHead;
    check(op, "q_weight", *q_weight, qkv, {norm_width(args, args.heads)});
    check(op, "k_weight", *k_weight, qkv, {norm_width(args, args.kv_heads)});
    args.q_weight = q_weight->const_data_ptr();
    args.k_weight = k_weight->const_data_ptr();
  }
  if (!sums) return;
  MEGARLX_CHECK(op, args.norm == HeadNorm::kFull, "sums", "given",
                "none where no norm spans the heads");
  check(op, "sums", *sums, precision_of(qkv), {args.tokens, 2}, qkv);
  args.sums = sums->const_data_ptr();
}

// Indices that the host can see are looked at.
void check_places(const char* op, const Tensor& slots, const Tensor& positions,
                  std::int64_t most_slots, std::int64_t most_positions) {
  if (!slots.is_cpu()) return;
  const auto* slot = slots.const_data_ptr<std::int64_t>();
  const auto* position = positions.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < slots.size(0); ++i) {
    MEGARLX_CHECK(op, slot[i] < most_slots, "slots", slot[i],
                  c10::str("below ", most_slots, "; below 0 for none"));
    MEGARLX_CHECK(op, position[i] >= 0 && position[i] < most_positions, "positions", position[i],
                  c10::str("0 to ", most_positions - 1));
  }
}

void decode_heads_(const Tensor& qkv, Tensor keys, Tensor values, const OptionalTensor& table,
                   const Tensor& slots, const Tensor& positions, const Tensor& cosines,
                   const Tensor& sines, const OptionalTensor& q_weight,
                   const OptionalTensor& k_weight, const OptionalTensor& sums, std::int64_t ranks,
                   double eps, Tensor q) {
  const char* op = "decode_heads_";
  HeadsArgs args{};
  args.dtype = checked_dtype(op, qkv);
  read_cache(op, keys, values, table, qkv, args);
  const auto dim = args.head_dim;
  MEGARLX_CHECK(op, q.dim() == 3, "q", c10::str("of shape ", q.sizes()), "[rows, heads, head_dim]");
  args.tokens = q.size(0);
  args.heads = q.size(1);
  check(op, "q", q, qkv, {args.tokens, args.heads, dim});
  args.qkv_stride = (args.heads + 2 * args.kv_heads) * dim;
  check(op, "qkv", qkv, qkv, {args.tokens, args.qkv_stride});
  check(op, "slots", slots, at::kLong, {args.tokens}, qkv);
  check(op, "positions", positions, at::kLong, {args.tokens}, qkv);
  const auto most = args.pages_of_slot * args.page_size;
  MEGARLX_CHECK(op, cosines.dim() == 2 && cosines.size(0) >= most, "cosines",
                c10::str("of shape ", cosines.sizes()),
                c10::str("[", most, " or more, ", dim / 2, "]"));
  check(op, "cosines", cosines, qkv, {cosines.size(0), dim / 2});
  check(op, "sines", sines, qkv, cosines.sizes());
  read_norm(op, q_weight, k_weight, sums, ranks, qkv, args);
  check_places(op, slots, positions, table ? table->size(0) : args.pages, most);
  args.eps = eps;
  args.qkv = qkv.const_data_ptr();
  args.cos = cosines.const_data_ptr();
  args.sin = sines.const_data_ptr();
  args.slots = slots.const_data_ptr<std::int64_t>();
  args.positions = positions.const_data_ptr<std::int64_t>();
  args.q = q.mutable_data_ptr();
#ifdef MEGARLX_CUDA
  if (!qkv.is_cpu()) return launch(op, qkv, args, cuda::heads);
#endif
  at::parallel_for(
      0, args.tokens, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(qkv.size(1), 1)),
      [&](std::int64_t begin, std::int64_t end) { cpu_kernels().heads(args, begin, end); });
}

template <typename T>
void merge_rows(const MergeArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const auto weights = MergeWeights<T>::of_row(args, row);
    static_cast<T*>(args.lse)[row] = weights.lse;
    for (std::int64_t e = row * args.width; e < (row + 1) * args.width; ++e)
      static_cast<T*>(args.out)[e] =
          weights.merged(static_cast<const T*>(args.a)[e], static_cast<const T*>(args.b)[e]);
  }
}

// Of any strides: flash-attn has it [heads, tokens] in memory for packed documents.
LseStrides checked_lse(const char* op, const char* name, const Tensor& lse, const Tensor& a) {
  check_apart(op, name, lse, precision_of(a), {a.size(0), a.size(1)}, a);
  return {lse.stride(0), lse.stride(1)};
}

std::tuple<Tensor, Tensor> merge_attention(const Tensor& a, const Tensor& a_lse, const Tensor& b,
                                           const Tensor& b_lse) {
  const char* op = "merge_attention";
  MEGARLX_CHECK(op, a.dim() == 3, "a", c10::str("of shape ", a.sizes()),
                "[tokens, heads, head_dim]");
  const auto tokens = a.size(0), heads = a.size(1);
  MergeArgs args{checked_dtype(op, a), tokens * heads, a.size(2), heads};
  check(op, "a", a, a, a.sizes());
  check(op, "b", b, a, a.sizes());
  args.a_stride = checked_lse(op, "a_lse", a_lse, a);
  args.b_stride = checked_lse(op, "b_lse", b_lse, a);
  Tensor out = at::empty_like(a), lse = at::empty({tokens, heads}, a_lse.options());
  args.a = a.const_data_ptr();
  args.b = b.const_data_ptr();
  args.a_lse = a_lse.const_data_ptr();
  args.b_lse = b_lse.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
#ifdef MEGARLX_CUDA
  if (!a.is_cpu()) {
    launch(op, a, args, cuda::merge_attention);
    return {out, lse};
  }
#endif
  at::parallel_for(0, args.rows, std::max<std::int64_t>(1, kGrain / (args.width + 1)),
                   [&](std::int64_t begin, std::int64_t end) {
                     args.dtype == Dtype::kFloat64 ? merge_rows<double>(args, begin, end)
                                                   : merge_rows<float>(args, begin, end);
                   });
  return {out, lse};
}

void decode_advance_(const Tensor& drawn, const Tensor& logprob, const Tensor& sampled_logprob,
                     const Tensor& ends, const Tensor& last_positions, std::int64_t idle_slot,
                     Tensor tokens, Tensor positions, Tensor slots, Tensor keys, Tensor frozen,
                     Tensor step, Tensor history, Tensor logprobs) {
  const char* op = "decode_advance_";
  MEGARLX_CHECK(op, history.dim() == 2 && history.size(0) > 0, "history",
                c10::str("of shape ", history.sizes()), "[steps, rows] with a step or more");
  MEGARLX_CHECK(op, ends.dim() == 1, "ends", c10::str("of shape ", ends.sizes()), "[ends]");
  const auto ring = history.size(0), rows = history.size(1);
  check(op, "history", history, at::kLong, {ring, rows}, history);
  check(op, "logprobs", logprobs, at::kFloat, {2, ring, rows}, history);
  check(op, "ends", ends, at::kLong, ends.sizes(), history);
  check(op, "keys", keys, at::kLong, {rows, 2}, history);
  check(op, "frozen", frozen, at::kBool, {rows}, history);
  check(op, "step", step, at::kLong, {1}, history);
  const std::pair<const char*, const Tensor*> of_rows[] = {{"drawn", &drawn},
                                                           {"last_positions", &last_positions},
                                                           {"tokens", &tokens},
                                                           {"slots", &slots},
                                                           {"positions", &positions}};
  for (const auto& [name, tensor] : of_rows) check(op, name, *tensor, at::kLong, {rows}, history);
  check(op, "logprob", logprob, at::kFloat, {rows}, history);
  check(op, "sampled_logprob", sampled_logprob, at::kFloat, {rows}, history);
  AdvanceArgs args{rows, ends.size(0), ring, idle_slot};
  args.drawn = drawn.const_data_ptr<std::int64_t>();
  args.ends = ends.const_data_ptr<std::int64_t>();
  args.logprob = logprob.const_data_ptr<float>();
  args.sampled = sampled_logprob.const_data_ptr<float>();
  args.last_positions = last_positions.const_data_ptr<std::int64_t>();
  args.tokens = tokens.mutable_data_ptr<std::int64_t>();
  args.positions = positions.mutable_data_ptr<std::int64_t>();
  args.slots = slots.mutable_data_ptr<std::int64_t>();
  args.keys = keys.mutable_data_ptr<std::int64_t>();
  args.frozen = frozen.mutable_data_ptr<bool>();
  args.step = step.mutable_data_ptr<std::int64_t>();
  args.history = history.mutable_data_ptr<std::int64_t>();
  args.logprobs = logprobs.mutable_data_ptr<float>();
#ifdef MEGARLX_CUDA
  if (!history.is_cpu()) return launch(op, history, args, cuda::decode_advance);
#endif
  for (std::int64_t row = 0; row < rows; ++row) advance_row(args, row);
  *args.step += 1;
}

void implement(torch::Library& m) {
  m.impl("decode_norm_", decode_norm_);
  m.impl("decode_swiglu_", decode_swiglu_);
  m.impl("decode_heads_", decode_heads_);
  m.impl("merge_attention", merge_attention);
  m.impl("decode_advance_", decode_advance_);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace megarlx
