// One sampling step around the projection, a pixel at a time (DESIGN §1, idm_fast/ops/projection.py).
#pragma once

#include "portable.h"

namespace idm {

// √ᾱ_t, √(1−ᾱ_t), √ᾱ_{t−1}, √(1−ᾱ_{t−1}).
template <class S>
struct Step {
  S s, c, s_prev, c_prev;
};

template <class S>
IDM_INLINE S denoised(S x, S e, Step<S> step) {
  return (x - step.c * e) / step.s;
}

template <class S>
IDM_INLINE S ddim_update(S x0, S e, Step<S> step) {
  return step.s_prev * x0 + step.c_prev * e;
}

// The gradient of e, from that of the step's result and that of the denoised image before it is projected.
template <class S>
IDM_INLINE S noise_gradient(S g, S dx0, Step<S> step) {
  return step.c_prev * g - step.c / step.s * dx0;
}

template <class S>
struct AbarGradient {
  S of_t, of_prev;
};

// The gradients of ᾱ_t and ᾱ_{t−1} from <dx0, x0>, <dx0, e>, <g, e> and <dy, y>. The projected image p, with which <g, p> would
// be formed, is not needed: <g, p> is (<dx0, x0> + <dy, y>)/√ᾱ_{t−1}.
template <class S>
IDM_INLINE AbarGradient<S> abar_gradient(S dx0_x0, S dx0_e, S g_e, S dy_y, Step<S> step) {
  return {(dx0_e / step.c - dx0_x0 / step.s) / (2 * step.s),
          (dx0_x0 + dy_y) / (2 * step.s_prev * step.s_prev) - g_e / (2 * step.c_prev)};
}

}  // namespace idm
