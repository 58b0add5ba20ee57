// RMSNorm on the GPU. A team of threads reads a row once and keeps it in registers; a row that is
// too wide for them is read a second time, from the L2 cache. Backward goes through several rows
// and adds up the gradient of the weight on the way.
#include "cuda/dependent.h"
#include "cuda/rows.h"

namespace megarlx::cuda {
namespace {

constexpr std::int64_t kMostNormBlocks = 512;
constexpr std::int64_t kLeastRowsOfBlock = 8;
constexpr int kSumColumns = 32, kSumRows = kThreads / kSumColumns;

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads, 2)
    rms_norm_kernel(const __grid_constant__ RmsNormArgs args, int team) {
  let_dependents_begin();  // a product that reads its weights meanwhile
  using T = Precision<Stored>;
  const int width = static_cast<int>(args.width), packs = packs_of<Stored>(width);
  const int round = team * kPacks, place = threadIdx.x % team;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  const int mine = row < args.rows ? packs : 0;
  const Stored* x_row = static_cast<const Stored*>(args.x) + row * width;
  const Stored* residual_row = static_cast<const Stored*>(args.residual) + row * width;
  const Stored* addend_row = static_cast<const Stored*>(args.addend) + row * width;
  const Stored* weight = static_cast<const Stored*>(args.weight);
  Stored* sum_row = static_cast<Stored*>(args.sum) + row * width;
  Stored* y_row = static_cast<Stored*>(args.y) + row * width;
  WidePack<Stored> x[kPacks], added[kPacks], w[kPacks];
  const auto each = [&](int begin, const auto& run) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u)
      if (begin + u * team + place < mine)
        run(u, place_of<Stored>(begin + u * team + place, width));
  };
  // All that is read is asked for before anything is computed with it.
  const auto fetch = [&](int begin, bool last) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) x[u] = added[u] = {};
    each(begin, [&](int u, Place at) { x[u] = read<whole>(x_row + at.column, at.count); });
    if (args.residual != nullptr)
      each(begin,
           [&](int u, Place at) { added[u] = read<whole>(residual_row + at.column, at.count); });
    if (last)
      each(begin, [&](int u, Place at) { w[u] = read<whole>(weight + at.column, at.count); });
    if (args.addend == nullptr) return;
    WidePack<Stored> more[kPacks];
    each(begin, [&](int u, Place at) { more[u] = read<whole>(addend_row + at.column, at.count); });
    each(begin, [&](int u, Place at) {
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k)
        x[u].put(k, narrowed<Stored>(widened(x[u].at(k)) + widened(more[u].at(k))));
      // A row that is read a second time is written after that: x may be the sum.
      if (last) write<whole>(x[u], sum_row + at.column, at.count);
    });
  };
  T squares = T(0);
  for (int begin = 0; begin < packs; begin += round) {
    fetch(begin, packs <= round);
#pragma unroll
    for (int u = 0; u < kPacks; ++u)
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k) {
        const T value = widened(x[u].at(k));
        squares = fmadd(value, value, squares);
      }
  }
  const T inverse = inverse_root_mean(team_sum(squares, team, 0), static_cast<T>(width),
                                      static_cast<T>(args.eps));
  if (place == 0 && mine > 0 && args.inverse != nullptr)
    static_cast<T*>(args.inverse)[row] = inverse;
  for (int begin = 0; begin < mine; begin += round) {
    if (packs > round) fetch(begin, true);
    each(begin, [&](int u, Place at) {
      WidePack<Stored> y{};
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k)
        y.put(k, narrowed<Stored>(normalised(widened(x[u].at(k)), inverse, widened(w[u].at(k)),
                                             widened(added[u].at(k)))));
      write<whole>(y, y_row + at.column, at.count);
    });
  }
}

