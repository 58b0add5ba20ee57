// What the sampling kernels share: a row's ids sixteen bytes at a time, a warp over a group of 32
// tiles (8 lanes a tile and 16 ids a lane), and the draw of a row whose tiles have their scores.
//
// A tile's exact sum decides tokens and takes 14 instructions a logit; one with the hardware's exp2
// takes 4. So every tile has a score made of the latter, which is off by less than score_margin(),
// and the few tiles so near to the best are then scored exactly (draw_of_row).
// Included by the .cu files of sampling alone, each of which compiles what it launches.
#pragma once
#include "cuda/launchers.h"
#include "cuda/logit_packs.h"

namespace megarlx::cuda {

// One allocation, cut up by sample().
struct SampleWorkspace {
  sampling::Partial* groups;  // [rows, groups of tiles], without filters
  float* tile_score;          // [rows, tiles], with filters three of these
};

// Filters and the draw (sample_filters.cu).
void sample_filtered(const sampling::SampleArgs& args, const SampleWorkspace& work,
                     cudaStream_t stream);

namespace {
using namespace megarlx::sampling;

constexpr int kTilesInGroup = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kFarBase = 1048576.0f;
constexpr float kInfinity = -kMinusInfinity;

__device__ __forceinline__ std::int64_t shuffle_xor(std::int64_t v, int mask) {
  return __shfl_xor_sync(kAll, static_cast<long long>(v), mask);
}

__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, mask));
  return x;
}

__device__ __forceinline__ Mass warp_sum(Mass mass) {
  std::int64_t top = mass.top;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const std::int64_t other = shuffle_xor(top, mask);
    top = other > top ? other : top;
  }
  mass.raise(top);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < 3; ++i) mass.sum[i] += shuffle_xor(mass.sum[i], mask);
  return mass;
}

__device__ __forceinline__ Scale row_scale(const SampleArgs& args, std::int64_t row) {
  return scale_of(args.temperature[row * args.temperature_stride]);
}
__device__ __forceinline__ RowKey row_noise(const SampleArgs& args, std::int64_t row) {
  return row_key(*args.seed, args.keys[2 * row], args.keys[2 * row + 1]);
}

// The 16 ids of lane q of eight: 8q..8q+7 and 64+8q..64+8q+7 of a tile, in packs of 16 bytes.
template <class T>
struct TileIds {
  static constexpr int kWidth = 16 / sizeof(T), kPacks = 16 / kWidth;
  static constexpr int kPacksInTile = kTile / kWidth;
  using P = Pack<T, kWidth>;
  P pack[kPacks];

  // The pack's place in the tile.
  __device__ __forceinline__ static int place(int j, int q) {
    return (64 * (j * kWidth / 8) + 8 * q + j * kWidth % 8) / kWidth;
  }
  __device__ __forceinline__ void widened(float (&x)[16]) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      float some[kWidth];
      pack[j].widened(some);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[j * kWidth + k] = some[k];
    }
  }
  // NaN if one of them is.
  __device__ __forceinline__ float largest() const {
    P most = pack[0];
#pragma unroll
    for (int j = 1; j < kPacks; ++j) most = most.template raised<float>(pack[j]);
    float x[kWidth];
    most.widened(x);
#pragma unroll
    for (int k = 1; k < kWidth; ++k) x[0] = Exponential<float>::at_least(x[0], x[k]);
    return x[0];
  }
};

// A row in memory; -inf beyond its columns, in tiles beyond the last too.
template <class T, bool kAligned>
struct RowInMemory {
  const T* logits;
  std::int64_t columns;

  __device__ __forceinline__ float at(std::int64_t id) const {
    return id < columns ? widen(logits[id]) : kMinusInfinity;
  }
  __device__ __forceinline__ TileIds<T> operator()(int tile, int q) const {
    using Ids = TileIds<T>;
    Ids ids;
    const std::int64_t first = static_cast<std::int64_t>(tile) * kTile;
    if (kAligned && first + kTile <= columns) {
#pragma unroll
      for (int j = 0; j < Ids::kPacks; ++j)
        ids.pack[j] = reinterpret_cast<const typename Ids::P*>(logits + first)[Ids::place(j, q)];
      return ids;
    }
#pragma unroll
    for (int j = 0; j < Ids::kPacks; ++j) {
      float x[Ids::kWidth];
#pragma unroll
      for (int k = 0; k < Ids::kWidth; ++k) x[k] = at(first + Ids::place(j, q) * Ids::kWidth + k);
      ids.pack[j] = Ids::P::narrow(x);
    }
    return ids;
  }
};

__device__ __forceinline__ float sum_of_eight_lanes(float sum) {
#pragma unroll
  for (int mask = 1; mask < 8; mask *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAll, sum, mask));
  return sum;
}

