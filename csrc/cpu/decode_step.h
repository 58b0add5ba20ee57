// The parts of a whole decode step on the CPU (math/decode.h). Whoever calls them deals rows and
// panels to threads; no part's bits depend on how.
#pragma once
#include "cpu/decode.h"
#include "cpu/packed_product.h"

namespace megarlx::cpu {
namespace {

template <class T>
inline const T* of_layer(const void* all, std::int64_t layer, std::int64_t each) {
  return all == nullptr ? nullptr : static_cast<const T*>(all) + layer * each;
}

template <class T>
inline std::int64_t panels_of(std::int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

// out [rows, columns] = x [rows, depth] · weight (+ bias)
template <class T>
void product(const T* x, std::int64_t rows, std::int64_t depth, const T* packed, const T* bias,
             std::int64_t columns, T* out, std::int64_t begin_panel, std::int64_t end_panel) {
  packed_product<T>(x, rows, depth, packed, begin_panel, end_panel,
                    [&](std::int64_t first, std::int64_t count, std::int64_t panel, T* sums) {
                      const std::int64_t column = panel * kPanel<T>;
                      const std::int64_t width = std::min(kPanel<T>, columns - column);
                      for (std::int64_t r = 0; r < count; ++r) {
                        const T* sum = sums + r * kPanel<T>;
                        T* to = out + (first + r) * columns + column;
                        if (bias != nullptr)
                          for (std::int64_t i = 0; i < width; ++i)
                            to[i] = sum[i] + bias[column + i];
                        else if (width == kPanel<T>)
                          std::memcpy(to, sum, sizeof(T) * kPanel<T>);
                        else
                          std::memcpy(to, sum, sizeof(T) * width);
                      }
                    });
}

// out [rows, columns] = silu(x · gate) · (x · up)
template <class T>
void swiglu_product(const T* x, std::int64_t rows, std::int64_t depth, const T* packed,
                    std::int64_t columns, T* out, std::int64_t begin_panel,
                    std::int64_t end_panel) {
  using Vec = DecodeVec<T>;
  constexpr std::int64_t kHalf = kPanel<T> / 2;
  packed_product<T>(x, rows, depth, packed, begin_panel, end_panel,
                    [&](std::int64_t first, std::int64_t count, std::int64_t panel, T* sums) {
                      const std::int64_t column = panel * kHalf,
                                         width = std::min(kHalf, columns - column);
                      for (std::int64_t r = 0; r < count; ++r) {
                        const T* gate = sums + r * kPanel<T>;
                        T* to = out + (first + r) * columns + column;
                        for (std::int64_t i = 0; i < width; i += Vec::size()) {
                          const Vec g = Vec::loadu(gate + i), up = Vec::loadu(gate + kHalf + i);
                          const Vec inner = g / (Vec(T(1)) + decode_exp(g.neg())) * up;
                          inner.store(to + i, std::min<std::int64_t>(Vec::size(), width - i));
                        }
                      }
                    });
}

template <class T>
void attend(const DecodeStepArgs& a, std::int64_t layer, std::int64_t begin, std::int64_t end) {
  const std::int64_t cache = a.pages * a.page_size * a.kv_heads * a.head_dim;
  const std::int64_t q = a.full_norm ? a.heads * a.head_dim : a.head_dim;
  const std::int64_t k = a.full_norm ? a.kv_heads * a.head_dim : a.head_dim;
  DecodeAttentionArgs args = {};
  args.dtype = a.dtype;
  args.qkv = a.fused;
  args.keys = static_cast<T*>(a.keys) + layer * cache;
  args.values = static_cast<T*>(a.values) + layer * cache;
  args.table = a.table;
  args.slots = a.slots;
  args.positions = a.positions;
  args.cosines = a.cosines;
  args.sines = a.sines;
  args.q_weight = of_layer<T>(a.q_norm, layer, q);
  args.k_weight = of_layer<T>(a.k_norm, layer, k);
  args.out = a.attended;
  args.eps = a.eps;
  args.scale = a.scale;
  args.heads = a.heads;
  args.kv_heads = a.kv_heads;
  args.head_dim = a.head_dim;
  args.pages_of_slot = a.pages_of_slot;
  args.page_size = a.page_size;
  args.full_norm = a.full_norm;
  decode_attention_rows<T>(args, begin, end);
}

template <class T>
void decode_part_of(const DecodeStepArgs& a, DecodePart part, std::int64_t layer,
                    std::int64_t begin, std::int64_t end, std::int64_t begin_panel,
                    std::int64_t end_panel) {
  const std::int64_t rows = end - begin, d = a.hidden, attended = a.heads * a.head_dim;
  const std::int64_t fused = attended + 2 * a.kv_heads * a.head_dim, inner = a.intermediate;
  T* x = static_cast<T*>(a.x) + begin * d;
  T* h = static_cast<T*>(a.h) + begin * d;
  T* y = static_cast<T*>(a.part) + begin * d;
  const T* source = a.post ? x : h;
  T* fused_rows = static_cast<T*>(a.fused) + begin * fused;
  T* attended_rows = static_cast<T*>(a.attended) + begin * attended;
  T* inner_rows = static_cast<T*>(a.inner) + begin * inner;
  const auto norm = [&](T* y, const T* weight, T* out) {
    decode_norm_rows<T>({a.dtype, x, y, weight, out, a.eps, d}, 0, rows);
  };
  const std::int64_t d_panels = panels_of<T>(d);
  switch (part) {
    case DecodePart::kEmbed:
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(x + r * d, static_cast<const T*>(a.embedding) + a.tokens[begin + r] * d,
                    sizeof(T) * d);
      break;
    case DecodePart::kEnter:
      if (!a.post) norm(nullptr, of_layer<T>(a.attention_norm, layer, d), h);
      break;
    case DecodePart::kQkv:
      product(source, rows, d, of_layer<T>(a.qkv, layer, panels_of<T>(fused) * kPanel<T> * d),
              of_layer<T>(a.qkv_bias, layer, fused), fused, fused_rows, begin_panel, end_panel);
      break;
    case DecodePart::kAttention:
      attend<T>(a, layer, begin, end);
      break;
    case DecodePart::kOut:
      product<T>(attended_rows, rows, attended,
                 of_layer<T>(a.o, layer, d_panels * kPanel<T> * attended), nullptr, d, y,
                 begin_panel, end_panel);
      break;
    case DecodePart::kMiddle:
      if (a.post)
        norm(y, of_layer<T>(a.attention_norm, layer, d), nullptr);
      else
        norm(y, of_layer<T>(a.mlp_norm, layer, d), h);
      break;
    case DecodePart::kGateUp:
      swiglu_product(source, rows, d,
                     of_layer<T>(a.gate_up, layer, panels_of<T>(2 * inner) * kPanel<T> * d), inner,
                     inner_rows, begin_panel, end_panel);
      break;
    case DecodePart::kDown:
      product<T>(inner_rows, rows, inner, of_layer<T>(a.down, layer, d_panels * kPanel<T> * inner),
                 nullptr, d, y, begin_panel, end_panel);
      break;
    case DecodePart::kLeave:
      if (a.post)
        norm(y, of_layer<T>(a.mlp_norm, layer, d), nullptr);
      else
        for (std::int64_t i = 0; i < rows * d; ++i) x[i] += y[i];
      break;
    case DecodePart::kNorm:
      norm(nullptr, static_cast<const T*>(a.norm), h);
      break;
    case DecodePart::kHead:
      product<T>(h, rows, d, static_cast<const T*>(a.head), nullptr, a.vocab,
                 static_cast<T*>(a.logits) + begin * a.vocab, begin_panel, end_panel);
      break;
  }
}

void decode_part(const DecodeStepArgs& args, DecodePart part, std::int64_t layer,
                 std::int64_t begin_row, std::int64_t end_row, std::int64_t begin_panel,
                 std::int64_t end_panel) {
  args.dtype == Dtype::kFloat64
      ? decode_part_of<double>(args, part, layer, begin_row, end_row, begin_panel, end_panel)
      : decode_part_of<float>(args, part, layer, begin_row, end_row, begin_panel, end_panel);
}

}  // namespace
}  // namespace megarlx::cpu
