// Token loss on CUDA: one block a row. The row is read once for its sums, which also keeps as much
// of it as fits in shared memory; the gradient is written from there, and from the L2 cache for
// what did not fit. Sums are combined in a fixed order: a rerun is bit-identical.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/launchers.h"
#include "math/token_loss.h"

namespace megarlx::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;              // vectors in flight for each thread
constexpr int kCacheBytes = 100 << 10;  // of a row, in shared memory: two blocks an SM

template <typename T>
struct Exponential;

// Exponents are in units of log 2 for float, where the hardware has 2^x, and of 1 for double.
template <>
struct Exponential<float> {
  static constexpr float kUnit = 0.693147180559945309f;
  // Rounded by itself: fused into a difference, equal numbers would no longer be equal.
  __device__ static float in_logarithms(float x) { return __fmul_rn(x, kUnit); }
  __device__ static float of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Keeps a NaN, unlike fmaxf: a NaN logit must not vanish.
  __device__ static float limit(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(static_cast<float>(kLowestExponent)));
    return y;
  }
};

template <>
struct Exponential<double> {
  static constexpr double kUnit = 1;
  __device__ static double in_logarithms(double x) { return x; }
  __device__ static double of(double x) { return exp(x); }
  __device__ static double limit(double x) { return x < kLowestExponent ? kLowestExponent : x; }
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename To, typename T>
__device__ __forceinline__ To narrow(T x) {
  if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename Logit, int Width>
struct alignas(sizeof(Logit) * Width) Pack {
  Logit lane[Width];
};

// Sums relative to a running maximum (in exponent units), over some of a row's logits.
template <typename T>
struct Running {
  T maximum, exp_sum, exp_z_sum;
};

template <typename T>
__device__ Running<T> merge(Running<T> a, Running<T> b) {
  using E = Exponential<T>;
  const T top = a.maximum > b.maximum ? a.maximum : b.maximum;
  const T step_a = E::limit(a.maximum - top), step_b = E::limit(b.maximum - top);
  const T factor_a = E::of(step_a), factor_b = E::of(step_b);
  return {top, a.exp_sum * factor_a + b.exp_sum * factor_b,
          (a.exp_z_sum + a.exp_sum * step_a) * factor_a +
              (b.exp_z_sum + b.exp_sum * step_b) * factor_b};
}

template <typename T>
__device__ T shuffled(T x, int offset) {
  return __shfl_xor_sync(0xffffffffu, x, offset);
}

// Adds `count` values; one rescaling for all of them.
template <typename T, int Count>
__device__ __forceinline__ void add(Running<T>& sums, const T (&x)[Count], T scale) {
  using E = Exponential<T>;
  T top = x[0];
#pragma unroll
  for (int k = 1; k < Count; ++k) top = x[k] > top ? x[k] : top;
  top *= scale;
  if (top > sums.maximum) {
    const T step = E::limit(sums.maximum - top);
    const T factor = E::of(step);
    sums.exp_z_sum = (sums.exp_z_sum + sums.exp_sum * step) * factor;
    sums.exp_sum *= factor;
    sums.maximum = top;
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const T gap = E::limit(x[k] * scale - sums.maximum);
    const T e = E::of(gap);
    sums.exp_sum += e;
    sums.exp_z_sum += e * gap;
  }
}

// The sums of the whole row, in every thread. `cache` receives the first `cached` logits.
template <typename T, typename Logit, int Width>
__device__ RowSums<T> block_sums(const Logit* row, int valid, T scale, Logit* cache, int cached) {
  using P = Pack<Logit, Width>;
  // A finite start, so that a row of -inf makes no inf - inf before its sum is seen to be 0.
  const T least = T(-1e30);
  Running<T> sums{least, T(0), T(0)};
  const int packs = valid / Width;
  for (int first = threadIdx.x; first < packs; first += kThreads * kUnroll) {
    P pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kThreads;
      if (i < packs) pack[u] = reinterpret_cast<const P*>(row)[i];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kThreads;
      if (i >= packs) break;
      if ((i + 1) * Width <= cached) reinterpret_cast<P*>(cache)[i] = pack[u];
      T x[Width];
#pragma unroll
      for (int k = 0; k < Width; ++k) x[k] = widen(pack[u].lane[k]);
      add(sums, x, scale);
    }
  }
  for (int i = packs * Width + threadIdx.x; i < valid; i += kThreads) {
    const T x[1] = {static_cast<T>(widen(row[i]))};
    add(sums, x, scale);
  }

  __shared__ Running<T> of_warp[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Running<T> other{shuffled(sums.maximum, offset), shuffled(sums.exp_sum, offset),
                           shuffled(sums.exp_z_sum, offset)};
    sums = merge(sums, other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  sums = of_warp[0];
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) sums = merge(sums, of_warp[warp]);
  // The largest term is 1. Fused, its exponent is the rounding error of the maximum, and a sum just
  // below 1 would make log-probs above 0.
  if (sums.exp_sum > T(0.5) && sums.exp_sum < T(1)) sums.exp_sum = T(1);
  return {Exponential<T>::in_logarithms(sums.maximum), sums.exp_sum,
          Exponential<T>::in_logarithms(sums.exp_z_sum), T(0)};
}

template <typename T, typename Logit, typename Gradient, int Width>
__device__ void write_gradient(const Logit* row, Gradient* out, int valid, int columns, T scale,
                               T maximum, const GradientTerms<T>& terms, int target_column,
                               const Logit* cache, int cached) {
  using E = Exponential<T>;
  using P = Pack<Logit, Width>;
  using G = Pack<Gradient, Width>;
  const T top = maximum / E::kUnit;
  const T flat = -terms.flat, slope = -terms.slope * E::kUnit;
  const auto gradient = [&](Logit logit, int column) {
    const T gap = E::limit(widen(logit) * scale - top);
    const T value = E::of(gap) * (flat + slope * gap);
    return narrow<Gradient>(column == target_column ? value + terms.at_target : value);
  };
  const int packs = valid / Width;
  for (int first = threadIdx.x; first < packs; first += kThreads * kUnroll) {
    P pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kThreads;
      if (i < packs) {
        pack[u] = (i + 1) * Width <= cached ? reinterpret_cast<const P*>(cache)[i]
                                            : reinterpret_cast<const P*>(row)[i];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kThreads;
      if (i >= packs) break;
      G result;
#pragma unroll
      for (int k = 0; k < Width; ++k) result.lane[k] = gradient(pack[u].lane[k], i * Width + k);
      reinterpret_cast<G*>(out)[i] = result;
    }
  }
  for (int i = packs * Width + threadIdx.x; i < valid; i += kThreads) {
    out[i] = gradient(row[i], i);
  }
  for (int i = valid + threadIdx.x; i < columns; i += kThreads) out[i] = narrow<Gradient>(T(0));
}

template <typename T, typename Logit, typename Gradient, int Width, LossStep step>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    token_loss_kernel(TokenLossArgs args, int cached) {
  extern __shared__ __align__(16) unsigned char shared[];
  Logit* cache = reinterpret_cast<Logit*>(shared);
  const std::int64_t token = blockIdx.x;
  const Logit* row = static_cast<const Logit*>(args.logits) + token * args.logits_stride;
  Gradient* out = args.gradient == nullptr || step == LossStep::kSums
                      ? nullptr
                      : static_cast<Gradient*>(args.gradient) + token * args.gradient_stride;
  const int valid = static_cast<int>(valid_columns(args));
  const int columns = static_cast<int>(args.columns);

  if (is_masked(args, token)) {  // the same for the whole block
    if (threadIdx.x == 0) {
      if constexpr (step == LossStep::kSums) {
        store_sums(args, token, RowSums<T>{T(0), T(0), T(0), T(0)});
      } else if constexpr (step == LossStep::kWhole) {
        store_terms(args, token, no_terms<T>());
      }
    }
    if (out != nullptr) {
      for (int i = threadIdx.x; i < columns; i += kThreads) out[i] = narrow<Gradient>(T(0));
    }
    return;
  }

  const T scale = T(1) / number<T>(args.temperature, 0);
  const T scale_in_units = scale / Exponential<T>::kUnit;
  const std::int64_t column = args.targets[token] - args.vocab_start;
  const bool owned = column >= 0 && column < valid;
  RowSums<T> sums;
  // Read before any gradient is written: that may be in the same place. Scaled as the maximum is,
  // so that it is never above it.
  const T target =
      owned ? Exponential<T>::in_logarithms(widen(row[column]) * scale_in_units) : T(0);
  if constexpr (step == LossStep::kGradient) {
    sums = stored_sums<T>(args, token);
  } else {
    sums = block_sums<T, Logit, Width>(row, valid, scale_in_units, cache, cached);
    sums.target = is_outside(args, token) ? T(NAN) : target;
  }
  if constexpr (step == LossStep::kSums) {
    if (threadIdx.x == 0) store_sums(args, token, sums);
    return;
  }

  __shared__ GradientTerms<T> terms;
  if (threadIdx.x == 0) {
    if constexpr (step == LossStep::kGradient) {
      terms = given_terms(args, token, sums);
    } else {
      const TokenTerms<T> of_token = terms_of_token(args, token, sums);
      store_terms(args, token, of_token);
      terms = of_token.gradient;
    }
  }
  __syncthreads();
  if (out == nullptr) return;
  const int here = step == LossStep::kGradient ? 0 : cached;
  write_gradient<T, Logit, Gradient, Width>(row, out, valid, columns, scale_in_units, sums.maximum,
                                            terms, owned ? int(column) : -1, cache, here);
}

template <typename T, typename Logit, typename Gradient, int Width, LossStep step>
void launch_width(const TokenLossArgs& args, cudaStream_t stream) {
  const auto kernel = token_loss_kernel<T, Logit, Gradient, Width, step>;
  int cached = 0;
  std::size_t bytes = 0;
  if (step == LossStep::kWhole && args.gradient != nullptr) {
    const std::int64_t fit = kCacheBytes / sizeof(Logit);
    cached = static_cast<int>(args.columns < fit ? args.columns : fit);
    bytes = (cached * sizeof(Logit) + 15) / 16 * 16;
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    // A device with less (sm_86 has 99 KB) reads again from its L2 cache what it cannot keep.
    if (bytes + 4096 > static_cast<std::size_t>(most)) {
      bytes = static_cast<std::size_t>(most > 4096 ? most - 4096 : 0) / 16 * 16;
      cached = static_cast<int>(bytes / sizeof(Logit));
    }
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(bytes));
  }
  kernel<<<static_cast<unsigned>(args.tokens), kThreads, bytes, stream>>>(args, cached);
}

template <typename T, typename Logit, typename Gradient, LossStep step>
void launch_as(const TokenLossArgs& args, cudaStream_t stream) {
  // Sixteen bytes at a time where every row starts on such an edge, else one element.
  constexpr int kWide = 16 / sizeof(Logit);
  const auto aligned = [](const void* pointer, std::int64_t stride, std::size_t size) {
    return reinterpret_cast<std::uintptr_t>(pointer) % (kWide * size) == 0 && stride % kWide == 0;
  };
  const bool wide =
      aligned(args.logits, args.logits_stride, sizeof(Logit)) &&
      (args.gradient == nullptr || aligned(args.gradient, args.gradient_stride, sizeof(Gradient)));
  if (wide) {
    launch_width<T, Logit, Gradient, kWide, step>(args, stream);
  } else {
    launch_width<T, Logit, Gradient, 1, step>(args, stream);
  }
}

template <LossStep step>
void launch_step(const TokenLossArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return;
  const bool narrows = args.gradient != nullptr && args.gradient_dtype == Dtype::kBFloat16;
  switch (args.logits_dtype) {
    case Dtype::kFloat32:
      if (narrows) {
        launch_as<float, float, __nv_bfloat16, step>(args, stream);
      } else {
        launch_as<float, float, float, step>(args, stream);
      }
      return;
    case Dtype::kFloat64:
      return launch_as<double, double, double, step>(args, stream);
    case Dtype::kBFloat16:
      return launch_as<float, __nv_bfloat16, __nv_bfloat16, step>(args, stream);
  }
}

}  // namespace

void token_loss(const TokenLossArgs& args, LossStep step, cudaStream_t stream) {
  switch (step) {
    case LossStep::kWhole:
      return launch_step<LossStep::kWhole>(args, stream);
    case LossStep::kSums:
      return launch_step<LossStep::kSums>(args, stream);
    case LossStep::kGradient:
      return launch_step<LossStep::kGradient>(args, stream);
  }
}

}  // namespace megarlx::cuda
