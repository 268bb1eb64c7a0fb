// How kernels use threads without knowing torch: the registration layer hands them torch's own loop.
#pragma once

#include <cstdint>

#include "../formulas/portable.h"

namespace idm::cpu {

// Runs body(begin, end, context) over pieces of [0, count) in torch's threads; returns when all are done.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// f(index) for every index of [0, count), `grain` indices at least to a thread. Results must not depend on which thread runs
// an index: then they are the same for every number of threads.
template <class Function>
IDM_INLINE void parallel(ParallelFor loop, int64_t count, int64_t grain, const Function& f) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Function& each = *static_cast<const Function*>(context);
    for (int64_t index = begin; index < end; ++index) each(index);
  };
  loop(count, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace idm::cpu
