// What the sampling kernels share: reading eight ids at a time, sums and merges over a warp, and
// the kernel over tiles. A warp takes a group of 32 tiles, 8 lanes a tile and 16 ids a lane.
// Included by the .cu files of sampling alone, each of which compiles the modes that it launches.
#pragma once
#include <cuda_bf16.h>

#include "cuda/launchers.h"

namespace megarlx::cuda {

// One allocation, cut up by sample().
struct SampleWorkspace {
  sampling::Partial* groups;  // [rows, groups of tiles]
  float* tile_largest;        // [rows, tiles], with filters only
  float* threshold;           // [rows], with filters only
};

// With filters: the model's mass of every group, a threshold for each row, the draw among what is
// kept (sample_filters.cu). Fills what the end of sample() reads.
void sample_filtered(const sampling::SampleArgs& args, const SampleWorkspace& work,
                     cudaStream_t stream);

namespace {
using namespace megarlx::sampling;

constexpr int kWarps = 4;  // a block of the tile and finish kernels
constexpr int kTilesInGroup = 32;
constexpr unsigned kAll = 0xffffffffu;
enum class Mode { kPlain, kMeasure, kDraw };

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(x)) << 16);
}

// Eight ids that lie side by side.
__device__ __forceinline__ void load_eight(const float* from, float* to) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(from));
  const float4 b = __ldg(reinterpret_cast<const float4*>(from) + 1);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ void load_eight(const __nv_bfloat16* from, float* to) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ std::int64_t shuffle_xor(std::int64_t v, int mask) {
  return __shfl_xor_sync(kAll, static_cast<long long>(v), mask);
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

// All lanes get the merged Partial.
__device__ __forceinline__ Partial warp_merge(Partial p) {
  p.invalid = __any_sync(kAll, p.invalid != 0);
  p.model = warp_sum(p.model);
  p.sampled = warp_sum(p.sampled);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    Partial other;
    other.invalid = 0;
    other.model.clear();
    other.sampled.clear();
    other.score.high = __shfl_xor_sync(kAll, p.score.high, mask);
    other.score.low = __shfl_xor_sync(kAll, p.score.low, mask);
    other.token = shuffle_xor(p.token, mask);
    other.logit = __shfl_xor_sync(kAll, p.logit, mask);
    p.merge(other);
  }
  return p;
}

// 2^(d c) by the hardware, for sums that decide no token; NaN stays NaN.
__device__ __forceinline__ float fast_weight(float d, float c) {
  float w;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(w) : "f"(d * c));
  return w;
}

