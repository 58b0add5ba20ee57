// x · weightᵀ with weights packed for it: a panel is 128 bytes of output columns for every depth,
// [columns / kPanel, depth, kPanel], whatever the instruction set. One output is one chain of
// multiply-adds from depth 0 on, so its bits depend on its row and its column alone: not on how
// many rows there are, nor on how they are dealt to threads.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "cpu/sum_tile.h"

namespace megarlx::cpu {
namespace {

template <class T>
using DecodeVec = at::vec::Vectorized<T>;

template <class T>
constexpr std::int64_t kPanel = 128 / sizeof(T);

// As many rows at once as leave their sums in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 14;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif

// sums [kRows, kPanel] of kRows rows of x and one panel
template <int kRows, class T>
inline void product_tile(const T* x, std::int64_t stride, std::int64_t depth, const T* panel,
                         T* sums) {
  using Vec = DecodeVec<T>;
  constexpr int kVecs = kPanel<T> / Vec::size();
  Vec sum[kRows][kVecs];
  sum_tile<kVecs, false>(x, stride, depth, panel, static_cast<const T*>(nullptr), 0, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v].store(sums + r * kPanel<T> + v * Vec::size());
}

template <int kRows, class T>
inline void product_tile_of(std::int64_t rows, const T* x, std::int64_t stride, std::int64_t depth,
                            const T* panel, T* sums) {
  if constexpr (kRows > 1)
    if (rows < kRows) return product_tile_of<kRows - 1>(rows, x, stride, depth, panel, sums);
  product_tile<kRows>(x, stride, depth, panel, sums);
}

// Calls finish(first row, rows, panel index, sums [rows, kPanel]) for every tile of the product of
// `rows` rows x [rows, depth] and the panels [begin, end).
template <class T, class Finish>
inline void packed_product(const T* x, std::int64_t rows, std::int64_t depth, const T* packed,
                           std::int64_t begin, std::int64_t end, const Finish& finish) {
  alignas(128) T sums[kTileRows * kPanel<T>];
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (std::int64_t panel = begin; panel < end; ++panel) {
    const T* weights = packed + panel * depth * kPanel<T>;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      product_tile_of<kTileRows>(count, x + first * depth, depth, depth, weights, sums);
      finish(first, count, panel, sums);
    }
  }
}

}  // namespace
}  // namespace megarlx::cpu
