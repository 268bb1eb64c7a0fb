// For the kernel files: they are compiled once for each instruction set, with IDM_ISA naming it.
#pragma once

#include <new>

#include "launchers.h"

#if !defined(IDM_ISA)
#error "compile the kernels through setup.py, which sets IDM_ISA for each instruction set"
#endif

#define IDM_LAMBDA_INLINE __attribute__((always_inline))

// Iterations do not depend on each other, whatever the pointers may look like.
#if defined(__clang__)
#define IDM_VECTOR_LOOP _Pragma("clang loop vectorize(enable) interleave(enable)")
#else
#define IDM_VECTOR_LOOP _Pragma("GCC ivdep")
#endif

namespace idm::cpu::IDM_ISA {

// Memory for `count` elements, not initialized, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T) + 1, ALIGNMENT))) {}
  ~Scratch() { ::operator delete(data_, ALIGNMENT); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  T* data_;
};

// sums[n] = Σ terms[n] over i < count, where term(i, terms) gives N terms of type S; sums side by side, or each addition would
// wait for the one before, and in double from one chunk to the next.
template <class S, int N, class Term>
IDM_INLINE void sum(int64_t count, double (&sums)[N], const Term& term) {
  constexpr int LANES = 32;
  constexpr int64_t CHUNK = 128 * LANES;
  for (int n = 0; n < N; ++n) sums[n] = 0;
  for (int64_t begin = 0; begin < count; begin += CHUNK) {
    const int64_t end = begin + CHUNK < count ? begin + CHUNK : count;
    S lanes[N][LANES] = {};
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
      IDM_VECTOR_LOOP
      for (int lane = 0; lane < LANES; ++lane) {
        S terms[N];
        term(i + lane, terms);
        for (int n = 0; n < N; ++n) lanes[n][lane] += terms[n];
      }
    }
    for (; i < end; ++i) {
      S terms[N];
      term(i, terms);
      for (int n = 0; n < N; ++n) lanes[n][0] += terms[n];
    }
    for (int n = 0; n < N; ++n) {
      for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[n][lane] += lanes[n][lane + half];
      sums[n] += lanes[n][0];
    }
  }
}

#define IDM_DECLARE(kernel, arguments) void kernel(const arguments&, ParallelFor);
IDM_FOR_EACH_KERNEL(IDM_DECLARE)
#undef IDM_DECLARE

}  // namespace idm::cpu::IDM_ISA
