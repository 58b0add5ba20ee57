// bfloat16 as its bits, the same on both backends: widening is exact, narrowing rounds to nearest,
// ties to even. Every NaN becomes the quiet NaN 0x7FC0, where the card has an instruction 0x7FFF.
#pragma once
#include <cstring>

#include "math/common.h"

namespace megarlx {

MEGARLX_HD float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

MEGARLX_HD std::uint16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return static_cast<std::uint16_t>(pair);
#else
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<std::uint16_t>(nan ? 0x7FC0u : rounded);
#endif
}

}  // namespace megarlx
