// The elementwise parts of a layer: RMSNorm, SwiGLU, and the query and key heads. Formulas, and the
// arguments of the kernels. Tensors have the type `dtype` unless said otherwise; "precision" is
// fp32 for bfloat16 (CUDA alone) and `dtype` else.
#pragma once
#include <cmath>
#include <cstdint>

#include "common.h"
#include "pages.h"

namespace megarlx {

// V is a number or, on a CPU, a vector of them, which brings its own fmadd and
// fnmadd (c - a · b).
MEGARLX_HD float fmadd(float a, float b, float c) { return ::fmaf(a, b, c); }
MEGARLX_HD double fmadd(double a, double b, double c) { return ::fma(a, b, c); }
MEGARLX_HD float fnmadd(float a, float b, float c) { return ::fmaf(-a, b, c); }
MEGARLX_HD double fnmadd(double a, double b, double c) { return ::fma(-a, b, c); }
MEGARLX_HD float root(float a) { return ::sqrtf(a); }
MEGARLX_HD double root(double a) { return ::sqrt(a); }

template <typename T>
MEGARLX_HD T inverse_root_mean(T squares, T count, T eps) {
  return T(1) / root(squares / count + eps);
}

template <typename V>
MEGARLX_HD V normalised(V x, V inverse, V weight) {
  return x * inverse * weight;
}

template <typename V>
MEGARLX_HD V normalised(V x, V inverse, V weight, V residual) {
  return fmadd(x * inverse, weight, residual);
}

// What an element adds to its weight's gradient, and with its weight to the mean of its row.
template <typename V>
MEGARLX_HD void add_products(V grad, V x, V weight, V& products) {
  products = fmadd(grad * x, weight, products);
}
template <typename V>
MEGARLX_HD void add_to_weight(V grad, V x, V inverse, V& sum) {
  sum = fmadd(grad * x, inverse, sum);
}

// The factor of x in its gradient, one for a row; `mean` is that of grad · x · weight.
template <typename T>
MEGARLX_HD T norm_slope(T mean, T inverse) {
  return -mean * inverse * inverse * inverse;
}

template <typename V>
MEGARLX_HD V norm_gradient(V grad, V x, V inverse, V weight, V slope) {
  return fmadd(x, slope, grad * weight * inverse);
}

// silu(gate) · up; `e` is exp(-gate).
template <typename V>
MEGARLX_HD V swiglu_of(V gate, V up, V e, V one) {
  return gate / (one + e) * up;
}

template <typename V>
MEGARLX_HD void swiglu_gradient(V grad, V gate, V up, V e, V one, V& grad_gate, V& grad_up) {
  const V sigmoid = one / (one + e);
  const V silu = gate * sigmoid;
  const V slope = fmadd(silu, one - sigmoid, sigmoid);
  grad_up = grad * silu;
  grad_gate = grad * up * slope;
}

// A pair turned by its angle, and turned back.
template <typename V>
MEGARLX_HD void turn(V first, V second, V cos, V sin, V& out_first, V& out_second) {
  out_first = fnmadd(second, sin, first * cos);
  out_second = fmadd(first, sin, second * cos);
}
template <typename V>
MEGARLX_HD void turn_back(V first, V second, V cos, V sin, V& out_first, V& out_second) {
  out_first = fmadd(second, sin, first * cos);
  out_second = fnmadd(first, sin, second * cos);
}

// Gradients of norm weights are summed over blocks of so many rows, then over blocks in order: the
// result does not depend on the number of threads. A GPU takes blocks of its own (cuda/rows.h).
constexpr std::int64_t kRowsPerBlock = 64;

constexpr std::int64_t blocks_of(std::int64_t rows) {
  return (rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

// y = weight · x · inverse (+ residual), inverse = 1 / sqrt(mean(x²) + eps) of each row. With an
// addend (CUDA alone) x stands for x + addend, rounded to `dtype` and written to `sum`. y may be
// residual, and sum x.
struct RmsNormArgs {
  Dtype dtype;
  std::int64_t rows, width;
  double eps;
  const void* x;  // [rows, width], as are residual, y, grad and grad_x
  const void* weight;
  const void* residual;  // null: none
  const void* addend;    // null: none
  void* sum;
  void* y;
  void* inverse;  // [rows] in precision; backward reads it; null: not wanted
  // backward
  const void* grad;
  void* grad_x;
  void* weight_sums;  // [blocks, width] in precision; null: no gradient of the weight is wanted
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
  void* inverse;                    // [tokens, norms_of_token] in precision; backward reads it
  // Where a full norm spans the heads of several ranks: how many, and [tokens, 2] in precision, the
  // sums of q² and k² over all of them, or in backward of grad · x · weight. Else 1 and null.
  std::int64_t ranks;
  const void* sums;
  void* own_sums;  // what a rank has to add to them, for the kernels that compute nothing else
  // One new token each of cached sequences; null positions: none of this. cos and sin are those of
  // every position, keys and values [pages, page_size, kv_heads, head_dim] are written in place of
  // k, and nothing is kept for backward.
  const std::int64_t *positions, *slots;  // [tokens]; a slot below 0: its token is not written
  const std::int32_t* table;              // of the slots' pages (math/pages.h); null: a slot is one
  std::int64_t pages, pages_of_slot, page_size;
  void *keys, *values;
  // backward
  const void *grad_q, *grad_k, *grad_v;
  void* grad_qkv;
  void* weight_sums;  // blocks × normalised widths of q and k, in precision; null: none wanted
};

MEGARLX_HD constexpr std::int64_t norms_of_token(const HeadsArgs& args) {
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
MEGARLX_HD constexpr std::int64_t norm_width(const HeadsArgs& args, std::int64_t heads) {
  if (args.norm == HeadNorm::kNone) return 0;
  return args.norm == HeadNorm::kFull ? heads * args.head_dim : args.head_dim;
}

// Which of the cache's places a new token takes, page after page; -1 where it has none.
MEGARLX_HD std::int64_t place_in_cache(const HeadsArgs& args, std::int64_t token) {
  const std::int64_t slot = args.slots[token], position = args.positions[token];
  if (slot < 0 || position < 0 || position >= args.pages_of_slot * args.page_size) return -1;
  const std::int64_t place =
      SlotPages::of(args.table, slot, args.pages_of_slot, args.page_size).place(position);
  return place < args.pages * args.page_size ? place : -1;
}

// The query heads of a token, or its key heads: how many, and where their things are.
struct HeadsKind {
  std::int64_t heads, offset;  // offset in the token's row
  const void* weight;
  std::int64_t first_norm;  // in the token's inverses
};

MEGARLX_HD HeadsKind queries(const HeadsArgs& args) { return {args.heads, 0, args.q_weight, 0}; }

MEGARLX_HD HeadsKind keys(const HeadsArgs& args) {
  return {args.kv_heads, args.heads * args.head_dim, args.k_weight,
          args.norm == HeadNorm::kFull ? 1 : args.heads};
}

}  // namespace megarlx
