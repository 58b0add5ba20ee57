// Attention of cached decoding, and its whole step, in place and into given buffers. CPU only: on
// CUDA attention is flash-attn's. What both have is in decode_parts.cpp.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "dispatch.h"

namespace megarlx {
namespace {
using at::Tensor;

constexpr std::int64_t kMost = 1 << 28;  // heads, elements of a row: their products do not overflow
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

// The pages of every slot that a row is in, as far as it is filled; returns how many a slot has.
std::int64_t check_pages(const char* op, const std::optional<Tensor>& table, const Tensor& slots,
                         const Tensor& positions, std::int64_t rows, std::int64_t pages,
                         std::int64_t size) {
  MEGARLX_CHECK(op, size > 0, "keys", c10::str("pages of ", size, " places"), "1 or more");
  std::int64_t count = 1, held = pages;
  if (table) {
    MEGARLX_CHECK(op, table->scalar_type() == at::kInt, "table", table->scalar_type(), "Int");
    MEGARLX_CHECK(op, table->dim() == 2 && table->size(1) % 2 == 1 && table->size(1) > 1, "table",
                  c10::str("of shape ", table->sizes()), "[slots, 1 + 2 pages of a slot]");
    MEGARLX_CHECK(op, table->is_contiguous(), "table", c10::str("strided ", table->strides()),
                  "contiguous");
    held = table->size(0);
    count = table->size(1) / 2;
  }
  check_indices(op, "slots", slots, rows, held);
  check_indices(op, "positions", positions, rows, count * size);
  if (!table) return count;
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto position = positions.const_data_ptr<std::int64_t>()[i];
    const auto slot = SlotPages::of(table->const_data_ptr<std::int32_t>(),
                                    slots.const_data_ptr<std::int64_t>()[i], count, size);
    const auto shared = slot.shared();
    MEGARLX_CHECK(op, shared >= 0 && shared <= position, "table", c10::str(shared, " shared"),
                  c10::str("0 to ", position, ", the position"));
    const auto check_page = [&](std::int64_t column) {
      const auto page = slot.page(column);
      MEGARLX_CHECK(op, page >= 0 && page < pages, "table", c10::str("page ", page),
                    c10::str("0 to ", pages - 1));
    };
    for (std::int64_t at = 0; at < shared; at += size) check_page(at / size);
    for (std::int64_t at = shared; at <= position; at += size)
      check_page(count + (at - shared) / size);
  }
  return count;
}

// Only the first `rows` rows are worked on; those behind them are padding of the products.
void decode_attention_(const Tensor& qkv, Tensor keys, Tensor values,
                       const std::optional<Tensor>& table, const Tensor& slots,
                       const Tensor& positions, const Tensor& cosines, const Tensor& sines,
                       const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                       const std::optional<Tensor>& inverse, double eps, double scale,
                       std::int64_t rows, Tensor out) {
  const char* op = "decode_attention_";
  DecodeAttentionArgs args = {};
  args.dtype = checked_dtype(op, qkv);
  MEGARLX_CHECK(op, keys.dim() == 4, "keys", c10::str("of shape ", keys.sizes()),
                "[pages, page_size, kv_heads, head_dim]");
  const auto kv_heads = keys.size(2), dim = keys.size(3);
  MEGARLX_CHECK(op, kv_heads > 0 && dim > 0, "keys", c10::str("of shape ", keys.sizes()),
                "at least one head of at least one element");
  MEGARLX_CHECK(op, out.dim() == 2 && out.size(1) > 0 && out.size(1) % (kv_heads * dim) == 0, "out",
                c10::str("of shape ", out.sizes()),
                c10::str("[rows, a multiple of ", kv_heads * dim, "]"));
  const auto batch = out.size(0), heads = out.size(1) / dim;
  MEGARLX_CHECK(op, rows >= 0 && rows <= batch, "rows", rows, c10::str("0 to ", batch));
  check(op, "qkv", qkv, qkv, {batch, (heads + 2 * kv_heads) * dim});
  check(op, "out", out, qkv, {batch, heads * dim});
  check(op, "keys", keys, qkv, keys.sizes());
  check(op, "values", values, qkv, keys.sizes());
  args.page_size = keys.size(1);
  args.pages_of_slot = check_pages(op, table, slots, positions, rows, keys.size(0), args.page_size);
  const auto places = args.pages_of_slot * args.page_size;
  MEGARLX_CHECK(op, cosines.dim() == 2 && cosines.size(0) >= places, "cosines",
                c10::str("of shape ", cosines.sizes()),
                c10::str("[", places, " or more, ", dim / 2, "]"));
  check(op, "cosines", cosines, qkv, {cosines.size(0), dim / 2});
  check(op, "sines", sines, qkv, cosines.sizes());
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
  args.table = table ? table->const_data_ptr<std::int32_t>() : nullptr;
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
  std::int64_t seen = 0;
  for (std::int64_t i = 0; i < rows; ++i) seen += args.positions[i] + 1;
  const auto cost = 2 * heads * dim * seen / std::max<std::int64_t>(rows, 1);
  at::parallel_for(0, rows, std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(cost, 1)),
                   [&](std::int64_t begin, std::int64_t end) {
                     cpu_kernels().decode_attention(args, begin, end);
                   });
}

