// Products of few rows: all that takes time is reading W, so it is read once, by 16 bytes, and its
// first packs are under way before x is there.
//
// A block has a few outputs (rows of W), and its warps share out the columns. What each sums, and
// in which order, follows from the columns alone, so a row's bits depend neither on the other rows
// nor on how many there are.
#include "cuda/dependent.h"
#include "cuda/rows.h"
#include "math/elementwise.h"
#include "math/narrow_product.h"

namespace megarlx::cuda {
namespace {

// Elements [column, column + 16 bytes) of a row; zeros behind its end, or where there is no row.
template <typename T, bool whole>
__device__ __forceinline__ uint4 packed_at(const T* row, int column, int columns) {
  if (row == nullptr || column >= columns) return make_uint4(0, 0, 0, 0);
  if constexpr (whole) return *reinterpret_cast<const uint4*>(row + column);
  const auto pack = read<false>(row + column, columns - column);
  uint4 bits;
  memcpy(&bits, &pack, sizeof bits);
  return bits;
}

// The same of W, which nobody reads again.
template <typename T, bool whole>
__device__ __forceinline__ uint4 streamed_at(const T* row, int column, int columns) {
  if constexpr (whole) {
    if (row == nullptr || column >= columns) return make_uint4(0, 0, 0, 0);
    return __ldcs(reinterpret_cast<const uint4*>(row + column));
  } else {
    return packed_at<T, false>(row, column, columns);
  }
}

// ---- bf16 and e4m3, by mma. Its rows are those of x, its columns are outputs, and its inner index
// may name the columns in any order that x and W share: a thread then has 16 adjacent bytes of
// each.

constexpr int kMmaOutputs = 8;
constexpr int kAhead = 8;  // packs of W that a thread has under way
constexpr int kHalf = 8;   // rows of x in one half of an mma

__device__ __forceinline__ void multiply_add(float (&sum)[4], unsigned low0, unsigned high0,
                                             unsigned low1, unsigned high1, unsigned w0,
                                             unsigned w1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(w0), "r"(w1));
}

// Two e4m3 in the high bytes of two halves, as two bf16. A half's sign, exponent and fraction go to
// their places in bf16; the exponents' biases, 7 and 127, then differ by 120, and so subnormals are
// right too. NaN becomes 480: its output's scale is what says that a weight was none.
__device__ __forceinline__ unsigned widened_pair(unsigned halves) {
  const unsigned bits = (halves & 0x80008000u) | ((halves >> 4) & 0x07F007F0u);
  constexpr unsigned kBias = 0x7B807B80u, kMinusZero = 0x80008000u;  // 2^120, -0, both twice
  unsigned pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(bits), "r"(kBias), "r"(kMinusZero));
  return pair;
}

__device__ __forceinline__ void to_pairs(uint4 pack, unsigned (&pairs)[4]) {
  memcpy(pairs, &pack, sizeof pack);
}
__device__ __forceinline__ void to_pairs(uint4 pack, unsigned (&pairs)[8]) {
  unsigned words[4];
  memcpy(words, &pack, sizeof pack);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = widened_pair(__byte_perm(words[i], 0, 0x1404));
    pairs[2 * i + 1] = widened_pair(__byte_perm(words[i], 0, 0x3424));
  }
}

// A thread's part of a row of x, beside the pack of W of the same columns.
template <bool whole, int kPairs>
__device__ __forceinline__ void read_pairs(const std::uint16_t* row, int column, int columns,
                                           unsigned (&pairs)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; i += 4) {
    const uint4 pack = packed_at<std::uint16_t, whole>(row, column + 2 * i, columns);
    memcpy(pairs + i, &pack, sizeof pack);
  }
}

__device__ __forceinline__ float finished(const NarrowProductArgs& args, float sum,
                                          std::int64_t output) {
  if (args.scales != nullptr) sum = __fmul_rn(sum, args.scales[output]);
  if (args.bias == nullptr) return sum;
  return __fadd_rn(sum, from_bfloat16(static_cast<const std::uint16_t*>(args.bias)[output]));
}

