// The CUDA kernels, as the registration layer calls them: plain pointers to the memory of one GPU, which is the current one, and
// a stream of it. All return at once; a launch that CUDA refuses throws std::runtime_error.
#pragma once

#include "../cpu/numbers.h"

namespace idm::cuda {

// Elements lie densely and in one order in all of F, x2 (or y1, d1) and the outputs. `body` is F's and dF's dtype, `stream` that
// of all others, float32 or float64; v and dv are one element of it each. `partial` has room for couple_partials(…) numbers.
//   couple: F, x2 → y1_out            couple_backward: d1, F, x2 → dF, dx2, dv
//   decouple: y1, F → x2_out          uncouple: y1, F, d1 → x2_out (may be y1), dF, dx2 (may be d1), dv
struct CoupleArguments {
  Dtype body, stream;
  int64_t count;
  const void *F, *x2, *y1, *d1, *v;
  void *y1_out, *x2_out, *dF, *dx2, *dv;
  double* partial;
};

int64_t couple_partials(Dtype stream, int64_t count);
void couple(const CoupleArguments&, void* stream);
void decouple(const CoupleArguments&, void* stream);
void couple_backward(const CoupleArguments&, void* stream);
void uncouple(const CoupleArguments&, void* stream);

// x (images, channels, positions), or (images, positions, channels) where `last` (NHWC), dense; weight and bias (channels,), mean and
// rstd (images, groups), all of the dtype of sums: float64 for float64, else float32. x and out (dout) have
// the same dtype, or x is float32 and out 16 bits wide.
struct NormArguments {
  Dtype x_dtype, out_dtype;  // the second is also dout's
  int64_t images, channels, positions, groups;
  double eps;
  bool silu, last;
  const void *x, *dout, *weight, *bias;
  void *out, *mean, *rstd;       // group_norm_silu writes all three; its gradient reads the statistics
  void *dx, *dweight, *dbias;
  void* partial;    // norm_partials(…) numbers of the dtype of sums
  double* sums;     // of the gradient: images·channels·2 numbers
  void* per_group;  // of the gradient: images·groups·2 numbers of the dtype of sums
};

int64_t norm_partials(const NormArguments&);
void group_norm_silu(const NormArguments&, void* stream);
void group_norm_silu_backward(const NormArguments&, void* stream);

}  // namespace idm::cuda
