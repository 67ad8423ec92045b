// The threads of one block on the host: fibers that take turns and meet at barriers, as
// __syncthreads() has threads meet.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace block {

// Enough for translated kernels, whose registers are variables. Pages that no thread touches cost
// nothing.
constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not initialised
  int waits_at = 0;                                      // the line of a barrier
  bool done = false;
};

// The block that this thread of the host runs.
struct Run {
  const std::function<void(uint32_t)>* body;
  uint32_t thread, round;  // rounds end where all threads meet
  ucontext_t caller;
  std::exception_ptr failure;
};
inline thread_local Run run;
inline thread_local std::vector<Fiber> fibers;  // kept for the next block

inline void enter() {
  Fiber& fiber = fibers[run.thread];
  try {
    (*run.body)(run.thread);
  } catch (...) {
    run.failure = std::current_exception();
  }
  fiber.done = true;  // and back to the caller, by uc_link
}

inline void barrier(int line) {
  Fiber& fiber = fibers[run.thread];
  fiber.waits_at = line;
  swapcontext(&fiber.context, &run.caller);
}

inline void check_meeting(uint32_t count) {
  for (uint32_t i = 1; i < count; ++i) {
    if (fibers[i].done != fibers[0].done) {
      throw std::runtime_error("a thread ends while others wait at a barrier");
    }
    if (!fibers[i].done && fibers[i].waits_at != fibers[0].waits_at) {
      throw std::runtime_error("threads wait at different barriers");
    }
  }
}

// Runs body(thread) for `count` threads. Throws what one of them throws, or what would hang or
// confuse a device. Every second round runs backwards, so that no order hides a missing barrier.
inline void run_threads(uint32_t count, const std::function<void(uint32_t)>& body) {
  if (fibers.size() < count) fibers = std::vector<Fiber>(count);
  run.body = &body;
  run.failure = nullptr;
  for (uint32_t i = 0; i < count; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack = {fibers[i].stack.get(), 0, kStackBytes};
    fibers[i].context.uc_link = &run.caller;
    fibers[i].done = false;
    makecontext(&fibers[i].context, &enter, 0);
  }
  for (run.round = 0; !fibers[0].done; ++run.round) {
    for (uint32_t i = 0; i < count; ++i) {
      run.thread = run.round % 2 ? count - 1 - i : i;
      swapcontext(&run.caller, &fibers[run.thread].context);
      if (run.failure) std::rethrow_exception(run.failure);
    }
    check_meeting(count);
  }
}

}  // namespace block