template <typename Weight, bool whole, bool tall>
__global__ void __launch_bounds__(kThreads, tall ? 2 : 3)
    narrow_mma_kernel(const __grid_constant__ NarrowProductArgs args) {
  constexpr int kLanes = kWidth<Weight>, kPairs = kLanes / 2, kSpan = 4 * kLanes;
  constexpr int kRows = tall ? 2 * kHalf : kHalf;
  __shared__ float partial[kWarps][kRows][kMmaOutputs];
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  const int columns = static_cast<int>(args.columns), rows = static_cast<int>(args.rows);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kMmaOutputs;
  const auto row_of = [&](int row) {
    return row < rows ? static_cast<const std::uint16_t*>(args.x) + row * args.columns : nullptr;
  };
  const Weight* weights = first + group < args.outputs ? static_cast<const Weight*>(args.weight) +
                                                             (first + group) * args.columns
                                                       : nullptr;
  // Two packs of a warp are neighbours, so that it reads whole lines.
  const auto span_of = [&](int pack) {
    return ((pack / 2 * kWarps + warp) * 2 + pack % 2) * kSpan;
  };
  const auto fetch = [&](int pack) {
    return streamed_at<Weight, whole>(weights, span_of(pack) + lane * kLanes, columns);
  };
  uint4 held[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) held[u] = fetch(u);
  wait_for_predecessor();
  float sum[4] = {};
  for (int begin = 0; span_of(begin) < columns; begin += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int column = span_of(begin + u) + lane * kLanes;
      unsigned w[kPairs], low[kPairs], high[kPairs] = {};
      read_pairs<whole>(row_of(group), column, columns, low);
      if constexpr (tall) read_pairs<whole>(row_of(group + kHalf), column, columns, high);
      to_pairs(held[u], w);
      held[u] = fetch(begin + u + kAhead);
#pragma unroll
      for (int i = 0; i < kPairs; i += 2)
        multiply_add(sum, low[i], high[i], low[i + 1], high[i + 1], w[i], w[i + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < (tall ? 4 : 2); ++i)
    partial[warp][group + i / 2 * kHalf][2 * lane + i % 2] = sum[i];
  __syncthreads();
  const int row = threadIdx.x / kMmaOutputs, column = threadIdx.x % kMmaOutputs;
  if (row >= rows || row >= kRows || first + column >= args.outputs) return;
  float total = partial[0][row][column];
  for (int i = 1; i < kWarps; ++i) total += partial[i][row][column];
  static_cast<std::uint16_t*>(args.out)[row * args.outputs + first + column] =
      to_bfloat16(finished(args, total, first + column));
}

// ---- fp32 and fp64, by fused multiply-adds.

constexpr int kFmaOutputs = 4, kFmaRows = 8;
constexpr int kFmaAhead = 1;  // packs of each output
static_assert(kFmaOutputs * kFmaRows == 32, "a lane ends up with one sum");

// From each lane's 32 sums to one whole sum a lane, sum[0], that of its number.
template <int width, typename T>
__device__ __forceinline__ void transpose_sums(T (&sum)[32], int lane) {
  const bool upper = (lane & width) != 0;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const T given = upper ? sum[i] : sum[i + width], kept = upper ? sum[i + width] : sum[i];
    sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, width);
  }
  if constexpr (width > 1) transpose_sums<width / 2>(sum, lane);
}

