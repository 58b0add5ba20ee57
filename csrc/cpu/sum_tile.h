// The innermost loop of products in this folder: a tile of sums, kept in registers.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>

#include <cstdint>

namespace megarlx::cpu {
namespace {

// sum = a b of kRows rows of a and kVecs vectors of columns of b, whose next depth is kStep vectors
// on. An element is one chain of multiply-adds from depth 0 on. Where a is stored by rows the next
// one is `step` away, by columns the next column is. Meanwhile `ahead` is fetched, if it is given,
// and what stands `ahead_step` behind it for each depth.
template <int kStep, bool kByColumns, class T, int kRows, int kVecs>
C10_ALWAYS_INLINE void sum_tile(const T* a, std::int64_t step, std::int64_t depth, const T* b,
                                const T* ahead, std::int64_t ahead_step,
                                at::vec::Vectorized<T> (&sum)[kRows][kVecs]) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int kBases = kByColumns ? 1 : (kRows + 2) / 3;  // few enough pointers for the registers
  const T* bases[kBases];
  for (int j = 0; j < kBases; ++j) bases[j] = a + 3 * j * step;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec(T(0));
#pragma GCC unroll 2
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec w[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) w[v] = Vec::loadu(b + (k * kStep + v) * Vec::size());
    if (ahead != nullptr) {
      __builtin_prefetch(ahead);
      ahead += ahead_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x(kByColumns ? a[k * step + r] : bases[r / 3][k + r % 3 * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = at::vec::fmadd(x, w[v], sum[r][v]);
    }
  }
}

}  // namespace
}  // namespace megarlx::cpu
