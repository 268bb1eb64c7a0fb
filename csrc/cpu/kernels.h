// For the kernel files: they are compiled once for each instruction set, with IDM_ISA naming it.
#pragma once

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

void couple(const CoupleArguments&, ParallelFor);
void decouple(const CoupleArguments&, ParallelFor);
void couple_backward(const CoupleArguments&, ParallelFor);
void uncouple(const CoupleArguments&, ParallelFor);

}  // namespace idm::cpu::IDM_ISA
