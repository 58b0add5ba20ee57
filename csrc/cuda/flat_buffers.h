// Walking flat buffers on the GPU: blocks of a grid-stride loop, and elements by the access.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "math/bfloat16.h"

namespace megarlx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAccess = 16;  // bytes of the widest load or store
// Elements of a thread at a time, where every buffer starts on the edge of an access; else 1.
template <typename T>
constexpr int kWidth = kAccess / sizeof(T);

__host__ bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kAccess == 0;
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

// bfloat16 is held as its bits.
template <typename Stored, int W>
struct alignas(sizeof(Stored) * W) Pack {
  Stored lane[W];
  __device__ __forceinline__ Stored at(int k) const { return lane[k]; }
  __device__ __forceinline__ void put(int k, Stored x) { lane[k] = x; }
};

// Two in a register, as they were read: a compiler that takes them apart where they are read waits
// for each read before it asks for the next.
template <int W>
  requires(W % 2 == 0)
struct alignas(2 * W) Pack<std::uint16_t, W> {
  std::uint32_t pair[W / 2];
  __device__ __forceinline__ std::uint16_t at(int k) const {
    return static_cast<std::uint16_t>(k % 2 == 0 ? pair[k / 2] : pair[k / 2] >> 16);
  }
  __device__ __forceinline__ void put(int k, std::uint16_t x) {
    const std::uint32_t wide = x, kept = pair[k / 2];
    pair[k / 2] = k % 2 == 0 ? (kept & 0xFFFF0000u) | wide : (kept & 0x0000FFFFu) | wide << 16;
  }
};

// Elements [e, e + W) of a buffer of Stored; with W > 1 its address must be a multiple of kAccess.
template <typename Stored, typename T, int W>
__device__ __forceinline__ void load(const void* pointer, std::int64_t e, T (&x)[W]) {
  const auto pack =
      *reinterpret_cast<const Pack<Stored, W>*>(static_cast<const Stored*>(pointer) + e);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    if constexpr (std::is_same_v<Stored, std::uint16_t>)
      x[k] = static_cast<T>(from_bfloat16(pack.at(k)));
    else
      x[k] = pack.at(k);
  }
}

template <typename Stored, typename T, int W>
__device__ __forceinline__ void store(void* pointer, std::int64_t e, const T (&x)[W]) {
  Pack<Stored, W> pack{};
#pragma unroll
  for (int k = 0; k < W; ++k) {
    if constexpr (std::is_same_v<Stored, std::uint16_t>)
      pack.put(k, to_bfloat16(static_cast<float>(x[k])));
    else
      pack.put(k, x[k]);
  }
  *reinterpret_cast<Pack<Stored, W>*>(static_cast<Stored*>(pointer) + e) = pack;
}

}  // namespace
}  // namespace megarlx::cuda