// The fixed tree over a tile: w holds ids 8q..8q+7 and 64+8q..64+8q+7 of lane q of eight.
__device__ __forceinline__ float tree_sum(const float* w) {
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = __fadd_rn(w[i], w[i + 8]);
#pragma unroll
  for (int n = 4; n > 0; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = __fadd_rn(s[2 * i], s[2 * i + 1]);
#pragma unroll
  for (int mask = 1; mask < 8; mask *= 2) s[0] = __fadd_rn(s[0], __shfl_xor_sync(kAll, s[0], mask));
  return s[0];
}

__device__ __forceinline__ Scale row_scale(const SampleArgs& args, std::int64_t row) {
  return scale_of(args.temperature[row * args.temperature_stride]);
}
__device__ __forceinline__ RowKey row_noise(const SampleArgs& args, std::int64_t row) {
  return row_key(*args.seed, args.keys[2 * row], args.keys[2 * row + 1]);
}
template <class T, Mode kMode, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, 1)
    tile_kernel(SampleArgs args, SampleWorkspace work, int tiles, int groups) {
  const int lane = threadIdx.x % 32;
  const int q = lane % 8;
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t row = warp / groups;
  const int group = static_cast<int>(warp % groups);
  if (row >= args.rows) return;  // whole warps only
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
  const Scale scale = row_scale(args, row);
  const float model_c = scale_of(1.0f).c;
  const float threshold = kMode == Mode::kDraw ? work.threshold[row] : kMinusInfinity;

  // Each lane ends up with one tile of the group.
  int my_tile = tiles;
  float my_largest = kMinusInfinity, my_sum = 0.0f, my_model_sum = 0.0f;
#pragma unroll 2
  for (int step = 0; step < 8; ++step) {
    const int tile = group * kTilesInGroup + 4 * step + lane / 8;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = kMinusInfinity;
    bool wanted = tile < tiles;
    if (kMode == Mode::kDraw && wanted) wanted = work.tile_largest[row * tiles + tile] >= threshold;
    // All lanes of the warp take part in the shuffles below, wanted or not.
    if (!__any_sync(kAll, wanted)) continue;
    if (wanted) {
      const std::int64_t first = static_cast<std::int64_t>(tile) * kTile + 8 * q;
      if (kAligned && static_cast<std::int64_t>(tile + 1) * kTile <= args.columns) {
        load_eight(logits + first, x);
        load_eight(logits + first + 64, x + 8);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const std::int64_t id = first + (i < 8 ? i : i + 56);
          if (id < args.columns) x[i] = as_float(logits[id]);
        }
      }
    }
    if (kMode == Mode::kDraw) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = x[i] < threshold ? kMinusInfinity : x[i];
    }
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) largest = fmaxf(largest, x[i]);
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
    const float base = largest == kMinusInfinity ? 0.0f : largest;
    float w[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) w[i] = weight(x[i] - base, scale.c, scale.floor);
    const float sum = tree_sum(w);
    float model_sum = sum;
    if (kMode != Mode::kDraw && !scale.is_model) {
#pragma unroll
      for (int i = 0; i < 16; ++i) w[i] = fast_weight(x[i] - base, model_c);
      model_sum = tree_sum(w);
    }
    if (q == step) {
      my_tile = tile;
      my_largest = largest;
      // A tile without a finite logit holds nothing; NaN must stay.
      const bool nothing = largest == kMinusInfinity;
      my_sum = nothing && sum == sum ? 0.0f : sum;
      my_model_sum = nothing && model_sum == model_sum ? 0.0f : model_sum;
    }
  }

  Partial* const out = work.groups + warp;
  Partial mine;
  mine.clear();
  const bool present = my_tile < tiles;
  if (kMode != Mode::kDraw && present) {
    mine.invalid = !(my_sum < 1e30f) || !(my_model_sum < 1e30f);
    if (kMode == Mode::kMeasure) work.tile_largest[row * tiles + my_tile] = my_largest;
  }
  if (present && my_sum > 0.0f) {
    const double base = static_cast<double>(my_largest) * static_cast<double>(scale.c);
    if (kMode != Mode::kDraw)
      mine.model.add_tile(static_cast<double>(my_largest) * static_cast<double>(model_c),
                          my_model_sum);
    if (kMode == Mode::kDraw || !scale.is_model) mine.sampled.add_tile(base, my_sum);
    if (kMode != Mode::kMeasure) {
      const std::int64_t tile = args.first_id / kTile + my_tile;
      if (scale.greedy) {
        mine.score = {static_cast<double>(my_largest), 0.0};
      } else {
        const Random128 noise = tile_noise(row_noise(args, row), tile);
        mine.score = tile_score(base, tile_gumbel(my_sum, noise.low()));
      }
      mine.token = tile * kTile;
      mine.logit = my_largest;
    }
  }
  mine = warp_merge(mine);
  if (lane != 0) return;
  if (kMode == Mode::kDraw) {  // the model's mass and the flag stay as they were measured
    mine.model = out->model;
    mine.invalid = out->invalid;
  }
  *out = mine;
}

int tiles_of(const SampleArgs& args) {
  return static_cast<int>((args.columns + kTile - 1) / kTile);
}
int groups_of(const SampleArgs& args) {
  return (tiles_of(args) + kTilesInGroup - 1) / kTilesInGroup;
}
bool is_filtered(const SampleArgs& args) { return args.top_k || args.top_p || args.min_p; }

template <class T, Mode kMode>
void launch_tiles(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  const int tiles = tiles_of(args), groups = groups_of(args);
  if (groups == 0) return;
  const auto blocks = static_cast<unsigned>((args.rows * groups + kWarps - 1) / kWarps);
  const bool aligned = reinterpret_cast<std::uintptr_t>(args.logits) % 16 == 0 &&
                       args.row_stride * sizeof(T) % 16 == 0;
  if (aligned)
    tile_kernel<T, kMode, true><<<blocks, 32 * kWarps, 0, stream>>>(args, work, tiles, groups);
  else
    tile_kernel<T, kMode, false><<<blocks, 32 * kWarps, 0, stream>>>(args, work, tiles, groups);
}

}  // namespace
}  // namespace megarlx::cuda
