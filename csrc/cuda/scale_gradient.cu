// A gradient times the upstream gradient, a number on the device that nobody waits for. It is
// nearly always 1: then no element is read.
#include "cuda/flat_buffers.h"
#include "cuda/launchers.h"

namespace megarlx::cuda {
namespace {

template <typename Stored, typename T, int W>
__device__ __forceinline__ void scale_elements(void* gradient, std::int64_t e, T factor) {
  T x[W];
  load<Stored>(gradient, e, x);
#pragma unroll
  for (int k = 0; k < W; ++k) x[k] *= factor;
  store<Stored>(gradient, e, x);
}

template <typename Stored, typename T, int W>
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(void* gradient, std::int64_t count, const T* factor_in) {
  T factor = *factor_in;
  if (factor == T(1)) return;
  // As torch does: the factor in the gradient's own type.
  if constexpr (std::is_same_v<Stored, std::uint16_t>) {
    factor = from_bfloat16(to_bfloat16(factor));
  }
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t groups = count / W;
  for (std::int64_t group = first; group < groups; group += stride)
    scale_elements<Stored, T, W>(gradient, group * W, factor);
  if constexpr (W > 1)
    for (std::int64_t e = groups * W + first; e < count; e += stride)
      scale_elements<Stored, T, 1>(gradient, e, factor);
}

template <typename Stored, typename T>
__host__ void scale_as(void* gradient, std::int64_t count, const void* factor,
                       cudaStream_t stream) {
  constexpr int kWide = kWidth<Stored>;
  const T* number = static_cast<const T*>(factor);
  if (aligned(gradient))
    scale_gradient_kernel<Stored, T, kWide>
        <<<blocks_for(count / kWide, 8), kThreads, 0, stream>>>(gradient, count, number);
  else
    scale_gradient_kernel<Stored, T, 1>
        <<<blocks_for(count, 8), kThreads, 0, stream>>>(gradient, count, number);
}

}  // namespace

void scale_gradient(void* gradient, Dtype dtype, std::int64_t count, const void* factor,
                    cudaStream_t stream) {
  if (count == 0) return;
  switch (dtype) {
    case Dtype::kFloat32:
      return scale_as<float, float>(gradient, count, factor, stream);
    case Dtype::kFloat64:
      return scale_as<double, double>(gradient, count, factor, stream);
    case Dtype::kBFloat16:
      return scale_as<std::uint16_t, float>(gradient, count, factor, stream);
  }
}

}  // namespace megarlx::cuda
