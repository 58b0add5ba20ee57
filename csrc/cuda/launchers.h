// Launchers of the CUDA kernels: raw pointers and a stream, so that nvcc compiles them alone.
#pragma once
#include <cuda_runtime.h>

#include "math/sample.h"

namespace megarlx::cuda {

// sample
std::int64_t sample_workspace_bytes(const sampling::SampleArgs& args);
void sample(const sampling::SampleArgs& args, void* workspace, cudaStream_t stream);
// partials [shards, rows] -> the outputs of args
void sample_combine(const sampling::SampleArgs& args, const sampling::Partial* partials,
                    std::int64_t shards, cudaStream_t stream);

}  // namespace megarlx::cuda
