// torch's threads for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace idm::cpu {

inline void in_torch_threads(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace idm::cpu
