// What causal attention over packed documents is told.
#pragma once
#include <cstdint>

namespace megarlx {

// Heads of tokens, [tokens, heads, dim], where they lie.
template <class T>
struct Heads {
  T* data;
  std::int64_t token, head;  // from one to the next, in elements

  T* at(std::int64_t t, std::int64_t h) const { return data + t * token + h * head; }
};

struct AttentionArgs {
  std::int64_t heads, kv_heads, dim;
  const std::int32_t* offsets;  // where each document begins, and where the last one ends
  float scale;
  Heads<const float> q, k, v;
  Heads<float> out;
  float* lse;  // [tokens, heads] log of a row's sum of exponentials
  // backward, which reads out and lse
  Heads<const float> grad;
  Heads<float> grad_q, grad_k, grad_v;
};

}  // namespace megarlx
