// The attention's heads on the CPU: QK-norm and rotation, forward and backward.
#pragma once
#include "cpu/elementwise.h"

namespace megarlx::cpu {
namespace {
namespace elementwise {

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

}  // namespace elementwise

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

}  // namespace
}  // namespace megarlx::cpu
