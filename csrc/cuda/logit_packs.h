// What the token loss does with several logits at once. Sixteen bytes are read at a time; two bf16
// stay in one register, where one instruction compares both.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "math/token_loss.h"

namespace megarlx::cuda {
namespace {

template <typename T>
struct Exponential;

// Exponents are in units of log 2 for float, where the hardware has 2^x, and of 1 for double.
template <>
struct Exponential<float> {
  static constexpr float kUnit = 0.693147180559945309f;
  // Rounded by itself: fused into a difference, equal numbers would no longer be equal.
  __device__ __forceinline__ static float in_logarithms(float x) { return __fmul_rn(x, kUnit); }
  __device__ __forceinline__ static float of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Keeps a NaN, unlike fmaxf: a NaN logit must not vanish.
  __device__ __forceinline__ static float at_least(float x, float low) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
    return y;
  }
  __device__ __forceinline__ static float larger(float a, float b) { return fmaxf(a, b); }
};

template <>
struct Exponential<double> {
  static constexpr double kUnit = 1;
  __device__ __forceinline__ static double in_logarithms(double x) { return x; }
  __device__ __forceinline__ static double of(double x) { return exp(x); }
  __device__ __forceinline__ static double at_least(double x, double low) {
    return x < low ? low : x;
  }
  __device__ __forceinline__ static double larger(double a, double b) { return a > b ? a : b; }
};

// The number that a logit is computed with.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// `Width` neighbours. T is what they are computed in: float, or double for double.
template <typename Logit, int Width>
struct alignas(sizeof(Logit) * Width) Pack {
  Logit lane[Width];

  template <typename T>
  __device__ __forceinline__ void widened(T (&x)[Width]) const {
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] = widen(lane[k]);
  }
  template <typename T>
  __device__ __forceinline__ static Pack narrow(const T (&x)[Width]) {
    Pack out;
#pragma unroll
    for (int k = 0; k < Width; ++k) {
      if constexpr (sizeof(Logit) == 2)
        out.lane[k] = __float2bfloat16_rn(x[k]);
      else
        out.lane[k] = x[k];
    }
    return out;
  }
  template <typename T>
  __device__ __forceinline__ Pack raised(const Pack& low) const {
    T x[Width], least[Width];
    widened(x);
    low.widened(least);
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] = Exponential<T>::at_least(x[k], least[k]);
    return narrow(x);
  }
  template <typename T>
  __device__ __forceinline__ Pack larger(const Pack& other) const {
    T x[Width], y[Width];
    widened(x);
    other.widened(y);
#pragma unroll
    for (int k = 0; k < Width; ++k) x[k] = Exponential<T>::larger(x[k], y[k]);
    return narrow(x);
  }
};

// Two bf16 a word, the lower one first.
template <int Width>
  requires(Width > 1)
struct alignas(2 * Width) Pack<__nv_bfloat16, Width> {
  static constexpr int kWords = Width / 2;
  unsigned word[kWords];

  template <typename T>
  __device__ __forceinline__ void widened(T (&x)[Width]) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      x[2 * k] = __uint_as_float(word[k] << 16);
      x[2 * k + 1] = __uint_as_float(word[k] & 0xffff0000u);
    }
  }
  template <typename T>
  __device__ __forceinline__ static Pack narrow(const T (&x)[Width]) {
    Pack out;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out.word[k]) : "f"(x[2 * k + 1]), "f"(x[2 * k]));
    return out;
  }
  template <typename T>
  __device__ __forceinline__ Pack raised(const Pack& low) const {
    Pack out;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out.word[k]) : "r"(word[k]), "r"(low.word[k]));
    return out;
  }
  template <typename T>
  __device__ __forceinline__ Pack larger(const Pack& other) const {
    Pack out;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      asm("max.bf16x2 %0, %1, %2;" : "=r"(out.word[k]) : "r"(word[k]), "r"(other.word[k]));
    return out;
  }
};

template <int Width, typename Logit, typename T>
__device__ __forceinline__ Pack<Logit, Width> filled(T x) {
  T same[Width];
#pragma unroll
  for (int k = 0; k < Width; ++k) same[k] = x;
  return Pack<Logit, Width>::narrow(same);
}

template <typename T, typename Logit, int Width>
__device__ __forceinline__ T largest(const Pack<Logit, Width>& pack) {
  T x[Width];
  pack.widened(x);
#pragma unroll
  for (int k = 1; k < Width; ++k) x[0] = Exponential<T>::larger(x[0], x[k]);
  return x[0];
}

}  // namespace
}  // namespace megarlx::cuda
