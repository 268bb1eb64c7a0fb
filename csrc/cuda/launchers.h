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

// x (images, channels, positions), or (images, positions, channels) where `last` (NHWC), dense; weight and bias (channels,), mean
// and rstd (images, groups), all of the dtype of sums: float64 for float64, else float32. norm_serves(dtype of x, of out or dout)
// holds.
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

// Whether the norms have kernels that read x and write out, or read dout and x, in these dtypes.
inline bool norm_serves(Dtype x, Dtype out) {
  return x == out || (x == Dtype::float32 && (out == Dtype::bfloat16 || out == Dtype::float16));
}

int64_t norm_partials(const NormArguments&);
void group_norm_silu(const NormArguments&, void* stream);
void group_norm_silu_backward(const NormArguments&, void* stream);

// `images` images of `pixels` pixels, `pixels` a multiple of N; matrix (N, q), permutation (pixels,), y (images, pixels/N, q);
// all dense, of one dtype. ᾱ are one element each of the dtype of sums. An entry of the permutation out of range is never
// followed: the pixel is read as NaN, which its row's measurements then are, and not written.
//   measure: x → y_out                project_step: x, e, y, ᾱ → x_out; y_out is room for the residual
//   adjoint: y → x_out                project_step_backward: g, x, e, y, ᾱ → x_out (dx), e_out (de), y_out (dy), dabar
//   gram: x → x_out; y_out is room for A x
struct ProjectArguments {
  Dtype dtype;
  bool tf32;  // of float32: products with factors rounded to TF32, on the tensor cores, instead of exact ones
  int64_t images, pixels, N, q;
  const void* matrix;
  const int64_t* permutation;
  const void *abar_t, *abar_prev;
  const void *g, *x, *e, *y;
  void *x_out, *e_out, *y_out;
  void *dabar_t, *dabar_prev;
  double* partial;  // of the gradient: project_partials(…) numbers
};

int64_t project_partials(const ProjectArguments&);
void measure(const ProjectArguments&, void* stream);
void adjoint(const ProjectArguments&, void* stream);
void gram(const ProjectArguments&, void* stream);
void project_step(const ProjectArguments&, void* stream);
void project_step_backward(const ProjectArguments&, void* stream);

// h: `rows` rows of 2·width elements, value and gate; out and dout: rows of `width`; dh like h; all dense, of one dtype.
struct GegluArguments {
  Dtype dtype;
  int64_t rows, width;
  const void *h, *dout;
  void *out, *dh;
};

void geglu(const GegluArguments&, void* stream);           // h → out
void geglu_backward(const GegluArguments&, void* stream);  // dout, h → dh

// x, dout, out, dx: `rows` rows of `width` elements; weight, bias, dweight, dbias (width,), mean and rstd (rows,), all of the dtype
// of sums; everything dense. Dtypes of x and out (dout) as in NormArguments.
struct LayerNormArguments {
  Dtype x_dtype, out_dtype;  // the second is also dout's
  int64_t rows, width;
  double eps;
  const void *x, *dout, *weight, *bias;
  void *out, *mean, *rstd;  // layer_norm writes all three; its gradient reads the statistics
  void *dx, *dweight, *dbias;
  void* partial;  // of the gradient: layer_norm_partials(…) numbers of the dtype of sums
};

int64_t layer_norm_partials(const LayerNormArguments&);
void layer_norm(const LayerNormArguments&, void* stream);
void layer_norm_backward(const LayerNormArguments&, void* stream);

// h, through, out (images, planes·r², height, width), or with the channels last where `last`; images z, gz, aty
// (images, 1, height·r, width·r); all dense, of one dtype; weight, bias, dweight, dbias of the dtype of sums. In a coupling x2, y1,
// d1 and dx2 lie as h does and are of `stream_dtype`, float32 or float64, and so are the elements v and dv.
//   inject_read: h, weight (planes), bias (1) → dz            inject_write: h, z, gz, aty, weight (planes, 3), bias → out
//   inject_read_backward: z (the image's gradient), h, weight, through (or null: what else comes back to h) → out, dweight, dbias
//   inject_write_backward: h (the gradient of out), z, gz, aty, weight → dz, dgz, daty, dweight, dbias
//   inject_couple: as inject_write, stream (x2), v → stream_out (y1)
//   inject_couple_backward: as inject_write, stream (x2), v, d1 → out (dh), dz, dgz, daty, dweight, dbias, dx2, dv
//   inject_uncouple: the same with y1 as stream → also stream_out (x2; may be y1)
struct InjectArguments {
  Dtype dtype, stream_dtype;  // where there is no coupling, the second is that of sums
  int64_t images, planes, height, width;
  int r;
  bool last;
  const void *h, *through, *z, *gz, *aty, *weight, *bias, *stream, *d1, *v;
  void *out, *dz, *dgz, *daty, *dweight, *dbias, *stream_out, *dx2, *dv;
  double* partial;  // of a gradient: inject_partials(…) numbers
};

int64_t inject_partials(const InjectArguments&);
void inject_read(const InjectArguments&, void* stream);
void inject_read_backward(const InjectArguments&, void* stream);
void inject_write(const InjectArguments&, void* stream);
void inject_write_backward(const InjectArguments&, void* stream);
void inject_couple(const InjectArguments&, void* stream);
void inject_couple_backward(const InjectArguments&, void* stream);
void inject_uncouple(const InjectArguments&, void* stream);

}  // namespace idm::cuda
