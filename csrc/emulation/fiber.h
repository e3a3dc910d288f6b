// One fiber: a call stack of its own that runs until it switches away.
#pragma once

#include <cstddef>

namespace dbp::emulation {

class Fiber {
 public:
  explicit Fiber(size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares a fresh run of entry(); whatever was on the stack is forgotten. entry must not return:
  // it ends by leave() and is not resumed any more.
  void start(void (*entry)());
  // Called by the scheduler: runs the fiber until it leaves.
  void enter();
  // Called on the fiber: back to the scheduler.
  void leave();

 private:
  char* stack_;
  size_t bytes_;
  void* own_ = nullptr;     // saved stack pointer (or context) of the fiber
  void* caller_ = nullptr;  // and of the scheduler
};

}  // namespace dbp::emulation
