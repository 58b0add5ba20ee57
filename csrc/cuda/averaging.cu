// average_adamw_, adamw_update_ and the two halves of replica_average_ on the GPU.
// All are bound by memory. A thread takes 8 elements at a time, in 16-byte loads, and works through
// the objectives one after the other: 8 loads in flight a thread and a full multiprocessor of
// threads are several times what the latency of memory asks for, for any number of objectives.
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "math/bfloat16.h"

namespace megarlx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;

__host__ bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// Enough blocks to fill the card once; the grid-stride loops do the rest.
__host__ int blocks_for(std::int64_t items, int blocks_a_multiprocessor) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const std::int64_t wanted = (items + kThreads - 1) / kThreads;
  const std::int64_t most = static_cast<std::int64_t>(multiprocessors) * blocks_a_multiprocessor;
  return static_cast<int>(wanted < 1 ? 1 : (wanted < most ? wanted : most));
}

// W elements from `pointer + e`; with W == kWidth the address must be a multiple of 16 bytes.
template <int W>
__device__ __forceinline__ void load(const float* pointer, std::int64_t e, float (&x)[W]) {
  if constexpr (W == kWidth) {
    const float4 a = *reinterpret_cast<const float4*>(pointer + e);
    const float4 b = *reinterpret_cast<const float4*>(pointer + e + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
    x[0] = pointer[e];
  }
}

template <int W>
__device__ __forceinline__ void load(const std::uint16_t* pointer, std::int64_t e, float (&x)[W]) {
  if constexpr (W == kWidth) {
    const uint4 a = *reinterpret_cast<const uint4*>(pointer + e);
    const std::uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = from_bfloat16(static_cast<std::uint16_t>(pairs[k] & 0xFFFFu));
      x[2 * k + 1] = from_bfloat16(static_cast<std::uint16_t>(pairs[k] >> 16));
    }
  } else {
    x[0] = from_bfloat16(pointer[e]);
  }
}

template <int W>
__device__ __forceinline__ void store(float* pointer, std::int64_t e, const float (&x)[W]) {
  if constexpr (W == kWidth) {
    *reinterpret_cast<float4*>(pointer + e) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(pointer + e + 4) = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    pointer[e] = x[0];
  }
}

template <int W>
__device__ __forceinline__ void store(std::uint16_t* pointer, std::int64_t e, const float (&x)[W]) {
  if constexpr (W == kWidth) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      pairs[k] =
          to_bfloat16(x[2 * k]) | (static_cast<std::uint32_t>(to_bfloat16(x[2 * k + 1])) << 16);
    *reinterpret_cast<uint4*>(pointer + e) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
    pointer[e] = to_bfloat16(x[0]);
  }
}

template <int W>
__device__ __forceinline__ void store(void* pointer, Dtype dtype, std::int64_t e,
                                      const float (&x)[W]) {
  if (dtype == Dtype::kBFloat16)
    store<W>(static_cast<std::uint16_t*>(pointer), e, x);
  else
    store<W>(static_cast<float*>(pointer), e, x);
}

template <int W>
__device__ __forceinline__ void load(const void* pointer, Dtype dtype, std::int64_t e,
                                     float (&x)[W]) {
  if (dtype == Dtype::kBFloat16)
    load<W>(static_cast<const std::uint16_t*>(pointer), e, x);
  else
    load<W>(static_cast<const float*>(pointer), e, x);
}

// A launch of its own: the next kernel's blocks find the steps advanced and never read them.
__global__ void prepare_adamw(AdamWArgs args, AdamWCoefficients<float>* coefficients) {
  const int i = threadIdx.x;
  if (i < args.objectives) coefficients[i] = adamw_coefficients(args, i).rounded<float>();
}

template <int W, typename Grad>
__device__ __forceinline__ void adamw_elements(const AdamWArgs& args,
                                               const AdamWCoefficients<float>* coefficients,
                                               std::int64_t e) {
  float theta[W], sum[W];
  load<W>(static_cast<const float*>(args.master), e, theta);
#pragma unroll
  for (int k = 0; k < W; ++k) sum[k] = -0.0f;
#pragma unroll 1
  for (int i = 0; i < args.objectives; ++i) {
    if (coefficients[i].skipped) continue;
    const AdamWCoefficients<float> c = coefficients[i];
    float grad[W], m[W], v[W];
    load<W>(static_cast<const Grad*>(args.grads[i]), e, grad);
    load<W>(static_cast<const float*>(args.exp_avgs[i]), e, m);
    load<W>(static_cast<const float*>(args.exp_avg_sqs[i]), e, v);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float delta = adamw_delta(theta[k], grad[k], m[k], v[k], c);
      if (c.contributes) sum[k] = add_delta(sum[k], delta, c);
    }
    store<W>(static_cast<float*>(args.exp_avgs[i]), e, m);
    store<W>(static_cast<float*>(args.exp_avg_sqs[i]), e, v);
  }
  if (!args.only_delta) {
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] = theta[k] + sum[k];
    store<W>(static_cast<float*>(args.master), e, sum);
  }
  if (args.out != nullptr) store<W>(args.out, args.out_dtype, e, sum);
}

template <int W, typename Grad>
__global__ void __launch_bounds__(kThreads)
    average_adamw_kernel(const __grid_constant__ AdamWArgs args,
                         const AdamWCoefficients<float>* coefficients) {
  __shared__ AdamWCoefficients<float> shared[kMaxObjectives];
  if (threadIdx.x < args.objectives) shared[threadIdx.x] = coefficients[threadIdx.x];
  __syncthreads();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t groups = args.count / W;
  for (std::int64_t group = first; group < groups; group += stride)
    adamw_elements<W, Grad>(args, shared, group * W);
  if constexpr (W > 1)
    for (std::int64_t e = groups * W + first; e < args.count; e += stride)
      adamw_elements<1, Grad>(args, shared, e);
}

