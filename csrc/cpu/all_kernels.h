// Every CPU kernel, and the table of them: included once by each build_<instruction set>.cpp.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include "cpu/attention.h"
#include "cpu/averaging.h"
#include "cpu/decode.h"
#include "cpu/decode_step.h"
#include "cpu/elementwise.h"
#include "cpu/heads.h"
#include "cpu/kernels.h"
#include "cpu/normal.h"
#include "cpu/product.h"
#include "cpu/sample.h"
#include "cpu/token_loss.h"

#define MEGARLX_STRING_(x) #x
#define MEGARLX_STRING(x) MEGARLX_STRING_(x)

extern "C" const megarlx::cpu::Kernels* megarlx_cpu_kernels() {
  static const megarlx::cpu::Kernels table = {
      megarlx::cpu::kKernelsVersion,
      MEGARLX_STRING(CPU_CAPABILITY),
      // sample
      megarlx::cpu::sample,
      megarlx::cpu::sample_combine,
      // token_loss
      megarlx::cpu::token_loss,
      // averaging
      megarlx::cpu::average_adamw,
      megarlx::cpu::replica_average_pack,
      megarlx::cpu::replica_average_apply,
      // elementwise
      megarlx::cpu::rms_norm,
      megarlx::cpu::rms_norm_backward,
      megarlx::cpu::swiglu,
      megarlx::cpu::swiglu_backward,
      megarlx::cpu::heads,
      megarlx::cpu::heads_sums,
      megarlx::cpu::heads_backward,
      megarlx::cpu::sum_blocks,
      // normal
      megarlx::cpu::normal_slice,
      // decode
      megarlx::cpu::decode_attention,
      megarlx::cpu::decode_norm,
      megarlx::cpu::decode_swiglu,
      megarlx::cpu::decode_part,
      // product
      megarlx::cpu::product,
      // attention
      megarlx::cpu::packed_attention,
      megarlx::cpu::packed_attention_backward,
  };
  return &table;
}
