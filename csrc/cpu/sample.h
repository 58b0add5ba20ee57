// Sampling on the CPU: rows [begin, end). The formulas are math/sample.h's.
#pragma once
#include <vector>

#include "cpu/sample_threshold.h"
#include "cpu/sample_tiles.h"

namespace megarlx::cpu {
namespace {

// One row on its way: what is known so far, and the tile that holds the token.
struct RowSampler {
  Scale scale;
  Scale model;
  RowKey key;
  bool one_mass;
  sampling::Partial partial;
  std::int64_t best_tile = -1;
  float best_largest = 0.0f;
  std::uint64_t best_noise = 0;

  void add_masses(Block& block, bool model_only) {
    sum_tiles(block, model.c, model.floor, block.model_sum);
    if (!model_only && !one_mass) sum_tiles(block, scale.c, scale.floor, block.sum);
    for (int t = 0; t < block.tiles; ++t) {
      if (!(block.model_sum[t] < 1e30f)) partial.invalid = 1;
      if (!(block.model_sum[t] > 0.0f)) continue;
      const double largest = block.largest[t];
      partial.model.add_tile(largest * model.c, block.model_sum[t]);
      if (!model_only && !one_mass) partial.sampled.add_tile(largest * scale.c, block.sum[t]);
    }
  }

  void compete(const Block& block, const float* sum) {
    Score score[kBlock];
    std::uint64_t inner[kBlock];
    if (scale.greedy) {
      for (int t = 0; t < block.tiles; ++t) score[t] = {block.largest[t], 0.0}, inner[t] = 0;
    } else {
      std::uint64_t noise[kBlock];
      for (int t = 0; t < block.tiles; ++t) {
        const Random128 random = tile_noise(key, block.tile[t]);
        noise[t] = random.low();
        inner[t] = random.high();
      }
      float gumbel[kBlock];
      for (int t = 0; t < block.tiles; ++t) gumbel[t] = tile_gumbel(sum[t], noise[t]);
      for (int t = 0; t < block.tiles; ++t)
        score[t] = tile_score(static_cast<double>(block.largest[t]) * scale.c, gumbel[t]);
    }
    for (int t = 0; t < block.tiles; ++t)
      if (sum[t] > 0.0f && score[t] > partial.score) {
        partial.score = score[t];
        best_tile = block.tile[t];
        best_largest = block.largest[t];
        best_noise = inner[t];
      }
  }

  // x: the winning tile, padded with -inf.
  void draw(const float* x) {
    alignas(64) std::int64_t weights[kTile];
    int chosen = 0;
    if (scale.greedy) {
      while (chosen < kTile - 1 && x[chosen] != best_largest) ++chosen;
    } else {
      alignas(64) float w[kTile];
      for (int i = 0; i < kTile; ++i) w[i] = weight(x[i] - best_largest, scale.c, scale.floor);
      for (int i = 0; i < kTile; ++i) weights[i] = integer_weight(w[i]);
      std::int64_t eights[kTile / 8], total = 0;
      for (int i = 0; i < kTile / 8; ++i) {
        eights[i] = 0;
        for (int j = 0; j < 8; ++j) eights[i] += weights[8 * i + j];
        total += eights[i];
      }
      std::int64_t left = inversion_target(best_noise, total);
      int group = 0;
      while (left >= eights[group]) left -= eights[group++];
      chosen = 8 * group;
      while (left >= weights[chosen]) left -= weights[chosen++];
    }
    partial.token = best_tile * kTile + chosen;
    partial.logit = x[chosen];
  }
};

template <class T>
class Rows {
 public:
  explicit Rows(const SampleArgs& args)
      : args_(args), row_{nullptr, args.columns}, tiles_(row_.tiles()) {
    if (filtered()) tile_largest_.resize(tiles_);
  }

  void run(std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      row_.logits = static_cast<const T*>(args_.logits) + row * args_.row_stride;
      RowSampler sampler{scale_of(args_.temperature[row * args_.temperature_stride]),
                         scale_of(1.0f),
                         row_key(*args_.seed, args_.keys[2 * row], args_.keys[2 * row + 1])};
      sampler.partial.clear();
      sampler.partial.invalid = !sampler.scale.valid;
      const bool filter = filtered() && !sampler.scale.greedy;
      sampler.one_mass = sampler.scale.is_model && !filter;
      if (filter)
        run_filtered(row, sampler);
      else
        run_unfiltered(sampler);
      write(row, sampler);
    }
  }

 private:
  bool filtered() const { return args_.top_k || args_.top_p || args_.min_p; }

