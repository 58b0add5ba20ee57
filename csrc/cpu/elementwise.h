// RMSNorm, SwiGLU and the attention's heads on the CPU. A row is read from memory once; what is
// read a second time comes from the L1 cache.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "math/elementwise.h"

namespace megarlx::cpu {
namespace {
namespace elementwise {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Calls visit(i, lanes) over [0, n) vector by vector; `lanes` is a constant but for the last one.
template <typename T, typename Visit>
inline void each_vector(std::int64_t n, const Visit& visit) {
  constexpr std::int64_t kLanes = Vec<T>::size();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, std::integral_constant<int, kLanes>());
  if (i < n) visit(i, static_cast<int>(n - i));
}

// Lanes beyond the end are zero.
template <typename T, typename Lanes>
inline Vec<T> load(const T* from, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>) {
    return Vec<T>::loadu(from, lanes);
  } else {
    return Vec<T>::loadu(from);
  }
}

template <typename T, typename Lanes>
inline void store(Vec<T> value, T* to, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>) {
    value.store(to, lanes);
  } else {
    value.store(to);
  }
}

template <typename T>
inline T sum_of_lanes(Vec<T> x) {
  return at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return a + b; }, x);
}

// 20 ulp instead of 1 for fp32, and inline: its error is below 2e-6 of exp.
inline Vec<float> exp_of(Vec<float> x) { return x.exp_u20(); }
inline Vec<double> exp_of(Vec<double> x) { return x.exp(); }

template <typename T>
inline T sum_of_squares(const T* x, std::int64_t n) {
  Vec<T> squares(T(0));
  each_vector<T>(n, [&](std::int64_t i, auto lanes) {
    const Vec<T> value = load(x + i, lanes);
    squares = fmadd(value, value, squares);
  });
  return sum_of_lanes(squares);
}

template <typename T>
inline T inverse_rms_of(const T* x, std::int64_t n, double eps) {
  return inverse_root_mean(sum_of_squares(x, n), static_cast<T>(n), static_cast<T>(eps));
}

// Gradient of x · inverse · weight; grad_x may be grad itself. Adds to weight_sums unless null.
// `given`, unless null, is the sum of grad · x · weight over the heads of all ranks.
template <typename T>
inline void norm_backward(const T* grad, const T* x, const T* weight, T inverse, std::int64_t n,
                          T* grad_x, T* weight_sums, const T* given = nullptr, T ranks = T(1)) {
  const Vec<T> scale(inverse);
  Vec<T> products(T(0));
  if (weight_sums == nullptr) {
    each_vector<T>(n, [&](std::int64_t i, auto lanes) {
      add_products(load(grad + i, lanes), load(x + i, lanes), load(weight + i, lanes), products);
    });
  } else {
    each_vector<T>(n, [&](std::int64_t i, auto lanes) {
      const Vec<T> upstream = load(grad + i, lanes), value = load(x + i, lanes);
      add_products(upstream, value, load(weight + i, lanes), products);
      Vec<T> sum = load<T>(weight_sums + i, lanes);
      add_to_weight(upstream, value, scale, sum);
      store(sum, weight_sums + i, lanes);
    });
  }
  const T sum = given == nullptr ? sum_of_lanes(products) : *given;
  const Vec<T> slope(norm_slope(sum / (static_cast<T>(n) * ranks), inverse));
  each_vector<T>(n, [&](std::int64_t i, auto lanes) {
    store(norm_gradient(load(grad + i, lanes), load(x + i, lanes), scale, load(weight + i, lanes),
                        slope),
          grad_x + i, lanes);
  });
}

template <typename T>
void rms_norm_rows(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * n;
    T* y = static_cast<T*>(args.y) + row * n;
    const T inverse = inverse_rms_of(x, n, args.eps);
    static_cast<T*>(args.inverse)[row] = inverse;
    const Vec<T> scale(inverse);
    if (args.residual == nullptr) {
      each_vector<T>(n, [&](std::int64_t i, auto lanes) {
        store(normalised(load(x + i, lanes), scale, load(weight + i, lanes)), y + i, lanes);
      });
    } else {
      const T* residual = static_cast<const T*>(args.residual) + row * n;
      each_vector<T>(n, [&](std::int64_t i, auto lanes) {
        store(normalised(load(x + i, lanes), scale, load(weight + i, lanes),
                         load(residual + i, lanes)),
              y + i, lanes);
      });
    }
  }
}

