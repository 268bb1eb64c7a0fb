// The fibers behind emulation.h.
#include "emulation.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

Dimensions threadIdx, blockIdx, blockDim;

namespace emulation {

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr int NOBODY = -1;
constexpr size_t LARGEST_EXCHANGE = 32;

// A place where `expected` threads meet.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  const Barrier* waits_at = nullptr;
  unsigned generation = 0;  // of that barrier, when it came
  void* fake_stack = nullptr;

  bool can_run() const { return !done && (waits_at == nullptr || waits_at->generation != generation); }
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
int threads_of_block = 0;
bool progress = false;
Barrier block_barrier, warp_barriers[32];
alignas(16) char exchanged[32][32][LARGEST_EXCHANGE];

[[noreturn]] void die(const char* message) {
  std::fprintf(stderr, "emulated kernel, block %u: %s\n", blockIdx.x, message);
  std::abort();
}

void switch_to(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack.get(), STACK);
#endif
  swapcontext(&scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void switch_back(bool for_good) {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
  (void)for_good;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  current->done = true;
  progress = true;
  switch_back(true);
}

void meet(Barrier& barrier, int expected) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_at = &barrier;
  current->generation = generation;
  switch_back(false);
  current->waits_at = nullptr;
}

}  // namespace

unsigned lane() { return threadIdx.x % 32; }

uint32_t checked_tf32(uint32_t word) {
  const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
  if (word & 0x1fffu && !nan) die("a factor was not rounded to TF32");
  return word;
}

const void* exchange(const void* mine, size_t size, unsigned from) {
  if (size > LARGEST_EXCHANGE) die("a lane exchanges too much at once");
  const unsigned warp = threadIdx.x / 32, self = lane();
  meet(warp_barriers[warp], 32);  // all have read what was exchanged before
  std::memcpy(exchanged[warp][self], mine, size);
  meet(warp_barriers[warp], 32);
  return exchanged[warp][from];
}

void run(unsigned blocks, int threads, const std::function<void()>& kernel) {
  if (threads <= 0 || threads > 1024 || threads % 32) die("a block must have 32, 64, … 1024 threads");
  body = &kernel;
  threads_of_block = threads;
  blockDim.x = static_cast<unsigned>(threads);
  while (fibers.size() < static_cast<size_t>(threads)) fibers.emplace_back(new Fiber);
  uint32_t random = 1;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      fiber.waits_at = nullptr;
      fiber.fake_stack = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    // One warp is held back until all others wait for it, then another one: what overtakes it, it will miss.
    int held = int(random >> 16) % (threads / 32);
    for (int left = threads; left > 0;) {
      random = random * 1664525u + 1013904223u;
      const unsigned first = random >> 16, step = (random & 256u) ? 1u : static_cast<unsigned>(threads) - 1;
      progress = false;
      for (unsigned i = 0, t = first % threads; i < static_cast<unsigned>(threads); ++i, t = (t + step) % threads) {
        Fiber& fiber = *fibers[t];
        if (!fiber.can_run() || int(t) / 32 == held) continue;
        threadIdx.x = t;
        current = &fiber;
        switch_to(&fiber);
        left -= fiber.done;
      }
      if (!progress && held == NOBODY) die("some threads wait at a barrier that the others never reach");
      if (!progress) held = NOBODY;
      else if (held == NOBODY) held = int(random >> 20) % (threads / 32);
    }
  }
}

}  // namespace emulation

void __syncthreads() {
  using namespace emulation;
  meet(block_barrier, threads_of_block);
}
