// A GPU for tests: the part of CUDA that csrc/cuda uses, on one thread of the CPU. Blocks run one after another; the threads of a
// block are fibers that run until they reach a barrier or a shuffle, in an order that changes from round to round and with one warp
// far behind the others, so that a missing barrier gives wrong results. Shared memory is as uninitialised as a GPU's: `__shared__` keeps what the last block left.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Dimensions {
  unsigned x;
};
extern Dimensions threadIdx, blockIdx, blockDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// Every thread of the block must come; one that has returned, or waits elsewhere, aborts the program with a message.
void __syncthreads();

namespace emulation {

// body() for every thread of every block.
void run(unsigned blocks, int threads, const std::function<void()>& body);

// Hands `size` bytes of this lane to all lanes of its warp, which must all come; returns lane `from`'s.
const void* exchange(const void* mine, size_t size, unsigned from);
unsigned lane();

// A register that the tensor cores take as TF32. They ignore its last 13 bits; one that was not rounded before ends the program.
uint32_t checked_tf32(uint32_t word);

// D += A·B as the tensor cores do mma.m16n8k16 (BYTES of an element: 2) and mma.m16n8k8 (4): which lane holds which elements stands
// in PTX's manual. value(word) converts an element, the lowest BYTES of `word`.
template <int BYTES, class Value>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  constexpr unsigned OF_WORD = 4 / BYTES, HALF = 4 * OF_WORD;  // elements of a register; what k the second registers start at
  struct Fragments {
    uint32_t a[4], b[2];
  } mine, all[32];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  for (unsigned from = 0; from < 32; ++from) std::memcpy(&all[from], exchange(&mine, sizeof mine, from), sizeof mine);
  const unsigned group = lane() / 4, in_group = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + 8 * (i / 2), column = 2 * in_group + i % 2;
    for (unsigned k = 0; k < 2 * HALF; ++k) {
      const unsigned holder = k % HALF / OF_WORD, shift = 8 * BYTES * (k % OF_WORD);
      const uint32_t from_a = all[row % 8 * 4 + holder].a[row / 8 + 2 * (k / HALF)];
      const uint32_t from_b = all[column * 4 + holder].b[k / HALF];
      d[i] += value(from_a >> shift) * value(from_b >> shift);
    }
  }
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T other;
  std::memcpy(&other, emulation::exchange(&value, sizeof value, emulation::lane() ^ unsigned(mask)), sizeof other);
  return other;
}
