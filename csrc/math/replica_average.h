// The two halves around the reduction of a shard over the replicas: pack before it, apply after it.
#pragma once
#include "math/common.h"

namespace megarlx {

// Partial norms belong to fixed chunks, summed in order: no thread count changes them.
constexpr std::int64_t kPackChunk = 1 << 16;

MEGARLX_HD std::int64_t pack_chunks(std::int64_t count) {
  return (count + kPackChunk - 1) / kPackChunk;
}

struct PackArgs {
  std::int64_t count;
  Dtype input_dtype;
  Dtype wire_dtype;
  const void* input;
  void* packed;            // weight * input, or zeros where found_inf says skip
  const double* weight;    // [1]
  const bool* found_inf;   // [1] or null
  double* partial_norms;   // [pack_chunks(count)]: sum of input^2
  double* squared_norm;    // [1]
  bool* packed_found_inf;  // [1]: found_inf, or the squared norm is not finite
};

struct ApplyArgs {
  std::int64_t count;
  Dtype dtype;  // of the target
  Dtype wire_dtype;
  Dtype out_dtype;
  bool add;  // target + summed (updates), or summed (gradients)
  void* target;
  const void* summed;
  void* out;  // may be null: a copy of the new target
};

}  // namespace megarlx
