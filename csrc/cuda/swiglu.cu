// SwiGLU on the GPU: a team of threads takes a row, each thread two packs of it at a time.
#include "cuda/dependent.h"
#include "cuda/rows.h"
#include "math/decode.h"

namespace megarlx::cuda {
namespace {

constexpr int kTogether = 2;  // packs of each operand in flight

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const __grid_constant__ SwiGluArgs args, int team) {
  let_dependents_begin();  // a product that reads its weights meanwhile
  using T = Precision<Stored>;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  if (row >= args.rows) return;
  const int width = static_cast<int>(args.width), packs = packs_of<Stored>(width);
  const Stored* gate = static_cast<const Stored*>(args.gate_up) + row * args.gate_up_stride;
  const Stored* up = gate + width;
  Stored* out = static_cast<Stored*>(args.out) + row * width;
  for (int begin = threadIdx.x % team; begin < packs; begin += team * kTogether) {
    WidePack<Stored> gates[kTogether], ups[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u * team >= packs) continue;
      const Place at = place_of<Stored>(begin + u * team, width);
      gates[u] = read<whole>(gate + at.column, at.count);
      ups[u] = read<whole>(up + at.column, at.count);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u * team >= packs) continue;
      const Place at = place_of<Stored>(begin + u * team, width);
      WidePack<Stored> to{};
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k) {
        const T x = widened(gates[u].at(k));
        to.put(k, narrowed<Stored>(swiglu_of(x, widened(ups[u].at(k)), exp_of(-x), T(1))));
      }
      write<whole>(to, out + at.column, at.count);
    }
  }
}

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads, 2)
    swiglu_backward_kernel(const __grid_constant__ SwiGluArgs args, int team) {
  using T = Precision<Stored>;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  if (row >= args.rows) return;
  const int width = static_cast<int>(args.width), packs = packs_of<Stored>(width);
  const Stored* gate = static_cast<const Stored*>(args.gate_up) + row * args.gate_up_stride;
  const Stored* grad = static_cast<const Stored*>(args.grad) + row * width;
  Stored* out = static_cast<Stored*>(args.grad_gate_up) + row * 2 * width;
  for (int begin = threadIdx.x % team; begin < packs; begin += team * kTogether) {
    WidePack<Stored> gates[kTogether], ups[kTogether], grads[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u * team >= packs) continue;
      const Place at = place_of<Stored>(begin + u * team, width);
      gates[u] = read<whole>(gate + at.column, at.count);
      ups[u] = read<whole>(gate + width + at.column, at.count);
      grads[u] = read<whole>(grad + at.column, at.count);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u * team >= packs) continue;
      const Place at = place_of<Stored>(begin + u * team, width);
      WidePack<Stored> to_gate{}, to_up{};
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k) {
        const T x = widened(gates[u].at(k));
        T by_gate, by_up;
        swiglu_gradient(widened(grads[u].at(k)), x, widened(ups[u].at(k)), exp_of(-x), T(1),
                        by_gate, by_up);
        to_gate.put(k, narrowed<Stored>(by_gate));
        to_up.put(k, narrowed<Stored>(by_up));
      }
      write<whole>(to_gate, out + at.column, at.count);
      write<whole>(to_up, out + width + at.column, at.count);
    }
  }
}

template <typename Stored>
__host__ bool whole_rows(const SwiGluArgs& args) {
  return args.width % kWidth<Stored> == 0 && args.gate_up_stride % kWidth<Stored> == 0 &&
         aligned(args.gate_up) && aligned(args.out) && aligned(args.grad) &&
         aligned(args.grad_gate_up);
}

struct Launch {
  int team;
  unsigned blocks;
};

template <typename Stored>
__host__ Launch launch_of(const SwiGluArgs& args) {
  const int team = team_for(packs_of<Stored>(args.width), kTogether), teams = kThreads / team;
  return {team, static_cast<unsigned>((args.rows + teams - 1) / teams)};
}

}  // namespace

void swiglu(const SwiGluArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const Launch launch = launch_of<Stored>(args);
    if (whole_rows<Stored>(args))
      swiglu_kernel<Stored, true><<<launch.blocks, kThreads, 0, stream>>>(args, launch.team);
    else
      swiglu_kernel<Stored, false><<<launch.blocks, kThreads, 0, stream>>>(args, launch.team);
  });
}

void swiglu_backward(const SwiGluArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const Launch launch = launch_of<Stored>(args);
    if (whole_rows<Stored>(args))
      swiglu_backward_kernel<Stored, true>
          <<<launch.blocks, kThreads, 0, stream>>>(args, launch.team);
    else
      swiglu_backward_kernel<Stored, false>
          <<<launch.blocks, kThreads, 0, stream>>>(args, launch.team);
  });
}

}  // namespace megarlx::cuda
