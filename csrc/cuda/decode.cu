// What a step of cached generation needs besides its products, its attention and the kernels that
// it shares with training (rms_norm.cu, swiglu.cu, heads.cu).
#include "cuda/dependent.h"
#include "cuda/rows.h"

namespace megarlx::cuda {
namespace {

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads)
    merge_attention_kernel(const __grid_constant__ MergeArgs args) {
  let_dependents_begin();  // a product that reads its weights meanwhile
  using T = Precision<Stored>;
  const int width = static_cast<int>(args.width), packs = packs_of<Stored>(width);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t row = index / packs;
  if (row >= args.rows) return;
  const int pack = static_cast<int>(index - row * packs);
  const Place at = place_of<Stored>(pack, width);
  const std::int64_t first = row * width + at.column;
  const auto a = read<whole>(static_cast<const Stored*>(args.a) + first, at.count);
  const auto b = read<whole>(static_cast<const Stored*>(args.b) + first, at.count);
  const auto weights = MergeWeights<T>::of_row(args, row);
  if (pack == 0) static_cast<T*>(args.lse)[row] = weights.lse;
  WidePack<Stored> out{};
#pragma unroll
  for (int k = 0; k < kWidth<Stored>; ++k)
    out.put(k, narrowed<Stored>(weights.merged(widened(a.at(k)), widened(b.at(k)))));
  write<whole>(out, static_cast<Stored*>(args.out) + first, at.count);
}

// One block, so that the step is counted when every row has read it.
__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ AdvanceArgs args) {
  for (std::int64_t row = threadIdx.x; row < args.rows; row += kThreads) advance_row(args, row);
  __syncthreads();
  if (threadIdx.x == 0) *args.step += 1;
}

}  // namespace

void merge_attention(const MergeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const std::int64_t packs = args.rows * packs_of<Stored>(args.width);
    const unsigned blocks = static_cast<unsigned>((packs + kThreads - 1) / kThreads);
    if (args.width % kWidth<Stored> == 0 && aligned(args.a) && aligned(args.b) && aligned(args.out))
      merge_attention_kernel<Stored, true><<<blocks, kThreads, 0, stream>>>(args);
    else
      merge_attention_kernel<Stored, false><<<blocks, kThreads, 0, stream>>>(args);
  });
}

void decode_advance(const AdvanceArgs& args, cudaStream_t stream) {
  advance_kernel<<<1, kThreads, 0, stream>>>(args);
}

}  // namespace megarlx::cuda
