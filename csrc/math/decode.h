// What one step of cached decoding needs besides its matrix products: the arguments of its kernels.
// B rows (one new token each), H query heads, K key/value heads, D head size, S slots, P pages of G
// places, n pages of a slot (math/pages.h).
#pragma once
#include <cmath>

#include "math/common.h"
#include "math/pages.h"

namespace megarlx {

// Element types are those of `dtype` unless said otherwise.
struct DecodeAttentionArgs {
  Dtype dtype;      // fp32 or fp64
  const void* qkv;  // [B, (H + 2K) D], as the fused projection leaves them
  void* keys;       // [P, G, K, D] of one layer; the new key is written at its place
  void* values;
  // [S, 1 + 2n]; null: a slot is a page. Only where is read depends on it, not what is computed.
  const std::int32_t* table;
  const std::int64_t* slots;      // [B]
  const std::int64_t* positions;  // [B] of the new token: it sees 0 … position
  const void* cosines;            // [at least n G, D / 2]
  const void* sines;
  const void* q_weight;  // of the QK-norm: [H D] (full), [D] (per head) or null (none)
  const void* k_weight;
  const void* inverse;  // [B, 2] 1 / rms of the queries and keys where other ranks hold heads too
  void* out;            // [B, H D]
  double eps, scale;
  std::int64_t heads, kv_heads, head_dim, pages_of_slot, page_size;
  bool full_norm;
};

// Without `out`: x += normed(y), the norm behind a part of the layer. With it: x += y (null: no y),
// out = normed(x), the norm before the next part. All [B, width].
struct DecodeNormArgs {
  Dtype dtype;
  void* x;
  const void* y;
  const void* weight;
  void* out;
  double eps;
  std::int64_t width;
};

// silu(gate) · up of a fused [B, 2 width] to [B, width].
struct DecodeSwigluArgs {
  Dtype dtype;
  const void* gate_up;
  void* out;
  std::int64_t width;
};

// A whole step through the layers of a stage. Letters as above, L layers, d hidden, F intermediate,
// V head columns. Matrices are packed in panels (cpu/packed_product.h), of all layers in a row.
struct DecodeStepArgs {
  Dtype dtype;
  const std::int64_t* tokens;  // [B], with embedding [·, d]; null: x is given
  const void* embedding;
  const void* qkv;       // [L, panels of (H + 2K) D, d]
  const void* qkv_bias;  // [L, (H + 2K) D] or null
  const void* o;         // [L, panels of d, H D]
  const void* gate_up;   // [L, panels of 2F, d]: half a panel of gate, then the same columns of up
  const void* down;      // [L, panels of d, F]
  const void* attention_norm;  // [L, d]
  const void* mlp_norm;
  const void* q_norm;  // [L, H D or D] or null
  const void* k_norm;
  const void* norm;  // [d] and head [panels of V, d]; null: the stage has no head
  const void* head;
  void* keys;  // [L, P, G, K, D]
  void* values;
  const std::int32_t* table;  // these three as for attention
  const std::int64_t* slots;
  const std::int64_t* positions;
  const void* cosines;
  const void* sines;
  void* x;         // [B, d]
  void* h;         // [B, d], like those that follow only scratch
  void* part;      // [B, d]
  void* fused;     // [B, (H + 2K) D]
  void* attended;  // [B, H D]
  void* inner;     // [B, F]
  void* logits;    // [B, V]
  double eps, scale;
  std::int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab;
  std::int64_t pages, pages_of_slot, page_size;
  bool full_norm, post;
};

// The parts of a step, in this order; all but the first and the last two for every layer. Products
// can be split by rows and by panels, the others by rows.
enum class DecodePart {
  kEmbed,
  kEnter,
  kQkv,
  kAttention,
  kOut,
  kMiddle,
  kGateUp,
  kDown,
  kLeave,
  kNorm,
  kHead
};

// Attention over two parts of what a row sees, each with the log-sum-exp of its scores, made one.
// A part that held nothing has an infinity there (flash-attn has +inf) and counts for nothing,
// whatever its output.
struct LseStrides {
  std::int64_t token, head;
};
struct MergeArgs {
  Dtype dtype;
  std::int64_t rows, width;  // tokens × heads, head_dim
  std::int64_t heads;
  LseStrides a_stride, b_stride;
  const void *a, *b;          // [rows, width]
  const void *a_lse, *b_lse;  // [tokens, heads] in fp32, fp64 for fp64
  void *out, *lse;            // contiguous both
};

MEGARLX_HD float exp_of(float x) { return ::expf(x); }
MEGARLX_HD double exp_of(double x) { return ::exp(x); }
MEGARLX_HD float log_of(float x) { return ::logf(x); }
MEGARLX_HD double log_of(double x) { return ::log(x); }

template <typename T>
struct MergeWeights {
  T a, b, lse;

