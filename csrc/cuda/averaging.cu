// average_adamw_, adamw_update_ and the two halves of replica_average_ on the GPU.
// All are bound by memory. A thread takes 16 bytes of each buffer at a time, one access, next to
// its neighbours' (two accesses a thread would leave gaps in each, and half the rate of memory),
// and works through the objectives one after the other.
#include "cuda/flat_buffers.h"
#include "cuda/launchers.h"

namespace megarlx::cuda {
namespace {

// Of a buffer of bfloat16 or T.
template <typename T, int W>
__device__ __forceinline__ void load_as(const void* pointer, Dtype dtype, std::int64_t e,
                                        T (&x)[W]) {
  if (dtype == Dtype::kBFloat16)
    load<std::uint16_t>(pointer, e, x);
  else
    load<T>(pointer, e, x);
}

template <typename T, int W>
__device__ __forceinline__ void store_as(void* pointer, Dtype dtype, std::int64_t e,
                                         const T (&x)[W]) {
  if (dtype == Dtype::kBFloat16)
    store<std::uint16_t>(pointer, e, x);
  else
    store<T>(pointer, e, x);
}

// A launch of its own: the next kernel's blocks find the steps advanced and never read them.
template <typename T>
__global__ void prepare_adamw(AdamWArgs args, AdamWCoefficients<T>* coefficients) {
  const int i = threadIdx.x;
  if (i < args.objectives) coefficients[i] = adamw_coefficients(args, i).template rounded<T>();
}

template <typename T, typename Grad, int W>
__device__ __forceinline__ void adamw_elements(const AdamWArgs& args,
                                               const AdamWCoefficients<T>* coefficients,
                                               std::int64_t e) {
  T theta[W], sum[W];
  load<T>(args.master, e, theta);
#pragma unroll
  for (int k = 0; k < W; ++k) sum[k] = T(-0.0);
#pragma unroll 1
  for (int i = 0; i < args.objectives; ++i) {
    if (coefficients[i].skipped) continue;
    const AdamWCoefficients<T> c = coefficients[i];
    T grad[W], m[W], v[W];
    load<Grad>(args.grads[i], e, grad);
    load<T>(args.exp_avgs[i], e, m);
    load<T>(args.exp_avg_sqs[i], e, v);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const T delta = adamw_delta(theta[k], grad[k], m[k], v[k], c);
      if (c.contributes) sum[k] = add_delta(sum[k], delta, c);
    }
    store<T>(args.exp_avgs[i], e, m);
    store<T>(args.exp_avg_sqs[i], e, v);
  }
  if (!args.only_delta) {
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] = theta[k] + sum[k];
    store<T>(args.master, e, sum);
  }
  if (args.out != nullptr) store_as(args.out, args.out_dtype, e, sum);
}

template <typename T, typename Grad, int W>
__global__ void __launch_bounds__(kThreads)
    average_adamw_kernel(const __grid_constant__ AdamWArgs args,
                         const AdamWCoefficients<T>* coefficients) {
  __shared__ AdamWCoefficients<T> shared[kMaxObjectives];
  if (threadIdx.x < args.objectives) shared[threadIdx.x] = coefficients[threadIdx.x];
  __syncthreads();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t groups = args.count / W;
  for (std::int64_t group = first; group < groups; group += stride)
    adamw_elements<T, Grad, W>(args, shared, group * W);
  if constexpr (W > 1)
    for (std::int64_t e = groups * W + first; e < args.count; e += stride)
      adamw_elements<T, Grad, 1>(args, shared, e);
}

template <typename T, int W>
__host__ void launch_adamw(const AdamWArgs& args, const AdamWCoefficients<T>* coefficients,
                           cudaStream_t stream) {
  const int blocks = blocks_for(args.count / W, 8);
  if (args.grad_dtype == Dtype::kBFloat16)
    average_adamw_kernel<T, std::uint16_t, W><<<blocks, kThreads, 0, stream>>>(args, coefficients);
  else
    average_adamw_kernel<T, T, W><<<blocks, kThreads, 0, stream>>>(args, coefficients);
}

template <typename T>
__host__ void average_adamw_as(const AdamWArgs& args, AdamWCoefficients<T>* coefficients,
                               cudaStream_t stream) {
  prepare_adamw<T><<<1, kMaxObjectives, 0, stream>>>(args, coefficients);
  if (args.count == 0) return;
  bool wide = aligned(args.master) && aligned(args.out);
  for (int i = 0; i < args.objectives; ++i)
    wide =
        wide && aligned(args.grads[i]) && aligned(args.exp_avgs[i]) && aligned(args.exp_avg_sqs[i]);
  if (wide)
    launch_adamw<T, kWidth<T>>(args, coefficients, stream);
  else
    launch_adamw<T, 1>(args, coefficients, stream);
}

