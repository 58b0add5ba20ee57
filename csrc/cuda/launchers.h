// The launchers: what a binding calls. Raw pointers and a stream, so that nvcc compiles them alone;
// they launch on the stream, wait for nothing, and check nothing that a binding has checked.
#pragma once
#include <cuda_runtime.h>

#include "math/adamw.h"
#include "math/decode.h"
#include "math/e4m3.h"
#include "math/elementwise.h"
#include "math/narrow_product.h"
#include "math/normal.h"
#include "math/replica_average.h"
#include "math/sample.h"
#include "math/token_loss.h"

namespace megarlx::cuda {

// sample
std::int64_t sample_workspace_bytes(const sampling::SampleArgs& args);
void sample(const sampling::SampleArgs& args, void* workspace, cudaStream_t stream);
// partials [shards, rows] -> the outputs of args
void sample_combine(const sampling::SampleArgs& args, const sampling::Partial* partials,
                    std::int64_t shards, cudaStream_t stream);

// token_loss
void token_loss(const TokenLossArgs& args, LossStep step, cudaStream_t stream);
// gradient *= factor, which lies on the device: fp64 for an fp64 gradient, else fp32.
void scale_gradient(void* gradient, Dtype dtype, std::int64_t count, const void* factor,
                    cudaStream_t stream);

// averaging
// `coefficients`: room for one AdamWCoefficients<double> an objective, on the device.
void average_adamw(const AdamWArgs& args, void* coefficients, cudaStream_t stream);
void replica_average_pack(const PackArgs& args, cudaStream_t stream);
void replica_average_apply(const ApplyArgs& args, cudaStream_t stream);
void zero_if(void* bytes, std::int64_t count, const bool* condition, cudaStream_t stream);

// elementwise
std::int64_t norm_blocks(std::int64_t rows);  // that sum the gradient of a norm's weight
void rms_norm(const RmsNormArgs& args, cudaStream_t stream);
void rms_norm_backward(const RmsNormArgs& args, cudaStream_t stream);
void swiglu(const SwiGluArgs& args, cudaStream_t stream);
void swiglu_backward(const SwiGluArgs& args, cudaStream_t stream);
void heads(const HeadsArgs& args, cudaStream_t stream);
void heads_sums(const HeadsArgs& args, cudaStream_t stream);
void heads_backward(const HeadsArgs& args, cudaStream_t stream);
void sum_blocks(Dtype precision, const void* sums, std::int64_t blocks, std::int64_t width,
                void* out, cudaStream_t stream);

// normal
void normal_slice(const normal::Args& args, cudaStream_t stream);

// decode
void narrow_product(const NarrowProductArgs& args, cudaStream_t stream);
void e4m3_rows(const E4m3Args& args, cudaStream_t stream);
void merge_attention(const MergeArgs& args, cudaStream_t stream);
void decode_advance(const AdvanceArgs& args, cudaStream_t stream);

}  // namespace megarlx::cuda
