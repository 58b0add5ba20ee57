// Rows of logits in tiles of kTile, up to 16 side by side: loops over flat arrays, in a form that
// compilers turn into vectors. The formulas are math/sample.h's.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "math/sample.h"

namespace megarlx::cpu {
namespace {
using namespace megarlx::sampling;

constexpr int kBlock = 16;  // tiles worked on together: 8 KB of logits, which stay in the L1 cache

inline void load_tile(const float* row, std::int64_t count, float* __restrict out) {
  std::memcpy(out, row, count * sizeof(float));
}
inline void load_tile(const c10::BFloat16* row, std::int64_t count, float* __restrict out) {
  const auto* bits = reinterpret_cast<const std::uint16_t*>(row);
  for (std::int64_t i = 0; i < count; ++i) out[i] = bits_as<float>(std::uint32_t(bits[i]) << 16);
}

// One row of logits, read a tile at a time; behind its end are -inf.
template <class T>
struct Row {
  const T* logits;
  std::int64_t columns;

  std::int64_t tiles() const { return (columns + kTile - 1) / kTile; }

  void load(std::int64_t tile, float* x) const {
    const std::int64_t count = std::min<std::int64_t>(kTile, columns - tile * kTile);
    load_tile(logits + tile * kTile, count, x);
    for (std::int64_t i = count; i < kTile; ++i) x[i] = kMinusInfinity;
  }
};

// The tiles of a block side by side, [tiles, kTile].
struct Block {
  alignas(64) float x[kBlock * kTile];
  alignas(64) float terms[kBlock * kTile];
  alignas(64) float folded[kBlock * kTile / 2];
  alignas(64) float largest[kBlock];
  alignas(64) float base[kBlock];  // `largest`, or 0 where the tile holds no finite logit
  alignas(64) float sum[kBlock];
  alignas(64) float model_sum[kBlock];
  std::int64_t tile[kBlock];
  int tiles;
};

// [n, 2] -> [n]
template <class F>
inline void halve(const float* __restrict in, float* __restrict out, int n, F f) {
  for (int i = 0; i < n; ++i) out[i] = f(in[2 * i], in[2 * i + 1]);
}

// [tiles, width] -> [tiles], neighbours first; a and b are overwritten.
template <class F>
inline void fold(float* a, float* b, int width, int tiles, float* out, F f) {
  for (width /= 2; width > 1; width /= 2) {
    halve(a, b, width * tiles, f);
    std::swap(a, b);
  }
  halve(a, out, tiles, f);
}

inline void find_largest(Block& block) {
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  for (int t = 0; t < block.tiles; ++t)
    for (int i = 0; i < 16; ++i) {
      const float* x = block.x + t * kTile + i;
      float m = x[0];
      for (int j = 1; j < 8; ++j) m = larger(m, x[16 * j]);
      block.folded[16 * t + i] = m;
    }
  fold(block.folded, block.terms, 16, block.tiles, block.largest, larger);
  for (int t = 0; t < block.tiles; ++t)
    block.base[t] = block.largest[t] == kMinusInfinity ? 0.0f : block.largest[t];
}

// The fixed tree: ids 64 apart first, then neighbours, pairs, fours ... of the 64 that remain.
inline void sum_tiles(Block& block, float c, float floor, float* out) {
  for (int t = 0; t < block.tiles; ++t) {
    const float* x = block.x + t * kTile;
    const float base = block.base[t];
    for (int i = 0; i < 64; ++i)
      block.folded[64 * t + i] = weight(x[i] - base, c, floor) + weight(x[i + 64] - base, c, floor);
  }
  const auto plus = [](float a, float b) { return a + b; };
  fold(block.folded, block.terms, 64, block.tiles, out, plus);
  for (int t = 0; t < block.tiles; ++t)
    out[t] = block.largest[t] == kMinusInfinity && out[t] == out[t] ? 0.0f : out[t];
}

// Ids below `threshold` become -inf.
inline void mask_below(float* x, int count, float threshold) {
  for (int i = 0; i < count; ++i) x[i] = x[i] < threshold ? kMinusInfinity : x[i];
}

}  // namespace
}  // namespace megarlx::cpu
