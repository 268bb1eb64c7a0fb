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
// wait for the one before, of eight terms each and then on in double, as sums lose digits while they grow.
template <class S, int N, class Term>
IDM_INLINE void sum(int64_t count, double (&sums)[N], const Term& term) {
  constexpr int LANES = 32;
  constexpr int64_t RUN = 8 * LANES;
  double totals[N][LANES] = {};
  for (int64_t i = 0; i < count;) {
    const int64_t stop = i + RUN < count ? i + RUN : count;
    S lanes[N][LANES] = {};
    for (; i + LANES <= stop; i += LANES) {
      IDM_VECTOR_LOOP
      for (int lane = 0; lane < LANES; ++lane) {
        S terms[N];
        term(i + lane, terms);
        for (int n = 0; n < N; ++n) lanes[n][lane] += terms[n];
      }
    }
    for (int lane = 0; i < stop; ++i, ++lane) {
      S terms[N];
      term(i, terms);
      for (int n = 0; n < N; ++n) lanes[n][lane] += terms[n];
    }
    for (int n = 0; n < N; ++n)
      for (int lane = 0; lane < LANES; ++lane) totals[n][lane] += lanes[n][lane];
  }
  for (int n = 0; n < N; ++n) {
    sums[n] = 0;
    for (int lane = 0; lane < LANES; ++lane) sums[n] += totals[n][lane];
  }
}

#define IDM_DECLARE(kernel, arguments) void kernel(const arguments&, ParallelFor);
IDM_FOR_EACH_KERNEL(IDM_DECLARE)
#undef IDM_DECLARE

}  // namespace idm::cpu::IDM_ISA