template <int W>
__host__ void launch_adamw(const AdamWArgs& args, const AdamWCoefficients<float>* coefficients,
                           cudaStream_t stream) {
  const int blocks = blocks_for(args.count / W, 8);
  if (args.grad_dtype == Dtype::kBFloat16)
    average_adamw_kernel<W, std::uint16_t><<<blocks, kThreads, 0, stream>>>(args, coefficients);
  else
    average_adamw_kernel<W, float><<<blocks, kThreads, 0, stream>>>(args, coefficients);
}

template <int W>
__device__ __forceinline__ double pack_elements(const PackArgs& args, bool skip, float weight,
                                                std::int64_t e) {
  float x[W];
  load<W>(args.input, args.input_dtype, e, x);
  double squares = 0;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const double value = x[k];
    squares += value * value;
    x[k] = skip ? 0.0f : weight * x[k];
  }
  store<W>(args.packed, args.wire_dtype, e, x);
  return squares;
}

// The sum of every thread's value, in an order that never changes, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double partial[kThreads];
  partial[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  __syncthreads();
  const double sum = partial[0];
  __syncthreads();
  return sum;
}

template <int W>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  const bool skip = args.found_inf != nullptr && *args.found_inf;
  const float weight = static_cast<float>(*args.weight);
  const std::int64_t chunks = pack_chunks(args.count);
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const std::int64_t begin = chunk * kPackChunk;
    const std::int64_t end = begin + kPackChunk < args.count ? begin + kPackChunk : args.count;
    const std::int64_t grouped = begin + (end - begin) / W * W;
    double squares = 0;
    for (std::int64_t e = begin + threadIdx.x * W; e < grouped; e += kThreads * W)
      squares += pack_elements<W>(args, skip, weight, e);
    if constexpr (W > 1)
      for (std::int64_t e = grouped + threadIdx.x; e < end; e += kThreads)
        squares += pack_elements<1>(args, skip, weight, e);
    const double sum = block_sum(squares);
    if (threadIdx.x == 0) args.partial_norms[chunk] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) finish_pack(const __grid_constant__ PackArgs args) {
  const std::int64_t chunks = pack_chunks(args.count);
  double squares = 0;
  for (std::int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
    squares += args.partial_norms[chunk];
  const double sum = block_sum(squares);
  if (threadIdx.x == 0) {
    *args.squared_norm = sum;
    *args.packed_found_inf = !isfinite(sum) || (args.found_inf != nullptr && *args.found_inf);
  }
}

template <int W>
__device__ __forceinline__ void apply_elements(const ApplyArgs& args, std::int64_t e) {
  float summed[W];
  load<W>(args.summed, args.wire_dtype, e, summed);
  if (args.add) {
    float target[W];
    load<W>(static_cast<const float*>(args.target), e, target);
#pragma unroll
    for (int k = 0; k < W; ++k) summed[k] = target[k] + summed[k];
  }
  store<W>(static_cast<float*>(args.target), e, summed);
  if (args.out != nullptr) store<W>(args.out, args.out_dtype, e, summed);
}

template <int W>
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ ApplyArgs args) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t groups = args.count / W;
  for (std::int64_t group = first; group < groups; group += stride)
    apply_elements<W>(args, group * W);
  if constexpr (W > 1)
    for (std::int64_t e = groups * W + first; e < args.count; e += stride)
      apply_elements<1>(args, e);
}

__global__ void __launch_bounds__(kThreads)
    zero_if_kernel(unsigned char* bytes, std::int64_t count, const bool* condition) {
  if (!*condition) return;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count;
       e += stride)
    bytes[e] = 0;
}

}  // namespace

void average_adamw(const AdamWArgs& args, AdamWCoefficients<float>* coefficients,
                   cudaStream_t stream) {
  prepare_adamw<<<1, kMaxObjectives, 0, stream>>>(args, coefficients);
  if (args.count == 0) return;
  bool wide = aligned(args.master) && aligned(args.out);
  for (int i = 0; i < args.objectives; ++i)
    wide =
        wide && aligned(args.grads[i]) && aligned(args.exp_avgs[i]) && aligned(args.exp_avg_sqs[i]);
  if (wide)
    launch_adamw<kWidth>(args, coefficients, stream);
  else
    launch_adamw<1>(args, coefficients, stream);
}

void replica_average_pack(const PackArgs& args, cudaStream_t stream) {
  if (args.count > 0) {
    const int blocks = blocks_for(pack_chunks(args.count) * kThreads, 8);
    if (aligned(args.input) && aligned(args.packed))
      pack_kernel<kWidth><<<blocks, kThreads, 0, stream>>>(args);
    else
      pack_kernel<1><<<blocks, kThreads, 0, stream>>>(args);
  }
  finish_pack<<<1, kThreads, 0, stream>>>(args);
}

void replica_average_apply(const ApplyArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  if (aligned(args.target) && aligned(args.summed) && aligned(args.out))
    apply_kernel<kWidth><<<blocks_for(args.count / kWidth, 8), kThreads, 0, stream>>>(args);
  else
    apply_kernel<1><<<blocks_for(args.count, 8), kThreads, 0, stream>>>(args);
}

void zero_if(void* bytes, std::int64_t count, const bool* condition, cudaStream_t stream) {
  if (count == 0) return;
  zero_if_kernel<<<blocks_for(count, 8), kThreads, 0, stream>>>(static_cast<unsigned char*>(bytes),
                                                                count, condition);
}

}  // namespace megarlx::cuda
