// Fibers: stacks that the engine switches between, known to the sanitizers. Included by engine.cpp.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the emulation switches fibers in x86-64 assembly"
#endif

#if defined(EMULATED_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
#if defined(EMULATED_ADDRESS_SANITIZER)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
void __asan_unpoison_memory_region(void const volatile*, std::size_t);
}
#endif

// Keeps what a call keeps, stores the stack in *save, and goes on at the stack `to`.
extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch,@function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch,.-emulated_switch
)");

namespace emulated {
constexpr std::size_t kStack = 256 << 10, kGuard = 4096;

// A stack of its own, and what sanitizers know of it.
struct Stack {
  char* memory = nullptr;  // kStack bytes, behind a page that nobody may touch
  void* sp = nullptr;
  void* sanitizer = nullptr;  // the thread sanitizer's fiber, or the address sanitizer's fake stack
};

// The stack of whoever called launch().
inline void* main_sp;
inline void* main_sanitizer;
inline const void* main_bottom;
inline std::size_t main_size;

// Makes `stack` begin at `entry`, which must not return.
inline void begin_at(Stack& stack, void (*entry)()) {
  if (stack.memory == nullptr) {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) std::abort();
    stack.memory = static_cast<char*>(memory) + kGuard;
  }
  auto* top = reinterpret_cast<void**>(stack.memory + kStack);
  *--top = nullptr;  // keeps the stack aligned at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack.sp = top;
#if defined(EMULATED_THREAD_SANITIZER)
  if (stack.sanitizer == nullptr) stack.sanitizer = __tsan_create_fiber(0);
#endif
}

// The first thing that `entry` does.
inline void entered() {
#if defined(EMULATED_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
}

inline void switch_to(Stack& stack) {
#if defined(EMULATED_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&main_sanitizer, stack.memory, kStack);
#elif defined(EMULATED_THREAD_SANITIZER)
  main_sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(stack.sanitizer, 1);
#endif
  emulated_switch(&main_sp, stack.sp);
#if defined(EMULATED_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(main_sanitizer, nullptr, nullptr);
#endif
}

// Back to switch_to(); `last`: nobody will come back here.
inline void switch_back(Stack& stack, [[maybe_unused]] bool last) {
#if defined(EMULATED_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(last ? nullptr : &stack.sanitizer, main_bottom, main_size);
#elif defined(EMULATED_THREAD_SANITIZER)
  __tsan_switch_to_fiber(main_sanitizer, 1);
#endif
  emulated_switch(&stack.sp, main_sp);
#if defined(EMULATED_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(stack.sanitizer, &main_bottom, &main_size);
#endif
}

// Forgets frames that nobody will leave.
inline void abandon(Stack& stack) {
#if defined(EMULATED_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(stack.memory, kStack);
#elif defined(EMULATED_THREAD_SANITIZER)
  if (stack.sanitizer != nullptr) __tsan_destroy_fiber(stack.sanitizer);
#endif
  stack.sanitizer = nullptr;
}

}  // namespace emulated
