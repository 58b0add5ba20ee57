// The engine under the emulated kernels: fibers, blocks, barriers, warps, shared memory, errors.
//
// __syncthreads and the *_sync intrinsics are where a fiber stops; the next is taken in order,
// backwards or at random. A problem ends its launch, which then reports cudaErrorLaunchFailure with
// a text: threads of a block or warp that meet at different lines, a lane in a mask that has
// returned, a shuffle from outside the mask, a deadlock, too much shared memory.
//
// Under the thread sanitizer each place in a block has a fiber of the sanitizer too. Switching
// between them orders nothing; __syncthreads and __syncwarp do. So every pair of accesses that they
// do not order is reported, whatever the schedule was. (A fiber of a thread is used again in the
// next block: races between one place of two blocks are not seen.)
#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "include/emulated_cuda.h"

namespace emulated {

Thread* current = nullptr;
dim3 block_index, block_dim, grid_dim;
std::uint64_t block_generation = 1;

namespace {
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;
constexpr int kMultiprocessors = 16;  // the number of the attribute
constexpr int kReservedShared = 1024;

enum class Order { kForwards, kBackwards, kRandom };
enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber : Thread {
  Stack stack;
  State state = State::kDone;
  int line = 0;
  const char* file = "";
  int barriers = 0, syncs = 0;
};
struct Warp {
  unsigned arrived = 0, mask = 0;
  Meeting kind{};
  int line = 0;
  const char* file = "";
  std::uint64_t value[32], result[32];
  int from[32];
  char keys[2];
};

struct Card {
  Order order = Order::kRandom;
  int poison = 0xff;
  int multiprocessors = 2, most_shared = 101376;
  bool inexact_exp2 = false;
  std::uint64_t random = 88172645463325252ull;
} card;

std::vector<Fiber*> fibers;
std::vector<Warp> warps;
std::vector<unsigned> ready;
unsigned threads, at_barrier, done;
int barrier_line;
const char* barrier_file;
char barrier_keys[2], launch_key, end_key;
const std::function<void()>* body;
std::vector<void*> shared_blocks;
std::size_t shared_used;
unsigned char* dynamic = nullptr;
std::map<const void*, int> most_shared;
std::map<std::string, long> launches;
const char* kernel_name = "";
int last_error = 0;
std::string problem_text;  // of the running launch; empty: none
std::mutex one_launch;

std::uint64_t next() {
  card.random ^= card.random << 13;
  card.random ^= card.random >> 7;
  card.random ^= card.random << 17;
  return card.random;
}

// Ends the launch. From a fiber it does not return: the fiber is left where it is.
void problem(const char* what, int line, const char* file) {
  if (problem_text.empty()) {
    char text[512];
    std::snprintf(text, sizeof text, "%s: %s at %s:%d, block (%u, %u, %u), thread %u", kernel_name,
                  what, file, line, block_index.x, block_index.y, block_index.z,
                  current != nullptr ? current->linear : 0);
    problem_text = text;
  }
  if (current != nullptr) switch_back(static_cast<Fiber*>(current)->stack, false);
}

void entry() {
  entered();
  __tsan_acquire(&launch_key);
  (*body)();
  __tsan_release(&end_key);
  Fiber* fiber = static_cast<Fiber*>(current);
  fiber->state = State::kDone;
  ++done;
  switch_back(fiber->stack, true);
  std::abort();
}

void wake(unsigned i) {
  fibers[i]->state = State::kReady;
  ready.push_back(i);
}

void maybe_release_barrier() {
  if (at_barrier == 0 || at_barrier + done < threads) return;
  at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i]->state == State::kAtBarrier) wake(i);
}

unsigned take_ready() {
  if (card.order == Order::kForwards) {
    const unsigned i = ready.front();
    ready.erase(ready.begin());
    return i;
  }
  const std::size_t at = card.order == Order::kBackwards ? ready.size() - 1 : next() % ready.size();
  const unsigned i = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return i;
}

void run_block() {
  ready.clear();
  at_barrier = done = 0;
  warps.assign((threads + 31) / 32, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = fibers[i];
    fiber->linear = i;
    fiber->index =
        dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y);
    fiber->barriers = fiber->syncs = 0;
    begin_at(fiber->stack, &entry);
    wake(i);
  }
  while (!ready.empty() && problem_text.empty()) {
    const unsigned i = take_ready();
    current = fibers[i];
    switch_to(fibers[i]->stack);
    current = nullptr;
    if (fibers[i]->state != State::kDone) continue;
    const Warp& warp = warps[i / 32];
    if (warp.arrived != 0 && (warp.mask >> (i % 32) & 1) != 0)
      problem("a lane named in a warp's mask has returned", warp.line, warp.file);
    maybe_release_barrier();
  }
  for (unsigned i = 0; i < threads && problem_text.empty(); ++i)
    if (fibers[i]->state != State::kDone)
      problem(fibers[i]->state == State::kAtBarrier ? "deadlock: waits for its block"
                                                    : "deadlock: waits for its warp",
              fibers[i]->line, fibers[i]->file);
}

