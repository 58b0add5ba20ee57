// Arguments of the elementwise parts of a layer: RMSNorm, SwiGLU, and the query and key heads.
// They exist for the CPU, where separate passes cost as much as products of small matrices; on
// CUDA the framework's own kernels stay.
#pragma once
#include <cstdint>

#include "common.h"

namespace megarlx {

// Gradients of norm weights are summed over blocks of so many rows, then over blocks in order:
// the result does not depend on the number of threads.
constexpr std::int64_t kRowsPerBlock = 64;

constexpr std::int64_t blocks_of(std::int64_t rows) {
  return (rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

// y = weight · x · inverse (+ residual), inverse = 1 / sqrt(mean(x²) + eps) of each row.
struct RmsNormArgs {
  Dtype dtype;
  std::int64_t rows, width;
  double eps;
  const void* x;  // [rows, width], as are residual, y, grad and grad_x
  const void* weight;
  const void* residual;  // null: none
  void* y;
  void* inverse;  // [rows]; backward reads it
  // backward
  const void* grad;
  void* grad_x;
  void* weight_sums;  // [blocks_of(rows), width]; null: no gradient of the weight is wanted
};

// silu(gate) · up of rows [gate, up] of twice the width.
struct SwiGluArgs {
  Dtype dtype;
  std::int64_t rows, width;
  const void* gate_up;
  std::int64_t gate_up_stride;
  void* out;         // [rows, width]
  const void* grad;  // [rows, width]
  void* grad_gate_up;
};

enum class HeadNorm : std::int32_t { kNone = 0, kFull = 1, kPerHead = 2 };

// A token's row of the fused projection is its query, key and value heads one after another.
// Queries and keys are normalised (over all heads of a kind, or head by head) and rotated: the
// pair (i, i + head_dim / 2) of a head by the token's angle i.
struct HeadsArgs {
  Dtype dtype;
  HeadNorm norm;
  std::int64_t tokens, heads, kv_heads, head_dim;
  double eps;
  const void* qkv;
  std::int64_t qkv_stride;
  const void *q_weight, *k_weight;  // null without norm
  const void *cos, *sin;            // [tokens, head_dim / 2]
  void *q, *k;                      // [tokens, heads or kv_heads, head_dim]
  void* inverse;                    // [tokens, norms_of_token]; backward reads it
  // backward
  const void *grad_q, *grad_k, *grad_v;
  void* grad_qkv;
  void* weight_sums;  // [blocks_of(tokens), normalised widths of q and k]; null: none wanted
};

constexpr std::int64_t norms_of_token(const HeadsArgs& args) {
  switch (args.norm) {
    case HeadNorm::kNone:
      return 0;
    case HeadNorm::kFull:
      return 2;
    case HeadNorm::kPerHead:
      return args.heads + args.kv_heads;
  }
  return 0;
}

// The elements over which `heads` heads are normalised together: the width of their weight.
constexpr std::int64_t norm_width(const HeadsArgs& args, std::int64_t heads) {
  if (args.norm == HeadNorm::kNone) return 0;
  return args.norm == HeadNorm::kFull ? heads * args.head_dim : args.head_dim;
}

}  // namespace megarlx
