// Every CPU kernel, and the table of them: included once by each build_<instruction set>.cpp.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include "cpu/kernels.h"
#include "cpu/sample.h"

#define MEGARLX_STRING_(x) #x
#define MEGARLX_STRING(x) MEGARLX_STRING_(x)

extern "C" const megarlx::cpu::Kernels* megarlx_cpu_kernels() {
  static const megarlx::cpu::Kernels table = {
      megarlx::cpu::kKernelsVersion,
      MEGARLX_STRING(CPU_CAPABILITY),
      // sample
      megarlx::cpu::sample,
      // token_loss
      // averaging
  };
  return &table;
}
