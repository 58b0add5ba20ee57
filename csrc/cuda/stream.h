// The one place that knows c10's CUDA headers, for bindings built with CUDA.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace megarlx::cuda {

// Makes `device` current for its lifetime; stream() is torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : guard_(device) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  // Call after a launch: a bad launch configuration raises here, with the op's name.
  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    TORCH_CHECK(error == cudaSuccess, "megarlx.", op, ": ", cudaGetErrorString(error));
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

}  // namespace megarlx::cuda
