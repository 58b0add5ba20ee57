// Sampling on a GPU; the formulas, and the order of every sum that decides a token, are those of
// math/sample.h and equal the CPU's bit for bit. (The model's mass at a temperature other than 1 is
// summed with the hardware's exp2: it decides no token.)
//
// A warp takes a group of 32 tiles, 8 lanes a tile and 16 ids a lane:
//     tile_kernel<kPlain>    reads each logit once; a Partial for each group
//     finish_kernel          a warp a row: merges the groups, draws inside the winning tile
// With filters:
//     tile_kernel<kMeasure>  each tile's largest logit, and the row's masses
//     threshold_kernel       a block a row: all filters as one threshold on the logit
//     tile_kernel<kDraw>     the draw among what is kept; tiles with nothing kept are not read
//     finish_kernel
#include <cuda_bf16.h>

#include "cuda/launchers.h"

namespace megarlx::cuda {
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

struct Workspace {
  Partial* groups;      // [rows, groups of tiles]
  float* tile_largest;  // [rows, tiles], with filters only
  float* threshold;     // [rows], with filters only
};

template <class T, Mode kMode, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, 1)
    tile_kernel(SampleArgs args, Workspace work, int tiles, int groups) {
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

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    finish_kernel(SampleArgs args, Workspace work, int groups, bool filtered) {
  const int lane = threadIdx.x % 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.rows) return;
  const Scale scale = row_scale(args, row);
  Partial p;
  p.clear();
  for (int group = lane; group < groups; group += 32) p.merge(work.groups[row * groups + group]);
  p = warp_merge(p);
  p.invalid |= !scale.valid;
  if (!p.invalid && p.token >= 0) {
    // p.token is the winning tile's first id, p.logit its largest logit.
    const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
    const float threshold = filtered ? work.threshold[row] : kMinusInfinity;
    const float largest = static_cast<float>(p.logit);
    float x[4];
    std::int64_t w[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t id = p.token - args.first_id + 4 * lane + i;
      x[i] = id < args.columns ? as_float(logits[id]) : kMinusInfinity;
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
    const std::uint64_t noise = tile_noise(row_noise(args, row), p.token / kTile).high();
    const std::int64_t target = scale.greedy ? 0 : inversion_target(noise, total);
    const int winner = __ffs(__ballot_sync(kAll, through > target)) - 1;
    std::int64_t left = target - (through - own);
    int chosen = 0;
    float logit = x[0];
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // in the winning lane, 0 <= left < own
      if (chosen == i && left >= w[i]) {
        left -= w[i];
        chosen = i + 1;
        logit = x[i + 1];
      }
    }
    p.token += 4 * winner + __shfl_sync(kAll, chosen, winner);
    p.logit = static_cast<double>(__shfl_sync(kAll, logit, winner));
  }
  if (lane != 0) return;
  if (args.partials) {
    args.partials[row] = p;
    return;
  }
  const Drawn drawn = finish(p, scale, scale.is_model && !filtered);
  args.token[row] = drawn.token;
  args.logprob[row] = drawn.logprob;
  args.sampled_logprob[row] = drawn.sampled_logprob;
}

constexpr int kThresholdThreads = 256;
constexpr int kBins = 2048;

// One row, worked on by a block.
template <class T>
struct RowFilter {
  const SampleArgs& args;
  const T* logits;
  const float* tile_largest;
  int tiles;
  float largest;
  Scale scale;
  unsigned long long* bins;     // shared, [kBins]
  unsigned long long* scratch;  // shared, [32]

