// Token loss on CUDA: one block a row. The row is read once for its sums, which also keeps as much
// of it as fits in shared memory; the gradient is written from there, and from the L2 cache for
// what did not fit. Sums are combined in a fixed order: a rerun is bit-identical.
#include <algorithm>
#include <type_traits>

#include "cuda/launchers.h"
#include "cuda/logit_packs.h"

namespace megarlx::cuda {
namespace {

constexpr int kUnroll = 4;  // packs in flight for each thread
constexpr unsigned kAll = 0xffffffffu;
constexpr int kReservedBytes = 4096;  // of shared memory, for all but the cache

// Below any logit that counts, and finite: a row of -inf makes no inf - inf before its sum is 0.
constexpr float kLeast = -1e30f;

// Calls f(i, step, batch) for packs i, i + step, ... of [begin, end), which are in flight together.
// Backwards, the last are the first: those the L2 cache still holds.
template <int kThreads, bool kBackwards, typename P, typename F>
__device__ __forceinline__ void each_batch(const P* packs, int begin, int end, const F& f) {
  constexpr int kStep = kBackwards ? -kThreads : kThreads;
  int left = end - begin - static_cast<int>(threadIdx.x);
  int i = kBackwards ? begin + left - 1 : begin + static_cast<int>(threadIdx.x);
  for (; left > (kUnroll - 1) * kThreads; left -= kUnroll * kThreads, i += kUnroll * kStep) {
    P batch[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) batch[u] = packs[i + u * kStep];
    f(i, kStep, batch);
  }
  for (; left > 0; left -= kThreads, i += kStep) {
    P batch[1] = {packs[i]};
    f(i, kStep, batch);
  }
}

// Sums relative to a running maximum (in exponent units), over some of a row's logits.
template <typename T>
struct Running {
  T maximum, exp_sum, exp_z_sum;

  __device__ __forceinline__ void raise(T top) {
    using E = Exponential<T>;
    const T step = E::at_least(maximum - top, T(kLowestExponent));
    const T factor = E::of(step);
    exp_z_sum = (exp_z_sum + exp_sum * step) * factor;
    exp_sum *= factor;
    maximum = top;
  }

  // One look at the maximum for all of them. No logit counts below `low`, which is finite in
  // exponent units: one of -inf adds 0 and not 0 * inf.
  template <typename Logit, int Width, int Count>
  __device__ __forceinline__ void add(Pack<Logit, Width> (&packs)[Count], T scale,
                                      const Pack<Logit, Width>& low) {
    packs[0] = packs[0].template raised<T>(low);
    Pack<Logit, Width> most = packs[0];
#pragma unroll
    for (int u = 1; u < Count; ++u) {
      packs[u] = packs[u].template raised<T>(low);
      most = most.template larger<T>(packs[u]);
    }
    const T top = largest<T>(most) * scale;
    if (top > maximum) raise(top);
#pragma unroll
    for (int u = 0; u < Count; ++u) {
      T x[Width];
      packs[u].widened(x);
#pragma unroll
      for (int k = 0; k < Width; ++k) {
        const T gap = x[k] * scale - maximum;
        const T e = Exponential<T>::of(gap);
        exp_sum += e;
        exp_z_sum += e * gap;
      }
    }
  }
};

// Over the lanes that have a number each; the same in all of them, but for the last bit of a sum.
template <typename T>
__device__ Running<T> warp_sums(Running<T> sums) {
  T top = sums.maximum;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    top = Exponential<T>::larger(top, __shfl_xor_sync(kAll, top, lanes));
  sums.raise(top);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sums.exp_sum += __shfl_xor_sync(kAll, sums.exp_sum, lanes);
    sums.exp_z_sum += __shfl_xor_sync(kAll, sums.exp_z_sum, lanes);
  }
  return sums;
}

// What one thread adds up is a warp's, then the block's.
template <int kThreads, typename T>
__device__ RowSums<T> combined(Running<T> sums) {
  __shared__ Running<T> of_warp[kThreads / 32];
  sums = warp_sums(sums);
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  const Running<T> none{T(kLeast), T(0), T(0)};
  sums = warp_sums(lane < kThreads / 32 ? of_warp[lane] : none);
  // The largest term is 1. Fused, its exponent is the rounding error of the maximum, and a sum just
  // below 1 would make log-probs above 0.
  if (sums.exp_sum > T(0.5) && sums.exp_sum < T(1)) sums.exp_sum = T(1);
  return {Exponential<T>::in_logarithms(sums.maximum), sums.exp_sum,
          Exponential<T>::in_logarithms(sums.exp_z_sum), T(0)};
}

// A row of logits and where its packs lie: the first `cached` in shared memory too, once read.
template <typename T, typename Logit, int Width>
struct Row {
  using P = Pack<Logit, Width>;
  const Logit* logits;
  int valid;
  T scale;  // to exponent units
  P* cache;
  int cached;