template <typename Stored, bool whole, bool kept>
__global__ void __launch_bounds__(kThreads, 2)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormArgs args, int team) {
  using T = Precision<Stored>;
  constexpr int kLanes = kWidth<Stored>;
  const int width = static_cast<int>(args.width), packs = packs_of<Stored>(width);
  const int round = team * kPacks, teams = kThreads / team, place = threadIdx.x % team;
  const BlockRows rows = rows_of_block(args.rows, blockIdx.x, gridDim.x);
  const Stored* weight = static_cast<const Stored*>(args.weight);
  using Sums = WeightSums<Stored, kept>;
  using Group = typename Sums::Group;
  __shared__ Group shared_sums[Sums::kSlots];
  Sums sums{shared_sums, static_cast<T*>(args.weight_sums)};
  const bool summing = args.weight_sums != nullptr;
  if (summing) {
    const T zeros[kLanes] = {};
    sums.memory += static_cast<std::int64_t>(blockIdx.x) * width;
    for (int u = 0; u < (kept ? kPacks : packs); ++u)
      sums.write_pack(u, place_of<Stored>(u * team + place, width), zeros);
  }
  const auto each = [&](int begin, int end, const auto& run) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u)
      if (begin + u * team + place < end) run(u, place_of<Stored>(begin + u * team + place, width));
  };
  // A thread whose row is kept has the same columns of every row.
  WidePack<Stored> x[kPacks], grad[kPacks], w[kPacks];
  const auto fetch_weight = [&](int begin) {
    each(begin, packs, [&](int u, Place at) { w[u] = read<whole>(weight + at.column, at.count); });
  };
  if constexpr (kept) fetch_weight(0);
  int turn = 0;
  for (std::int64_t first = rows.begin; first < rows.end; first += teams, turn ^= 1) {
    const std::int64_t row = first + threadIdx.x / team;
    const int mine = row < rows.end ? packs : 0;
    const T inverse = mine > 0 ? static_cast<const T*>(args.inverse)[row] : T(0);
    const Stored* x_row = static_cast<const Stored*>(args.x) + row * width;
    const Stored* grad_row = static_cast<const Stored*>(args.grad) + row * width;
    Stored* out = static_cast<Stored*>(args.grad_x) + row * width;
    const auto fetch = [&](int begin) {
      if constexpr (!kept) fetch_weight(begin);
#pragma unroll
      for (int u = 0; u < kPacks; ++u) x[u] = grad[u] = {};
      each(begin, mine, [&](int u, Place at) {
        x[u] = read<whole>(x_row + at.column, at.count);
        grad[u] = read<whole>(grad_row + at.column, at.count);
      });
    };
    T products = T(0);
    for (int begin = 0; begin < packs; begin += round) {
      fetch(begin);
      each(begin, mine, [&](int u, Place at) {
        T sum[kLanes] = {};
        if (summing) sums.read_pack(u, at, sum);
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          const T g = widened(grad[u].at(k)), value = widened(x[u].at(k));
          add_products(g, value, widened(w[u].at(k)), products);
          add_to_weight(g, value, inverse, sum[k]);
        }
        if (summing) sums.write_pack(u, at, sum);
      });
    }
    const T slope = norm_slope(team_sum(products, team, turn) / static_cast<T>(width), inverse);
    for (int begin = 0; begin < mine; begin += round) {
      if (!kept) fetch(begin);
      each(begin, mine, [&](int u, Place at) {
        WidePack<Stored> to{};
#pragma unroll
        for (int k = 0; k < kLanes; ++k)
          to.put(k, narrowed<Stored>(norm_gradient(widened(grad[u].at(k)), widened(x[u].at(k)),
                                                   inverse, widened(w[u].at(k)), slope)));
        write<whole>(to, out + at.column, at.count);
      });
    }
  }
  if constexpr (kept)
    if (summing)
      sums.add_teams(team,
                     [&](int u, int thread) { return place_of<Stored>(u * team + thread, width); });
}

// [blocks, width] to [width], in an order that never changes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_blocks_kernel(const T* sums, std::int64_t blocks, std::int64_t width, T* out) {
  __shared__ T partial[kSumRows][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + lane;
  T sum = T(0);
  if (column < width)
    for (std::int64_t block = part; block < blocks; block += kSumRows)
      sum += sums[block * width + column];
  partial[part][lane] = sum;
  __syncthreads();
  if (part != 0 || column >= width) return;
  for (int i = 1; i < kSumRows; ++i) sum += partial[i][lane];
  out[column] = sum;
}

template <typename Stored>
__host__ bool whole_rows(const RmsNormArgs& args) {
  return args.width % kWidth<Stored> == 0 && aligned(args.x) && aligned(args.weight) &&
         aligned(args.residual) && aligned(args.addend) && aligned(args.sum) && aligned(args.y) &&
         aligned(args.grad) && aligned(args.grad_x);
}

}  // namespace

std::int64_t norm_blocks(std::int64_t rows) {
  const std::int64_t wanted = (rows + kLeastRowsOfBlock - 1) / kLeastRowsOfBlock;
  return wanted < kMostNormBlocks ? wanted : kMostNormBlocks;
}

void rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const int team = team_for(packs_of<Stored>(args.width), kPacks), teams = kThreads / team;
    const unsigned blocks = static_cast<unsigned>((args.rows + teams - 1) / teams);
    if (whole_rows<Stored>(args))
      rms_norm_kernel<Stored, true><<<blocks, kThreads, 0, stream>>>(args, team);
    else
      rms_norm_kernel<Stored, false><<<blocks, kThreads, 0, stream>>>(args, team);
  });
}

void rms_norm_backward(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  with_stored(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const int team = team_for(packs_of<Stored>(args.width), kPacks);
    const unsigned blocks = static_cast<unsigned>(norm_blocks(args.rows));
    if (packs_of<Stored>(args.width) > team * kPacks)
      rms_norm_backward_kernel<Stored, false, false><<<blocks, kThreads, 0, stream>>>(args, team);
    else if (whole_rows<Stored>(args))
      rms_norm_backward_kernel<Stored, true, true><<<blocks, kThreads, 0, stream>>>(args, team);
    else
      rms_norm_backward_kernel<Stored, false, true><<<blocks, kThreads, 0, stream>>>(args, team);
  });
}

void sum_blocks(Dtype precision, const void* sums, std::int64_t blocks, std::int64_t width,
                void* out, cudaStream_t stream) {
  if (width == 0) return;
  const unsigned grid = static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns);
  if (precision == Dtype::kFloat64)
    sum_blocks_kernel<double><<<grid, kThreads, 0, stream>>>(
        static_cast<const double*>(sums), blocks, width, static_cast<double*>(out));
  else
    sum_blocks_kernel<float><<<grid, kThreads, 0, stream>>>(static_cast<const float*>(sums), blocks,
                                                            width, static_cast<float*>(out));
}

}  // namespace megarlx::cuda
