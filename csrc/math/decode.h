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
  const void* cosines;            // [at least M, D / 2]
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

}  // namespace megarlx