// The fixed tree over a tile, of which x holds the ids of TileIds.
__device__ __forceinline__ float exact_sum(const float (&x)[16], float base, const Scale& scale) {
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    s[i] = __fadd_rn(weight_of_number(x[i] - base, scale.c, scale.floor),
                     weight_of_number(x[i + 8] - base, scale.c, scale.floor));
#pragma unroll
  for (int n = 4; n > 0; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = __fadd_rn(s[2 * i], s[2 * i + 1]);
  return sum_of_eight_lanes(s[0]);
}

// Sum of 2^(c x - base) with the hardware's exp2; with kKept over x at or above the threshold.
template <bool kKept>
__device__ __forceinline__ float fast_sum(const float (&x)[16], float base, float c,
                                          float threshold) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float w = Exponential<float>::of(x[i] * c - base);
    if (!kKept || x[i] >= threshold) sum += w;
  }
  return sum_of_eight_lanes(sum);
}

// What a lane knows of its tile: the mass at the row's temperature is sum * 2^mass_base(), and
// model_sum belongs to temperature 1.
struct TileOfLane {
  int tile;
  float largest, sum, model_sum;
};

enum class Sum { kFast, kExact };

// Beyond it the rounded product of a logit and the scale is off by more than a weight should be.
__device__ __forceinline__ bool is_far(float base) { return !(fabsf(base) < kFarBase); }

// The units of a tile's sum, as a power of 2. It depends on nothing but the tile.
template <Sum kSum>
__device__ __forceinline__ double mass_base(float largest, float c) {
  const float rounded = largest * c;
  return kSum == Sum::kExact || is_far(rounded)
             ? static_cast<double>(largest) * static_cast<double>(c)
             : static_cast<double>(rounded);
}

// The sum over a tile, or with kKept over its x at or above the threshold. `top`: the largest.
template <Sum kSum, bool kKept>
__device__ __forceinline__ float sum_of_tile(float (&x)[16], float top, const Scale& scale,
                                             float threshold) {
  if (kSum == Sum::kExact) return exact_sum(x, top, scale);
  const float base = top * scale.c;
  const float fast = fast_sum<kKept>(x, base, scale.c, threshold);
  if (!__any_sync(kAll, is_far(base))) return fast;
  if (kKept) {
#pragma unroll
    for (float& some : x) some = some < threshold ? kMinusInfinity : some;
  }
  const float exact = exact_sum(x, top, scale);
  return is_far(base) ? exact : fast;
}

// Tiles [32 group, 32 group + 32) of a row, one for each lane. With kKept only ids at or above the
// threshold count, and the tiles' largest are given; others have a `largest` of -inf. A NaN or an
// infinity makes `largest` one, and then nothing else has a meaning.
// kAhead: the next tile's ids are on their way, in registers.
template <Sum kSum, bool kKept, bool kAhead, class Source>
__device__ __forceinline__ TileOfLane group_of_tiles(const Source& row, int group, int tiles,
                                                     const Scale& scale, float threshold,
                                                     const float* tile_largest) {
  const int lane = threadIdx.x % 32, q = lane % 8;
  const int first = group * kTilesInGroup + lane / 8;
  TileOfLane mine{tiles, kMinusInfinity, 0.0f, 0.0f};
  using Ids = decltype(row(first, q));
  Ids next;
  if (kAhead) next = row(first, q);
#pragma unroll 1
  for (int step = 0; step < 8; ++step) {
    const int tile = first + 4 * step;
    Ids ids;
    float largest = kMinusInfinity;
    if (kKept) {
      if (tile < tiles) largest = tile_largest[tile];
      const bool wanted = largest > kMinusInfinity && largest >= threshold;
      // All lanes of the warp take part in the shuffles below, wanted or not.
      if (!__any_sync(kAll, wanted)) continue;
      if (!wanted) largest = kMinusInfinity;
      ids = row(wanted ? tile : tiles, q);
    } else {
      ids = kAhead ? next : row(tile, q);
      if (kAhead && step < 7) next = row(tile + 4, q);
      largest = ids.largest();
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2)
        largest = Exponential<float>::at_least(largest, __shfl_xor_sync(kAll, largest, mask));
    }
    float x[16];
    ids.widened(x);
    const float top = largest == kMinusInfinity ? 0.0f : largest;
    const float sum = sum_of_tile<kSum, kKept>(x, top, scale, threshold);
    float model_sum = sum;
    if (!kKept && !scale.is_model)
      model_sum = sum_of_tile<Sum::kFast, kKept>(x, top, scale_of(1.0f), threshold);
    if (q == step) mine = {tile, largest, sum, model_sum};  // tile may be beyond the last
  }
  return mine;
}

// Of a tile with a finite logit. Equals the exact score but for score_margin().
__device__ __forceinline__ float fast_score(float largest, float sum, const Scale& scale,
                                            std::uint64_t noise) {
  if (scale.greedy) return largest;
  const float base = fminf(fmaxf(largest * scale.c, -3e38f), 3e38f);
  return base + (log2_of(sum) - log2_of(exponential_base2(noise)));
}
// Rounding of the product and the sums above, 2^-22 of their size each, and of exp2 and log2.
__device__ __forceinline__ float score_margin(float score) {
  return fabsf(score) * 0x1p-20f + 0x1p-13f;
}

struct ExactTile {
  Score score;
  float largest;
};

