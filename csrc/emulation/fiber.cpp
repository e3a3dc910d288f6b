#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(DBP_UCONTEXT)

// Saves the callee-saved registers on the current stack and resumes another: swapcontext without
// its system calls, which would dominate the run time.
extern "C" void dbp_switch_stack(void** save, void* resume);
asm(R"(
.text
.hidden dbp_switch_stack
.globl dbp_switch_stack
.type dbp_switch_stack, @function
dbp_switch_stack:
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
.size dbp_switch_stack, .-dbp_switch_stack
)");

namespace dbp::emulation {

void Fiber::start(void (*entry)()) {
  // Layout as if entry had just been called from address 0: six registers, then the return address.
  auto top = reinterpret_cast<uintptr_t>(stack_ + bytes_) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<void**>(top);
  *--slots = nullptr;
  *--slots = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  own_ = slots;
}

void Fiber::enter() { dbp_switch_stack(&caller_, own_); }
void Fiber::leave() { dbp_switch_stack(&own_, caller_); }

}  // namespace dbp::emulation

#else

namespace dbp::emulation {

void Fiber::start(void (*entry)()) {
  if (!own_) own_ = new ucontext_t, caller_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(own_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = bytes_;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

void Fiber::enter() {
  swapcontext(static_cast<ucontext_t*>(caller_), static_cast<ucontext_t*>(own_));
}
void Fiber::leave() {
  swapcontext(static_cast<ucontext_t*>(own_), static_cast<ucontext_t*>(caller_));
}

}  // namespace dbp::emulation

#endif

namespace dbp::emulation {

Fiber::Fiber(size_t stack_bytes) : bytes_(stack_bytes) {
  // The lowest page stays inaccessible, so that an overflow faults instead of corrupting.
  void* memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, 4096, PROT_NONE);
  stack_ = static_cast<char*>(memory);
}

Fiber::~Fiber() {
  munmap(stack_, bytes_);
#if !defined(__x86_64__) || defined(DBP_UCONTEXT)
  delete static_cast<ucontext_t*>(own_);
  delete static_cast<ucontext_t*>(caller_);
#endif
}

}  // namespace dbp::emulation