void free_shared() {
  for (void* block : shared_blocks) std::free(block);
  shared_blocks.clear();
}

// Block number i of a permutation that depends on the order.
std::uint64_t nth_block(std::uint64_t i, std::uint64_t blocks, std::uint64_t step,
                        std::uint64_t first) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(step) * i + first) % blocks);
}
}  // namespace

void barrier(int line, const char* file) {
  Fiber* fiber = static_cast<Fiber*>(current);
  if (at_barrier == 0) {
    barrier_line = line;
    barrier_file = file;
  } else if (line != barrier_line || std::strcmp(file, barrier_file) != 0) {
    problem("threads of a block at different __syncthreads", line, file);
  }
  fiber->line = line;
  fiber->file = file;
  fiber->state = State::kAtBarrier;
  ++at_barrier;
  char* key = &barrier_keys[++fiber->barriers % 2];
  __tsan_release(key);
  maybe_release_barrier();
  switch_back(fiber->stack, false);
  __tsan_acquire(key);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int from, Meeting kind, int line,
                       const char* file) {
  Fiber* fiber = static_cast<Fiber*>(current);
  const unsigned lane = fiber->linear % 32, first = fiber->linear - lane;
  Warp& warp = warps[first / 32];
  const unsigned here = threads - first >= 32 ? 0xffffffffu : (1u << (threads - first)) - 1;
  if ((mask >> lane & 1) == 0) problem("a lane that its own mask leaves out", line, file);
  if ((mask & ~here) != 0) problem("a mask with lanes that the warp does not have", line, file);
  for (unsigned l = 0; l < 32; ++l)
    if ((mask >> l & 1) != 0 && fibers[first + l]->state == State::kDone)
      problem("a mask with a lane that has returned", line, file);
  if (warp.arrived == 0) {
    warp.mask = mask, warp.kind = kind, warp.line = line, warp.file = file;
  } else if (warp.mask != mask || warp.kind != kind || warp.line != line ||
             std::strcmp(warp.file, file) != 0) {
    problem("lanes of a warp at different warp operations", line, file);
  }
  warp.value[lane] = value;
  warp.from[lane] = from;
  warp.arrived |= 1u << lane;
  fiber->state = State::kAtWarp;
  fiber->line = line;
  fiber->file = file;
  char* key = nullptr;  // only __syncwarp orders memory
  if (kind == Meeting::kSync) {
    key = &warp.keys[++fiber->syncs % 2];
    __tsan_release(key);
  }
  if (warp.arrived == mask) {
    std::uint64_t ballot = 0;
    for (unsigned l = 0; l < 32; ++l)
      if ((mask >> l & 1) != 0 && warp.value[l] != 0) ballot |= 1ull << l;
    for (unsigned l = 0; l < 32; ++l) {
      if ((mask >> l & 1) == 0) continue;
      const int source = warp.from[l] < 0 ? static_cast<int>(l) : warp.from[l];
      if ((mask >> source & 1) == 0) problem("a shuffle from outside the mask", line, file);
      warp.result[l] = kind >= Meeting::kAny ? ballot : warp.value[source];
    }
    warp.arrived = 0;
    for (unsigned l = 0; l < 32; ++l)
      if ((mask >> l & 1) != 0) wake(first + l);
  }
  switch_back(fiber->stack, false);
  if (key != nullptr) __tsan_acquire(key);
  return warp.result[lane];
}

void maybe_yield() {
  if (card.order != Order::kRandom || next() % 4 != 0) return;
  Fiber* fiber = static_cast<Fiber*>(current);
  wake(fiber->linear);
  switch_back(fiber->stack, false);
}

void* allocate_shared(std::size_t bytes, std::size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) std::abort();
  std::memset(memory, card.poison, bytes);
  shared_blocks.push_back(memory);
  shared_used += bytes;
  if (shared_used > static_cast<std::size_t>(card.most_shared + kReservedShared))
    problem("more shared memory than a block can have", 0, "its launch");
  return memory;
}
unsigned char* dynamic_shared() { return dynamic; }

