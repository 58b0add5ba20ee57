// The interface between the bindings (compiled once, with torch's headers) and the CPU kernels
// (compiled once per instruction set, into a shared object each): a table of functions on raw
// pointers. Kernels work on a range of rows or elements; the bindings split the work over threads.
#pragma once
#include <cstdint>

#include "math/common.h"
#include "math/sample.h"

namespace megarlx::cpu {

// Changes whenever a signature below does, so that a stale shared object is refused by name.
constexpr std::int64_t kKernelsVersion = 1;

struct Kernels {
  std::int64_t version;
  const char* instruction_set;
  // sample
  void (*sample)(const sampling::SampleArgs&, std::int64_t begin, std::int64_t end);
  // token_loss
  // averaging
};

}  // namespace megarlx::cpu

// The only symbol that a kernel library exports.
extern "C" __attribute__((visibility("default"))) const megarlx::cpu::Kernels*
megarlx_cpu_kernels();
