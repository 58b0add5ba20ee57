// Sampling with filters: a block a row, which is read from memory once. As many of its tiles as fit
// stay in shared memory; the others are read again from the L2 cache. Three walks over it:
//     masses and tiles' largest logits; the threshold that all filters come to
//     (sample_threshold.h); scores of the tiles that keep something, and the draw.
#include <algorithm>

#include "cuda/sample_threshold.h"

namespace megarlx::cuda {
namespace {

constexpr int kReservedBytes = 24 << 10;  // of shared memory: bins, sums
// Of a mass of fast sums against one of exact ones: 2^-18 of it are what roundings come to.
constexpr double kFastIsOff = 0x1p-17;

// What the threads of a block know of their row, added up.
struct RowMasses {
  Mass model, sampled;
  bool invalid;
  float largest;
};

__device__ __forceinline__ RowMasses no_masses() {
  RowMasses none;
  none.model.clear();
  none.sampled.clear();
  none.invalid = false;
  none.largest = kMinusInfinity;
  return none;
}

// Behind a barrier on both sides.
__device__ void add_over_block(RowMasses mine, RowMasses& whole) {
  __shared__ RowMasses of_warp[kRowWarps];
  const int lane = threadIdx.x % 32;
  const auto of_warp_of = [](const RowMasses& some) {
    return RowMasses{warp_sum(some.model), warp_sum(some.sampled),
                     __any_sync(kAll, some.invalid) != 0, warp_largest(some.largest)};
  };
  mine = of_warp_of(mine);
  __syncthreads();
  if (lane == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    mine = of_warp_of(lane < kRowWarps ? of_warp[lane] : no_masses());
    if (lane == 0) whole = mine;
  }
  __syncthreads();
}

// Of each tile of a row. `score` is the sum at temperature 1 until there is one.
struct TileNumbers {
  float *largest, *sum, *score;
};

// A thread's tiles, before any filter.
template <Sum kSum>
__device__ __forceinline__ RowMasses row_masses(const Scale& scale, int tiles,
                                                const TileNumbers& of) {
  RowMasses mine = no_masses();
  const float model_c = scale_of(1.0f).c;
  for (int tile = threadIdx.x; tile < tiles; tile += kRowThreads) {
    const float largest = of.largest[tile];
    mine.invalid |= !(largest < kInfinity);
    mine.largest = fmaxf(mine.largest, largest);
    if (!(largest > kMinusInfinity)) continue;
    mine.sampled.add_tile(mass_base<kSum>(largest, scale.c), of.sum[tile]);
    if (!scale.is_model)
      mine.model.add_tile(mass_base<Sum::kFast>(largest, model_c), of.score[tile]);
  }
  return mine;
}

// Reads the row for these numbers of its tiles.
template <Sum kSum, class T, bool kAligned>
__device__ __forceinline__ void read_row(const KeptRow<T, kAligned>& logits, int tiles,
                                         const Scale& scale, const TileNumbers& of) {
  constexpr bool kAhead = kAligned && sizeof(T) == 2 && kSum == Sum::kFast;
  const auto read_and_keep = [&](int tile, int q) { return logits.read_and_keep(tile, q); };
  for (int group = threadIdx.x / 32; group * kTilesInGroup < tiles; group += kRowWarps) {
    const TileOfLane mine = group_of_tiles<kSum, false, kAhead>(read_and_keep, group, tiles, scale,
                                                                kMinusInfinity, nullptr);
    if (mine.tile >= tiles) continue;
    of.largest[mine.tile] = mine.largest;
    of.sum[mine.tile] = mine.sum;
    of.score[mine.tile] = mine.model_sum;
  }
  __syncthreads();
}

// Of what is kept: scores, and the mass of a thread's tiles.
__device__ __forceinline__ RowMasses scored(const SampleArgs& args, std::int64_t row, int tiles,
                                            const TileNumbers& of) {
  RowMasses mine = no_masses();
  const Scale scale = row_scale(args, row);
  for (int tile = threadIdx.x; tile < tiles; tile += kRowThreads) {
    const float largest = of.largest[tile], sum = of.sum[tile];
    float score = kMinusInfinity;
    if (sum > 0.0f) {
      mine.sampled.add_tile(mass_base<Sum::kFast>(largest, scale.c), sum);
      score = fast_score(largest, sum, scale, tile_noise(row_noise(args, row), tile).low());
    }
    of.score[tile] = score;
  }
  return mine;
}

// In units of the largest weight.
__device__ __forceinline__ double total_of(const RowMasses& masses, const Scale& scale) {
  return exp2_of_double(masses.sampled.log2() - clamped_base(masses.largest, scale.c));
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads, 1)
    filtered_kernel(SampleArgs args, SampleWorkspace work, int tiles, int kept) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ RowMasses whole;
  __shared__ RowMasses sampled;
  const std::int64_t row = blockIdx.x;
  const int groups = (tiles + kTilesInGroup - 1) / kTilesInGroup, warp = threadIdx.x / 32;
  const Scale scale = row_scale(args, row);
  const std::int64_t numbers = args.rows * tiles;  // of one kind
  float* const first = work.tile_score + row * tiles;
  const TileNumbers of{first, first + numbers, first + 2 * numbers};
  const RowInMemory<T, kAligned> in_memory{
      static_cast<const T*>(args.logits) + row * args.row_stride, args.columns};
  const KeptRow<T, kAligned> logits{in_memory, reinterpret_cast<typename TileIds<T>::P*>(shared),
                                    kept};