void launch(const char* name, const void* kernel, unsigned most_threads, dim3 grid, dim3 block,
            std::size_t shared_bytes, const std::function<void()>& kernel_body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  kernel_name = name;
  threads = block.x * block.y * block.z;
  const auto found = most_shared.find(kernel);
  const int allowed = std::max(48 << 10, found == most_shared.end() ? 0 : found->second);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > 1024 ||
      (most_threads != 0 && threads > most_threads)) {
    last_error = kInvalidConfiguration;
    return;
  }
  if (shared_bytes > static_cast<std::size_t>(allowed)) {
    last_error = kInvalidValue;
    return;
  }
  ++launches[name];
  body = &kernel_body;
  grid_dim = grid;
  block_dim = block;
  problem_text.clear();
  while (fibers.size() < threads) fibers.push_back(new Fiber);
  __tsan_release(&launch_key);
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::uint64_t step = 1, first = 0;
  if (card.order == Order::kBackwards && blocks > 1) step = first = blocks - 1;
  if (card.order == Order::kRandom && blocks > 1) {
    do step = next() % blocks;
    while (step == 0 || std::gcd(step, blocks) != 1);
    first = next() % blocks;
  }
  for (std::uint64_t i = 0; i < blocks && problem_text.empty(); ++i) {
    const std::uint64_t id = nth_block(i, blocks, step, first);
    block_index =
        dim3(static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
             static_cast<unsigned>(id / grid.x / grid.y));
    ++block_generation;
    shared_used = 0;
    dynamic = nullptr;
    if (shared_bytes != 0)
      dynamic = static_cast<unsigned char*>(allocate_shared(shared_bytes, 128));
    if (problem_text.empty()) run_block();
#if !defined(EMULATED_THREAD_SANITIZER)
    free_shared();  // there it stays, so that no address is used again in this launch
#endif
  }
  __tsan_acquire(&end_key);
  free_shared();
  if (problem_text.empty()) return;
  last_error = kLaunchFailure;
  for (Fiber* fiber : fibers) abandon(fiber->stack);
}

float max_nan(float a, float b) {
  if (a != a || b != b) return from_bits<float>(0x7fffffffu);
  return a > b ? a : b;
}

namespace {
template <class F>
unsigned of_halves(unsigned a, unsigned b, F f) {
  unsigned out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float larger = f(of_bf16(a >> shift & 0xffffu), of_bf16(b >> shift & 0xffffu));
    out |= to_bf16(larger) << shift;
  }
  return out;
}
}  // namespace

unsigned max_nan_bf16x2(unsigned a, unsigned b) { return of_halves(a, b, max_nan); }
unsigned max_bf16x2(unsigned a, unsigned b) {
  return of_halves(a, b, [](float x, float y) { return y != y || x > y ? x : y; });
}
unsigned to_bf16x2(float high, float low) { return to_bf16(high) << 16 | to_bf16(low); }

float ex2_approx_ftz(float x) {
  constexpr float kSmallest = 1.17549435e-38f;
  if (x != x) return from_bits<float>(0x7fffffffu);
  if (std::fabs(x) < kSmallest) x = 0;
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)));
  if (y < kSmallest) return 0.0f;
  if (!card.inexact_exp2 || y > 3e38f || x == std::floor(x)) return y;
  const std::uint64_t off = to_bits(x) * 0x9E3779B97F4A7C15ull >> 62;  // 0 to 3: -1 to +2 units
  return from_bits<float>(to_bits(y) + off - 1);
}

int device_attribute(int which) {
  return which == kMultiprocessors ? card.multiprocessors : card.most_shared;
}
int set_most_shared(const void* kernel, int bytes) {
  if (bytes > card.most_shared) return last_error = kInvalidValue;
  most_shared[kernel] = bytes;
  return 0;
}
int take_error() { return std::exchange(last_error, 0); }
const char* error_text(int error) {
  switch (error) {
    case 0:
      return "no error";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    case kLaunchFailure:
      return problem_text.c_str();
    default:
      return "invalid argument";
  }
}
}  // namespace emulated

// What Python calls, see library.py.
#define EMULATED_API extern "C" __attribute__((visibility("default")))

EMULATED_API void emulated_pretend(int order, std::uint64_t seed, int poison, int multiprocessors,
                                   int most_shared, int inexact_exp2) {
  emulated::card = {
      static_cast<emulated::Order>(order), poison, multiprocessors, most_shared, inexact_exp2 != 0,
      seed * 0x9E3779B97F4A7C15ull + 1};
}
EMULATED_API long emulated_launches(const char* kernel) { return emulated::launches[kernel]; }
