#include "fibers.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "sanitizers.hpp"

namespace lstm_cuda::emulation {

#if defined(LSTM_USE_UCONTEXT)

namespace {
void raw_switch(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }
}  // namespace

void prepare(Context& context, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = context.stack;
  context.machine.uc_stack.ss_size = kStackBytes;
  makecontext(&context.machine, entry, 0);
}

#else

// Saves the registers that a called function must preserve, and swaps stacks. (swapcontext also
// asks the system for the signal mask: six times slower.)
extern "C" __attribute__((visibility("hidden"))) void lstm_emulation_switch(void** save,
                                                                            void* load);
asm(R"(
.text
.hidden lstm_emulation_switch
.globl lstm_emulation_switch
.type lstm_emulation_switch,@function
lstm_emulation_switch:
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
.size lstm_emulation_switch,.-lstm_emulation_switch
)");

namespace {
void raw_switch(Context& from, Context& to) {
  lstm_emulation_switch(&from.stack_pointer, to.stack_pointer);
}
}  // namespace

void prepare(Context& context, void (*entry)()) {
  // Tops are staggered: otherwise equal frames of all threads would share a few cache sets.
  const std::size_t number =
      reinterpret_cast<std::uintptr_t>(context.stack) / (kStackBytes + kPage);
  auto** top = reinterpret_cast<void**>(context.stack + kStackBytes - number % 61 * 192);
  *--top = nullptr;  // where a caller's return address would be: keeps the stack aligned
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

#endif

void switch_context(Context& from, Context& to, bool final) {
  impersonate(to.tsan);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(final ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  raw_switch(from, to);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void enter_context(Context& launcher) {
  const void* stack = nullptr;
  std::size_t bytes = 0;
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (launcher.stack) return;
  launcher.stack = static_cast<char*>(const_cast<void*>(stack));
  launcher.stack_bytes = bytes;
}

void protect(void* p, std::size_t bytes, int protection) {
  if (!mprotect(p, bytes, protection)) return;
  std::perror("emulation: mprotect");
  std::abort();
}

char* Region::take(std::size_t bytes, int protection) {
  fresh_ = bytes > bytes_ || under_tsan();
  if (!fresh_) return base_;
  if (base_) munmap(base_, bytes_);
  base_ = nullptr, bytes_ = 0;
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  madvise(p, bytes, MADV_NOHUGEPAGE);  // of a stack only the first pages are used
  base_ = static_cast<char*>(p), bytes_ = bytes;
  return base_;
}

}  // namespace lstm_cuda::emulation
