// A row's filters as one threshold on its logits, found by a block (math/sample_filters.h). In bf16
// one walk over the row is enough: it has a bin for every number near the largest in size, and all
// that fell into a bin weighs the same. Else, and in fp32, by histograms of 2048 equal steps of the
// ordered keys, each time over the one step that holds the answer.
#pragma once
#include <algorithm>

#include "cuda/sample_tiles.h"
#include "math/sample_filters.h"

namespace megarlx::cuda {
namespace {

constexpr int kRowThreads = 896;  // a block; 1024 leave each too few registers
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kSteps = 2048;             // of a descent
constexpr int kNumberBins = 2 * kSteps;  // of bf16 numbers
constexpr float kLeastFinite = -3.4028235e38f;
constexpr int kCenter = kSteps;  // the bin of what is too small to have its own

// A row whose first `kept` tiles lie in shared memory.
template <class T, bool kAligned>
struct KeptRow {
  using Ids = TileIds<T>;
  RowInMemory<T, kAligned> in_memory;
  typename Ids::P* packs;
  int kept;

  __device__ __forceinline__ Ids read_and_keep(int tile, int q) const {
    const Ids ids = in_memory(tile, q);
    if (tile < kept)
#pragma unroll
      for (int j = 0; j < Ids::kPacks; ++j)
        packs[tile * Ids::kPacksInTile + Ids::place(j, q)] = ids.pack[j];
    return ids;
  }
  __device__ __forceinline__ Ids operator()(int tile, int q) const {
    if (tile >= kept) return in_memory(tile, q);
    Ids ids;
#pragma unroll
    for (int j = 0; j < Ids::kPacks; ++j)
      ids.pack[j] = packs[tile * Ids::kPacksInTile + Ids::place(j, q)];
    return ids;
  }
  __device__ __forceinline__ float at(std::int64_t id) const {
    return id < static_cast<std::int64_t>(kept) * kTile
               ? widen(reinterpret_cast<const T*>(packs)[id])
               : in_memory.at(id);
  }
};

struct Bins {
  unsigned long long mass[kSteps];  // of a descent; or two bins of numbers each
  unsigned long long center;        // the mass of kCenter
  unsigned long long scratch[kRowWarps];
};

// Where a sum from the top bin downwards reaches its target: the bin, or -1 where it never does,
// and what lies above it.
struct Place {
  int bin;
  unsigned long long above;
};

template <class T, bool kAligned>
struct RowFilter {
  const KeptRow<T, kAligned>& logits;
  const float* tile_largest;
  int tiles;
  float largest;
  const Scale& scale;

  // Calls f(x) for every finite logit at least `bound`.
  template <class F>
  __device__ __forceinline__ void each(float bound, const F& f) const {
    const float least = fmaxf(bound, kLeastFinite);
    for (int tile = threadIdx.x / 8; tile < tiles; tile += kRowThreads / 8) {
      if (tile_largest[tile] < least) continue;
      float x[16];
      logits(tile, threadIdx.x % 8).widened(x);
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (x[i] >= least) f(x[i]);
    }
  }
  __device__ __forceinline__ std::uint64_t weight_at(float x) const {
    return filter_weight(x, largest, scale);
  }
};

__device__ __forceinline__ unsigned long long block_sum(unsigned long long v, Bins& bins) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAll, v, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) bins.scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < kRowWarps ? bins.scratch[threadIdx.x % 32] : 0;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAll, v, mask);
  return v;
}

// value(bin) is asked for bins of `kCount`; the same Place in every thread.
template <int kCount, class Value>
__device__ Place find_place(Bins& bins, const Value& value, unsigned long long above,
                            unsigned long long target) {
  constexpr int kOwn = (kCount + kRowThreads - 1) / kRowThreads;
  __shared__ Place found;
  const int last = kCount - 1 - kOwn * static_cast<int>(threadIdx.x), lane = threadIdx.x % 32;
  unsigned long long own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (last >= i) own += value(last - i);
  unsigned long long through = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long before = __shfl_up_sync(kAll, through, distance);
    if (lane >= distance) through += before;
  }
  if (lane == 31) bins.scratch[threadIdx.x / 32] = through;
  if (threadIdx.x == 0) found = {-1, above};
  __syncthreads();
  unsigned long long warps = lane < static_cast<int>(threadIdx.x) / 32 ? bins.scratch[lane] : 0;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) warps += __shfl_xor_sync(kAll, warps, mask);
  through += above + warps;
  unsigned long long sum = through - own;
  if (sum < target && through >= target) {  // one thread
    int bin = last;
    while (sum + value(bin) < target) sum += value(bin--);
    found = {bin, sum};
  }
  __syncthreads();
  return found;
}