template <typename T>
void rms_norm_backward_blocks(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = args.width;
  for (std::int64_t block = begin; block < end; ++block) {
    T* sums = static_cast<T*>(args.weight_sums);
    if (sums != nullptr) {
      sums += block * n;
      std::fill_n(sums, n, T(0));
    }
    const std::int64_t stop = std::min((block + 1) * kRowsPerBlock, args.rows);
    for (std::int64_t row = block * kRowsPerBlock; row < stop; ++row) {
      norm_backward(static_cast<const T*>(args.grad) + row * n,
                    static_cast<const T*>(args.x) + row * n, static_cast<const T*>(args.weight),
                    static_cast<const T*>(args.inverse)[row], n,
                    static_cast<T*>(args.grad_x) + row * n, sums);
    }
  }
}

template <typename T>
void swiglu_rows(const SwiGluArgs& args, std::int64_t begin, std::int64_t end) {
  const Vec<T> one(T(1));
  for (std::int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + row * args.gate_up_stride;
    const T* up = gate + args.width;
    T* out = static_cast<T*>(args.out) + row * args.width;
    each_vector<T>(args.width, [&](std::int64_t i, auto lanes) {
      const Vec<T> x = load(gate + i, lanes);
      store(swiglu_of(x, load(up + i, lanes), exp_of(x.neg()), one), out + i, lanes);
    });
  }
}

template <typename T>
void swiglu_backward_rows(const SwiGluArgs& args, std::int64_t begin, std::int64_t end) {
  const Vec<T> one(T(1));
  for (std::int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + row * args.gate_up_stride;
    const T* up = gate + args.width;
    const T* grad = static_cast<const T*>(args.grad) + row * args.width;
    T* grad_gate = static_cast<T*>(args.grad_gate_up) + row * 2 * args.width;
    T* grad_up = grad_gate + args.width;
    each_vector<T>(args.width, [&](std::int64_t i, auto lanes) {
      const Vec<T> x = load(gate + i, lanes);
      Vec<T> by_gate, by_up;
      swiglu_gradient(load(grad + i, lanes), x, load(up + i, lanes), exp_of(x.neg()), one, by_gate,
                      by_up);
      store(by_up, grad_up + i, lanes);
      store(by_gate, grad_gate + i, lanes);
    });
  }
}

// One head, normalised if it has a weight, turned by its angles.
template <typename T, bool with_norm>
inline void rotate_head(const T* x, const T* weight, T inverse, const T* cos, const T* sin,
                        std::int64_t half, T* out) {
  const Vec<T> scale(inverse);
  each_vector<T>(half, [&](std::int64_t i, auto lanes) {
    Vec<T> first = load(x + i, lanes), second = load(x + half + i, lanes);
    if constexpr (with_norm) {
      first = normalised(first, scale, load(weight + i, lanes));
      second = normalised(second, scale, load(weight + half + i, lanes));
    }
    turn(first, second, load(cos + i, lanes), load(sin + i, lanes), first, second);
    store(first, out + i, lanes);
    store(second, out + half + i, lanes);
  });
}

template <typename T>
inline void turn_head_back(const T* grad, const T* cos, const T* sin, std::int64_t half, T* out) {
  each_vector<T>(half, [&](std::int64_t i, auto lanes) {
    Vec<T> first, second;
    turn_back(load(grad + i, lanes), load(grad + half + i, lanes), load(cos + i, lanes),
              load(sin + i, lanes), first, second);
    store(first, out + i, lanes);
    store(second, out + half + i, lanes);
  });
}

template <typename T>
inline void rotate_heads(const HeadsArgs& args, const HeadsKind& kind, std::int64_t token,
                         T* inverses, T* out) {
  const std::int64_t dim = args.head_dim, half = dim / 2;
  const std::int64_t turned_by = args.positions == nullptr ? token : args.positions[token];
  const T* x = static_cast<const T*>(args.qkv) + token * args.qkv_stride + kind.offset;
  const T* cos = static_cast<const T*>(args.cos) + turned_by * half;
  const T* sin = static_cast<const T*>(args.sin) + turned_by * half;
  const T* weight = static_cast<const T*>(kind.weight);
  const std::int64_t width = norm_width(args, kind.heads);
  if (args.norm == HeadNorm::kFull && args.sums == nullptr) {
    inverses[0] = inverse_rms_of(x, width, args.eps);
  } else if (args.norm == HeadNorm::kFull) {
    inverses[0] = inverse_root_mean(static_cast<const T*>(args.sums)[token * 2 + kind.first_norm],
                                    static_cast<T>(width * args.ranks), static_cast<T>(args.eps));
  }
  for (std::int64_t head = 0; head < kind.heads; ++head, x += dim, out += dim) {
    switch (args.norm) {
      case HeadNorm::kNone:
        rotate_head<T, false>(x, nullptr, T(1), cos, sin, half, out);
        break;
      case HeadNorm::kFull:
        rotate_head<T, true>(x, weight + head * dim, inverses[0], cos, sin, half, out);
        break;
      case HeadNorm::kPerHead:
        inverses[head] = inverse_rms_of(x, dim, args.eps);
        rotate_head<T, true>(x, weight, inverses[head], cos, sin, half, out);
        break;
    }
  }
}

