// Sampling on the CPU: rows [begin, end). The formulas are math/sample.h's; the loops here are over
// flat arrays of up to 16 tiles, in a form that compilers turn into vectors.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

#include "math/sample.h"

namespace megarlx::cpu {
namespace {
using namespace megarlx::sampling;

constexpr int kBlock = 16;  // tiles worked on together: 8 KB of logits, which stay in the L1 cache

inline void load_tile(const float* row, std::int64_t count, float* __restrict out) {
  std::memcpy(out, row, count * sizeof(float));
}
inline void load_tile(const c10::BFloat16* row, std::int64_t count, float* __restrict out) {
  const auto* bits = reinterpret_cast<const std::uint16_t*>(row);
  for (std::int64_t i = 0; i < count; ++i) out[i] = bits_as<float>(std::uint32_t(bits[i]) << 16);
}

// The tiles of a block side by side, [tiles, kTile].
struct Block {
  alignas(64) float x[kBlock * kTile];
  alignas(64) float terms[kBlock * kTile];
  alignas(64) float folded[kBlock * kTile / 2];
  alignas(64) float largest[kBlock];
  alignas(64) float base[kBlock];  // `largest`, or 0 where the tile holds no finite logit
  alignas(64) float sum[kBlock];
  alignas(64) float model_sum[kBlock];
  std::int64_t tile[kBlock];
  int tiles;
};

// [n, 2] -> [n]
template <class F>
inline void halve(const float* __restrict in, float* __restrict out, int n, F f) {
  for (int i = 0; i < n; ++i) out[i] = f(in[2 * i], in[2 * i + 1]);
}

// [tiles, width] -> [tiles], neighbours first; a and b are overwritten.
template <class F>
inline void fold(float* a, float* b, int width, int tiles, float* out, F f) {
  for (width /= 2; width > 1; width /= 2) {
    halve(a, b, width * tiles, f);
    std::swap(a, b);
  }
  halve(a, out, tiles, f);
}

inline void find_largest(Block& block) {
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  for (int t = 0; t < block.tiles; ++t)
    for (int i = 0; i < 16; ++i) {
      const float* x = block.x + t * kTile + i;
      float m = x[0];
      for (int j = 1; j < 8; ++j) m = larger(m, x[16 * j]);
      block.folded[16 * t + i] = m;
    }
  fold(block.folded, block.terms, 16, block.tiles, block.largest, larger);
  for (int t = 0; t < block.tiles; ++t)
    block.base[t] = block.largest[t] == kMinusInfinity ? 0.0f : block.largest[t];
}

// The fixed tree: ids 64 apart first, then neighbours, pairs, fours ... of the 64 that remain.
inline void sum_tiles(Block& block, float c, float floor, float* out) {
  for (int t = 0; t < block.tiles; ++t) {
    const float* x = block.x + t * kTile;
    const float base = block.base[t];
    for (int i = 0; i < 64; ++i)
      block.folded[64 * t + i] = weight(x[i] - base, c, floor) + weight(x[i + 64] - base, c, floor);
  }
  const auto plus = [](float a, float b) { return a + b; };
  fold(block.folded, block.terms, 64, block.tiles, out, plus);
  for (int t = 0; t < block.tiles; ++t)
    out[t] = block.largest[t] == kMinusInfinity && out[t] == out[t] ? 0.0f : out[t];
}

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

// Ids below `threshold` become -inf.
inline void mask_below(float* x, int count, float threshold) {
  for (int i = 0; i < count; ++i) x[i] = x[i] < threshold ? kMinusInfinity : x[i];
}

template <class T>
class Rows {
 public:
  explicit Rows(const SampleArgs& args) : args_(args), tiles_((args.columns + kTile - 1) / kTile) {
    if (filtered()) tile_largest_.resize(tiles_);
  }

