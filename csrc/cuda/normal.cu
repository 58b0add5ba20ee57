// normal_slice_: a thread makes the four numbers of one counter.
#include "cuda/flat_buffers.h"
#include "cuda/launchers.h"

namespace megarlx::cuda {
namespace {

template <typename Stored>
__device__ __forceinline__ void put(const normal::Args& args, const normal::Place& place, int i,
                                    float number) {
  if (i < place.begin || i >= place.end) return;
  const float scaled = number * args.std;
  Stored* out = static_cast<Stored*>(args.out) + place.at + i;
  if constexpr (std::is_same_v<Stored, std::uint16_t>)
    *out = to_bfloat16(scaled);
  else
    *out = static_cast<Stored>(scaled);
}

template <typename Stored>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(const __grid_constant__ normal::Args args) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t count = args.rows * args.groups * normal::kLanes;
  for (std::int64_t index = first; index < count; index += stride) {
    const int lane = static_cast<int>(index % normal::kLanes);
    const normal::Place place = normal::place_of(args, index / normal::kLanes);
    if (place.begin >= place.end) continue;
    const auto counter = static_cast<std::uint64_t>(place.counter + lane);
    const Random128 random =
        philox(static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0,
               static_cast<std::uint32_t>(args.key), static_cast<std::uint32_t>(args.key >> 32));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float radius = ::sqrtf(normal::squared_radius(random.word[2 * half]));
      const normal::Direction to = normal::direction(random.word[2 * half + 1]);
      const int at = 2 * half * normal::kLanes + lane;
      put<Stored>(args, place, at, radius * to.cosine);
      put<Stored>(args, place, at + normal::kLanes, radius * to.sine);
    }
  }
}

template <typename Stored>
__host__ void normal_as(const normal::Args& args, cudaStream_t stream) {
  const int blocks = blocks_for(args.rows * args.groups * normal::kLanes, 8);
  normal_kernel<Stored><<<blocks, kThreads, 0, stream>>>(args);
}

}  // namespace

void normal_slice(const normal::Args& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return normal_as<float>(args, stream);
    case Dtype::kFloat64:
      return normal_as<double>(args, stream);
    case Dtype::kBFloat16:
      return normal_as<std::uint16_t>(args, stream);
  }
}

}  // namespace megarlx::cuda