template <typename T, int W>
__device__ __forceinline__ double pack_elements(const PackArgs& args, bool skip, T weight,
                                                std::int64_t e) {
  T x[W];
  load_as(args.input, args.input_dtype, e, x);
  double squares = 0;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const double value = x[k];
    squares += value * value;
    x[k] = skip ? T(0) : weight * x[k];
  }
  store_as(args.packed, args.wire_dtype, e, x);
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

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  const bool skip = args.found_inf != nullptr && *args.found_inf;
  const T weight = static_cast<T>(*args.weight);
  const std::int64_t chunks = pack_chunks(args.count);
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const std::int64_t begin = chunk * kPackChunk;
    const std::int64_t end = begin + kPackChunk < args.count ? begin + kPackChunk : args.count;
    const std::int64_t grouped = begin + (end - begin) / W * W;
    double squares = 0;
    for (std::int64_t e = begin + threadIdx.x * W; e < grouped; e += kThreads * W)
      squares += pack_elements<T, W>(args, skip, weight, e);
    if constexpr (W > 1)
      for (std::int64_t e = grouped + threadIdx.x; e < end; e += kThreads)
        squares += pack_elements<T, 1>(args, skip, weight, e);
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

template <typename T, int W>
__device__ __forceinline__ void apply_elements(const ApplyArgs& args, std::int64_t e) {
  T summed[W];
  load_as(args.summed, args.wire_dtype, e, summed);
  if (args.add) {
    T target[W];
    load<T>(args.target, e, target);
#pragma unroll
    for (int k = 0; k < W; ++k) summed[k] = target[k] + summed[k];
  }
  store<T>(args.target, e, summed);
  if (args.out != nullptr) store_as(args.out, args.out_dtype, e, summed);
}

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, 1)
    apply_kernel(const __grid_constant__ ApplyArgs args) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t groups = args.count / W;
  for (std::int64_t group = first; group < groups; group += stride)
    apply_elements<T, W>(args, group * W);
  if constexpr (W > 1)
    for (std::int64_t e = groups * W + first; e < args.count; e += stride)
      apply_elements<T, 1>(args, e);
}

__global__ void __launch_bounds__(kThreads)
    zero_if_kernel(unsigned char* bytes, std::int64_t count, const bool* condition) {
  if (!*condition) return;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count;
       e += stride)
    bytes[e] = 0;
}

template <typename T>
__host__ void pack_as(const PackArgs& args, cudaStream_t stream) {
  const int blocks = blocks_for(pack_chunks(args.count) * kThreads, 8);
  if (aligned(args.input) && aligned(args.packed))
    pack_kernel<T, kWidth<T>><<<blocks, kThreads, 0, stream>>>(args);
  else
    pack_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(args);
}

template <typename T>
__host__ void apply_as(const ApplyArgs& args, cudaStream_t stream) {
  if (aligned(args.target) && aligned(args.summed) && aligned(args.out))
    apply_kernel<T, kWidth<T>>
        <<<blocks_for(args.count / kWidth<T>, 8), kThreads, 0, stream>>>(args);
  else
    apply_kernel<T, 1><<<blocks_for(args.count, 8), kThreads, 0, stream>>>(args);
}

}  // namespace

void average_adamw(const AdamWArgs& args, void* coefficients, cudaStream_t stream) {
  if (args.dtype == Dtype::kFloat64)
    average_adamw_as(args, static_cast<AdamWCoefficients<double>*>(coefficients), stream);
  else
    average_adamw_as(args, static_cast<AdamWCoefficients<float>*>(coefficients), stream);
}

void replica_average_pack(const PackArgs& args, cudaStream_t stream) {
  if (args.count > 0) {
    if (args.input_dtype == Dtype::kFloat64)
      pack_as<double>(args, stream);
    else
      pack_as<float>(args, stream);
  }
  finish_pack<<<1, kThreads, 0, stream>>>(args);
}

void replica_average_apply(const ApplyArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  if (args.dtype == Dtype::kFloat64)
    apply_as<double>(args, stream);
  else
    apply_as<float>(args, stream);
}

void zero_if(void* bytes, std::int64_t count, const bool* condition, cudaStream_t stream) {
  if (count == 0) return;
  zero_if_kernel<<<blocks_for(count, 8), kThreads, 0, stream>>>(static_cast<unsigned char*>(bytes),
                                                                count, condition);
}

}  // namespace megarlx::cuda
