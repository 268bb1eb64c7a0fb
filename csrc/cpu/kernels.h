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

#define IDM_DECLARE(kernel, arguments) void kernel(const arguments&, ParallelFor);
IDM_FOR_EACH_KERNEL(IDM_DECLARE)
#undef IDM_DECLARE

}  // namespace idm::cpu::IDM_ISA
