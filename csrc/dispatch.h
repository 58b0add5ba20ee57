// What every binding needs: the chosen CPU kernels, and errors that name the argument.
#pragma once
#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace megarlx {

// The table that load_cpu_kernels() chose; raises when nothing was loaded yet.
const cpu::Kernels& cpu_kernels();

}  // namespace megarlx

// MEGARLX_CHECK("sample", condition, "temperature", value, "a number >= 0")
#define MEGARLX_CHECK(op, condition, argument, value, allowed)                \
  TORCH_CHECK_VALUE(condition, "megarlx.", op, ": ", argument, " is ", value, \
                    "; allowed: ", allowed)
