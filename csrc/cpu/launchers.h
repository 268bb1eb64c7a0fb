// The CPU kernels, as the registration layer calls them. Every kernel file is compiled once for each instruction set, into a
// namespace of that name; `launchers()` picks the newest one that this machine runs.
#pragma once

#include "numbers.h"
#include "parallel.h"

namespace idm::cpu {

// Elements lie densely and in one order in all of F, x2 (or y1, d1) and the outputs. `body` is F's and dF's dtype, `stream` that
// of all others, float32 or float64; v is one number.
struct CoupleArguments {
  Dtype body, stream;
  int64_t count;
  double v;
  const void *F, *x2, *y1, *d1;
  void *y1_out, *x2_out, *dF, *dx2;
  double* dv;  // one element
};

struct Launchers {
  const char* name;
  void (*couple)(const CoupleArguments&, ParallelFor);           // F, x2 → y1_out
  void (*decouple)(const CoupleArguments&, ParallelFor);         // y1, F → x2_out
  void (*couple_backward)(const CoupleArguments&, ParallelFor);  // d1, F, x2 → dF, dx2, dv
  void (*uncouple)(const CoupleArguments&, ParallelFor);         // y1, F, d1 → x2_out (may be y1), dF, dx2 (may be d1), dv
};

// The instruction set in use: the newest that this machine has, or the one that IDM_FAST_CPU_ISA names (an error if it cannot).
const Launchers& launchers();

namespace portable { extern const Launchers launchers; }
#if defined(__x86_64__)
namespace avx2 { extern const Launchers launchers; }
namespace avx512 { extern const Launchers launchers; }
#endif

}  // namespace idm::cpu
