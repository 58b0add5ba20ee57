// c (+)= a b in fp32, each side stored by rows or by columns. b is packed into panels of columns, a
// only where it is stored by columns; a tile, some rows of a panel, is summed in registers. Depth
// is cut into blocks that follow from the depth alone, and an element of c is the sum, in their
// order, of one chain of multiply-adds a block. So its bits depend on its row and its column alone:
// not on how many others there are, nor on how they are dealt to threads.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/sum_tile.h"
#include "math/product.h"

namespace megarlx::cpu {
namespace {

using ProductVec = at::vec::Vectorized<float>;
constexpr std::int64_t kProductVec = ProductVec::size();
constexpr int kPanelVecs = 2;
constexpr std::int64_t kPanelColumns = kPanelVecs * kProductVec;
constexpr std::int64_t kBlockDepth = 384, kBlockPanels = 16;  // at most; what a cache holds

// As many rows at once as leave their sums in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kProductRows = 14;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kProductRows = 6;
#else
constexpr int kProductRows = 2;
#endif
static_assert(kProductRows <= kProductVec);  // packed rows are kProductVec apart

// One of a block of depth, and where its sums go.
struct ProductTile {
  std::int64_t rows, columns, depth;
  const float* a;
  std::int64_t a_step;  // to its next row; where it is stored by columns, to its next column
  const float* panel;
  Strided<float> c;
  bool add;
  // What the next tile reads of a, fetched meanwhile: so far from one step of depth to the next.
  const float* ahead = nullptr;
  std::int64_t ahead_step = 0;
};

template <int kRows, int kVecs>
inline void write_tile(const ProductTile& t, const ProductVec (&sum)[kRows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const std::int64_t count = std::min(t.columns - v * kProductVec, kProductVec);
      if (count <= 0) continue;
      float* out = t.c.data + r * t.c.row + v * kProductVec;
      (t.add ? ProductVec::loadu(out, count) + sum[r][v] : sum[r][v]).store(out, count);
    }
}

// c is stored by columns.
template <int kRows, int kVecs>
inline void write_turned_tile(const ProductTile& t, const ProductVec (&sum)[kRows][kVecs]) {
  alignas(64) float sums[kRows][kVecs * kProductVec];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v].store(sums[r] + v * kProductVec);
  for (std::int64_t j = 0; j < t.columns; ++j) {
    float* out = t.c.data + j * t.c.column;
    for (int r = 0; r < kRows; ++r) out[r] = t.add ? out[r] + sums[r][j] : sums[r][j];
  }
}

template <int kRows, int kVecs, bool kByColumns>
inline void product_tile(const ProductTile& t) {
  ProductVec sum[kRows][kVecs];
  sum_tile<kPanelVecs, kByColumns>(t.a, t.a_step, t.depth, t.panel, t.ahead, t.ahead_step, sum);
  if (t.c.column != 1)
    write_turned_tile<kRows, kVecs>(t, sum);
  else
    write_tile<kRows, kVecs>(t, sum);
}

template <int kRows, bool kByColumns>
inline void product_tile_of(const ProductTile& t) {
  if constexpr (kRows > 1)
    if (t.rows < kRows) return product_tile_of<kRows - 1, kByColumns>(t);
  if (t.columns > kProductVec) return product_tile<kRows, kPanelVecs, kByColumns>(t);
  product_tile<kRows, 1, kByColumns>(t);
}

// [depth, kPanelColumns] of `columns` columns of b from its first row and column on, the rest 0
inline void pack_panel(const Strided<const float>& b, std::int64_t depth, std::int64_t columns,
                       float* panel) {
  if (columns < kPanelColumns) std::fill(panel, panel + depth * kPanelColumns, 0.f);
  if (b.column != 1) {
    at::vec::transpose_mxn<float>(b.data, b.column, panel, kPanelColumns, static_cast<int>(columns),
                                  static_cast<int>(depth));
    return;
  }
  for (std::int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < kPanelVecs; ++v) {
      const std::int64_t count = std::min(columns - v * kProductVec, kProductVec);
      if (count <= 0) continue;
      ProductVec::loadu(b.data + k * b.row + v * kProductVec, count)
          .store(panel + k * kPanelColumns + v * kProductVec, count);
    }
}

// [depth, kProductVec] of rows of a that is stored by columns
inline void pack_rows(const float* a, std::int64_t column, std::int64_t depth, std::int64_t rows,
                      float* packed) {
  for (std::int64_t k = 0; k < depth; ++k)
    ProductVec::loadu(a + k * column, rows).store(packed + k * kProductVec, rows);
}

struct ProductSpace {
  std::vector<float> panels = std::vector<float>(kBlockDepth * kBlockPanels * kPanelColumns);
  std::vector<float> rows = std::vector<float>(kBlockDepth * kProductVec);
};

// A block of depth, of rows [begin_row, end_row) and the packed columns [begin, end).
inline void product_block(const ProductArgs& p, std::int64_t begin_row, std::int64_t end_row,
                          std::int64_t begin, std::int64_t end, std::int64_t from,
                          std::int64_t depth, ProductSpace& space) {
  const std::int64_t count = end_row - begin_row;
  const std::int64_t tiles = (count + kProductRows - 1) / kProductRows;
  const bool packed = p.a.column != 1;
  ProductTile t{
      0, 0, depth, nullptr, packed ? kProductVec : p.a.row, nullptr, p.c, p.add || from > 0};
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t row = begin_row + count * tile / tiles;
    t.rows = begin_row + count * (tile + 1) / tiles - row;
    t.a = p.a.data + row * p.a.row + from * p.a.column;
    const bool last = tile + 1 == tiles;
    if (packed) {  // behind the last row the next block of depth begins
      const std::int64_t next = last ? depth * p.a.column + begin_row - row : t.rows;
      t.ahead = t.a + next + kProductRows - 1;
      t.ahead_step = p.a.column;
      pack_rows(t.a, p.a.column, depth, t.rows, space.rows.data());
      t.a = space.rows.data();
    } else {
      t.ahead = last ? t.a : t.a + t.rows * p.a.row;
      t.ahead_step = kProductRows;
    }
    for (std::int64_t column = begin; column < end; column += kPanelColumns) {
      t.columns = std::min(kPanelColumns, end - column);
      t.panel = space.panels.data() + (column - begin) * depth;
      t.c.data = p.c.data + row * p.c.row + column * p.c.column;
      if (packed)
        product_tile_of<kProductRows, true>(t);
      else
        product_tile_of<kProductRows, false>(t);
    }
  }
}

void product(const ProductArgs& p, std::int64_t begin_row, std::int64_t end_row,
             std::int64_t begin_column, std::int64_t end_column) {
  thread_local ProductSpace space;
  const std::int64_t blocks = std::max<std::int64_t>(1, (p.depth + kBlockDepth - 1) / kBlockDepth);
  constexpr std::int64_t kWidth = kBlockPanels * kPanelColumns;
  for (std::int64_t begin = begin_column; begin < end_column; begin += kWidth) {
    const std::int64_t end = std::min(begin + kWidth, end_column);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t from = p.depth * block / blocks;
      const std::int64_t depth = p.depth * (block + 1) / blocks - from;
      for (std::int64_t column = begin; column < end; column += kPanelColumns)
        pack_panel({p.b.data + from * p.b.row + column * p.b.column, p.b.row, p.b.column}, depth,
                   std::min(kPanelColumns, end - column),
                   space.panels.data() + (column - begin) * depth);
      product_block(p, begin_row, end_row, begin, end, from, depth, space);
    }
  }
}

}  // namespace
}  // namespace megarlx::cpu