__device__ __forceinline__ unsigned long long whole_target(double target) {
  return target < 1.0 ? 1ull : static_cast<unsigned long long>(target);
}

// In 32-bit halves, for which shared memory has an instruction.
__device__ __forceinline__ void add_to(unsigned long long* sum, unsigned long long v) {
  auto* halves = reinterpret_cast<unsigned*>(sum);
  const auto low = static_cast<unsigned>(v);
  const unsigned before = atomicAdd(halves, low);
  const unsigned high = static_cast<unsigned>(v >> 32) + (before + low < before ? 1u : 0u);
  if (high != 0) atomicAdd(halves + 1, high);
}

// The largest key such that the weights (or the count) of the keys from it upwards reach `target`.
template <class Filter>
__device__ std::uint32_t descend(const Filter& filter, Bins& bins, float bound, bool by_weight,
                                 unsigned long long target) {
  std::uint32_t low = ordered_key(fmaxf(bound, kLeastFinite));
  std::uint32_t high = ordered_key(filter.largest);
  unsigned long long above = 0;
  while (low < high) {
    int shift = 0;
    while (((high - low) >> shift) >= kSteps) ++shift;
    __syncthreads();
    for (int i = threadIdx.x; i < kSteps; i += kRowThreads) bins.mass[i] = 0;
    __syncthreads();
    filter.each(from_ordered_key(low), [&](float x) {
      const std::uint32_t key = ordered_key(x);
      if (key < low || key > high) return;
      add_to(bins.mass + ((key - low) >> shift), by_weight ? filter.weight_at(x) : 1ull);
    });
    __syncthreads();
    const Place place =
        find_place<kSteps>(bins, [&](int bin) { return bins.mass[bin]; }, above, target);
    above = place.above;
    const std::uint32_t first = low + (static_cast<std::uint32_t>(std::max(place.bin, 0)) << shift);
    const std::uint64_t end = static_cast<std::uint64_t>(first) + ((std::uint64_t{1} << shift) - 1);
    high = end < high ? static_cast<std::uint32_t>(end) : high;
    low = first;
  }
  return low;
}

// The k-th largest of the tiles' largest logits, by halving the range of keys.
template <class Filter>
__device__ float kth_tile(const Filter& filter, Bins& bins, std::int64_t k) {
  std::uint32_t low = 0, high = ordered_key(filter.largest);
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2 + 1;
    unsigned long long count = 0;
    for (int t = threadIdx.x; t < filter.tiles; t += kRowThreads)
      count += ordered_key(filter.tile_largest[t]) >= middle;
    if (block_sum(count, bins) >= static_cast<unsigned long long>(k))
      low = middle;
    else
      high = middle - 1;
  }
  const float x = from_ordered_key(low);
  return x == x ? x : kMinusInfinity;
}

// What is asked of a row.
struct Wanted {
  std::int64_t k;
  bool by_k, by_p;
  double p, mass;  // mass: of the whole row, in units of a filter's weights
  double off;      // by how much of it the mass may be off
  float bound;     // below every answer

  __device__ __forceinline__ unsigned long long target(double of) const {
    return whole_target(::ceil((p > 0.0 ? p : 0.0) * of));
  }
  // The place stays the same wherever in its bounds the mass is.
  __device__ __forceinline__ bool is_sure(const Place& place, unsigned long long in_bin) const {
    return by_k || off == 0.0 ||
           (target(mass * (1.0 - off)) > place.above &&
            target(mass * (1.0 + off)) <= place.above + in_bin);
  }
};

template <class Filter>
__device__ float by_descents(const Filter& filter, Bins& bins, const Wanted& wanted) {
  float bound = wanted.bound;
  double mass = wanted.mass;
  if (wanted.by_k) {
    bound = from_ordered_key(
        descend(filter, bins, bound, false, static_cast<unsigned long long>(wanted.k)));
    if (wanted.by_p) {
      unsigned long long sum = 0;
      filter.each(bound, [&](float x) { sum += filter.weight_at(x); });
      mass = static_cast<double>(block_sum(sum, bins));
    }
  }
  if (wanted.by_p)
    bound = fmaxf(bound, from_ordered_key(descend(filter, bins, bound, true, wanted.target(mass))));
  return bound;
}

// Bins of bf16 numbers, in their order: those from `smallest` to 2047 more in size have their own.
struct NumberBins {
  int smallest;

