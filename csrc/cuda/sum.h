// The second stage of a sum: what each block left is added up by one block, in a fixed order.
#pragma once

#include "device.h"

namespace idm::cuda {

// Of `count` rows of COLUMNS numbers, the sum of column k, in every thread of a block of SUM_THREADS.
template <int COLUMNS>
__device__ __forceinline__ double column_sum(const double* partial, int64_t count, int k) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += partial[i * COLUMNS + k];
  return block_sum<SUM_THREADS>(sum);
}

template <class S>
__global__ void __launch_bounds__(SUM_THREADS) total_kernel(const double* partial, int64_t count, S* total) {
  const double sum = column_sum<1>(partial, count, 0);
  if (threadIdx.x == 0) *total = S(sum);
}

}  // namespace idm::cuda
