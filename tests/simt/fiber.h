// A function on a stack of its own, which can be left in the middle and resumed later.
#pragma once
#include <cstddef>
#include <memory>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "the stack switch of the host run is written for x86-64"
#endif

namespace simt {

// Pushes what a called function must preserve, stores the stack pointer in *save and goes on where
// `load` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm(R"(
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
  )");
}

class Fiber {
 public:
  explicit Fiber(void (*function)()) : function_(function) {
    // What switch_stack pops on the first resume: six registers and the address to return to. The
    // word above stands for the return address of that function, which never returns.
    void** top = reinterpret_cast<void**>(stack_.get() + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Fiber::start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }

  // Runs the function until it suspends or ends.
  void resume() {
    running_ = this;
    caller_.leave(identity_, false);
    switch_stack(&caller_stack_pointer_, stack_pointer_);
    caller_.enter(identity_);
  }

  // Back to the caller of resume.
  static void suspend() {
    Fiber* self = running_;
    self->identity_.leave(caller_, false);
    switch_stack(&self->stack_pointer_, caller_stack_pointer_);
    self->identity_.enter(caller_);
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  static void start() {
    Fiber* self;
    {
      const Unwatched unwatched;
      self = running_;
      self->identity_.enter(caller_);
    }
    self->function_();
    self->identity_.leave(caller_, true);
    switch_stack(&self->stack_pointer_, caller_stack_pointer_);
    __builtin_unreachable();
  }

  inline static Fiber* running_ = nullptr;
  inline static StackIdentity caller_;
  inline static void* caller_stack_pointer_ = nullptr;

  void (*function_)();
  std::unique_ptr<std::byte[]> stack_ = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  StackIdentity identity_{stack_.get(), kStackBytes};
  void* stack_pointer_;
};

}  // namespace simt
