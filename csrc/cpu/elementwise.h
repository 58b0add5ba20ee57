// RMSNorm and SwiGLU on the CPU. A row is read from memory once; what is
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