  // Calls f(key, logit) for every finite logit at least `bound`.
  template <class F>
  __device__ void each(float bound, F f) const {
    for (int tile = threadIdx.x / 32; tile < tiles; tile += kThresholdThreads / 32) {
      const float most = tile_largest[tile];
      if (most == kMinusInfinity || most < bound) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t id = static_cast<std::int64_t>(tile) * kTile + 32 * i + threadIdx.x % 32;
        const float x = id < args.columns ? as_float(logits[id]) : kMinusInfinity;
        if (x > kMinusInfinity && x >= bound) f(ordered_key(x), x);
      }
    }
  }

  __device__ unsigned long long block_sum(unsigned long long v) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAll, v, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < kThresholdThreads / 32; ++i) v += scratch[i];
    return v;
  }

  __device__ unsigned long long mass_from(float bound) const {
    unsigned long long sum = 0;
    each(bound, [&](std::uint32_t, float x) { sum += filter_weight(x, largest, scale); });
    return block_sum(sum);
  }

  // The k-th largest of the tiles' largest logits, by halving the range of keys.
  __device__ float kth_tile(std::int64_t k) const {
    std::uint32_t low = 0, high = ordered_key(largest);
    while (low < high) {
      const std::uint32_t middle = low + (high - low) / 2 + 1;
      unsigned long long count = 0;
      for (int t = threadIdx.x; t < tiles; t += kThresholdThreads)
        count += ordered_key(tile_largest[t]) >= middle;
      if (block_sum(count) >= static_cast<unsigned long long>(k))
        low = middle;
      else
        high = middle - 1;
    }
    const float x = from_ordered_key(low);
    return x == x ? x : kMinusInfinity;
  }

  // The largest key such that the weights (or the count) of the keys from it upwards reach
  // `target`: histograms of 2048 equal steps, each time over the one step that holds the answer.
  __device__ std::uint32_t descend(float bound, bool by_weight, unsigned long long target) const {
    constexpr int kOwn = kBins / kThresholdThreads;  // bins of a thread
    std::uint32_t low = ordered_key(bound > -3.4028235e38f ? bound : -3.4028235e38f);
    std::uint32_t high = ordered_key(largest);
    unsigned long long above = 0;
    if (target < 1) target = 1;
    while (low < high) {
      int shift = 0;
      while (((high - low) >> shift) >= kBins) ++shift;
      for (int i = threadIdx.x; i < kBins; i += kThresholdThreads) bins[i] = 0;
      __syncthreads();
      each(from_ordered_key(low), [&](std::uint32_t key, float x) {
        if (key < low || key > high) return;
        atomicAdd(
            bins + ((key - low) >> shift),
            by_weight ? static_cast<unsigned long long>(filter_weight(x, largest, scale)) : 1ull);
      });
      __syncthreads();
      // Thread t owns bins [last - kOwn + 1, last], counted from the top.
      const int last = kBins - 1 - kOwn * static_cast<int>(threadIdx.x);
      unsigned long long own = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own += bins[last - i];
      unsigned long long through = own;
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned long long before = __shfl_up_sync(kAll, through, distance);
        if (lane >= distance) through += before;
      }
      if (lane == 31) scratch[threadIdx.x / 32] = through;
      __syncthreads();
      for (int i = 0; i < static_cast<int>(threadIdx.x) / 32; ++i) through += scratch[i];
      __syncthreads();
      if (threadIdx.x == 0) {
        scratch[0] = 0;  // the bin, and what lies above it, where the target is never reached
        scratch[1] = above;
      }
      __syncthreads();
      unsigned long long sum = above + through - own;
      if (sum < target && above + through >= target) {  // one thread
        int bin = last;
        while (sum + bins[bin] < target) sum += bins[bin--];
        scratch[0] = bin;
        scratch[1] = sum;
      }
      __syncthreads();
      const std::uint32_t first = low + (static_cast<std::uint32_t>(scratch[0]) << shift);
      above = scratch[1];
      const std::uint64_t end =
          static_cast<std::uint64_t>(first) + ((std::uint64_t{1} << shift) - 1);
      high = end < high ? static_cast<std::uint32_t>(end) : high;
      low = first;
      __syncthreads();
    }
    return low;
  }
};

