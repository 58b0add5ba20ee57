// A product of few rows with a matrix that is read once, out = x Wᵀ + bias.
#pragma once
#include "math/common.h"

namespace megarlx {

constexpr std::int64_t kMostNarrowRows = 16;  // an mma's, so that one pass over W serves them all

struct NarrowProductArgs {
  Dtype dtype;                          // of x, bias, out, and of W where it has no scales
  std::int64_t rows, columns, outputs;  // of x, of both, of W
  const void *x, *weight, *bias;
  const float* scales;  // one an output, where W is e4m3
  void* out;
  bool dependent;  // W is read while the kernel before still runs
};

}  // namespace megarlx