  __device__ __forceinline__ static int size_of(float x) {
    return static_cast<int>(__float_as_uint(x) >> 16 & 0x7fffu);
  }
  __device__ __forceinline__ int of(float x) const {
    const int size = std::max(size_of(x) - smallest, 0);
    return x < 0.0f ? std::max(kCenter - size, 0) : kCenter + size;  // the largest has a bin
  }
  __device__ __forceinline__ float number(int bin) const {
    const unsigned size = static_cast<unsigned>(smallest + std::abs(bin - kCenter)) << 16;
    return __uint_as_float(size | (bin < kCenter ? 0x80000000u : 0u));
  }
};

// False where the answer lies among numbers that share a bin, or needs an exact mass.
template <class Filter>
__device__ bool by_numbers(const Filter& filter, Bins& bins, const Wanted& wanted,
                           float& threshold) {
  auto* counts = reinterpret_cast<unsigned*>(bins.mass);
  const float far = fminf(fabsf(wanted.bound), 64.0f);
  const int most = NumberBins::size_of(fmaxf(fabsf(filter.largest), far));
  const NumberBins numbers{std::max(most - (kSteps - 1), 0)};
  __syncthreads();
  for (int i = threadIdx.x; i < kNumberBins; i += kRowThreads) counts[i] = 0;
  if (threadIdx.x == 0) bins.center = 0;
  __syncthreads();
  filter.each(wanted.bound, [&](float x) {
    const int bin = numbers.of(x);
    if (bin == kCenter) add_to(&bins.center, filter.weight_at(x));
    atomicAdd(counts + bin, 1u);
  });
  __syncthreads();
  const auto count = [&](int bin) { return static_cast<unsigned long long>(counts[bin]); };
  const auto mass = [&](int bin) -> unsigned long long {
    if (bin == kCenter) return bins.center;
    return counts[bin] == 0 ? 0 : counts[bin] * filter.weight_at(numbers.number(bin));
  };
  Place place{0, 0};
  double total = wanted.mass;
  int lowest = 0;
  if (wanted.by_k) {
    place = find_place<kNumberBins>(bins, count, 0, static_cast<unsigned long long>(wanted.k));
    lowest = place.bin;
    if (lowest <= 0 || lowest == kCenter) return false;
    if (wanted.by_p) {
      unsigned long long sum = 0;
      for (int i = lowest + threadIdx.x; i < kNumberBins; i += kRowThreads) sum += mass(i);
      total = static_cast<double>(block_sum(sum, bins));
      __syncthreads();
    }
  }
  if (wanted.by_p) place = find_place<kNumberBins>(bins, mass, 0, wanted.target(total));
  if (place.bin <= 0 || place.bin == kCenter) return false;
  if (wanted.by_p && !wanted.is_sure(place, mass(place.bin))) return false;
  threshold = numbers.number(std::max(place.bin, lowest));
  return true;
}

// Keep x >= it. The same in every thread; `total`: the row's mass in units of its largest weight,
// which may be off by a part `off` of it. False where that is too much.
template <class T, bool kAligned>
__device__ bool row_threshold(const RowFilter<T, kAligned>& filter, const SampleArgs& args,
                              std::int64_t row, double total, double off, float& threshold) {
  __shared__ Bins bins;
  const float p = args.top_p ? args.top_p[row * args.top_p_stride] : 1.0f;
  const std::int64_t k = args.top_k ? args.top_k[row * args.top_k_stride] : 0;
  Wanted wanted{k,
                k > 0 && k < args.columns,
                p < 1.0f,
                static_cast<double>(p),
                total * static_cast<double>(kFilterUnit),
                off,
                kMinusInfinity};
  threshold = args.min_p ? min_p_threshold(args.min_p[row * args.min_p_stride], filter.largest,
                                           filter.scale)
                         : kMinusInfinity;
  if (!wanted.by_k && !wanted.by_p) return true;
  if (wanted.by_k && k <= filter.tiles)
    wanted.bound = kth_tile(filter, bins, k);
  else if (!wanted.by_k)
    wanted.bound =
        top_p_lower_bound(p, total * (1.0 - off), args.columns, filter.largest, filter.scale);
  float found = kMinusInfinity;
  if (sizeof(T) != 2 || !by_numbers(filter, bins, wanted, found)) {
    if (!wanted.by_k && off != 0.0) return false;
    found = by_descents(filter, bins, wanted);
  }
  threshold = fmaxf(threshold, found);
  return true;
}

}  // namespace
}  // namespace megarlx::cuda
