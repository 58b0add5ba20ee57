// Rows that a team of a block's threads works on together: 16 bytes of a row at a time, a pack, so
// that neighbours touch neighbouring memory. A pack's numbers stay in the type they are stored in
// until they are computed with: registers then hold as many bytes in flight as possible.
#pragma once
#include "cuda/flat_buffers.h"
#include "cuda/launchers.h"

namespace megarlx::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kPacks = 4;  // of a row, in a thread's registers

// What a stored number is computed in.
template <typename Stored>
struct PrecisionOf {
  using Type = Stored;
};
template <>
struct PrecisionOf<std::uint16_t> {
  using Type = float;
};
template <typename Stored>
using Precision = typename PrecisionOf<Stored>::Type;

template <typename Stored>
using WidePack = Pack<Stored, kWidth<Stored>>;

template <typename Stored>
__device__ __forceinline__ Precision<Stored> widened(Stored x) {
  if constexpr (std::is_same_v<Stored, std::uint16_t>)
    return from_bfloat16(x);
  else
    return x;
}

template <typename Stored>
__device__ __forceinline__ Stored narrowed(Precision<Stored> x) {
  if constexpr (std::is_same_v<Stored, std::uint16_t>)
    return to_bfloat16(x);
  else
    return x;
}

// A pack whose first `count` lanes exist; the others are 0. `whole` promises that all of them do
// and that the address is a multiple of kAccess.
template <bool whole, typename Stored>
__device__ __forceinline__ WidePack<Stored> read(const Stored* from, int count) {
  if constexpr (whole) {
    return *reinterpret_cast<const WidePack<Stored>*>(from);
  } else {
    WidePack<Stored> pack{};
#pragma unroll
    for (int k = 0; k < kWidth<Stored>; ++k)
      if (k < count) pack.put(k, from[k]);
    return pack;
  }
}

template <bool whole, typename Stored>
__device__ __forceinline__ void write(const WidePack<Stored>& pack, Stored* to, int count) {
  if constexpr (whole) {
    *reinterpret_cast<WidePack<Stored>*>(to) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth<Stored>; ++k)
      if (k < count) to[k] = pack.at(k);
  }
}

template <typename Stored>
__host__ __device__ constexpr int packs_of(std::int64_t width) {
  return static_cast<int>((width + kWidth<Stored> - 1) / kWidth<Stored>);
}

// Where a pack of a row begins, and how many of its lanes exist: none where there is no such pack.
struct Place {
  int column, count;
};

template <typename Stored>
__device__ __forceinline__ Place place_of(int pack, int width) {
  constexpr int kLanes = kWidth<Stored>;
  const int column = pack * kLanes, left = width - column;
  return {column, left < 0 ? 0 : (left < kLanes ? left : kLanes)};
}

// The threads of a team: the smallest power of two that holds so many packs, at most a block.
__host__ int team_for(std::int64_t packs, int packs_of_thread) {
  int team = 1;
  while (team < kThreads && static_cast<std::int64_t>(team) * packs_of_thread < packs) team *= 2;
  return team;
}

// The sum over a team, in every thread of it, in an order that never changes. All threads of the
// block call it, in turns `turn` of 0, 1, 0, …, so that one barrier is enough for each.
template <typename T>
__device__ __forceinline__ T team_sum(T value, int team, int turn) {
  __shared__ T partial[2][kWarps];
  for (int offset = (team < 32 ? team : 32) / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (team <= 32) return value;
  const int warp = threadIdx.x / 32, warps = team / 32, first = warp / warps * warps;
  if (threadIdx.x % 32 == 0) partial[turn][warp] = value;
  __syncthreads();
  T sum = partial[turn][first];
  for (int i = 1; i < warps; ++i) sum += partial[turn][first + i];
  return sum;
}

// A thread's sums for the gradient of a norm's weight, one for each of its columns. Where the team
// holds a row whole they stand in shared memory (registers are scarcer), and the teams of the block
// are added up at the end; else in the block's row of `memory`, where one team is the block.
template <typename Stored, bool kept>
struct WeightSums {
  using T = Precision<Stored>;
  static constexpr int kLanes = kWidth<Stored>, kGroup = kWidth<T>, kGroups = kLanes / kGroup;
  using Group = Pack<T, kGroup>;
  static constexpr int kSlots = kept ? kPacks * kGroups * kThreads : 1;

  Group* shared;  // [kSlots]: a thread's beside its neighbour's
  T* memory;

  __device__ __forceinline__ Group& group(int u, int g, int thread) const {
    return shared[(u * kGroups + g) * kThreads + thread];
  }

  __device__ __forceinline__ void read_pack(int u, Place at, T (&sum)[kLanes]) const {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if constexpr (kept)
        sum[k] = group(u, k / kGroup, threadIdx.x).lane[k % kGroup];
      else
        sum[k] = k < at.count ? memory[at.column + k] : T(0);
    }
  }

  __device__ __forceinline__ void write_pack(int u, Place at, const T (&sum)[kLanes]) const {
    if constexpr (kept) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Group numbers;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) numbers.lane[k] = sum[g * kGroup + k];
        group(u, g, threadIdx.x) = numbers;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (k < at.count) memory[at.column + k] = sum[k];
    }
  }

  // Adds the teams of the block in their order; `place(u, thread)` is that of pack u of a thread.
  template <typename PlaceOf>
  __device__ __forceinline__ void add_teams(int team, const PlaceOf& place) const {
    __syncthreads();
    for (int item = threadIdx.x; item < kPacks * kLanes * team; item += kThreads) {
      const int k = item % kLanes, thread = item / kLanes % team, u = item / kLanes / team;
      const Place at = place(u, thread);
      if (k >= at.count) continue;
      T total = T(0);
      for (int other = thread; other < kThreads; other += team)
        total += group(u, k / kGroup, other).lane[k % kGroup];
      memory[at.column + k] = total;
    }
  }
};

// Blocks that share `rows` of which each has a row of weight sums: a number of their own, so that
// no sum depends on the card.
struct BlockRows {
  std::int64_t begin, end;
};
__device__ __forceinline__ BlockRows rows_of_block(std::int64_t rows, std::int64_t block,
                                                   std::int64_t blocks) {
  const std::int64_t each = (rows + blocks - 1) / blocks, begin = block * each;
  return {begin < rows ? begin : rows, begin + each < rows ? begin + each : rows};
}

// Calls `run` with the type that `dtype` is stored as.
template <typename Run>
__host__ void with_stored(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float());
    case Dtype::kFloat64:
      return run(double());
    case Dtype::kBFloat16:
      return run(std::uint16_t());
  }
}

}  // namespace
}  // namespace megarlx::cuda