  read_row<Sum::kFast>(logits, tiles, scale, of);
  add_over_block(row_masses<Sum::kFast>(scale, tiles, of), whole);
  const bool broken = whole.invalid || !scale.valid || whole.largest == kMinusInfinity;
  float threshold = kMinusInfinity;
  if (!broken && !scale.greedy) {
    const RowFilter<T, kAligned> filter{logits, of.largest, tiles, whole.largest, scale};
    // In bf16 top-p hardly ever depends on the last bits of the mass, for which exact sums are
    // made.
    for (bool exact = false;; exact = true) {
      const double total = total_of(exact ? sampled : whole, scale);
      if (row_threshold(filter, args, row, total, exact ? 0.0 : kFastIsOff, threshold)) break;
      read_row<Sum::kExact>(logits, tiles, scale, of);
      add_over_block(row_masses<Sum::kExact>(scale, tiles, of), sampled);
    }
  }

  if (!broken) {
    for (int group = warp; group < groups; group += kRowWarps) {
      const TileOfLane mine = group_of_tiles<Sum::kFast, true, false>(logits, group, tiles, scale,
                                                                      threshold, of.largest);
      const int tile = group * kTilesInGroup + threadIdx.x % 32;
      if (tile < tiles) of.sum[tile] = 0.0f;
      __syncwarp();
      if (mine.tile < tiles && mine.largest > kMinusInfinity) of.sum[mine.tile] = mine.sum;
    }
    __syncthreads();
    add_over_block(scored(args, row, tiles, of), sampled);  // behind it, every score is written
  }
  if (warp != 0) return;
  const Scale again = row_scale(args, row);  // rather than kept in registers
  Partial p;
  p.clear();
  p.invalid = broken;
  if (!broken) draw_of_row(logits, of.score, tiles, threshold, again, row_noise(args, row), 0, p);
  p.model = again.is_model ? whole.sampled : whole.model;
  if (!broken) p.sampled = sampled.sampled;
  if (threadIdx.x == 0) store_drawn(args, row, finish(p, again, false));
}

template <class T, bool kAligned>
void launch_filtered(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  const int tiles = tiles_of(args);
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  constexpr int kTileBytes = kTile * sizeof(T);
  const int kept = std::min(tiles, std::max(0, most - kReservedBytes) / kTileBytes);
  const auto kernel = filtered_kernel<T, kAligned>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kept * kTileBytes);
  kernel<<<static_cast<unsigned>(args.rows), kRowThreads, kept * kTileBytes, stream>>>(args, work,
                                                                                       tiles, kept);
}

template <class T>
void launch_type(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  if (is_aligned<T>(args))
    launch_filtered<T, true>(args, work, stream);
  else
    launch_filtered<T, false>(args, work, stream);
}

}  // namespace

void sample_filtered(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  if (args.dtype == Dtype::kBFloat16)
    launch_type<__nv_bfloat16>(args, work, stream);
  else
    launch_type<float>(args, work, stream);
}

}  // namespace megarlx::cuda
