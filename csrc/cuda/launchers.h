// Launchers of the CUDA kernels: raw pointers and a stream, so that nvcc compiles them alone.
#pragma once
#include <cuda_runtime.h>

#include "math/adamw.h"
#include "math/replica_average.h"

namespace megarlx::cuda {

// averaging
// `coefficients`: room for one AdamWCoefficients<float> an objective, on the device.
void average_adamw(const AdamWArgs& args, AdamWCoefficients<float>* coefficients,
                   cudaStream_t stream);
void replica_average_pack(const PackArgs& args, cudaStream_t stream);
void replica_average_apply(const ApplyArgs& args, cudaStream_t stream);
void zero_if(void* bytes, std::int64_t count, const bool* condition, cudaStream_t stream);

}  // namespace megarlx::cuda
