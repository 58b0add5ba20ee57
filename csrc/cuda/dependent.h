// Kernels that begin while the one before them still runs (sm_90 and later; elsewhere behind it).
//
// The kernel before says `let_dependents_begin`. The dependent one may at once read what stands
// since before that kernel, and says `wait_for_predecessor` before it reads or writes anything
// else. Every thread of it has to: who comes next relies on that.
#pragma once
#include <cuda_runtime.h>

namespace megarlx::cuda {
namespace {

__device__ __forceinline__ void let_dependents_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Code that was compiled for an older architecture does not wait, and so may not begin early.
template <typename Kernel>
__host__ bool can_wait(Kernel kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <typename Kernel, typename Args>
__host__ void launch_dependent(bool dependent, Kernel kernel, dim3 blocks, dim3 threads,
                               cudaStream_t stream, const Args& args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const unsigned attributes = dependent && can_wait(kernel) ? 1 : 0;
  const cudaLaunchConfig_t config{blocks, threads, 0, stream, &early, attributes};
  cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace
}  // namespace megarlx::cuda
