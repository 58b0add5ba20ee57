// What every math header starts from: these headers are compiled by the C++ compiler for the CPU
// kernels and by nvcc for the CUDA ones, so a formula exists once.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MEGARLX_HD __host__ __device__ __forceinline__
#else
#define MEGARLX_HD inline __attribute__((always_inline))
#endif

namespace megarlx {

// Element types of raw pointers that cross the interface between bindings and kernels.
enum class Dtype : std::int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

}  // namespace megarlx