  __device__ __forceinline__ int packs() const { return valid / Width; }
  __device__ __forceinline__ const P* wide() const { return reinterpret_cast<const P*>(logits); }
  // The least logit, twice below what counts as a maximum.
  __device__ __forceinline__ T low() const {
    const T low = T(2) * T(kLeast) / (scale < T(0) ? -scale : scale);
    return low < T(-3e38f) ? T(-3e38f) : low;
  }

  // In every thread.
  template <int kThreads>
  __device__ __forceinline__ RowSums<T> sums() const {
    Running<T> sums{T(kLeast), T(0), T(0)};
    const P low_pack = filled<Width, Logit>(low());
    const int kept = std::min(cached, packs());
    each_batch<kThreads, false>(wide(), 0, kept, [&](int i, int step, auto& batch) {
#pragma unroll
      for (int u = 0; u < int(sizeof(batch) / sizeof(P)); ++u) cache[i + u * step] = batch[u];
      sums.add(batch, scale, low_pack);
    });
    const auto add = [&](int, int, auto& batch) { sums.add(batch, scale, low_pack); };
    each_batch<kThreads, false>(wide(), kept, packs(), add);
    if constexpr (Width > 1) {
      const auto one_low = filled<1, Logit>(low());
      for (int i = packs() * Width + threadIdx.x; i < valid; i += kThreads) {
        Pack<Logit, 1> one[1] = {{logits[i]}};
        sums.add(one, scale, one_low);
      }
    }
    return combined<kThreads>(sums);
  }
};

// The gradient of some neighbours; kSloped: the row's slope is not 0.
template <bool kSloped, typename T>
struct GradientOf {
  T scale, top, flat, slope;

  __device__ __forceinline__ T operator()(T x) const {
    const T gap = x * scale - top;
    const T e = Exponential<T>::of(gap);
    return kSloped ? e * (flat + slope * gap) : e * flat;
  }
  template <typename Gradient, typename Logit, int Width>
  __device__ __forceinline__ Pack<Gradient, Width> of(Pack<Logit, Width> pack,
                                                      const Pack<Logit, Width>& low) const {
    if (kSloped) pack = pack.template raised<T>(low);
    T x[Width];
    pack.widened(x);
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] = (*this)(x[k]);
    return Pack<Gradient, Width>::narrow(x);
  }
};

template <int kThreads, typename Gradient, typename Logit, int Width, typename T, typename Of>
__device__ __forceinline__ void write_gradient(const Row<T, Logit, Width>& row, Gradient* out,
                                               const Of& gradient) {
  using P = Pack<Logit, Width>;
  using G = Pack<Gradient, Width>;
  const P low = filled<Width, Logit>(row.low());
  const auto write = [&](int i, int step, auto& batch) {
#pragma unroll
    for (int u = 0; u < int(sizeof(batch) / sizeof(P)); ++u)
      reinterpret_cast<G*>(out)[i + u * step] = gradient.template of<Gradient>(batch[u], low);
  };
  const int kept = std::min(row.cached, row.packs());
  each_batch<kThreads, true>(row.wide(), kept, row.packs(), write);
  each_batch<kThreads, false>(static_cast<const P*>(row.cache), 0, kept, write);
  if constexpr (Width > 1) {
    const auto one_low = filled<1, Logit>(row.low());
    for (int i = row.packs() * Width + threadIdx.x; i < row.valid; i += kThreads) {
      const Pack<Logit, 1> one{row.logits[i]};
      out[i] = gradient.template of<Gradient>(one, one_low).lane[0];
    }
  }
}