template <typename T>
inline void rotate_heads_backward(const HeadsArgs& args, const HeadsKind& kind, std::int64_t token,
                                  const T* grad, T* sums) {
  const std::int64_t dim = args.head_dim, half = dim / 2;
  const std::int64_t row = (args.heads + 2 * args.kv_heads) * dim;
  const T* cos = static_cast<const T*>(args.cos) + token * half;
  const T* sin = static_cast<const T*>(args.sin) + token * half;
  T* out = static_cast<T*>(args.grad_qkv) + token * row + kind.offset;
  grad += token * kind.heads * dim;
  for (std::int64_t head = 0; head < kind.heads; ++head)
    turn_head_back(grad + head * dim, cos, sin, half, out + head * dim);
  if (args.norm == HeadNorm::kNone) return;
  const T* x = static_cast<const T*>(args.qkv) + token * args.qkv_stride + kind.offset;
  const T* inverses =
      static_cast<const T*>(args.inverse) + token * norms_of_token(args) + kind.first_norm;
  const T* given = static_cast<const T*>(args.sums);
  if (given != nullptr) given += token * 2 + kind.first_norm;
  const std::int64_t width = norm_width(args, kind.heads), norms = kind.heads * dim / width;
  for (std::int64_t i = 0; i < norms; ++i, x += width, out += width)
    norm_backward(out, x, static_cast<const T*>(kind.weight), inverses[i], width, out, sums, given,
                  static_cast<T>(args.ranks));
}

// The sum of grad · x · weight over a token's heads of a kind, where grad is turned back.
template <typename T>
inline T products_of_heads(const HeadsArgs& args, const HeadsKind& kind, std::int64_t token,
                           const T* grad) {
  const std::int64_t dim = args.head_dim, half = dim / 2;
  const T* x = static_cast<const T*>(args.qkv) + token * args.qkv_stride + kind.offset;
  const T* cos = static_cast<const T*>(args.cos) + token * half;
  const T* sin = static_cast<const T*>(args.sin) + token * half;
  const T* weight = static_cast<const T*>(kind.weight);
  grad += token * kind.heads * dim;
  Vec<T> products(T(0));
  for (std::int64_t e = 0; e < kind.heads * dim; e += dim) {
    each_vector<T>(half, [&](std::int64_t i, auto lanes) {
      const std::int64_t a = e + i, b = a + half;
      Vec<T> first, second;
      turn_back(load(grad + a, lanes), load(grad + b, lanes), load(cos + i, lanes),
                load(sin + i, lanes), first, second);
      add_products(first, load(x + a, lanes), load(weight + a, lanes), products);
      add_products(second, load(x + b, lanes), load(weight + b, lanes), products);
    });
  }
  return sum_of_lanes(products);
}

template <typename T>
void heads_tokens(const HeadsArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t token = begin; token < end; ++token) {
    T* inverses = static_cast<T*>(args.inverse) + token * norms_of_token(args);
    for (const bool of_keys : {false, true}) {
      const HeadsKind kind = of_keys ? keys(args) : queries(args);
      T* out = static_cast<T*>(of_keys ? args.k : args.q) + token * kind.heads * args.head_dim;
      rotate_heads(args, kind, token, inverses + kind.first_norm, out);
    }
  }
}

// One new token of each sequence: keys and values go to their places in the cache.
template <typename T>
void cached_heads_tokens(const HeadsArgs& args, std::int64_t begin, std::int64_t end) {
  const HeadsKind q = queries(args), k = keys(args);
  const std::int64_t q_width = q.heads * args.head_dim, values = k.heads * args.head_dim;
  std::vector<T> inverses(std::max<std::int64_t>(norms_of_token(args), 1));
  for (std::int64_t token = begin; token < end; ++token) {
    rotate_heads(args, q, token, inverses.data(), static_cast<T*>(args.q) + token * q_width);
    const std::int64_t place = place_in_cache(args, token);
    if (place < 0) continue;
    rotate_heads(args, k, token, inverses.data() + k.first_norm,
                 static_cast<T*>(args.keys) + place * values);
    const T* row = static_cast<const T*>(args.qkv) + token * args.qkv_stride;
    std::copy_n(row + q_width + values, values, static_cast<T*>(args.values) + place * values);
  }
}

