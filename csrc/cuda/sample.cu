// Sampling on a GPU; the formulas, and the order of every sum that decides a token, are those of
// math/sample.h and equal the CPU's bit for bit. (Masses are summed with the hardware's exp2: they
// decide no token.)
//
//     tile_kernel       a warp for 32 tiles: reads each logit once; their mass, a score for each
//     finish_kernel     a warp a row: adds the masses, draws
//     filtered_kernel   with filters, in place of both: a block a row (sample_filters.cu)
#include "cuda/sample_tiles.h"

namespace megarlx::cuda {
namespace {

constexpr int kWarps = 4;  // a block of the tile and finish kernels

template <class T, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, 8)
    tile_kernel(SampleArgs args, SampleWorkspace work, int tiles, int groups) {
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t row = warp / groups;
  if (row >= args.rows) return;  // whole warps only
  const RowInMemory<T, kAligned> logits{static_cast<const T*>(args.logits) + row * args.row_stride,
                                        args.columns};
  const Scale scale = row_scale(args, row);
  const TileOfLane mine = group_of_tiles<Sum::kFast, false, true>(
      logits, static_cast<int>(warp % groups), tiles, scale, kMinusInfinity, nullptr);
  Mass model, sampled;
  model.clear();
  sampled.clear();
  if (mine.tile < tiles) {
    float score = kMinusInfinity;
    if (mine.largest > kMinusInfinity) {
      const float model_c = scale_of(1.0f).c;
      model.add_tile(mass_base<Sum::kFast>(mine.largest, model_c), mine.model_sum);
      if (!scale.is_model) sampled.add_tile(mass_base<Sum::kFast>(mine.largest, scale.c), mine.sum);
      const std::int64_t tile = args.first_id / kTile + mine.tile;
      score =
          fast_score(mine.largest, mine.sum, scale, tile_noise(row_noise(args, row), tile).low());
    }
    work.tile_score[row * tiles + mine.tile] = score;
  }
  const bool invalid = __any_sync(kAll, mine.tile < tiles && !(mine.largest < kInfinity));
  model = warp_sum(model);
  if (!scale.is_model) sampled = warp_sum(sampled);
  if (threadIdx.x % 32 != 0) return;
  Partial& out = work.groups[warp];
  out.invalid = invalid;
  out.model = model;
  out.sampled = sampled;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    finish_kernel(SampleArgs args, SampleWorkspace work, int tiles, int groups) {
  const int lane = threadIdx.x % 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.rows) return;
  const Scale scale = row_scale(args, row);
  Partial p;
  p.clear();
  for (int group = lane; group < groups; group += 32) {
    const Partial& part = work.groups[row * groups + group];
    p.invalid |= part.invalid;
    p.model.add(part.model);
    p.sampled.add(part.sampled);
  }
  p.invalid = __any_sync(kAll, p.invalid != 0 || !scale.valid);
  p.model = warp_sum(p.model);
  p.sampled = warp_sum(p.sampled);
  if (!p.invalid) {
    const RowInMemory<T, false> logits{static_cast<const T*>(args.logits) + row * args.row_stride,
                                       args.columns};
    draw_of_row(logits, work.tile_score + row * tiles, tiles, kMinusInfinity, scale,
                row_noise(args, row), args.first_id / kTile, p);
  }
  if (lane != 0) return;
  if (args.partials) {
    args.partials[row] = p;
    return;
  }
  store_drawn(args, row, finish(p, scale, scale.is_model));
}

__global__ void combine_kernel(SampleArgs args, const Partial* partials, std::int64_t shards) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  Partial all = partials[row];
  for (std::int64_t shard = 1; shard < shards; ++shard)
    all.merge(partials[shard * args.rows + row]);
  const Scale scale = row_scale(args, row);
  store_drawn(args, row, finish(all, scale, scale.is_model));
}

template <class T>
void launch(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  const int tiles = tiles_of(args), groups = groups_of(args);
  const auto blocks_of = [](std::int64_t warps) {
    return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  };
  const unsigned blocks = blocks_of(args.rows * groups);
  if (groups > 0 && is_aligned<T>(args))
    tile_kernel<T, true><<<blocks, 32 * kWarps, 0, stream>>>(args, work, tiles, groups);
  else if (groups > 0)
    tile_kernel<T, false><<<blocks, 32 * kWarps, 0, stream>>>(args, work, tiles, groups);
  finish_kernel<T><<<blocks_of(args.rows), 32 * kWarps, 0, stream>>>(args, work, tiles, groups);
}

bool is_filtered(const SampleArgs& args) { return args.top_k || args.top_p || args.min_p; }

}  // namespace

std::int64_t sample_workspace_bytes(const SampleArgs& args) {
  const std::int64_t floats =
      args.rows * std::int64_t{tiles_of(args)} * std::int64_t{sizeof(float)};
  if (is_filtered(args)) return 3 * floats;
  return floats + args.rows * groups_of(args) * std::int64_t{sizeof(Partial)};
}

void sample(const SampleArgs& args, void* workspace, cudaStream_t stream) {
  SampleWorkspace work{};
  if (is_filtered(args)) {
    work.tile_score = static_cast<float*>(workspace);
    return sample_filtered(args, work, stream);
  }
  work.groups = static_cast<Partial*>(workspace);
  work.tile_score = reinterpret_cast<float*>(work.groups + args.rows * groups_of(args));
  if (args.dtype == Dtype::kBFloat16)
    launch<__nv_bfloat16>(args, work, stream);
  else
    launch<float>(args, work, stream);
}

void sample_combine(const SampleArgs& args, const Partial* partials, std::int64_t shards,
                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.rows + 127) / 128);
  combine_kernel<<<blocks, 128, 0, stream>>>(args, partials, shards);
}

}  // namespace megarlx::cuda