  // Loads tiles [first, first + count) into the block.
  void load_block(std::int64_t first, int count) {
    block_.tiles = count;
    for (int t = 0; t < count; ++t) {
      row_.load(first + t, block_.x + t * kTile);
      block_.tile[t] = args_.first_id / kTile + first + t;
    }
  }

  void run_unfiltered(RowSampler& sampler) {
    for (std::int64_t first = 0; first < tiles_; first += kBlock) {
      load_block(first, static_cast<int>(std::min<std::int64_t>(kBlock, tiles_ - first)));
      find_largest(block_);
      sampler.add_masses(block_, false);
      sampler.compete(block_, sampler.one_mass ? block_.model_sum : block_.sum);
    }
    finish_row(sampler, kMinusInfinity);
  }

  void finish_row(RowSampler& sampler, float threshold) {
    if (sampler.partial.invalid || sampler.best_tile < 0) return;
    alignas(64) float x[kTile];
    row_.load(sampler.best_tile - args_.first_id / kTile, x);
    mask_below(x, kTile, threshold);
    sampler.draw(x);
  }

  void run_filtered(std::int64_t row, RowSampler& sampler) {
    const Filters filters(args_, row);
    const bool by_p = filters.top_p < 1.0f;
    float largest = kMinusInfinity;
    // The mass of the whole row under the temperature is wanted by top-p alone.
    const bool model_only = !by_p || sampler.scale.is_model;
    for (std::int64_t first = 0; first < tiles_; first += kBlock) {
      load_block(first, static_cast<int>(std::min<std::int64_t>(kBlock, tiles_ - first)));
      find_largest(block_);
      sampler.add_masses(block_, model_only);
      for (int t = 0; t < block_.tiles; ++t) {
        tile_largest_[first + t] = block_.largest[t];
        largest = std::max(largest, block_.largest[t]);
      }
    }
    if (sampler.partial.invalid || largest == kMinusInfinity) return;
    const Mass& whole = sampler.scale.is_model ? sampler.partial.model : sampler.partial.sampled;
    const double total =
        by_p ? exp2_of_double(whole.log2() - clamped_base(largest, sampler.scale.c)) : 0.0;
    sampler.partial.sampled.clear();
    const float threshold =
        threshold_.find(row_, filters, tile_largest_, largest, total, sampler.scale);

    block_.tiles = 0;
    const auto flush = [&] {
      if (block_.tiles == 0) return;
      find_largest(block_);
      sum_tiles(block_, sampler.scale.c, sampler.scale.floor, block_.sum);
      for (int t = 0; t < block_.tiles; ++t)
        sampler.partial.sampled.add_tile(static_cast<double>(block_.largest[t]) * sampler.scale.c,
                                         block_.sum[t]);
      sampler.compete(block_, block_.sum);
      block_.tiles = 0;
    };
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      if (tile_largest_[tile] == kMinusInfinity || tile_largest_[tile] < threshold) continue;
      float* x = block_.x + block_.tiles * kTile;
      row_.load(tile, x);
      mask_below(x, kTile, threshold);
      block_.tile[block_.tiles++] = args_.first_id / kTile + tile;
      if (block_.tiles == kBlock) flush();
    }
    flush();
    finish_row(sampler, threshold);
  }

  void write(std::int64_t row, const RowSampler& sampler) const {
    if (args_.partials) {
      args_.partials[row] = sampler.partial;
      return;
    }
    const Drawn drawn = finish(sampler.partial, sampler.scale, sampler.one_mass);
    args_.token[row] = drawn.token;
    args_.logprob[row] = drawn.logprob;
    args_.sampled_logprob[row] = drawn.sampled_logprob;
  }

  const SampleArgs& args_;
  Row<T> row_;
  const std::int64_t tiles_;
  Block block_;
  std::vector<float> tile_largest_;  // of the row under the filters
  Threshold<T> threshold_;
};

void sample(const SampleArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == Dtype::kBFloat16)
    Rows<c10::BFloat16>(args).run(begin, end);
  else
    Rows<float>(args).run(begin, end);
}

// Here and not in the binding: rows must end in the same instructions whether they were split or
// not.
void sample_combine(const SampleArgs& args, const sampling::Partial* partials,
                    std::int64_t shards) {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    sampling::Partial all = partials[row];
    for (std::int64_t shard = 1; shard < shards; ++shard)
      all.merge(partials[shard * args.rows + row]);
    const Scale scale = scale_of(args.temperature[row * args.temperature_stride]);
    const Drawn drawn = finish(all, scale, scale.is_model);
    args.token[row] = drawn.token;
    args.logprob[row] = drawn.logprob;
    args.sampled_logprob[row] = drawn.sampled_logprob;
  }
}

}  // namespace
}  // namespace megarlx::cpu
