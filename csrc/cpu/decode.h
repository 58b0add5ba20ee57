// One step of cached decoding on the CPU. Every row is worked on alone and reads its slot as far as
// it is filled, so its bits depend on nothing else: not on its neighbours, not on the longest of
// them. Letters as in math/decode.h.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/packed_product.h"
#include "math/decode.h"

namespace megarlx::cpu {
namespace {

inline DecodeVec<float> decode_exp(DecodeVec<float> x) { return x.exp_u20(); }
inline DecodeVec<double> decode_exp(DecodeVec<double> x) { return x.exp(); }

template <class T>
inline T lane_sum(DecodeVec<T> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_reduce_add_ps(x);
  else
    return _mm512_reduce_add_pd(x);
#else
  return at::vec::vec_reduce_all<T>([](DecodeVec<T>& a, DecodeVec<T>& b) { return a + b; }, x);
#endif
}

// The lanes behind `n` are zero when they are read.
template <class T>
inline T dot(const T* a, const T* b, std::int64_t n) {
  constexpr std::int64_t kLanes = DecodeVec<T>::size();
  DecodeVec<T> sum(T(0));
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    sum = at::vec::fmadd(DecodeVec<T>::loadu(a + i), DecodeVec<T>::loadu(b + i), sum);
  if (i < n)
    sum = at::vec::fmadd(DecodeVec<T>::loadu(a + i, n - i), DecodeVec<T>::loadu(b + i, n - i), sum);
  return lane_sum(sum);
}

constexpr std::int64_t kDots = 16;

// out [kDots] = q · (rows[i] + offset), each of dim; the sums of the lanes of 16 rows in one go
template <class T>
inline void dots(const T* q, const T* const* rows, std::int64_t offset, std::int64_t dim, T* out) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512 s[kDots];
#pragma GCC unroll 16
    for (int i = 0; i < kDots; ++i) s[i] = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __mmask16 mask = dim - d >= 16 ? 0xFFFF : (1 << (dim - d)) - 1;
      const __m512 part = _mm512_maskz_loadu_ps(mask, q + d);
#pragma GCC unroll 16
      for (int i = 0; i < kDots; ++i)
        s[i] = _mm512_fmadd_ps(part, _mm512_maskz_loadu_ps(mask, rows[i] + offset + d), s[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)  // 0 2, 1 3 of every four lanes
      s[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]),
                           _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
    __m512d half[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) half[i] = _mm512_castps_pd(s[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      s[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(half[2 * i], half[2 * i + 1])),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(half[2 * i], half[2 * i + 1])));
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x44),
                                   _mm512_shuffle_f32x4(s[0], s[1], 0xEE));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(s[2], s[3], 0x44),
                                   _mm512_shuffle_f32x4(s[2], s[3], 0xEE));
    _mm512_storeu_ps(
        out, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD)));
    return;
  }
#endif
  for (int i = 0; i < kDots; ++i) out[i] = dot(q, rows[i] + offset, dim);
}

template <class T>
inline T inverse_rms(const T* x, std::int64_t n, double eps) {
  return T(1) / std::sqrt(dot(x, x, n) / T(n) + T(eps));
}

// out = x · inverse · weight; out may be x.
template <class T>
inline void scale_by(const T* x, T inverse, const T* weight, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

template <class T>
void norm_and_rotate(const DecodeAttentionArgs& args, T* x, std::int64_t heads, const T* weight,
                     const T* given_inverse, const T* cosine, const T* sine) {
  const std::int64_t dim = args.head_dim, half = dim / 2;
  if (weight != nullptr && args.full_norm) {
    const T inverse = given_inverse ? *given_inverse : inverse_rms(x, heads * dim, args.eps);
    scale_by(x, inverse, weight, x, heads * dim);
  }
  for (std::int64_t h = 0; h < heads; ++h, x += dim) {
    if (weight != nullptr && !args.full_norm)
      scale_by(x, inverse_rms(x, dim, args.eps), weight, x, dim);
    for (std::int64_t i = 0; i < half; ++i) {
      const T a = x[i], b = x[i + half];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + half] = b * cosine[i] + a * sine[i];
    }
  }
}

