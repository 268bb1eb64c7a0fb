// The convex coupling y1 = (1−v)·F + v·x2, its inverse and its gradient, element by element (DESIGN §1, idm_fast/ops/coupling.py).
#pragma once

#include "portable.h"

namespace idm {

// torch.lerp's form: from the nearer end, so that v = 0 and v = 1 are exact.
template <class S>
IDM_INLINE S couple(S F, S x2, S v) {
  const S difference = x2 - F;
  return v < S(0.5) ? F + v * difference : x2 - (S(1) - v) * difference;
}

// x2 from y1.
template <class S>
IDM_INLINE S decouple(S y1, S F, S v) {
  return (F * (v - S(1)) + y1) / v;
}

template <class S>
struct CoupleGradient {
  S dF, dx2, dv;  // dv: this element's term of <d1, x2 − F>
};

template <class S>
IDM_INLINE CoupleGradient<S> couple_gradient(S d1, S F, S x2, S v) {
  return {d1 * (S(1) - v), d1 * v, d1 * (x2 - F)};
}

}  // namespace idm
