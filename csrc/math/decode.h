// What one step of cached decoding needs besides its matrix products: the arguments of its kernels.
// B rows (one new token each), H query heads, K key/value heads, D head size, S slots, M places.
#pragma once
#include "math/common.h"

namespace megarlx {

// Element types are those of `dtype` unless said otherwise.
struct DecodeAttentionArgs {
  Dtype dtype;      // fp32 or fp64
  const void* qkv;  // [B, (H + 2K) D], as the fused projection leaves them
  void* keys;       // [S, M, K, D] of one layer; the new key is written at its position
  void* values;
  const std::int64_t* slots;      // [B]
  const std::int64_t* positions;  // [B] of the new token: it sees 0 … position
  // [B], both or null: where another slot holds the same first places, so that rows of one prompt
  // read them from one memory. Only where they are read changes, not what is computed.
  const std::int64_t* shared_slots;
  const std::int64_t* shared_lengths;
  const void* cosines;  // [at least M, D / 2]
  const void* sines;
  const void* q_weight;  // of the QK-norm: [H D] (full), [D] (per head) or null (none)
  const void* k_weight;
  const void* inverse;  // [B, 2] 1 / rms of the queries and keys where other ranks hold heads too
  void* out;            // [B, H D]
  double eps, scale;
  std::int64_t heads, kv_heads, head_dim, places;
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
  void* keys;  // [L, S, M, K, D]
  void* values;
  const std::int64_t* slots;  // these four as for attention
  const std::int64_t* positions;
  const std::int64_t* shared_slots;
  const std::int64_t* shared_lengths;
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
  std::int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, cache_slots, places;
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

}  // namespace megarlx
