// CUDA's execution model on a CPU, as far as csrc/cuda uses it: the threads of a block are fibers
// of one thread of the operating system, and blocks run one after another, in an order that a seed
// decides. No torch here.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define EMULATED_UNSANITIZED __attribute__((no_sanitize("thread", "address", "undefined")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Thread {
  dim3 index;
  unsigned linear;  // in the block
};
extern Thread* current;
extern dim3 block_index, block_dim, grid_dim;
extern std::uint64_t block_generation;  // counts the blocks that have begun

// Every thread of the block that has not returned meets here.
void barrier(int line, const char* file);
// All lanes of `mask` meet; each gets the value of lane `from` (its own where from < 0), or the
// lanes whose value is not 0.
enum class Meeting { kXor, kUp, kDown, kIndex, kAny, kAll, kBallot, kSync };
std::uint64_t exchange(unsigned mask, std::uint64_t value, int from, Meeting kind, int line,
                       const char* file);
void maybe_yield();  // another thread may go on here
void* allocate_shared(std::size_t bytes, std::size_t alignment);
unsigned char* dynamic_shared();
// most_threads: what __launch_bounds__ allows; 0 where it says nothing.
void launch(const char* name, const void* kernel, unsigned most_threads, dim3 grid, dim3 block,
            std::size_t shared_bytes, const std::function<void()>& body);
float ex2_approx_ftz(float x);
float max_nan(float a, float b);
unsigned max_nan_bf16x2(unsigned a, unsigned b);  // of both halves
unsigned max_bf16x2(unsigned a, unsigned b);      // a NaN loses
unsigned to_bf16x2(float high, float low);
int device_attribute(int which);
int set_most_shared(const void* kernel, int bytes);
int take_error();
const char* error_text(int error);

template <class F>
const void* address(F* f) {
  return reinterpret_cast<const void*>(f);
}

// A __shared__ variable: a new T in each block, and the same for all of its threads.
template <class T>
struct Shared {
  T* pointer = nullptr;
  std::uint64_t generation = 0;
  EMULATED_UNSANITIZED T& get() {
    if (generation != block_generation) {
      pointer = static_cast<T*>(allocate_shared(sizeof(T), alignof(T)));
      generation = block_generation;
    }
    return *pointer;
  }
};

template <class T>
EMULATED_UNSANITIZED std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
EMULATED_UNSANITIZED T from_bits(std::uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulated

#define threadIdx (::emulated::current->index)
#define blockIdx (::emulated::block_index)
#define blockDim (::emulated::block_dim)
#define gridDim (::emulated::grid_dim)
#define __syncthreads() ::emulated::barrier(__LINE__, __FILE__)

// Where a function is called, which names the operation that lanes have to meet at.
#define EMULATED_PLACE int line = __builtin_LINE(), const char *file = __builtin_FILE()

namespace emulated {
inline int lane() { return static_cast<int>(current->linear % 32); }
template <class T>
T shuffled(unsigned mask, T value, int from, Meeting kind, int line, const char* file) {
  return from_bits<T>(exchange(mask, to_bits(value), from, kind, line, file));
}
}  // namespace emulated

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATED_PLACE) {
  const int lane = ::emulated::lane(), from = lane ^ lanes;
  const bool inside = from / width <= lane / width;
  return ::emulated::shuffled(mask, value, inside ? from : -1, ::emulated::Meeting::kXor, line,
                              file);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_PLACE) {
  const int lane = ::emulated::lane(), from = lane - static_cast<int>(by);
  const bool inside = from >= lane / width * width;
  return ::emulated::shuffled(mask, value, inside ? from : -1, ::emulated::Meeting::kUp, line,
                              file);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_PLACE) {
  const int lane = ::emulated::lane(), from = lane + static_cast<int>(by);
  const bool inside = from < (lane / width + 1) * width;
  return ::emulated::shuffled(mask, value, inside ? from : -1, ::emulated::Meeting::kDown, line,
                              file);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMULATED_PLACE) {
  const int lane = ::emulated::lane();
  return ::emulated::shuffled(mask, value, lane / width * width + (from & (width - 1)),
                              ::emulated::Meeting::kIndex, line, file);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_PLACE) {
  return static_cast<unsigned>(
      ::emulated::exchange(mask, p != 0, -1, ::emulated::Meeting::kBallot, line, file));
}
inline int __any_sync(unsigned mask, int p, EMULATED_PLACE) {
  return ::emulated::exchange(mask, p != 0, -1, ::emulated::Meeting::kAny, line, file) != 0;
}
inline int __all_sync(unsigned mask, int p, EMULATED_PLACE) {
  return ::emulated::exchange(mask, p != 0, -1, ::emulated::Meeting::kAll, line, file) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_PLACE) {
  ::emulated::exchange(mask, 0, -1, ::emulated::Meeting::kSync, line, file);
}

// PTX over several lanes, or in halves of a register.
namespace emulated {
inline void nothing() { maybe_yield(); }

inline float of_bf16(unsigned bits) { return from_bits<float>(bits << 16); }
inline unsigned to_bf16(float x) {
  const unsigned bits = static_cast<unsigned>(to_bits(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned both = 0;
  for (int shift = 0; shift < 32; shift += 16)
    both |= to_bf16(__builtin_fmaf(of_bf16(a >> shift & 0xffff), of_bf16(b >> shift & 0xffff),
                                   of_bf16(c >> shift & 0xffff)))
            << shift;
  return both;
}

// D [16, 8] += A [16, 16] B [16, 8]. Of lane 4 g + t are A's rows g (a0, a2) and g + 8 (a1, a3) at
// columns 2 t (a0, a1) and 2 t + 8 (a2, a3), two in a register; B's column g at rows 2 t (b0) and
// 2 t + 8 (b1); D's rows g (d0, d1) and g + 8 at columns 2 t and 2 t + 1.
inline void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,
                         unsigned a2, unsigned a3, unsigned b0, unsigned b1, EMULATED_PLACE) {
  const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  float* const d[4] = {&d0, &d1, &d2, &d3};
  const int group = lane() / 4, t = lane() % 4;
  float sums[4] = {d0, d1, d2, d3};
  for (int other = 0; other < 4; ++other)
    for (int part = 0; part < 2; ++part) {
      unsigned left[2], right[2];
      for (int i = 0; i < 2; ++i) {
        left[i] = __shfl_sync(0xffffffffu, a[2 * part + i], 4 * group + other, 32, line, file);
        right[i] = __shfl_sync(0xffffffffu, b[part], 4 * (2 * t + i) + other, 32, line, file);
      }
      for (int i = 0; i < 4; ++i)
        for (int shift = 0; shift < 32; shift += 16)
          sums[i] +=
              of_bf16(left[i / 2] >> shift & 0xffff) * of_bf16(right[i % 2] >> shift & 0xffff);
    }
  for (int i = 0; i < 4; ++i) *d[i] = sums[i];
}
}  // namespace emulated
