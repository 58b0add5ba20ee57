// Where the filters cut a row off: the least logit that top-k, top-p and min-p together leave.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/sample_tiles.h"
#include "math/sample_filters.h"

namespace megarlx::cpu {
namespace {

// Of one row; 0 and 1 filter nothing.
struct Filters {
  std::int64_t top_k = 0;
  float top_p = 1.0f;
  bool by_min_p = false;
  float min_p = 0.0f;

  Filters(const SampleArgs& args, std::int64_t row) {
    if (args.top_k) top_k = args.top_k[row * args.top_k_stride];
    if (args.top_p) top_p = args.top_p[row * args.top_p_stride];
    by_min_p = args.min_p != nullptr;
    if (by_min_p) min_p = args.min_p[row * args.min_p_stride];
  }
};

template <class T>
class Threshold {
 public:
  // `total`: the mass of the row, the largest weight being 1.
  float find(const Row<T>& row, const Filters& filters, const std::vector<float>& tile_largest,
             float largest, double total, const Scale& scale) {
    const std::int64_t k = filters.top_k, tiles = row.tiles();
    const float p = filters.top_p;
    float threshold =
        filters.by_min_p ? min_p_threshold(filters.min_p, largest, scale) : kMinusInfinity;
    const bool by_k = k > 0 && k < row.columns;
    const bool by_p = p < 1.0f;
    if (!by_k && !by_p) return threshold;
    float bound = kMinusInfinity;  // no filter's threshold is below it
    if (by_k && k <= tiles) {
      // Each tile has one logit as large as its largest: k tiles, k logits.
      ordered_ = tile_largest;
      std::nth_element(ordered_.begin(), ordered_.begin() + (k - 1), ordered_.end(),
                       std::greater<float>());
      bound = ordered_[k - 1];
    } else if (!by_k) {
      bound = top_p_lower_bound(p, total, row.columns, largest, scale);
    }
    collect(row, tile_largest, bound, largest, scale, by_p);
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

 private:
  // Keys (and weights) of the logits that are at least `bound`.
  void collect(const Row<T>& row, const std::vector<float>& tile_largest, float bound,
               float largest, const Scale& scale, bool with_weights) {
    keys_.clear();
    for (std::int64_t tile = 0; tile < row.tiles(); ++tile) {
      if (tile_largest[tile] == kMinusInfinity || tile_largest[tile] < bound) continue;
      alignas(64) float x[kTile];
      alignas(64) std::uint32_t key[kTile];
      row.load(tile, x);
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

  // Scratch, one row at a time.
  std::vector<float> ordered_;
  std::vector<std::uint32_t> keys_, near_keys_;
  std::vector<std::uint64_t> weights_, near_weights_, histogram_;
};

}  // namespace
}  // namespace megarlx::cpu