template <typename T, bool whole>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    narrow_fma_kernel(const __grid_constant__ NarrowProductArgs args) {
  constexpr int kLanes = kWidth<T>;
  __shared__ T partial[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = static_cast<int>(args.columns), rows = static_cast<int>(args.rows);
  const int first_row = blockIdx.y * kFmaRows;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kFmaOutputs;
  const T* weight = static_cast<const T*>(args.weight);
  const auto column_of = [&](int pack) { return ((pack * kWarps + warp) * 32 + lane) * kLanes; };
  const auto fetch = [&](int pack, int o) {
    const T* row = first + o < args.outputs ? weight + (first + o) * args.columns : nullptr;
    const uint4 bits = streamed_at<T, whole>(row, column_of(pack), columns);
    WidePack<T> numbers;
    memcpy(&numbers, &bits, sizeof bits);
    return numbers;
  };
  WidePack<T> held[kFmaAhead][kFmaOutputs];
#pragma unroll
  for (int u = 0; u < kFmaAhead; ++u)
#pragma unroll
    for (int o = 0; o < kFmaOutputs; ++o) held[u][o] = fetch(u, o);
  wait_for_predecessor();
  T sum[32] = {};
  for (int begin = 0; column_of(begin) < columns; begin += kFmaAhead) {
#pragma unroll
    for (int u = 0; u < kFmaAhead; ++u) {
      WidePack<T> w[kFmaOutputs];
#pragma unroll
      for (int o = 0; o < kFmaOutputs; ++o) {
        w[o] = held[u][o];
        held[u][o] = fetch(begin + u + kFmaAhead, o);
      }
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r) {
        if (first_row + r >= rows) continue;
        const T* row = static_cast<const T*>(args.x) + (first_row + r) * args.columns;
        const uint4 bits = packed_at<T, whole>(row, column_of(begin + u), columns);
        WidePack<T> x;
        memcpy(&x, &bits, sizeof bits);
#pragma unroll
        for (int o = 0; o < kFmaOutputs; ++o)
#pragma unroll
          for (int k = 0; k < kLanes; ++k)
            sum[o * kFmaRows + r] = fmadd(x.lane[k], w[o].lane[k], sum[o * kFmaRows + r]);
      }
    }
  }
  transpose_sums<16>(sum, lane);
  partial[warp][lane] = sum[0];
  __syncthreads();
  const int row = first_row + lane % kFmaRows;
  const std::int64_t output = first + lane / kFmaRows;
  if (warp > 0 || row >= rows || output >= args.outputs) return;
  T total = partial[0][lane];
  for (int i = 1; i < kWarps; ++i) total += partial[i][lane];
  if (args.bias != nullptr) total += static_cast<const T*>(args.bias)[output];
  static_cast<T*>(args.out)[row * args.outputs + output] = total;
}

__host__ unsigned shared_by(std::int64_t count, std::int64_t of_each) {
  return static_cast<unsigned>((count + of_each - 1) / of_each);
}

template <typename Weight, bool whole>
__host__ void launch_mma(const NarrowProductArgs& args, cudaStream_t stream) {
  const unsigned blocks = shared_by(args.outputs, kMmaOutputs);
  if (args.rows > kHalf) {
    const auto kernel = narrow_mma_kernel<Weight, whole, true>;
    launch_dependent(args.dependent, kernel, blocks, kThreads, stream, args);
  } else {
    const auto kernel = narrow_mma_kernel<Weight, whole, false>;
    launch_dependent(args.dependent, kernel, blocks, kThreads, stream, args);
  }
}

template <typename T, bool whole>
__host__ void launch_fma(const NarrowProductArgs& args, cudaStream_t stream) {
  const dim3 blocks(shared_by(args.outputs, kFmaOutputs), shared_by(args.rows, kFmaRows));
  const auto kernel = narrow_fma_kernel<T, whole>;
  launch_dependent(args.dependent, kernel, blocks, kThreads, stream, args);
}

template <typename Weight>
__host__ bool whole_packs(const NarrowProductArgs& args) {
  return args.columns % kWidth<Weight> == 0 && aligned(args.x) && aligned(args.weight);
}

template <typename Weight, bool whole>
__host__ void launch(const NarrowProductArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(Weight) <= 2)
    launch_mma<Weight, whole>(args, stream);
  else
    launch_fma<Weight, whole>(args, stream);
}

}  // namespace

void narrow_product(const NarrowProductArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.outputs == 0) return;
  const auto with_weight = [&](auto stored) {
    using Weight = decltype(stored);
    if (whole_packs<Weight>(args))
      launch<Weight, true>(args, stream);
    else
      launch<Weight, false>(args, stream);
  };
  if (args.scales != nullptr)
    with_weight(std::uint8_t());
  else
    with_stored(args.dtype, with_weight);
}

}  // namespace megarlx::cuda