template <int kThreads, int Width, typename Gradient>
__device__ void write_zeros(Gradient* out, int columns) {
  using T = std::conditional_t<sizeof(Gradient) == 8, double, float>;
  const auto zero = filled<Width, Gradient>(T(0));
  for (int i = threadIdx.x; i < columns / Width; i += kThreads)
    reinterpret_cast<Pack<Gradient, Width>*>(out)[i] = zero;
  for (int i = columns / Width * Width + threadIdx.x; i < columns; i += kThreads)
    out[i] = filled<1, Gradient>(T(0)).lane[0];
}

template <typename T, typename Logit, typename Gradient, int Width, LossStep step, int kThreads>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || kThreads > 512 ? 1 : 2)
    token_loss_kernel(TokenLossArgs args, int cached) {
  extern __shared__ __align__(16) unsigned char shared[];
  const std::int64_t token = blockIdx.x;
  const Logit* logits = static_cast<const Logit*>(args.logits) + token * args.logits_stride;
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
    if (out != nullptr) write_zeros<kThreads, Width>(out, columns);
    return;
  }

  using E = Exponential<T>;
  const T scale = T(1) / number<T>(args.temperature, 0) / E::kUnit;
  const std::int64_t column = args.targets[token] - args.vocab_start;
  const bool owned = column >= 0 && column < valid;
  // Read before any gradient is written: that may be in the same place.
  const T target_logit = owned ? T(widen(logits[column])) : T(0);
  const Row<T, Logit, Width> row{logits, valid, scale,
                                 reinterpret_cast<Pack<Logit, Width>*>(shared), cached};
  RowSums<T> sums;
  if constexpr (step == LossStep::kGradient) {
    sums = stored_sums<T>(args, token);
  } else {
    sums = row.template sums<kThreads>();
    // Scaled as the maximum is, so that it is never above it.
    sums.target = is_outside(args, token) ? T(NAN) : E::in_logarithms(target_logit * scale);
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
  const T top = sums.maximum / E::kUnit, flat = -terms.flat, slope = -terms.slope * E::kUnit;
  const GradientOf<true, T> sloped{scale, top, flat, slope};
  if (slope == T(0))
    write_gradient<kThreads>(row, out, GradientOf<false, T>{scale, top, flat, slope});
  else
    write_gradient<kThreads>(row, out, sloped);
  for (int i = valid + threadIdx.x; i < columns; i += kThreads)
    out[i] = filled<1, Gradient>(T(0)).lane[0];
  if (!owned) return;
  __syncthreads();
  // Added before rounding to the gradient's own type: p near 1 would cancel badly.
  if (threadIdx.x == 0) {
    const T low = row.low(), x = target_logit < low ? low : target_logit;
    const T sum[1] = {sloped(x) + terms.at_target};
    out[column] = Pack<Gradient, 1>::narrow(sum).lane[0];
  }
}

template <typename T, typename Logit, typename Gradient, int Width, LossStep step, int kThreads>
void launch_block(const TokenLossArgs& args, std::int64_t cache_bytes, cudaStream_t stream) {
  const auto kernel = token_loss_kernel<T, Logit, Gradient, Width, step, kThreads>;
  if (cache_bytes > 0)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(cache_bytes));
  const int cached = static_cast<int>(cache_bytes / (Width * sizeof(Logit)));
  kernel<<<static_cast<unsigned>(args.tokens), kThreads, cache_bytes, stream>>>(args, cached);
}

template <typename T, typename Logit, typename Gradient, int Width, LossStep step>
void launch_width(const TokenLossArgs& args, cudaStream_t stream) {
  constexpr auto launch = launch_block<T, Logit, Gradient, Width, step, 512>;
  if (step != LossStep::kWhole || args.gradient == nullptr) return launch(args, 0, stream);
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const std::int64_t room = std::max(0, most - kReservedBytes) / 16 * 16;
  const std::int64_t wanted = args.columns / Width * Width * std::int64_t{sizeof(Logit)};
  const std::int64_t half = room / 2 / 16 * 16;
  // A long row has a multiprocessor to itself, others share one. What still does not fit is read
  // again, from the L2 cache where it can be.
  if constexpr (Width > 1 && sizeof(T) == 4 && step == LossStep::kWhole)
    if (wanted > half)
      return launch_block<T, Logit, Gradient, Width, step, 1024>(args, std::min(room, wanted),
                                                                 stream);
  launch(args, std::min(room, wanted), stream);
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