  MEGARLX_HD static MergeWeights of_row(const MergeArgs& args, std::int64_t row) {
    const std::int64_t token = row / args.heads, head = row - token * args.heads;
    const auto a = static_cast<const T*>(args.a_lse), b = static_cast<const T*>(args.b_lse);
    return of(a[token * args.a_stride.token + head * args.a_stride.head],
              b[token * args.b_stride.token + head * args.b_stride.head]);
  }

  MEGARLX_HD static MergeWeights of(T a, T b) {
    constexpr T kInfinity = static_cast<T>(INFINITY);
    if (a == kInfinity) a = -kInfinity;
    if (b == kInfinity) b = -kInfinity;
    const T top = a > b ? a : b;
    if (top == -kInfinity) return {T(0), T(0), top};
    const T by_a = exp_of(a - top), by_b = exp_of(b - top), sum = by_a + by_b;
    return {by_a / sum, by_b / sum, top + log_of(sum)};
  }
  MEGARLX_HD T merged(T x, T y) const {
    return (a == T(0) ? T(0) : a * x) + (b == T(0) ? T(0) : b * y);
  }
};

// The end of a step: each row goes on by the token drawn for it, or is frozen where that was its
// last one. A ring of `ring` steps keeps what was drawn until the host reads it.
struct AdvanceArgs {
  std::int64_t rows, ends_count, ring, idle_slot;
  const std::int64_t *drawn, *ends;                 // [rows], [ends_count]
  const float *logprob, *sampled;                   // [rows]
  const std::int64_t* last_positions;               // [rows] of the last token allowed
  std::int64_t *tokens, *positions, *slots, *keys;  // [rows], keys [rows, 2]
  bool* frozen;                                     // [rows]
  std::int64_t* step;                               // [1]
  std::int64_t* history;                            // [ring, rows]
  float* logprobs;                                  // [2, ring, rows]
};

constexpr std::int64_t kNothingDrawn = -2;  // in the history of a frozen row

MEGARLX_HD bool is_last(const AdvanceArgs& args, std::int64_t row, std::int64_t token) {
  bool last = token < 0 || args.keys[2 * row + 1] >= args.last_positions[row];
  for (std::int64_t i = 0; i < args.ends_count; ++i) last = last || token == args.ends[i];
  return last;
}

MEGARLX_HD void advance_row(const AdvanceArgs& args, std::int64_t row) {
  const std::int64_t at = *args.step % args.ring * args.rows + row;
  const bool was_frozen = args.frozen[row];
  const std::int64_t token = was_frozen ? kNothingDrawn : args.drawn[row];
  args.history[at] = token;
  args.logprobs[at] = was_frozen ? 0.0f : args.logprob[row];
  args.logprobs[args.ring * args.rows + at] = was_frozen ? 0.0f : args.sampled[row];
  if (was_frozen) return;
  const bool last = is_last(args, row, token);
  args.frozen[row] = last;
  args.tokens[row] = last ? 0 : token;
  args.positions[row] = last ? 0 : args.keys[2 * row + 1];
  if (last) args.slots[row] = args.idle_slot;
  args.keys[2 * row + 1] += 1;
}

}  // namespace megarlx
