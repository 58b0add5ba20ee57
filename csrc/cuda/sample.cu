// Sampling on a GPU; the formulas, and the order of every sum that decides a token, are those of
// math/sample.h and equal the CPU's bit for bit. (The model's mass at a temperature other than 1 is
// summed with the hardware's exp2: it decides no token.)
//
//     tile_kernel<kPlain>    reads each logit once; a Partial for each group of tiles
//     finish_kernel          a warp a row: merges the groups, draws inside the winning tile
// With filters, before finish_kernel and in place of kPlain (sample_filters.cu):
//     tile_kernel<kMeasure>  each tile's largest logit, and the row's masses
//     threshold_kernel       a block a row: all filters as one threshold on the logit
//     tile_kernel<kDraw>     the draw among what is kept; tiles with nothing kept are not read
#include "cuda/sample_tiles.h"

namespace megarlx::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    finish_kernel(SampleArgs args, SampleWorkspace work, int groups, bool filtered) {
  const int lane = threadIdx.x % 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.rows) return;
  const Scale scale = row_scale(args, row);
  Partial p;
  p.clear();
  for (int group = lane; group < groups; group += 32) p.merge(work.groups[row * groups + group]);
  p = warp_merge(p);
  p.invalid |= !scale.valid;
  if (!p.invalid && p.token >= 0) {
    // p.token is the winning tile's first id, p.logit its largest logit.
    const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
    const float threshold = filtered ? work.threshold[row] : kMinusInfinity;
    const float largest = static_cast<float>(p.logit);
    float x[4];
    std::int64_t w[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t id = p.token - args.first_id + 4 * lane + i;
      x[i] = id < args.columns ? as_float(logits[id]) : kMinusInfinity;
      if (x[i] < threshold) x[i] = kMinusInfinity;
      w[i] = scale.greedy ? x[i] == largest
                          : integer_weight(weight(x[i] - largest, scale.c, scale.floor));
      own += w[i];
    }
    std::int64_t through = own;  // of this lane and those below it
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int64_t below = __shfl_up_sync(kAll, static_cast<long long>(through), distance);
      if (lane >= distance) through += below;
    }
    const std::int64_t total = __shfl_sync(kAll, static_cast<long long>(through), 31);
    const std::uint64_t noise = tile_noise(row_noise(args, row), p.token / kTile).high();
    const std::int64_t target = scale.greedy ? 0 : inversion_target(noise, total);
    const int winner = __ffs(__ballot_sync(kAll, through > target)) - 1;
    std::int64_t left = target - (through - own);
    int chosen = 0;
    float logit = x[0];
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // in the winning lane, 0 <= left < own
      if (chosen == i && left >= w[i]) {
        left -= w[i];
        chosen = i + 1;
        logit = x[i + 1];
      }
    }
    p.token += 4 * winner + __shfl_sync(kAll, chosen, winner);
    p.logit = static_cast<double>(__shfl_sync(kAll, logit, winner));
  }
  if (lane != 0) return;
  if (args.partials) {
    args.partials[row] = p;
    return;
  }
  const Drawn drawn = finish(p, scale, scale.is_model && !filtered);
  args.token[row] = drawn.token;
  args.logprob[row] = drawn.logprob;
  args.sampled_logprob[row] = drawn.sampled_logprob;
}

__global__ void combine_kernel(SampleArgs args, const Partial* partials, std::int64_t shards) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  Partial all = partials[row];
  for (std::int64_t shard = 1; shard < shards; ++shard)
    all.merge(partials[shard * args.rows + row]);
  const Scale scale = row_scale(args, row);
  const Drawn drawn = finish(all, scale, scale.is_model);
  args.token[row] = drawn.token;
  args.logprob[row] = drawn.logprob;
  args.sampled_logprob[row] = drawn.sampled_logprob;
}

template <class T>
void launch(const SampleArgs& args, const SampleWorkspace& work, cudaStream_t stream) {
  const bool filtered = is_filtered(args);
  if (filtered) {
    sample_filtered(args, work, stream);
  } else {
    launch_tiles<T, Mode::kPlain>(args, work, stream);
  }
  const auto blocks = static_cast<unsigned>((args.rows + kWarps - 1) / kWarps);
  finish_kernel<T><<<blocks, 32 * kWarps, 0, stream>>>(args, work, groups_of(args), filtered);
}

}  // namespace

std::int64_t sample_workspace_bytes(const SampleArgs& args) {
  const std::int64_t groups = args.rows * groups_of(args) * std::int64_t{sizeof(Partial)};
  if (!is_filtered(args)) return groups;
  return groups + args.rows * (std::int64_t{tiles_of(args)} + 1) * std::int64_t{sizeof(float)};
}

void sample(const SampleArgs& args, void* workspace, cudaStream_t stream) {
  SampleWorkspace work;
  work.groups = static_cast<Partial*>(workspace);
  work.tile_largest = reinterpret_cast<float*>(work.groups + args.rows * groups_of(args));
  work.threshold = work.tile_largest + args.rows * tiles_of(args);
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
