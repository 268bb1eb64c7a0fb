// The injector's two halves, one channel and position at a time (DESIGN §1, idm_fast/ops/injector.py).
#pragma once

#include "portable.h"

namespace idm {

// A channel's three weights of the 1×1 convolution that spreads z, AᵀA z and Aᵀy over the features.
template <class S>
struct Spread {
  S z, gz, aty;
};

template <class S>
IDM_INLINE S spread(S h, S z, S gz, S aty, Spread<S> weight, S bias) {
  return h + (bias + weight.z * z + weight.gz * gz + weight.aty * aty);
}

}  // namespace idm
