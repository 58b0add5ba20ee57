// Philox 4x32-10: a counter-based random function. The same (counter, key) gives the same 128 bits
// on every machine, in every order, so that noise needs no state.
#pragma once
#include "math/common.h"

namespace megarlx {

struct Random128 {
  std::uint32_t word[4];
  MEGARLX_HD std::uint64_t low() const { return word[0] | std::uint64_t(word[1]) << 32; }
  MEGARLX_HD std::uint64_t high() const { return word[2] | std::uint64_t(word[3]) << 32; }
};

constexpr int kPhiloxRounds = 10;

MEGARLX_HD void philox_round(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2,
                             std::uint32_t& c3, std::uint32_t k0, std::uint32_t k1) {
  const std::uint64_t a = std::uint64_t(0xD2511F53u) * c0;
  const std::uint64_t b = std::uint64_t(0xCD9E8D57u) * c2;
  c0 = std::uint32_t(b >> 32) ^ c1 ^ k0;
  c2 = std::uint32_t(a >> 32) ^ c3 ^ k1;
  c1 = std::uint32_t(b);
  c3 = std::uint32_t(a);
}

MEGARLX_HD void next_philox_key(std::uint32_t& k0, std::uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

MEGARLX_HD Random128 philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                            std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    next_philox_key(k0, k1);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace megarlx
