// GEGLU, value·gelu(gate) with the exact GELU, element by element (idm_fast/ops/geglu.py).
#pragma once

#include "exponential.h"

namespace idm {

template <class S>
IDM_INLINE S geglu(S value, S gate) {
  return value * (gate * normal(gate).cumulative);
}

template <class S>
struct GegluGradient {
  S value, gate;
};

template <class S>
IDM_INLINE GegluGradient<S> geglu_gradient(S dout, S value, S gate) {
  const Normal<S> n = normal(gate);
  return {dout * (gate * n.cumulative), dout * value * (n.cumulative + gate * n.density)};
}

}  // namespace idm
