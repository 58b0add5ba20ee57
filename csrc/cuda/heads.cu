// QK-norm and rotation on the GPU, from the fused projection to q and k and back. A team of threads
// takes a row: heads of one token that are normalised together, all of a kind or one. A thread
// holds pairs of packs, elements i … and i + head_dim / 2 … of a head, so that it can turn them.
#include "cuda/rows.h"

namespace megarlx::cuda {
namespace {

constexpr int kPairs = kPacks / 2;  // of packs, in a thread's registers

// The rows that the query heads, or the key heads, of a token make.
template <typename Stored>
struct Rows {
  HeadsKind kind;
  int rows_of_token, width;             // of a row
  int dim, half, pairs_of_head, pairs;  // pairs of a row

  __host__ __device__ Rows(const HeadsArgs& args, HeadsKind of) : kind(of) {
    const bool together = args.norm == HeadNorm::kFull;
    const int heads = together ? static_cast<int>(kind.heads) : 1;
    rows_of_token = together ? 1 : static_cast<int>(kind.heads);
    dim = static_cast<int>(args.head_dim);
    half = dim / 2;
    width = heads * dim;
    pairs_of_head = packs_of<Stored>(half);
    pairs = heads * pairs_of_head;
  }

  __host__ int team() const { return team_for(pairs, kPairs); }

  // Of the first pack of a pair; the second is half a head behind it.
  __device__ __forceinline__ Place place(int pair) const {
    if (pair >= pairs) return {0, 0};
    const int head = pair / pairs_of_head;
    const Place in_half = place_of<Stored>(pair - head * pairs_of_head, half);
    return {head * dim + in_half.column, in_half.count};
  }
  // Of a pair's angles.
  __device__ __forceinline__ int angle(Place at) const { return at.column % dim; }
};

// A token's row of a kind: where it stands in the projection, and in q or k and its inverses.
struct Row {
  std::int64_t token, in_projection, in_heads, in_inverses;
};

template <typename Stored>
__device__ __forceinline__ Row row_of(const HeadsArgs& args, const Rows<Stored>& rows,
                                      std::int64_t index, std::int64_t token_stride) {
  const std::uint32_t number = static_cast<std::uint32_t>(index);
  const std::uint32_t token = number / rows.rows_of_token;
  const std::uint32_t part = number - token * rows.rows_of_token;
  return {token, token * token_stride + rows.kind.offset + part * rows.width, index * rows.width,
          token * norms_of_token(args) + rows.kind.first_norm + part};
}

// Two packs, and what stands beside them.
template <typename Stored>
struct Pair {
  WidePack<Stored> first, second;