// So many rows a thread make its products as fast as they get: then a thread takes its rows through
// the whole step and waits for nobody. With fewer, all threads share the columns of every product.
constexpr std::int64_t kRowsOfThread = 8;
constexpr std::int64_t kRowsAtOnce = 64;  // what they compute on the way stays in a core's cache

struct PartOfStep {
  DecodePart part;
  std::int64_t layer;
  std::int64_t panels;  // 0: not a product
  std::int64_t cost;    // multiplications a row, of one panel or of the whole part
};

std::vector<PartOfStep> parts_of_step(const DecodeStepArgs& a) {
  const std::int64_t panel = a.dtype == Dtype::kFloat64 ? 16 : 32;
  const auto panels = [&](std::int64_t columns) { return (columns + panel - 1) / panel; };
  const auto attended = a.heads * a.head_dim, fused = attended + 2 * a.kv_heads * a.head_dim;
  const auto d = a.hidden;
  std::vector<PartOfStep> parts;
  if (a.embedding != nullptr) parts.push_back({DecodePart::kEmbed, 0, 0, d});
  for (std::int64_t layer = 0; layer < a.layers; ++layer) {
    if (!a.post) parts.push_back({DecodePart::kEnter, layer, 0, 4 * d});
    parts.push_back({DecodePart::kQkv, layer, panels(fused), panel * d});
    parts.push_back({DecodePart::kAttention, layer, 0, attended * a.pages_of_slot * a.page_size});
    parts.push_back({DecodePart::kOut, layer, panels(d), panel * attended});
    parts.push_back({DecodePart::kMiddle, layer, 0, 4 * d});
    parts.push_back({DecodePart::kGateUp, layer, panels(2 * a.intermediate), panel * d});
    parts.push_back({DecodePart::kDown, layer, panels(d), panel * a.intermediate});
    parts.push_back({DecodePart::kLeave, layer, 0, 4 * d});
  }
  if (a.head != nullptr) {
    parts.push_back({DecodePart::kNorm, 0, 0, 4 * d});
    parts.push_back({DecodePart::kHead, 0, panels(a.vocab), panel * d});
  }
  return parts;
}

