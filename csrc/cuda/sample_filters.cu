// The filters of sampling: top-k, top-p and min-p of a row as one threshold on its logits, found by
// histograms of exact integer weights, and the draw among the ids at or above it.
#include "cuda/sample_tiles.h"
#include "math/sample_filters.h"

namespace megarlx::cuda {
namespace {

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
    threshold_kernel(SampleArgs args, SampleWorkspace work, int tiles, int groups) {
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

template <class T>
void launch_filtered(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  launch_tiles<T, Mode::kMeasure>(args, work, stream);
  threshold_kernel<T><<<static_cast<unsigned>(args.rows), kThresholdThreads, 0, stream>>>(
      args, work, tiles_of(args), groups_of(args));
  launch_tiles<T, Mode::kDraw>(args, work, stream);
}

}  // namespace

void sample_filtered(const sampling::SampleArgs& args, const SampleWorkspace& work,
                     cudaStream_t stream) {
  if (args.dtype == Dtype::kBFloat16)
    launch_filtered<__nv_bfloat16>(args, work, stream);
  else
    launch_filtered<float>(args, work, stream);
}

}  // namespace megarlx::cuda