// scores [n] of one query to their softmax.
template <class T>
void softmax(T* scores, std::int64_t n) {
  constexpr std::int64_t kLanes = DecodeVec<T>::size();
  DecodeVec<T> most(scores[0]);
  std::int64_t seen = 0;
  for (; seen + kLanes <= n; seen += kLanes)
    most = at::vec::maximum(most, DecodeVec<T>::loadu(scores + seen));
  T lanes[kLanes];
  most.store(lanes);
  T largest = lanes[0];
  for (std::int64_t i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  for (; seen < n; ++seen) largest = scores[seen] > largest ? scores[seen] : largest;
  DecodeVec<T> sum(T(0));
  const DecodeVec<T> base(largest);
  for (std::int64_t t = 0; t < n; t += kLanes) {
    const std::int64_t count = std::min(kLanes, n - t);
    const auto e = decode_exp(DecodeVec<T>::loadu(scores + t, count) - base);
    e.store(scores + t, count);
    sum = sum + DecodeVec<T>::set(DecodeVec<T>(T(0)), e, count);
  }
  const T factor = T(1) / lane_sum(sum);
  for (std::int64_t t = 0; t < n; ++t) scores[t] *= factor;
}

// out [dim] += p[0] · values + p[1] · (values + stride) + … of kCount places
template <int kCount, class T>
inline void add_weighted(const T* p, const T* values, std::int64_t stride, std::int64_t dim,
                         T* out) {
  using Vec = DecodeVec<T>;
  Vec weights[kCount];
  for (int j = 0; j < kCount; ++j) weights[j] = Vec(p[j]);
  std::int64_t d = 0;
  for (; d + Vec::size() <= dim; d += Vec::size()) {
    Vec sum = Vec::loadu(out + d);
    for (int j = 0; j < kCount; ++j)
      sum = at::vec::fmadd(weights[j], Vec::loadu(values + j * stride + d), sum);
    sum.store(out + d);
  }
  if (d < dim) {
    Vec sum = Vec::loadu(out + d, dim - d);
    for (int j = 0; j < kCount; ++j)
      sum = at::vec::fmadd(weights[j], Vec::loadu(values + j * stride + d, dim - d), sum);
    sum.store(out + d, dim - d);
  }
}

// Pages are short streams in memory of their own, too short for the hardware to foresee: while one
// thing is computed, what comes next is asked for.
inline void fetch_ahead(const void* at, std::int64_t bytes) {
  const char* next = static_cast<const char*>(at);
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
}

// The positions [begin, end) of a slot, which lie side by side in a page, the first at `place`.
struct PageRun {
  SlotPages pages;
  std::int64_t last, column, begin, end, place;

  // The first run of a slot whose newest token stands at `last`.
  static PageRun first_of(const DecodeAttentionArgs& args, std::int64_t row) {
    const auto slot = args.slots[row];
    const auto pages = SlotPages::of(args.table, slot, args.pages_of_slot, args.page_size);
    PageRun run{pages, args.positions[row], 0, 0, 0, 0};
    run.enter(pages.shared() > 0 ? 0 : pages.first_own(), 0);
    return run;
  }
  void enter(std::int64_t in_column, std::int64_t from) {
    column = in_column;
    begin = from;
    end = std::min(from + pages.size, own() ? last + 1 : pages.shared());
    place = pages.page(column) * pages.size;
  }
  void next() { enter(end == pages.shared() ? pages.first_own() : column + 1, end); }
  bool own() const { return column >= pages.first_own(); }
};

// out [H, D] += the values of a run of a slot, weighted; scores [H, stride]. Every output is one
// chain from place to place, however many of them are added at once.
template <class T>
inline void add_values(const DecodeAttentionArgs& args, const T* scores, std::int64_t stride,
                       const T* all_values, const PageRun& run, T* out, const T* next_keys) {
  const std::int64_t dim = args.head_dim, kv_width = args.kv_heads * dim;
  const std::int64_t queries_per_key = args.heads / args.kv_heads;
  const T* values = all_values + run.place * kv_width;
  const auto add = [&](auto count, std::int64_t i) {
    if (next_keys != nullptr) fetch_ahead(next_keys + i * kv_width, count * kv_width * sizeof(T));
    for (std::int64_t h = 0; h < args.heads; ++h)
      add_weighted<count>(scores + h * stride + run.begin + i,
                          values + i * kv_width + h / queries_per_key * dim, kv_width, dim,
                          out + h * dim);
  };
  std::int64_t i = 0;
  const std::int64_t count = run.end - run.begin;
  for (; i + 8 <= count; i += 8) add(std::integral_constant<int, 8>(), i);
  for (; i < count; ++i) add(std::integral_constant<int, 1>(), i);
}

// Place by place, all heads of it at once: so a page is read from memory in one stream.
template <class T>
void decode_attention_rows(const DecodeAttentionArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t dim = args.head_dim, heads = args.heads, kv_heads = args.kv_heads;
  const std::int64_t q_width = heads * dim, kv_width = kv_heads * dim;
  const std::int64_t places = args.pages_of_slot * args.page_size;
  const std::int64_t queries_per_key = heads / kv_heads;
  const std::int64_t stride = (places + kDots - 1) / kDots * kDots;
  std::vector<T> scratch(q_width + heads * stride);
  T* q = scratch.data();
  T* scores = q + q_width;  // [H, stride]
  for (std::int64_t row = begin; row < end; ++row) {
    const T* qkv = static_cast<const T*>(args.qkv) + row * (q_width + 2 * kv_width);
    const std::int64_t position = args.positions[row], n = position + 1;
    const PageRun first = PageRun::first_of(args, row);
    T* keys = static_cast<T*>(args.keys);
    T* values = static_cast<T*>(args.values);
    const std::int64_t newest = first.pages.place(position) * kv_width;
    T* key = keys + newest;
    std::memcpy(q, qkv, q_width * sizeof(T));
    std::memcpy(key, qkv + q_width, kv_width * sizeof(T));
    std::memcpy(values + newest, qkv + q_width + kv_width, kv_width * sizeof(T));
    const T* cosine = static_cast<const T*>(args.cosines) + position * (dim / 2);
    const T* sine = static_cast<const T*>(args.sines) + position * (dim / 2);
    const T* inverse = static_cast<const T*>(args.inverse);
    if (inverse != nullptr) inverse += 2 * row;
    norm_and_rotate(args, q, heads, static_cast<const T*>(args.q_weight), inverse, cosine, sine);
    norm_and_rotate(args, key, kv_heads, static_cast<const T*>(args.k_weight),
                    inverse ? inverse + 1 : nullptr, cosine, sine);
    for (std::int64_t i = 0; i < q_width; ++i) q[i] *= T(args.scale);
    const T* seen[kDots];
    PageRun run = first;
    for (std::int64_t t = 0; t < n; t += kDots) {
      std::int64_t i = 0;
      while (i < kDots && t + i < n) {
        if (t + i == run.end) run.next();
        const std::int64_t some = std::min(kDots - i, run.end - t - i);
        const std::int64_t at = (run.place + t + i - run.begin) * kv_width;
        if (run.own()) fetch_ahead(values + at, some * kv_width * sizeof(T));
        for (std::int64_t j = 0; j < some; ++j) seen[i + j] = keys + at + j * kv_width;
        i += some;
      }
      for (; i < kDots; ++i) seen[i] = key;  // behind the end: read and dropped
      for (std::int64_t h = 0; h < heads; ++h)
        dots(q + h * dim, seen, h / queries_per_key * dim, dim, scores + h * stride + t);
    }
    for (std::int64_t h = 0; h < heads; ++h) softmax(scores + h * stride, n);
    T* out = static_cast<T*>(args.out) + row * q_width;
    std::fill(out, out + q_width, T(0));
    const auto next = SlotPages::of(args.table, args.slots[std::min(row + 1, end - 1)],
                                    args.pages_of_slot, args.page_size);
    for (run = first;; run.next()) {
      const bool ahead = row + 1 < end && run.own();  // the next row's own pages, page by page
      add_values<T>(args, scores, stride, values, run, out,
                    ahead ? keys + next.page(run.column) * next.size * kv_width : nullptr);
      if (run.end == n) break;
    }
  }
}

template <class T>
void decode_norm_rows(const DecodeNormArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  for (std::int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(args.x) + row * n;
    const T* y = args.y == nullptr ? nullptr : static_cast<const T*>(args.y) + row * n;
    if (args.out == nullptr) {
      const T inverse = inverse_rms(y, n, args.eps);
      for (std::int64_t i = 0; i < n; ++i) x[i] += y[i] * inverse * weight[i];
      continue;
    }
    if (y != nullptr)
      for (std::int64_t i = 0; i < n; ++i) x[i] += y[i];
    scale_by(x, inverse_rms(x, n, args.eps), weight, static_cast<T*>(args.out) + row * n, n);
  }
}

template <class T>
void decode_swiglu_rows(const DecodeSwigluArgs& args, std::int64_t begin, std::int64_t end) {
  using Vec = DecodeVec<T>;
  const std::int64_t n = args.width;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + row * 2 * n;
    T* out = static_cast<T*>(args.out) + row * n;
    for (std::int64_t i = 0; i < n; i += Vec::size()) {
      const std::int64_t count = std::min<std::int64_t>(Vec::size(), n - i);
      const Vec g = Vec::loadu(gate + i, count), up = Vec::loadu(gate + n + i, count);
      (g / (Vec(T(1)) + decode_exp(g.neg())) * up).store(out + i, count);
    }
  }
}

void decode_attention(const DecodeAttentionArgs& args, std::int64_t begin, std::int64_t end) {
  args.dtype == Dtype::kFloat64 ? decode_attention_rows<double>(args, begin, end)
                                : decode_attention_rows<float>(args, begin, end);
}
void decode_norm(const DecodeNormArgs& args, std::int64_t begin, std::int64_t end) {
  args.dtype == Dtype::kFloat64 ? decode_norm_rows<double>(args, begin, end)
                                : decode_norm_rows<float>(args, begin, end);
}
void decode_swiglu(const DecodeSwigluArgs& args, std::int64_t begin, std::int64_t end) {
  args.dtype == Dtype::kFloat64 ? decode_swiglu_rows<double>(args, begin, end)
                                : decode_swiglu_rows<float>(args, begin, end);
}

}  // namespace
}  // namespace megarlx::cpu