void run_step(const DecodeStepArgs& args, std::int64_t rows) {
  const auto run = cpu_kernels().decode_part;
  const auto parts = parts_of_step(args);
  const std::int64_t threads = at::get_num_threads();
  if (threads == 1 || rows >= kRowsOfThread * threads) {
    at::parallel_for(0, rows, kRowsOfThread, [&](std::int64_t begin, std::int64_t end) {
      const auto blocks = (end - begin + kRowsAtOnce - 1) / kRowsAtOnce;
      for (std::int64_t block = 0; block < blocks; ++block)
        for (const auto& p : parts)
          run(args, p.part, p.layer, begin + (end - begin) * block / blocks,
              begin + (end - begin) * (block + 1) / blocks, 0, p.panels);
    });
    return;
  }
  for (const auto& p : parts) {
    const auto cost = p.cost * (p.panels == 0 ? 1 : rows);
    const auto grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(cost, 1));
    if (p.panels == 0)
      at::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
        run(args, p.part, p.layer, begin, end, 0, 0);
      });
    else
      at::parallel_for(0, p.panels, grain, [&](std::int64_t begin, std::int64_t end) {
        run(args, p.part, p.layer, 0, rows, begin, end);
      });
  }
}

void decode_step_(Tensor x, const std::optional<Tensor>& tokens,
                  const std::optional<Tensor>& embedding, const Tensor& qkv,
                  const std::optional<Tensor>& qkv_bias, const Tensor& o, const Tensor& gate_up,
                  const Tensor& down, const Tensor& attention_norm, const Tensor& mlp_norm,
                  const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                  const std::optional<Tensor>& norm, const std::optional<Tensor>& head, Tensor keys,
                  Tensor values, const std::optional<Tensor>& table, const Tensor& slots,
                  const Tensor& positions, const Tensor& cosines, const Tensor& sines, double eps,
                  double scale, std::int64_t heads, std::int64_t intermediate, bool post,
                  std::int64_t rows, Tensor scratch, const std::optional<Tensor>& logits) {
  const char* op = "decode_step_";
  DecodeStepArgs args = {};
  args.dtype = checked_dtype(op, x);
  MEGARLX_CHECK(op, x.dim() == 2, "x", c10::str("of shape ", x.sizes()), "[rows, hidden]");
  MEGARLX_CHECK(op, keys.dim() == 5, "keys", c10::str("of shape ", keys.sizes()),
                "[layers, pages, page_size, kv_heads, head_dim]");
  const auto batch = x.size(0), d = x.size(1), layers = keys.size(0);
  const auto kv_heads = keys.size(3), dim = keys.size(4), attended = heads * dim;
  MEGARLX_CHECK(op, kv_heads > 0 && dim > 0 && d > 0, "keys", c10::str("of shape ", keys.sizes()),
                "at least one head of at least one element, and a hidden size above 0");
  const auto fused = attended + 2 * kv_heads * dim;
  const std::int64_t panel = args.dtype == Dtype::kFloat64 ? 16 : 32;
  const auto panels = [&](std::int64_t columns) { return (columns + panel - 1) / panel; };
  MEGARLX_CHECK(op, heads > 0 && heads <= kMost && heads % kv_heads == 0, "heads", heads,
                c10::str("a multiple of ", kv_heads));
  MEGARLX_CHECK(op, intermediate > 0 && intermediate <= kMost, "intermediate", intermediate,
                c10::str("1 to ", kMost));
  MEGARLX_CHECK(op, rows >= 0 && rows <= batch, "rows", rows, c10::str("0 to ", batch));
  check(op, "x", x, x, x.sizes());
  check(op, "qkv", qkv, x, {layers, panels(fused), d, panel});
  check(op, "o", o, x, {layers, panels(d), attended, panel});
  check(op, "gate_up", gate_up, x, {layers, panels(2 * intermediate), d, panel});
  check(op, "down", down, x, {layers, panels(d), intermediate, panel});
  check(op, "attention_norm", attention_norm, x, {layers, d});
  check(op, "mlp_norm", mlp_norm, x, {layers, d});
  if (qkv_bias) check(op, "qkv_bias", *qkv_bias, x, {layers, fused});
  check(op, "keys", keys, x, keys.sizes());
  check(op, "values", values, x, keys.sizes());
  args.pages = keys.size(1);
  args.page_size = keys.size(2);
  args.pages_of_slot = check_pages(op, table, slots, positions, rows, args.pages, args.page_size);
  const auto places = args.pages_of_slot * args.page_size;
  check(op, "cosines", cosines, x, {places, dim / 2});
  check(op, "sines", sines, x, {places, dim / 2});
  args.table = table ? table->const_data_ptr<std::int32_t>() : nullptr;
  args.slots = slots.const_data_ptr<std::int64_t>();
  args.positions = positions.const_data_ptr<std::int64_t>();
  MEGARLX_CHECK(op, tokens.has_value() == embedding.has_value(), "embedding",
                embedding ? "given" : "missing", "both tokens and embedding or neither");
  if (tokens) {
    check(op, "embedding", *embedding, x, {embedding->size(0), d});
    check_indices(op, "tokens", *tokens, rows, embedding->size(0));
    args.tokens = tokens->const_data_ptr<std::int64_t>();
    args.embedding = embedding->const_data_ptr();
  }
  MEGARLX_CHECK(op, q_norm.has_value() == k_norm.has_value(), "k_norm",
                k_norm ? "given" : "missing", "both norm weights or neither");
  if (q_norm) {
    args.full_norm = q_norm->numel() == layers * attended;
    check(op, "q_norm", *q_norm, x, {layers, args.full_norm ? attended : dim});
    check(op, "k_norm", *k_norm, x, {layers, args.full_norm ? kv_heads * dim : dim});
    args.q_norm = q_norm->const_data_ptr();
    args.k_norm = k_norm->const_data_ptr();
  }
  MEGARLX_CHECK(op, head.has_value() == norm.has_value() && head.has_value() == logits.has_value(),
                "head", head ? "given" : "missing", "norm, head and logits or none of them");
  if (head) {
    MEGARLX_CHECK(op, logits->dim() == 2 && logits->size(0) >= rows, "logits",
                  c10::str("of shape ", logits->sizes()), c10::str("[", rows, " or more, V]"));
    args.vocab = logits->size(1);
    check(op, "logits", *logits, x, logits->sizes());
    check(op, "norm", *norm, x, {d});
    check(op, "head", *head, x, {panels(args.vocab), d, panel});
    args.norm = norm->const_data_ptr();
    args.head = head->const_data_ptr();
    args.logits = logits->mutable_data_ptr();
  }
  const auto wanted = rows * (2 * d + fused + attended + intermediate);
  check(op, "scratch", scratch, x, scratch.sizes());
  MEGARLX_CHECK(op, scratch.numel() >= wanted, "scratch",
                c10::str("of ", scratch.numel(), " elements"), c10::str(wanted, " or more"));
  auto* next = static_cast<char*>(scratch.mutable_data_ptr());
  const auto take = [&](std::int64_t width) {
    void* taken = next;
    next += rows * width * scratch.element_size();
    return taken;
  };
  args.h = take(d);
  args.part = take(d);
  args.fused = take(fused);
  args.attended = take(attended);
  args.inner = take(intermediate);
  args.x = x.mutable_data_ptr();
  args.qkv = qkv.const_data_ptr();
  args.qkv_bias = qkv_bias ? qkv_bias->const_data_ptr() : nullptr;
  args.o = o.const_data_ptr();
  args.gate_up = gate_up.const_data_ptr();
  args.down = down.const_data_ptr();
  args.attention_norm = attention_norm.const_data_ptr();
  args.mlp_norm = mlp_norm.const_data_ptr();
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  args.cosines = cosines.const_data_ptr();
  args.sines = sines.const_data_ptr();
  args.eps = eps;
  args.scale = scale;
  args.layers = layers;
  args.hidden = d;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = dim;
  args.intermediate = intermediate;
  args.post = post;
  run_step(args, rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("decode_step_", decode_step_);
  m.impl("decode_attention_", decode_attention_);
}

}  // namespace megarlx
