// The interface between the bindings (compiled once, with torch's headers) and the CPU kernels
// (compiled once per instruction set, into a shared object each): a table of functions on raw
// pointers. Kernels work on a range of rows or elements; the bindings split the work over threads.
#pragma once
#include <cstdint>

#include "math/adamw.h"
#include "math/common.h"
#include "math/decode.h"
#include "math/elementwise.h"
#include "math/normal.h"
#include "math/product.h"
#include "math/replica_average.h"
#include "math/sample.h"
#include "math/token_loss.h"

namespace megarlx {
struct AttentionArgs;
}

namespace megarlx::cpu {

// Changes whenever a signature below does, so that a stale shared object is refused by name.
constexpr std::int64_t kKernelsVersion = 9;

struct Kernels {
  std::int64_t version;
  const char* instruction_set;
  // sample
  void (*sample)(const sampling::SampleArgs&, std::int64_t begin, std::int64_t end);
  void (*sample_combine)(const sampling::SampleArgs&, const sampling::Partial*,
                         std::int64_t shards);
  // token_loss
  void (*token_loss)(const TokenLossArgs& args, LossStep step, std::int64_t begin,
                     std::int64_t end);
  // averaging
  void (*average_adamw)(const AdamWArgs&, const AdamWCoefficients<double>*, std::int64_t begin,
                        std::int64_t end);
  void (*replica_average_pack)(const PackArgs&, std::int64_t begin_chunk, std::int64_t end_chunk);
  void (*replica_average_apply)(const ApplyArgs&, std::int64_t begin, std::int64_t end);
  // elementwise
  void (*rms_norm)(const RmsNormArgs&, std::int64_t begin_row, std::int64_t end_row);
  void (*rms_norm_backward)(const RmsNormArgs&, std::int64_t begin_block, std::int64_t end_block);
  void (*swiglu)(const SwiGluArgs&, std::int64_t begin_row, std::int64_t end_row);
  void (*swiglu_backward)(const SwiGluArgs&, std::int64_t begin_row, std::int64_t end_row);
  void (*heads)(const HeadsArgs&, std::int64_t begin_token, std::int64_t end_token);
  void (*heads_sums)(const HeadsArgs&, std::int64_t begin_token, std::int64_t end_token);
  void (*heads_backward)(const HeadsArgs&, std::int64_t begin_block, std::int64_t end_block);
  void (*sum_blocks)(Dtype dtype, const void* sums, std::int64_t blocks, std::int64_t width,
                     void* out);
  // normal
  void (*normal_slice)(const normal::Args&, std::int64_t begin_group, std::int64_t end_group);
  // decode
  void (*decode_attention)(const DecodeAttentionArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_norm)(const DecodeNormArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_swiglu)(const DecodeSwigluArgs&, std::int64_t begin, std::int64_t end);
  void (*decode_part)(const DecodeStepArgs&, DecodePart part, std::int64_t layer,
                      std::int64_t begin_row, std::int64_t end_row, std::int64_t begin_panel,
                      std::int64_t end_panel);
  // product
  void (*product)(const ProductArgs&, std::int64_t begin_row, std::int64_t end_row,
                  std::int64_t begin_column, std::int64_t end_column);
  // attention
  void (*attention)(const AttentionArgs&, std::int64_t begin, std::int64_t end);
  void (*attention_backward)(const AttentionArgs&, std::int64_t begin, std::int64_t end);
};

}  // namespace megarlx::cpu

// The only symbol that a kernel library exports.
extern "C" __attribute__((visibility("default"))) const megarlx::cpu::Kernels*
megarlx_cpu_kernels();
