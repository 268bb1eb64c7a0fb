// The CPU kernels, as the registration layer calls them. Every kernel file is compiled once for each instruction set, into a
// namespace of that name; `launchers()` is the table of the one in use.
#pragma once

#include "numbers.h"
#include "parallel.h"

namespace idm::cpu {

// Elements lie densely and in one order in all of F, x2 (or y1, d1) and the outputs. `body` is F's and dF's dtype, `stream` that
// of all others, float32 or float64; v is one number.
//   couple: F, x2 → y1_out            couple_backward: d1, F, x2 → dF, dx2, dv
//   decouple: y1, F → x2_out          uncouple: y1, F, d1 → x2_out (may be y1), dF, dx2 (may be d1), dv
struct CoupleArguments {
  Dtype body, stream;
  int64_t count;
  double v;
  const void *F, *x2, *y1, *d1;
  void *y1_out, *x2_out, *dF, *dx2;
  double* dv;  // one element
};

// Whether all of `entries` lie in [0, count).
struct PermutationArguments {
  const int64_t* entries;
  int64_t count;
  bool* holds;
};

// `images` images of `pixels` pixels, `pixels` a multiple of N; matrix (N, q), permutation (pixels,) with entries in range,
// y (images, pixels/N, q); all dense, of one dtype. ᾱ are numbers.
//   measure: x → y_out                project_step: x, e, y, ᾱ → x_out
//   adjoint: y → x_out                project_step_backward: g, x, e, y, ᾱ → x_out (dx), e_out (de), y_out (dy), dabar
//   gram: x → x_out
struct ProjectArguments {
  Dtype dtype;
  int64_t images, pixels, N, q;
  const void* matrix;
  const int64_t* permutation;
  double abar_t, abar_prev;
  const void *g, *x, *e, *y;
  void *x_out, *e_out, *y_out;
  double* dabar;  // of ᾱ_t, of ᾱ_{t−1}
};

// Features (images, channels·r², height, width), images of r times the size; all dense, of one dtype, but for weights, bias and
// their gradients, which are in the dtype of sums. read: weight (channels,), write: weight (channels, 3).
//   inject_read: h, weight, bias → z_out
//   inject_read_backward: z (dz), h, weight, through (of h's shape, added to its gradient, or null) → h_out (dh), weight_out,
//     bias_out
//   inject_write: h, z, gz, aty, weight, bias → h_out
//   inject_write_backward: h (dout), z, gz, aty, weight → z_out, gz_out, aty_out, weight_out, bias_out
// With the coupling behind inject_write, whose streams have h's shape and are in `stream`, float32 or float64; v is one number:
//   inject_couple: as inject_write, x2 → y1_out
//   inject_couple_backward: d1, as inject_write, x2 → h_out, dx2, dv, and the outputs of inject_write_backward
//   inject_uncouple: y1, d1, as inject_write → x2_out (may be y1), and the outputs of inject_couple_backward
struct InjectArguments {
  Dtype dtype, stream;
  int64_t images, channels, height, width, r;
  double v;
  const void *h, *z, *gz, *aty, *weight, *bias, *through, *x2, *y1, *d1;
  void *h_out, *z_out, *gz_out, *aty_out, *weight_out, *bias_out, *y1_out, *x2_out, *dx2;
  double* dv;  // one element
};

// Dense; h (rows, 2·width), value and gate; out and dout (rows, width), out in `dtype` as h is.
//   geglu: h → out                    geglu_backward: dout, h → out (dh, as h)
struct GegluArguments {
  Dtype dtype, dout_dtype;
  int64_t rows, width;
  const void *h, *dout;
  void* out;
};

// x (images, channels, positions), or (images, positions, channels) where `channels_last`; dense, as are dout and out, which lie
// as x does. weight, bias, their gradients (channels,), mean and rstd (images, groups): in the dtype of sums over x.
//   group_norm_silu: x, weight, bias → out, mean_out, rstd_out
//   group_norm_silu_backward: dout, x, weight, bias, mean, rstd → out (dx), weight_out, bias_out
struct GroupNormArguments {
  Dtype dtype, out_dtype, dout_dtype;
  bool channels_last, silu;
  int64_t images, channels, groups, positions;
  double eps;
  const void *x, *dout, *weight, *bias, *mean, *rstd;
  void *out, *mean_out, *rstd_out, *weight_out, *bias_out;
};

// x, dout and out (rows, width), dense; weight, bias, their gradients (width,), mean and rstd (rows,): in the dtype of sums over x.
//   layer_norm: x, weight, bias → out, mean_out, rstd_out
//   layer_norm_backward: dout, x, weight, mean, rstd → out (dx), weight_out, bias_out
struct LayerNormArguments {
  Dtype dtype, out_dtype, dout_dtype;
  int64_t rows, width;
  double eps;
  const void *x, *dout, *weight, *bias, *mean, *rstd;
  void *out, *mean_out, *rstd_out, *weight_out, *bias_out;
};

#define IDM_FOR_EACH_KERNEL(EACH)                    \
  EACH(couple, CoupleArguments)                      \
  EACH(decouple, CoupleArguments)                    \
  EACH(couple_backward, CoupleArguments)             \
  EACH(uncouple, CoupleArguments)                    \
  EACH(check_permutation, PermutationArguments)      \
  EACH(measure, ProjectArguments)                    \
  EACH(adjoint, ProjectArguments)                    \
  EACH(gram, ProjectArguments)                       \
  EACH(project_step, ProjectArguments)               \
  EACH(project_step_backward, ProjectArguments)      \
  EACH(inject_read, InjectArguments)                 \
  EACH(inject_read_backward, InjectArguments)        \
  EACH(inject_write, InjectArguments)                \
  EACH(inject_write_backward, InjectArguments)       \
  EACH(inject_couple, InjectArguments)               \
  EACH(inject_couple_backward, InjectArguments)      \
  EACH(inject_uncouple, InjectArguments)             \
  EACH(group_norm_silu, GroupNormArguments)          \
  EACH(group_norm_silu_backward, GroupNormArguments) \
  EACH(layer_norm, LayerNormArguments)               \
  EACH(layer_norm_backward, LayerNormArguments)      \
  EACH(geglu, GegluArguments)                        \
  EACH(geglu_backward, GegluArguments)

struct Launchers {
  const char* name;
#define IDM_POINTER(kernel, arguments) void (*kernel)(const arguments&, ParallelFor);
  IDM_FOR_EACH_KERNEL(IDM_POINTER)
#undef IDM_POINTER
};

// The instruction set in use: the newest that this machine has, or the one that IDM_FAST_CPU_ISA names (an error if it cannot).
const Launchers& launchers();

// Uses another one from now on, in all threads; std::runtime_error when this machine does not run it. For tests.
void use_instruction_set(const char* name);

namespace portable { extern const Launchers launchers; }
#if defined(__x86_64__)
namespace avx2 { extern const Launchers launchers; }
namespace avx512 { extern const Launchers launchers; }
#endif

}  // namespace idm::cpu