template <class T>
__global__ void __launch_bounds__(kThresholdThreads, 1)
    threshold_kernel(SampleArgs args, Workspace work, int tiles, int groups) {
  __shared__ unsigned long long bins[kBins];
  __shared__ unsigned long long scratch[32];
  __shared__ float shared_largest;
  __shared__ double shared_total;
  __shared__ bool stop;
  const std::int64_t row = blockIdx.x;
  const Scale scale = row_scale(args, row);
  const float p = args.top_p ? args.top_p[row * args.top_p_stride] : 1.0f;
  const float* tile_largest = work.tile_largest + row * tiles;

  if (threadIdx.x < 32) {
    Partial whole;
    whole.clear();
    for (int g = threadIdx.x; g < groups; g += 32) whole.merge(work.groups[row * groups + g]);
    whole = warp_merge(whole);
    float largest = kMinusInfinity;
    for (int t = threadIdx.x; t < tiles; t += 32) largest = fmaxf(largest, tile_largest[t]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
    if (threadIdx.x == 0) {
      shared_largest = largest;
      stop = whole.invalid || !scale.valid || scale.greedy || largest == kMinusInfinity;
      const double mass = scale.is_model ? whole.model.log2() : whole.sampled.log2();
      shared_total = stop ? 0.0 : exp2_of_double(mass - clamped_base(largest, scale.c));
    }
  }
  __syncthreads();
  if (stop) {
    if (threadIdx.x == 0) work.threshold[row] = kMinusInfinity;
    return;
  }
  const float largest = shared_largest;
  const double total = shared_total;
  const RowFilter<T> filter{
      args,         static_cast<const T*>(args.logits) + row * args.row_stride,
      tile_largest, tiles,
      largest,      scale,
      bins,         scratch};
  const std::int64_t k = args.top_k ? args.top_k[row * args.top_k_stride] : 0;
  const bool by_k = k > 0 && k < args.columns;
  const bool by_p = p < 1.0f;
  float threshold = args.min_p
                        ? min_p_threshold(args.min_p[row * args.min_p_stride], largest, scale)
                        : kMinusInfinity;
  float bound = kMinusInfinity;
  double mass = total * static_cast<double>(kFilterUnit);
  if (by_k) {
    if (k <= tiles) bound = filter.kth_tile(k);
    bound = from_ordered_key(filter.descend(bound, false, static_cast<unsigned long long>(k)));
    threshold = fmaxf(threshold, bound);
    if (by_p) mass = static_cast<double>(filter.mass_from(bound));
  } else if (by_p) {
    bound = top_p_lower_bound(p, total, args.columns, largest, scale);
  }
  if (by_p) {
    const double target = ::ceil((p > 0.0f ? static_cast<double>(p) : 0.0) * mass);
    threshold = fmaxf(threshold, from_ordered_key(filter.descend(
                                     bound, true, static_cast<unsigned long long>(target))));
  }
  if (threadIdx.x == 0) work.threshold[row] = threshold;
}

__global__ void combine_kernel(SampleArgs args, const Partial* partials, std::int64_t shards) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  Partial all = partials[row];
  for (std::int64_t shard = 1; shard < shards; ++shard)
    all.merge(partials[shard * args.rows + row]);
  const Scale scale = row_scale(args, row);
  const Drawn drawn = finish(all, scale, scale.is_model);
  args.token[row] = drawn.token;
  args.logprob[row] = drawn.logprob;
  args.sampled_logprob[row] = drawn.sampled_logprob;
}

int tiles_of(const SampleArgs& args) {
  return static_cast<int>((args.columns + kTile - 1) / kTile);
}
int groups_of(const SampleArgs& args) {
  return (tiles_of(args) + kTilesInGroup - 1) / kTilesInGroup;
}
bool is_filtered(const SampleArgs& args) { return args.top_k || args.top_p || args.min_p; }

template <class T, Mode kMode>
void launch_tiles(const SampleArgs& args, const Workspace& work, cudaStream_t stream) {
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

template <class T>
void launch(const SampleArgs& args, const Workspace& work, cudaStream_t stream) {
  const bool filtered = is_filtered(args);
  if (filtered) {
    launch_tiles<T, Mode::kMeasure>(args, work, stream);
    threshold_kernel<T><<<static_cast<unsigned>(args.rows), kThresholdThreads, 0, stream>>>(
        args, work, tiles_of(args), groups_of(args));
    launch_tiles<T, Mode::kDraw>(args, work, stream);
  } else {
    launch_tiles<T, Mode::kPlain>(args, work, stream);
  }
  const auto blocks = static_cast<unsigned>((args.rows + kWarps - 1) / kWarps);
  finish_kernel<T><<<blocks, 32 * kWarps, 0, stream>>>(args, work, groups_of(args), filtered);
}

}  // namespace

std::int64_t sample_workspace_bytes(const SampleArgs& args) {
  const std::int64_t groups = args.rows * groups_of(args) * std::int64_t{sizeof(Partial)};
  if (!is_filtered(args)) return groups;
  return groups + args.rows * (std::int64_t{tiles_of(args)} + 1) * std::int64_t{sizeof(float)};
}

void sample(const SampleArgs& args, void* workspace, cudaStream_t stream) {
  Workspace work;
  work.groups = static_cast<Partial*>(workspace);
  work.tile_largest = reinterpret_cast<float*>(work.groups + args.rows * groups_of(args));
  work.threshold = work.tile_largest + args.rows * tiles_of(args);
  if (args.dtype == Dtype::kBFloat16)
    launch<__nv_bfloat16>(args, work, stream);
  else
    launch<float>(args, work, stream);
}

void sample_combine(const SampleArgs& args, const Partial* partials, std::int64_t shards,
                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.rows + 127) / 128);
  combine_kernel<<<blocks, 128, 0, stream>>>(args, partials, shards);
}

}  // namespace megarlx::cuda