  template <bool whole>
  __device__ __forceinline__ void read_from(const Stored* from, int half, int count) {
    first = read<whole>(from, count);
    second = read<whole>(from + half, count);
  }
  template <bool whole>
  __device__ __forceinline__ void write_to(Stored* to, int half, int count) const {
    write<whole>(first, to, count);
    write<whole>(second, to + half, count);
  }
};

// 1 / rms of a row: kept for backward, and the same in all threads of the team.
template <typename Stored>
__device__ __forceinline__ Precision<Stored> inverse_of_row(const HeadsArgs& args,
                                                            const Rows<Stored>& rows, Row row,
                                                            Precision<Stored> squares) {
  using T = Precision<Stored>;
  const T count = static_cast<T>(rows.width * args.ranks);
  if (args.sums != nullptr)
    squares = static_cast<const T*>(args.sums)[row.token * 2 + rows.kind.first_norm];
  return inverse_root_mean(squares, count, static_cast<T>(args.eps));
}

template <typename Stored, bool whole>
__global__ void __launch_bounds__(kThreads)
    heads_kernel(const __grid_constant__ HeadsArgs args, int q_team, int k_team,
                 unsigned q_blocks) {
  using T = Precision<Stored>;
  using P = Pair<Stored>;
  const bool of_queries = blockIdx.x < q_blocks;
  const Rows<Stored> rows(args, of_queries ? queries(args) : keys(args));
  const int team = of_queries ? q_team : k_team, place = threadIdx.x % team;
  const int round = team * kPairs, half = rows.half;
  const std::int64_t block = of_queries ? blockIdx.x : blockIdx.x - q_blocks;
  const std::int64_t index = block * (kThreads / team) + threadIdx.x / team;
  const int mine = index < args.tokens * rows.rows_of_token ? rows.pairs : 0;
  const Row row = row_of(args, rows, index, args.qkv_stride);
  const Stored* x = static_cast<const Stored*>(args.qkv) + row.in_projection;
  const bool normed = args.norm != HeadNorm::kNone;
  const bool cached = args.positions != nullptr && mine > 0;
  const std::int64_t turned_by = cached ? args.positions[row.token] : row.token;
  const Stored* weight = static_cast<const Stored*>(rows.kind.weight);
  const Stored* cos = static_cast<const Stored*>(args.cos) + turned_by * half;
  const Stored* sin = static_cast<const Stored*>(args.sin) + turned_by * half;
  P pair[kPairs], w[kPairs], turned[kPairs];  // of the last: cosines and sines
  const auto each = [&](int begin, int end, const auto& run) {
#pragma unroll
    for (int u = 0; u < kPairs; ++u)
      if (begin + u * team + place < end) run(u, rows.place(begin + u * team + place));
  };
  // All that is read is asked for before anything is computed with it.
  const auto fetch = [&](int begin, bool last) {
#pragma unroll
    for (int u = 0; u < kPairs; ++u) pair[u] = {};
    each(begin, mine, [&](int u, Place at) {
      pair[u].template read_from<whole>(x + at.column, half, at.count);
      if (!last) return;
      const int angle = rows.angle(at);
      turned[u] = {read<whole>(cos + angle, at.count), read<whole>(sin + angle, at.count)};
      if (normed) w[u].template read_from<whole>(weight + at.column, half, at.count);
    });
  };
  const bool to_cache = cached && !of_queries;
  const std::int64_t values = args.kv_heads * args.head_dim;
  T inverse = T(1), squares = T(0);
  fetch(0, rows.pairs <= round && args.own_sums == nullptr);
  const std::int64_t cache_place = to_cache ? place_in_cache(args, row.token) : 0;
  if (normed && args.sums == nullptr) {
    for (int begin = 0; begin < rows.pairs; begin += round) {
      if (begin > 0) fetch(begin, false);
#pragma unroll
      for (int u = 0; u < kPairs; ++u)
#pragma unroll
        for (int k = 0; k < kWidth<Stored>; ++k) {
          const T a = widened(pair[u].first.at(k)), b = widened(pair[u].second.at(k));
          squares = fmadd(a, a, squares);
          squares = fmadd(b, b, squares);
        }
    }
    squares = team_sum(squares, team, 0);
  }
  if (args.own_sums != nullptr) {
    if (place == 0 && mine > 0)
      static_cast<T*>(args.own_sums)[row.token * 2 + rows.kind.first_norm] = squares;
    return;
  }
  if (normed && mine > 0) {
    inverse = inverse_of_row(args, rows, row, squares);
    if (place == 0 && args.inverse != nullptr)
      static_cast<T*>(args.inverse)[row.in_inverses] = inverse;
  }
  Stored* out = static_cast<Stored*>(of_queries ? args.q : args.k) + row.in_heads;
  Stored* value_out = nullptr;
  if (to_cache) {
    const std::int64_t to = (cache_place - row.token) * values + row.in_heads;
    out = static_cast<Stored*>(args.keys) + to;
    value_out = static_cast<Stored*>(args.values) + to;
  }
  const int writing = cache_place < 0 ? 0 : mine;
  for (int begin = 0; begin < writing; begin += round) {
    if (rows.pairs > round) fetch(begin, true);
    each(begin, writing, [&](int u, Place at) {
      P value;  // stands behind the keys as the keys stand among themselves
      if (to_cache) value.template read_from<whole>(x + values + at.column, half, at.count);
#pragma unroll
      for (int k = 0; k < kWidth<Stored>; ++k) {
        T a = widened(pair[u].first.at(k)), b = widened(pair[u].second.at(k));
        if (normed) {
          a = normalised(a, inverse, widened(w[u].first.at(k)));
          b = normalised(b, inverse, widened(w[u].second.at(k)));
        }
        turn(a, b, widened(turned[u].first.at(k)), widened(turned[u].second.at(k)), a, b);
        pair[u].first.put(k, narrowed<Stored>(a));
        pair[u].second.put(k, narrowed<Stored>(b));
      }
      pair[u].template write_to<whole>(out + at.column, half, at.count);
      if (to_cache) value.template write_to<whole>(value_out + at.column, half, at.count);
    });
  }
}

// Of a block: tokens of one kind. Blocks of queries and keys of the same tokens are neighbours.
template <typename Stored, bool whole, bool kept>
__global__ void __launch_bounds__(kThreads, whole&& kept ? 2 : 1)
    heads_backward_kernel(const __grid_constant__ HeadsArgs args, int q_team, int k_team) {
  using T = Precision<Stored>;
  using P = Pair<Stored>;
  constexpr int kLanes = kWidth<Stored>;
  const bool of_queries = blockIdx.x % 2 == 0, normed = args.norm != HeadNorm::kNone;
  const Rows<Stored> rows(args, of_queries ? queries(args) : keys(args));
  const int team = of_queries ? q_team : k_team, place = threadIdx.x % team;
  const int round = team * kPairs, half = rows.half;
  const std::int64_t blocks = gridDim.x / 2, block = blockIdx.x / 2;
  const BlockRows tokens = rows_of_block(args.tokens, block, blocks);
  const std::int64_t end = tokens.end * rows.rows_of_token;
  const std::int64_t values = args.kv_heads * args.head_dim;
  const std::int64_t whole_row = args.heads * args.head_dim + 2 * values;
  const Stored* weight = static_cast<const Stored*>(rows.kind.weight);
  using Sums = WeightSums<Stored, kept>;
  using Group = typename Sums::Group;
  __shared__ Group shared_sums[Sums::kSlots];
  Sums sums{shared_sums, static_cast<T*>(args.weight_sums)};
  const bool summing = args.weight_sums != nullptr;
  const auto place_of_pack = [&](int u, int thread) {
    const Place at = rows.place(u / 2 * team + thread);
    return Place{at.column + u % 2 * half, at.count};
  };
  if (summing) {
    const T zeros[kLanes] = {};
    const std::int64_t q_width = norm_width(args, args.heads);
    sums.memory += block * (q_width + norm_width(args, args.kv_heads)) + (of_queries ? 0 : q_width);
    for (int u = 0; u < (kept ? kPacks : 2 * rows.pairs); ++u)
      sums.write_pack(u, place_of_pack(u, place), zeros);
  }
  const auto each = [&](int begin, int limit, const auto& run) {
#pragma unroll
    for (int u = 0; u < kPairs; ++u)
      if (begin + u * team + place < limit) run(u, rows.place(begin + u * team + place));
  };
  // A thread whose row is kept has the same columns of every row.
  P own_x[kPairs], upstream[kPairs], w[kPairs];
  const auto fetch_weight = [&](int begin) {
    if (normed)
      each(begin, rows.pairs, [&](int u, Place at) {
        w[u].template read_from<whole>(weight + at.column, half, at.count);
      });
  };
  if constexpr (kept) fetch_weight(0);
  int turn_of_sum = 0;
  for (std::int64_t begun = tokens.begin * rows.rows_of_token; begun < end;
       begun += kThreads / team, turn_of_sum ^= 1) {
    const std::int64_t index = begun + threadIdx.x / team;
    const int mine = index < end ? rows.pairs : 0;
    const Row row = row_of(args, rows, index, args.qkv_stride);
    const Row out_row = row_of(args, rows, index, whole_row);
    const Stored* x = static_cast<const Stored*>(args.qkv) + row.in_projection;
    const Stored* grad =
        static_cast<const Stored*>(of_queries ? args.grad_q : args.grad_k) + row.in_heads;
    const Stored* cos = static_cast<const Stored*>(args.cos) + row.token * half;
    const Stored* sin = static_cast<const Stored*>(args.sin) + row.token * half;
    Stored* out = static_cast<Stored*>(args.grad_qkv) + out_row.in_projection;
    const auto fetch = [&](int begin) {
      if constexpr (!kept) fetch_weight(begin);
#pragma unroll
      for (int u = 0; u < kPairs; ++u) own_x[u] = upstream[u] = {};
      each(begin, mine, [&](int u, Place at) {
        upstream[u].template read_from<whole>(grad + at.column, half, at.count);
        if (normed) own_x[u].template read_from<whole>(x + at.column, half, at.count);
      });
    };
    const auto angles_of = [&](Place at) {
      const int angle = rows.angle(at);
      return P{read<whole>(cos + angle, at.count), read<whole>(sin + angle, at.count)};
    };
    const auto turned_back = [&](int u, const P& angles, int k, T& a, T& b) {
      turn_back(widened(upstream[u].first.at(k)), widened(upstream[u].second.at(k)),
                widened(angles.first.at(k)), widened(angles.second.at(k)), a, b);
    };
    T inverse = T(0), slope = T(0);
    fetch(0);
    if (normed) {
      if (mine > 0 && args.inverse != nullptr)
        inverse = static_cast<const T*>(args.inverse)[row.in_inverses];
      T products = T(0);
      for (int begin = 0; begin < rows.pairs; begin += round) {
        if (begin > 0) fetch(begin);
        each(begin, mine, [&](int u, Place at) {
          const Place second{at.column + half, at.count};
          const P angles = angles_of(at);
          T sum_a[kLanes] = {}, sum_b[kLanes] = {};
          if (summing) {
            sums.read_pack(2 * u, at, sum_a);
            sums.read_pack(2 * u + 1, second, sum_b);
          }
#pragma unroll
          for (int k = 0; k < kLanes; ++k) {
            T a, b;
            turned_back(u, angles, k, a, b);
            const T x_a = widened(own_x[u].first.at(k)), x_b = widened(own_x[u].second.at(k));
            add_products(a, x_a, widened(w[u].first.at(k)), products);
            add_products(b, x_b, widened(w[u].second.at(k)), products);
            add_to_weight(a, x_a, inverse, sum_a[k]);
            add_to_weight(b, x_b, inverse, sum_b[k]);
          }
          if (summing) {
            sums.write_pack(2 * u, at, sum_a);
            sums.write_pack(2 * u + 1, second, sum_b);
          }
        });
      }
      products = team_sum(products, team, turn_of_sum);
      const std::int64_t number = row.token * 2 + rows.kind.first_norm;
      if (args.own_sums != nullptr) {
        if (place == 0 && mine > 0) static_cast<T*>(args.own_sums)[number] = products;
        continue;
      }
      if (args.sums != nullptr && mine > 0) products = static_cast<const T*>(args.sums)[number];
      slope = norm_slope(products / static_cast<T>(rows.width * args.ranks), inverse);
    }
    for (int begin = 0; begin < mine; begin += round) {
      if (!kept) fetch(begin);
      each(begin, mine, [&](int u, Place at) {
        const P angles = angles_of(at);
        P value;
        if (!of_queries)
          value.template read_from<whole>(
              static_cast<const Stored*>(args.grad_v) + row.in_heads + at.column, half, at.count);
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          T a, b;
          turned_back(u, angles, k, a, b);
          if (normed) {
            a = norm_gradient(a, widened(own_x[u].first.at(k)), inverse, widened(w[u].first.at(k)),
                              slope);
            b = norm_gradient(b, widened(own_x[u].second.at(k)), inverse,
                              widened(w[u].second.at(k)), slope);
          }
          upstream[u].first.put(k, narrowed<Stored>(a));
          upstream[u].second.put(k, narrowed<Stored>(b));
        }
        upstream[u].template write_to<whole>(out + at.column, half, at.count);
        if (!of_queries) value.template write_to<whole>(out + values + at.column, half, at.count);
      });
    }
  }
  if constexpr (kept)
    if (summing) sums.add_teams(team, place_of_pack);
}

template <typename Stored>
__host__ bool whole_rows(const HeadsArgs& args) {
  const int lanes = kWidth<Stored>;
  return args.head_dim / 2 % lanes == 0 && args.qkv_stride % lanes == 0 && aligned(args.qkv) &&
         aligned(args.q_weight) && aligned(args.k_weight) && aligned(args.cos) &&
         aligned(args.sin) && aligned(args.q) && aligned(args.k) && aligned(args.keys) &&
         aligned(args.values) && aligned(args.grad_q) && aligned(args.grad_k) &&
         aligned(args.grad_v) && aligned(args.grad_qkv);
}

template <typename Stored>
__host__ unsigned blocks_of_rows(const HeadsArgs& args, const Rows<Stored>& rows) {
  const std::int64_t teams = kThreads / rows.team();
  return static_cast<unsigned>((args.tokens * rows.rows_of_token + teams - 1) / teams);
}

template <typename Stored>
__host__ void heads_as(const HeadsArgs& args, cudaStream_t stream) {
  const Rows<Stored> q(args, queries(args)), k(args, keys(args));
  const unsigned q_blocks = blocks_of_rows(args, q), blocks = q_blocks + blocks_of_rows(args, k);
  if (whole_rows<Stored>(args))
    heads_kernel<Stored, true><<<blocks, kThreads, 0, stream>>>(args, q.team(), k.team(), q_blocks);
  else
    heads_kernel<Stored, false>
        <<<blocks, kThreads, 0, stream>>>(args, q.team(), k.team(), q_blocks);
}

template <typename Stored>
__host__ void heads_backward_as(const HeadsArgs& args, cudaStream_t stream) {
  const Rows<Stored> q(args, queries(args)), k(args, keys(args));
  const int q_team = q.team(), k_team = k.team();
  const unsigned blocks = 2 * static_cast<unsigned>(norm_blocks(args.tokens));
  if (q.pairs > q_team * kPairs || k.pairs > k_team * kPairs)
    heads_backward_kernel<Stored, false, false>
        <<<blocks, kThreads, 0, stream>>>(args, kThreads, kThreads);
  else if (whole_rows<Stored>(args))
    heads_backward_kernel<Stored, true, true>
        <<<blocks, kThreads, 0, stream>>>(args, q_team, k_team);
  else
    heads_backward_kernel<Stored, false, true>
        <<<blocks, kThreads, 0, stream>>>(args, q_team, k_team);
}

}  // namespace

void heads(const HeadsArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return;
  with_stored(args.dtype, [&](auto stored) { heads_as<decltype(stored)>(args, stream); });
}

void heads_backward(const HeadsArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return;
  with_stored(args.dtype, [&](auto stored) { heads_backward_as<decltype(stored)>(args, stream); });
}

// The kernels above, which leave behind their sums.
void heads_sums(const HeadsArgs& args, cudaStream_t stream) {
  if (args.grad_q == nullptr)
    heads(args, stream);
  else
    heads_backward(args, stream);
}

}  // namespace megarlx::cuda