  void run(std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      logits_ = static_cast<const T*>(args_.logits) + row * args_.row_stride;
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

  void load(std::int64_t tile, float* x) const {
    const std::int64_t count = std::min<std::int64_t>(kTile, args_.columns - tile * kTile);
    load_tile(logits_ + tile * kTile, count, x);
    for (std::int64_t i = count; i < kTile; ++i) x[i] = kMinusInfinity;
  }

  // Loads tiles [first, first + count) into the block.
  void load_block(std::int64_t first, int count) {
    block_.tiles = count;
    for (int t = 0; t < count; ++t) {
      load(first + t, block_.x + t * kTile);
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
    load(sampler.best_tile - args_.first_id / kTile, x);
    mask_below(x, kTile, threshold);
    sampler.draw(x);
  }

  void run_filtered(std::int64_t row, RowSampler& sampler) {
    const float p = args_.top_p ? args_.top_p[row * args_.top_p_stride] : 1.0f;
    const bool by_p = p < 1.0f;
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
    const float threshold = find_threshold(row, p, largest, total, sampler.scale);

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
      load(tile, x);
      mask_below(x, kTile, threshold);
      block_.tile[block_.tiles++] = args_.first_id / kTile + tile;
      if (block_.tiles == kBlock) flush();
    }
    flush();
    finish_row(sampler, threshold);
  }

  // The threshold of all filters together. `total`: the mass of the row, the largest weight
  // being 1.
  float find_threshold(std::int64_t row, float p, float largest, double total, const Scale& scale) {
    float threshold = args_.min_p
                          ? min_p_threshold(args_.min_p[row * args_.min_p_stride], largest, scale)
                          : kMinusInfinity;
    const std::int64_t k = args_.top_k ? args_.top_k[row * args_.top_k_stride] : 0;
    const bool by_k = k > 0 && k < args_.columns;
    const bool by_p = p < 1.0f;
    if (!by_k && !by_p) return threshold;
    float bound = kMinusInfinity;  // no filter's threshold is below it
    if (by_k && k <= tiles_) {
      // Each tile has one logit as large as its largest: k tiles, k logits.
      ordered_ = tile_largest_;
      std::nth_element(ordered_.begin(), ordered_.begin() + (k - 1), ordered_.end(),
                       std::greater<float>());
      bound = ordered_[k - 1];
    } else if (!by_k) {
      bound = top_p_lower_bound(p, total, args_.columns, largest, scale);
    }
    collect(bound, largest, scale, by_p);
    if (by_k) {
      const std::uint32_t key = descend(keys_, nullptr, static_cast<std::uint64_t>(k));
      threshold = std::max(threshold, from_ordered_key(key));
      if (by_p) keep_from(key);
    }
    if (by_p) {
      double mass = total * kFilterUnit;
      if (by_k) {
        std::uint64_t kept = 0;
        for (const std::uint64_t w : weights_) kept += w;
        mass = static_cast<double>(kept);
      }
      const double target = std::ceil(std::max(0.0, static_cast<double>(p)) * mass);
      threshold =
          std::max(threshold,
                   from_ordered_key(descend(keys_, &weights_, static_cast<std::uint64_t>(target))));
    }
    return threshold;
  }

  // Keys (and weights) of the logits that are at least `bound`.
  void collect(float bound, float largest, const Scale& scale, bool with_weights) {
    keys_.clear();
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      if (tile_largest_[tile] == kMinusInfinity || tile_largest_[tile] < bound) continue;
      alignas(64) float x[kTile];
      alignas(64) std::uint32_t key[kTile];
      load(tile, x);
      for (int i = 0; i < kTile; ++i) key[i] = ordered_key(x[i]);
      const std::size_t before = keys_.size();
      keys_.resize(before + kTile);
      std::uint32_t* out = keys_.data() + before;
      const float least = bound == kMinusInfinity ? -3.4028235e38f : bound;
      int n = 0;
      for (int i = 0; i < kTile; ++i) {
        out[n] = key[i];
        n += x[i] >= least;
      }
      keys_.resize(before + n);
    }
    if (!with_weights) return;
    weights_.resize(keys_.size());
    for (std::size_t i = 0; i < keys_.size(); ++i)
      weights_[i] = filter_weight(from_ordered_key(keys_[i]), largest, scale);
  }

  void keep_from(std::uint32_t least) {
    std::size_t n = 0;
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      keys_[n] = keys_[i];
      weights_[n] = weights_[i];
      n += keys_[i] >= least;
    }
    keys_.resize(n);
    weights_.resize(n);
  }

  // The largest key such that the weights (or the count) of the keys from it upwards reach
  // `target`; the smallest key there is where they never do. Histograms of 2048 equal steps, each
  // time over the one step that holds the answer.
  std::uint32_t descend(const std::vector<std::uint32_t>& all,
                        const std::vector<std::uint64_t>* weights, std::uint64_t target) {
    constexpr int kBins = 2048;
    const auto [least, most] = std::minmax_element(all.begin(), all.end());
    std::uint32_t low = *least, high = *most;
    target = std::max<std::uint64_t>(target, 1);  // p = 0 keeps the largest
    std::uint64_t above = 0;
    const std::uint32_t* keys = all.data();
    const std::uint64_t* weight_of = weights ? weights->data() : nullptr;
    std::size_t count = all.size();
    while (low < high) {
      int shift = 0;
      while (((high - low) >> shift) >= kBins) ++shift;
      histogram_.assign(kBins, 0);
      for (std::size_t i = 0; i < count; ++i)
        histogram_[(keys[i] - low) >> shift] += weight_of ? weight_of[i] : 1;
      int bin = static_cast<int>((high - low) >> shift);
      while (bin > 0 && above + histogram_[bin] < target) above += histogram_[bin--];
      const std::uint32_t first = low + (static_cast<std::uint32_t>(bin) << shift);
      const std::uint32_t last = std::min<std::uint64_t>(
          high, static_cast<std::uint64_t>(first) + ((std::uint64_t{1} << shift) - 1));
      std::size_t n = 0;
      near_keys_.resize(std::max(near_keys_.size(), count));
      near_weights_.resize(std::max(near_weights_.size(), count));
      std::uint32_t lowest = last, highest = first;
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t key = keys[i];
        if (key < first || key > last) continue;
        near_weights_[n] = weight_of ? weight_of[i] : 1;
        near_keys_[n++] = key;
        lowest = std::min(lowest, key);
        highest = std::max(highest, key);
      }
      keys = near_keys_.data();
      weight_of = near_weights_.data();
      count = n;
      low = lowest;
      high = highest;
    }
    return low;
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
  const std::int64_t tiles_;
  const T* logits_ = nullptr;
  Block block_;
  // Scratch of the filters, one row at a time.
  std::vector<float> tile_largest_, ordered_;
  std::vector<std::uint32_t> keys_, near_keys_;
  std::vector<std::uint64_t> weights_, near_weights_, histogram_;
};

void sample(const SampleArgs& args, std::int64_t begin, std::int64_t end) {
  if (args.dtype == Dtype::kBFloat16)
    Rows<c10::BFloat16>(args).run(begin, end);
  else
    Rows<float>(args).run(begin, end);
}

}  // namespace
}  // namespace megarlx::cpu
