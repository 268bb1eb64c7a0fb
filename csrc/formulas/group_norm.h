// GroupNorm with SiLU behind it, and LayerNorm, element by element (idm_fast/ops/group_norm.py, layer_norm.py).
#pragma once

#include "exponential.h"

namespace idm {

template <class S>
IDM_INLINE S silu(S u) {
#if defined(__CUDA_ARCH__)
  return u * sigmoid(u);  // which a GPU has a fast quotient for
#else
  return u / one_and_exponential(u);
#endif
}

template <class S>
IDM_INLINE S silu_derivative(S u) {
  const S s = sigmoid(u);
  return s + s * (u - u * s);
}

// (x − mean)·rstd·weight + bias; `scale` is rstd·weight. The difference first, which is exact where digits would cancel.
template <class S>
IDM_INLINE S normalized(S x, S mean, S scale, S bias) {
  return (x - mean) * scale + bias;
}

// The gradient of x from that of the norm's output, g: rstd·(g·weight − (Σ g·weight + x̂·Σ g·weight·x̂)/n) over the n elements
// of a group, with x̂ = (x − mean)·rstd. `scale` is rstd·weight, `shift` rstd·Σ g·weight/n, `slope` rstd²·Σ g·weight·x̂/n.
template <class S>
IDM_INLINE S norm_gradient(S g, S x, S mean, S scale, S shift, S slope) {
  return g * scale - (shift + (x - mean) * slope);
}

}  // namespace idm