template <typename T>
void heads_sums_tokens(const HeadsArgs& args, std::int64_t begin, std::int64_t end) {
  const bool backward = args.grad_q != nullptr;
  for (std::int64_t token = begin; token < end; ++token) {
    T* out = static_cast<T*>(args.own_sums) + token * 2;
    if (backward) {
      out[0] = products_of_heads(args, queries(args), token, static_cast<const T*>(args.grad_q));
      out[1] = products_of_heads(args, keys(args), token, static_cast<const T*>(args.grad_k));
    } else {
      const T* row = static_cast<const T*>(args.qkv) + token * args.qkv_stride;
      const std::int64_t width = args.heads * args.head_dim;
      out[0] = sum_of_squares(row, width);
      out[1] = sum_of_squares(row + width, args.kv_heads * args.head_dim);
    }
  }
}

template <typename T>
void heads_backward_blocks(const HeadsArgs& args, std::int64_t begin, std::int64_t end) {
  const HeadsKind q = queries(args), k = keys(args);
  const std::int64_t q_width = norm_width(args, args.heads);
  const std::int64_t widths = q_width + norm_width(args, args.kv_heads);
  const std::int64_t values = args.kv_heads * args.head_dim, row = k.offset + 2 * values;
  for (std::int64_t block = begin; block < end; ++block) {
    T* sums = static_cast<T*>(args.weight_sums);
    if (sums != nullptr) {
      sums += block * widths;
      std::fill_n(sums, widths, T(0));
    }
    const std::int64_t stop = std::min((block + 1) * kRowsPerBlock, args.tokens);
    for (std::int64_t token = block * kRowsPerBlock; token < stop; ++token) {
      rotate_heads_backward(args, q, token, static_cast<const T*>(args.grad_q), sums);
      rotate_heads_backward(args, k, token, static_cast<const T*>(args.grad_k),
                            sums == nullptr ? sums : sums + q_width);
      std::copy_n(static_cast<const T*>(args.grad_v) + token * values, values,
                  static_cast<T*>(args.grad_qkv) + (token + 1) * row - values);
    }
  }
}

template <typename T>
void sum_blocks_of(const T* sums, std::int64_t blocks, std::int64_t width, T* out) {
  std::fill_n(out, width, T(0));
  for (std::int64_t block = 0; block < blocks; ++block, sums += width) {
    each_vector<T>(width, [&](std::int64_t i, auto lanes) {
      store(load<T>(out + i, lanes) + load(sums + i, lanes), out + i, lanes);
    });
  }
}

}  // namespace elementwise

void rms_norm(const RmsNormArgs& args, std::int64_t begin_row, std::int64_t end_row) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::rms_norm_rows<double>(args, begin_row, end_row);
  elementwise::rms_norm_rows<float>(args, begin_row, end_row);
}

void rms_norm_backward(const RmsNormArgs& args, std::int64_t begin_block, std::int64_t end_block) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::rms_norm_backward_blocks<double>(args, begin_block, end_block);
  elementwise::rms_norm_backward_blocks<float>(args, begin_block, end_block);
}

void swiglu(const SwiGluArgs& args, std::int64_t begin_row, std::int64_t end_row) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::swiglu_rows<double>(args, begin_row, end_row);
  elementwise::swiglu_rows<float>(args, begin_row, end_row);
}

void swiglu_backward(const SwiGluArgs& args, std::int64_t begin_row, std::int64_t end_row) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::swiglu_backward_rows<double>(args, begin_row, end_row);
  elementwise::swiglu_backward_rows<float>(args, begin_row, end_row);
}

void heads(const HeadsArgs& args, std::int64_t begin_token, std::int64_t end_token) {
  if (args.positions != nullptr)
    return args.dtype == Dtype::kFloat64
               ? elementwise::cached_heads_tokens<double>(args, begin_token, end_token)
               : elementwise::cached_heads_tokens<float>(args, begin_token, end_token);
  if (args.dtype == Dtype::kFloat64)
    return elementwise::heads_tokens<double>(args, begin_token, end_token);
  elementwise::heads_tokens<float>(args, begin_token, end_token);
}

void heads_sums(const HeadsArgs& args, std::int64_t begin_token, std::int64_t end_token) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::heads_sums_tokens<double>(args, begin_token, end_token);
  elementwise::heads_sums_tokens<float>(args, begin_token, end_token);
}

void heads_backward(const HeadsArgs& args, std::int64_t begin_block, std::int64_t end_block) {
  if (args.dtype == Dtype::kFloat64)
    return elementwise::heads_backward_blocks<double>(args, begin_block, end_block);
  elementwise::heads_backward_blocks<float>(args, begin_block, end_block);
}

// [blocks, width] to [width], block by block.
void sum_blocks(Dtype dtype, const void* sums, std::int64_t blocks, std::int64_t width, void* out) {
  if (dtype == Dtype::kFloat64)
    return elementwise::sum_blocks_of(static_cast<const double*>(sums), blocks, width,
                                      static_cast<double*>(out));
  elementwise::sum_blocks_of(static_cast<const float*>(sums), blocks, width,
                             static_cast<float*>(out));
}

}  // namespace
}  // namespace megarlx::cpu
