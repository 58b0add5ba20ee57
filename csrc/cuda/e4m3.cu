// Rows rounded to e4m3 on the GPU: a block takes a row, once for its largest number and once more,
// from the caches, to round it.
#include "cuda/rows.h"
#include "math/e4m3.h"

namespace megarlx::cuda {
namespace {

// The largest number of a block, in every thread of it.
__device__ __forceinline__ float block_largest(float value) {
  __shared__ float partial[kWarps];
  for (int offset = 16; offset > 0; offset /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) value = larger(value, partial[i]);
  return value;
}

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads) e4m3_kernel(const __grid_constant__ E4m3Args args) {
  constexpr int kLanes = kWidth<Stored>;
  const int columns = static_cast<int>(args.columns), packs = packs_of<Stored>(columns);
  const std::int64_t first = blockIdx.x * args.columns;
  const Stored* x = static_cast<const Stored*>(args.x) + first;
  float largest = 0.0f;
  for (int p = threadIdx.x; p < packs; p += kThreads) {
    const Place at = place_of<Stored>(p, columns);
    const auto pack = read<whole>(x + at.column, at.count);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      largest = larger(largest, fabsf(static_cast<float>(widened(pack.at(k)))));
  }
  const float scale = e4m3_scale(block_largest(largest));
  if (threadIdx.x == 0) args.scales[blockIdx.x] = scale;
  for (int p = threadIdx.x; p < packs; p += kThreads) {
    const Place at = place_of<Stored>(p, columns);
    const auto pack = read<whole>(x + at.column, at.count);
    Pack<std::uint8_t, kLanes> codes;
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      codes.lane[k] = to_e4m3(static_cast<float>(widened(pack.at(k))) / scale);
    std::uint8_t* to = args.values + first + at.column;
    if constexpr (whole) {
      *reinterpret_cast<Pack<std::uint8_t, kLanes>*>(to) = codes;
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (k < at.count) to[k] = codes.lane[k];
    }
  }
}

}  // namespace

void e4m3_rows(const E4m3Args& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const unsigned blocks = static_cast<unsigned>(args.rows);
    if (args.columns % kWidth<Stored> == 0 && aligned(args.x) && aligned(args.values))
      e4m3_kernel<Stored, true><<<blocks, kThreads, 0, stream>>>(args);
    else
      e4m3_kernel<Stored, false><<<blocks, kThreads, 0, stream>>>(args);
  });
}

}  // namespace megarlx::cuda
