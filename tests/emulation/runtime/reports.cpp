// What a kernel did wrong, in words; how a failed launch ends.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.hpp"

namespace lstm_cuda::emulation {

const char* file_of(const Site& at) {
  const char* slash = std::strrchr(at.file, '/');
  return slash ? slash + 1 : at.file;
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

namespace {

// Back to the launcher. Every fiber stays where it is for good, so nothing of theirs is destroyed:
// hence no objects that own memory on the way here.
[[noreturn]] void abandon() {
  Quiet::end_all();
  switch_context(*self(), launched->launcher);
  std::abort();
}

// Appends to the report.
__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  const std::size_t used = std::strlen(launched->report);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(launched->report + used, sizeof launched->report - used, format, arguments);
  va_end(arguments);
}

}  // namespace

void fail(const Site& at, const char* format, ...) {
  {
    const Quiet quiet;
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(launched->report, sizeof launched->report, format, arguments);
    va_end(arguments);
    say("\n  block %u thread %u", current->block, current->thread);
    if (at.line) say(" at %s:%u", file_of(at), at.line);
  }
  abandon();
}

void report_deadlock() {
  {
    const Quiet quiet;
    say("deadlock: no thread can go on");
    // Threads of one block that wait at one line are counted in one line of the report.
    std::vector<bool> told(launched->fibers.size());
    for (std::size_t i = 0; i < told.size(); ++i) {
      const Fiber& f = *launched->fibers[i];
      if (f.done || told[i]) continue;
      unsigned count = 0;
      for (std::size_t j = i; j < told.size(); ++j) {
        const Fiber& g = *launched->fibers[j];
        if (g.done || g.block != f.block || !same(g.site, f.site)) continue;
        told[j] = true;
        ++count;
      }
      say("\n  block %u: %u thread%s (first %u) at %s, %s:%u", f.block, count, count > 1 ? "s" : "",
          f.thread, f.doing, file_of(f.site), f.site.line);
    }
  }
  abandon();
}

// ---- invalid accesses ----

namespace {

const void* fault_address;
alignas(16) char signal_stack[16384];
struct sigaction old_action;
stack_t old_stack;

void report_fault() {
  fail(self()->site, "invalid access to %p, after %s", fault_address, self()->doing);
}

// Goes on in report_fault, at the top of the thread's stack: nothing will return to what is there.
void on_fault(int signal, siginfo_t* info, void* machine) {
  if (!current) {  // not a kernel's: the process dies of it as if we were not here
    sigaction(signal, &old_action, nullptr);
    return;
  }
  fault_address = info->si_addr;
  const std::uintptr_t top = reinterpret_cast<std::uintptr_t>(self()->stack + kStackBytes) - 64;
  auto& registers = static_cast<ucontext_t*>(machine)->uc_mcontext;
#if defined(__x86_64__)
  registers.gregs[REG_RSP] = static_cast<greg_t>(top - 8);  // as after a call
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(&report_fault);
#elif defined(__aarch64__)
  registers.sp = top;
  registers.pc = reinterpret_cast<std::uintptr_t>(&report_fault);
#else
  (void)top, (void)registers;
  std::fprintf(stderr, "emulation: invalid access to %p by block %u thread %u, after %s, %s:%u\n",
               fault_address, current->block, current->thread, self()->doing, file_of(self()->site),
               self()->site.line);
  sigaction(signal, &old_action, nullptr);
#endif
}

}  // namespace

FaultHandler::FaultHandler() {
  if (sanitized()) return;  // they report more
  stack_t stack{};
  stack.ss_sp = signal_stack, stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_action);
}

FaultHandler::~FaultHandler() {
  if (sanitized()) return;  // they report more
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace lstm_cuda::emulation
