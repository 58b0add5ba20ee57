// Causal attention over packed documents in fp32. A unit is a key head of a document with the query
// heads that share it; its keys and values are packed once and stay in a cache, and the scores of
// some queries are all there is of the square. Sums run over what a query sees, in an order that
// follows from its place in its document.
//
// Letters: L tokens of the document, D head dim.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/product.h"
#include "math/attention.h"

namespace megarlx::cpu {
namespace attention {

constexpr std::int64_t kQueries = 128;  // of a block of backward, at most

inline std::int64_t panels_of(std::int64_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

// Begins of n things dealt to tiles of at most kProductRows, as equal as they can be.
struct Tiles {
  std::int64_t begin, count, tiles;
  Tiles(std::int64_t begin, std::int64_t end)
      : begin(begin), count(end - begin), tiles((count + kProductRows - 1) / kProductRows) {}
  std::int64_t at(std::int64_t tile) const { return begin + count * tile / tiles; }
};

struct Unit {
  std::int64_t first, length, kv_head, group;
  Unit(const AttentionArgs& a, std::int64_t unit)
      : first(a.offsets[unit / a.kv_heads]),
        length(a.offsets[unit / a.kv_heads + 1] - first),
        kv_head(unit % a.kv_heads),
        group(a.heads / a.kv_heads) {}
};

// A matrix [depth, columns] as panels.
struct Panels {
  std::vector<float> data;
  std::int64_t depth = 0, columns = 0;

  void pack(const Strided<const float>& b, std::int64_t of_depth, std::int64_t of_columns) {
    depth = of_depth, columns = of_columns;
    const std::size_t size = panels_of(columns) * depth * kPanelColumns;
    if (data.size() < size) data.resize(size);
    for (std::int64_t column = 0; column < columns; column += kPanelColumns)
      pack_panel({b.data + column * b.column, b.row, b.column}, depth,
                 std::min(kPanelColumns, columns - column), data.data() + column * depth);
  }

  // c (+)= a times the rows [from, from + t.depth) and the first `most` columns
  template <bool kByColumns>
  void multiply(ProductTile t, std::int64_t from, std::int64_t most) const {
    float* c = t.c.data;
    for (std::int64_t column = 0; column < most; column += kPanelColumns) {
      t.columns = std::min(kPanelColumns, most - column);
      t.panel = data.data() + column * depth + from * kPanelColumns;
      t.c.data = c + column;
      product_tile_of<kProductRows, kByColumns>(t);
    }
  }
};

struct Space {
  Panels keys, values, keys_by_rows, queries, upstream;  // the first two: D deep in backward
  std::vector<float> weights, slopes;

  static float* of(std::vector<float>& buffer, std::int64_t size) {
    if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
  }
};

inline Strided<const float> by_rows(const Heads<const float>& x, const Unit& u, std::int64_t head,
                                    std::int64_t row = 0) {
  return {x.at(u.first + row, head), x.token, 1};
}

inline Strided<const float> turned(const Strided<const float>& x) {
  return {x.data, x.column, x.row};
}

// Scores become weights that are not normalised yet, with zeros behind them as far as a tile looks;
// returns (largest score, sum of weights).
inline std::pair<float, float> soften(float* scores, std::int64_t seen, float scale) {
  using elementwise::each_vector, elementwise::load, elementwise::store;
  const ProductVec lowest(-std::numeric_limits<float>::infinity()), none(0.f), by(scale);
  ProductVec most = lowest, sums = none;
  each_vector<float>(seen, [&](std::int64_t i, auto lanes) {
    most = at::vec::maximum(most, ProductVec::set(lowest, load(scores + i, lanes), lanes));
  });
  const float top = scale * at::vec::vec_reduce_all<float>(
                                [](auto& x, auto& y) { return at::vec::maximum(x, y); }, most);
  const ProductVec from(-top);
  each_vector<float>(seen, [&](std::int64_t i, auto lanes) {
    const ProductVec e = at::vec::fmadd(load(scores + i, lanes), by, from).exp_u20();
    sums = sums + ProductVec::set(none, e, lanes);
    store(e, scores + i, lanes);
  });
  none.store(scores + seen);
  return {top, elementwise::sum_of_lanes(sums)};
}

inline void forward_tile(const AttentionArgs& a, const Unit& u, const Panels& keys,
                         const Panels& values, float* scores, std::int64_t width, std::int64_t head,
                         std::int64_t row, std::int64_t rows) {
  const std::int64_t seen = row + rows, token = u.first + row;
  keys.multiply<false>(
      {rows, 0, a.dim, a.q.at(token, head), a.q.token, nullptr, {scores, width, 1}, false}, 0,
      seen);
  alignas(64) float tops[kProductVec], sums[kProductVec];
  for (std::int64_t r = 0; r < rows; ++r)
    std::tie(tops[r], sums[r]) = soften(scores + r * width, row + r + 1, a.scale);
  const ProductVec sum = ProductVec::loadu(sums, rows);
  (ProductVec::loadu(tops, rows) + sum.log()).store(tops, rows);
  (ProductVec(1.f) / sum).store(sums, rows);
  values.multiply<false>(
      {rows, 0, seen, scores, width, nullptr, {a.out.at(token, head), a.out.token, 1}, false}, 0,
      a.dim);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* out = a.out.at(token + r, head);
    a.lse[(token + r) * a.heads + head] = tops[r];
    const ProductVec by(sums[r]);
    elementwise::each_vector<float>(a.dim, [&](std::int64_t i, auto lanes) {
      elementwise::store(elementwise::load(out + i, lanes) * by, out + i, lanes);
    });
  }
}

inline void forward_unit(const AttentionArgs& a, const Unit& u, Space& space) {
  space.keys.pack(turned(by_rows(a.k, u, u.kv_head)), a.dim, u.length);
  space.values.pack(by_rows(a.v, u, u.kv_head), u.length, a.dim);
  const std::int64_t width = panels_of(u.length + kProductVec) * kPanelColumns;
  float* scores = Space::of(space.weights, kProductRows * width);
  const Tiles tiles(0, u.length);
  for (std::int64_t head = u.kv_head * u.group; head < (u.kv_head + 1) * u.group; ++head)
    for (std::int64_t tile = 0; tile < tiles.tiles; ++tile)
      forward_tile(a, u, space.keys, space.values, scores, width, head, tiles.at(tile),
                   tiles.at(tile + 1) - tiles.at(tile));
}

// Scores and the products of the upstream gradient with the values become the weights, and the
// slopes by the scores; zeros behind them as far as a tile looks.
inline void slopes_of_row(float* weights, float* slopes, std::int64_t seen, float scale, float lse,
                          float delta) {
  using elementwise::load, elementwise::store;
  const ProductVec by(scale), from(-lse), less(delta);
  elementwise::each_vector<float>(seen, [&](std::int64_t i, auto lanes) {
    const ProductVec p = at::vec::fmadd(load(weights + i, lanes), by, from).exp_u20();
    store(p * (load(slopes + i, lanes) - less) * by, slopes + i, lanes);
    store(p, weights + i, lanes);
  });
  ProductVec(0.f).store(weights + seen);
  ProductVec(0.f).store(slopes + seen);
}

inline float dot(const float* x, const float* y, std::int64_t n) {
  ProductVec sums(0.f);
  elementwise::each_vector<float>(n, [&](std::int64_t i, auto lanes) {
    sums = at::vec::fmadd(elementwise::load(x + i, lanes), elementwise::load(y + i, lanes), sums);
  });
  return elementwise::sum_of_lanes(sums);
}

// A tile's rows of weights and slopes, and its part of grad_q.
inline void backward_tile(const AttentionArgs& a, const Unit& u, const Space& space, float* weights,
                          float* slopes, std::int64_t width, std::int64_t head, std::int64_t row,
                          std::int64_t rows) {
  const std::int64_t seen = row + rows, token = u.first + row, dim = a.dim;
  space.keys.multiply<false>(
      {rows, 0, dim, a.q.at(token, head), a.q.token, nullptr, {weights, width, 1}, false}, 0, seen);
  space.values.multiply<false>(
      {rows, 0, dim, a.grad.at(token, head), a.grad.token, nullptr, {slopes, width, 1}, false}, 0,
      seen);
  for (std::int64_t r = 0; r < rows; ++r)
    slopes_of_row(weights + r * width, slopes + r * width, row + r + 1, a.scale,
                  a.lse[(token + r) * a.heads + head],
                  dot(a.grad.at(token + r, head), a.out.at(token + r, head), dim));
  space.keys_by_rows.multiply<false>(
      {rows, 0, seen, slopes, width, nullptr, {a.grad_q.at(token, head), a.grad_q.token, 1}, false},
      0, dim);
}

// What the queries [begin, end) of a head add to the gradients of keys and values.
inline void backward_keys(const AttentionArgs& a, const Unit& u, const Space& space,
                          const float* weights, const float* slopes, std::int64_t width,
                          std::int64_t begin, std::int64_t end) {
  const Tiles tiles(0, end);
  for (std::int64_t tile = 0; tile < tiles.tiles; ++tile) {
    const std::int64_t key = tiles.at(tile), rows = tiles.at(tile + 1) - key;
    const std::int64_t from = std::max(key - begin, std::int64_t{0}), depth = end - begin - from;
    const auto add = [&](const Panels& panels, const float* by, const Heads<float>& to) {
      panels.multiply<true>({rows,
                             0,
                             depth,
                             by + from * width + key,
                             width,
                             nullptr,
                             {to.at(u.first + key, u.kv_head), to.token, 1},
                             true},
                            from, a.dim);
    };
    add(space.upstream, weights, a.grad_v);
    add(space.queries, slopes, a.grad_k);
  }
}

inline void backward_unit(const AttentionArgs& a, const Unit& u, Space& space) {
  const auto keys = by_rows(a.k, u, u.kv_head);
  space.keys.pack(turned(keys), a.dim, u.length);
  space.values.pack(turned(by_rows(a.v, u, u.kv_head)), a.dim, u.length);
  space.keys_by_rows.pack(keys, u.length, a.dim);
  for (std::int64_t t = u.first; t < u.first + u.length; ++t) {
    std::fill_n(a.grad_k.at(t, u.kv_head), a.dim, 0.f);
    std::fill_n(a.grad_v.at(t, u.kv_head), a.dim, 0.f);
  }
  const std::int64_t width = panels_of(u.length + kProductVec) * kPanelColumns;
  float* weights = Space::of(space.weights, kQueries * width);
  float* slopes = Space::of(space.slopes, kQueries * width);
  const std::int64_t blocks = (u.length + kQueries - 1) / kQueries;
  for (std::int64_t head = u.kv_head * u.group; head < (u.kv_head + 1) * u.group; ++head)
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t begin = u.length * block / blocks, end = u.length * (block + 1) / blocks;
      const Tiles tiles(begin, end);
      for (std::int64_t tile = 0; tile < tiles.tiles; ++tile) {
        const std::int64_t row = tiles.at(tile), at = (row - begin) * width;
        backward_tile(a, u, space, weights + at, slopes + at, width, head, row,
                      tiles.at(tile + 1) - row);
      }
      space.queries.pack(by_rows(a.q, u, head, begin), end - begin, a.dim);
      space.upstream.pack(by_rows(a.grad, u, head, begin), end - begin, a.dim);
      backward_keys(a, u, space, weights, slopes, width, begin, end);
    }
}

}  // namespace attention

namespace {

attention::Space& attention_space() {
  thread_local attention::Space space;
  return space;
}

void packed_attention(const AttentionArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t unit = begin; unit < end; ++unit)
    attention::forward_unit(args, attention::Unit(args, unit), attention_space());
}

void packed_attention_backward(const AttentionArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t unit = begin; unit < end; ++unit)
    attention::backward_unit(args, attention::Unit(args, unit), attention_space());
}

}  // namespace
}  // namespace megarlx::cpu