// A whole warp and one tile, of which it keeps ids at or above the threshold.
template <class Source>
__device__ __forceinline__ ExactTile exact_tile(const Source& row, int tile, float threshold,
                                                const Scale& scale, std::uint64_t noise) {
  const int lane = threadIdx.x % 32;
  const std::int64_t first = static_cast<std::int64_t>(tile) * kTile + 2 * lane;
  float x[4] = {row.at(first), row.at(first + 1), row.at(first + 64), row.at(first + 65)};
#pragma unroll
  for (float& some : x) some = some < threshold ? kMinusInfinity : some;
  const float largest = warp_largest(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  if (scale.greedy) return {{static_cast<double>(largest), 0.0}, largest};
  float w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = weight_of_number(x[i] - largest, scale.c, scale.floor);
  float sum = __fadd_rn(__fadd_rn(w[0], w[2]), __fadd_rn(w[1], w[3]));
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAll, sum, mask));
  const double base = static_cast<double>(largest) * static_cast<double>(scale.c);
  return {tile_score(base, tile_gumbel(sum, noise)), largest};
}

// Of equal scores the lower tile stays. tile: -1 where no tile has one.
struct Winner {
  ExactTile exact;
  int tile;
};

template <class Source>
__device__ Winner winning_tile(const Source& row, const float* scores, int tiles, float threshold,
                               const Scale& scale, const RowKey& key, std::int64_t first_tile) {
  const int lane = threadIdx.x % 32;
  float best = kMinusInfinity;
#pragma unroll 4
  for (int t = lane; t < tiles; t += 32) best = fmaxf(best, scores[t]);
  best = warp_largest(best);
  Winner winner{{{static_cast<double>(kMinusInfinity), 0.0}, kMinusInfinity}, -1};
  if (best == kMinusInfinity) return winner;
  const float least = scale.greedy ? best : best - score_margin(best);
  for (int first = 0; first < tiles; first += 32) {
    const float score = first + lane < tiles ? scores[first + lane] : kMinusInfinity;
    unsigned near = __ballot_sync(kAll, score > kMinusInfinity && score >= least);
    for (; near != 0; near &= near - 1) {
      const int tile = first + __ffs(static_cast<int>(near)) - 1;
      const std::uint64_t noise = tile_noise(key, first_tile + tile).low();
      const ExactTile exact = exact_tile(row, tile, threshold, scale, noise);
      if (winner.tile < 0 || exact.score > winner.exact.score) winner = {exact, tile};
    }
  }
  return winner;
}

// The whole warp: score, token and logit of p, from the tiles' scores.
template <class Source>
__device__ void draw_of_row(const Source& row, const float* scores, int tiles, float threshold,
                            const Scale& scale, const RowKey& key, std::int64_t first_tile,
                            Partial& p) {
  const int lane = threadIdx.x % 32;
  const Winner winner = winning_tile(row, scores, tiles, threshold, scale, key, first_tile);
  if (winner.tile < 0) return;
  const float largest = winner.exact.largest;
  float x[4];
  std::int64_t w[4], own = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = row.at(static_cast<std::int64_t>(winner.tile) * kTile + 4 * lane + i);
    if (x[i] < threshold) x[i] = kMinusInfinity;
    w[i] = scale.greedy ? x[i] == largest
                        : integer_weight(weight(x[i] - largest, scale.c, scale.floor));
    own += w[i];
  }
  std::int64_t through = own;  // of this lane and those below it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int64_t below = __shfl_up_sync(kAll, static_cast<long long>(through), distance);
    if (lane >= distance) through += below;
  }
  const std::int64_t total = __shfl_sync(kAll, static_cast<long long>(through), 31);
  const std::uint64_t noise = tile_noise(key, first_tile + winner.tile).high();
  const std::int64_t target = scale.greedy ? 0 : inversion_target(noise, total);
  const int lane_of_token = __ffs(__ballot_sync(kAll, through > target)) - 1;
  std::int64_t left = target - (through - own);
  int chosen = 0;
  float logit = x[0];
#pragma unroll
  for (int i = 0; i < 3; ++i) {  // in the lane of the token, 0 <= left < own
    if (chosen == i && left >= w[i]) {
      left -= w[i];
      chosen = i + 1;
      logit = x[i + 1];
    }
  }
  p.score = winner.exact.score;
  p.token = (first_tile + winner.tile) * kTile + 4 * lane_of_token +
            __shfl_sync(kAll, chosen, lane_of_token);
  p.logit = static_cast<double>(__shfl_sync(kAll, logit, lane_of_token));
}

int tiles_of(const SampleArgs& args) {
  return static_cast<int>((args.columns + kTile - 1) / kTile);
}
int groups_of(const SampleArgs& args) {
  return (tiles_of(args) + kTilesInGroup - 1) / kTilesInGroup;
}
// Every row starts on an edge of sixteen bytes.
template <class T>
bool is_aligned(const SampleArgs& args) {
  return reinterpret_cast<std::uintptr_t>(args.logits) % 16 == 0 &&
         args.row_stride * sizeof(T) % 16 == 0;
}

}  // namespace
}  // namespace megarlx::cuda
