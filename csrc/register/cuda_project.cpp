// Checks and registration of the projection's CUDA kernels. The permutation's entries are on the GPU: the kernels check them.
// Each op is there twice: its overload "tf32" multiplies float32 on the tensor cores (idm_fast/ops/native.py chooses).
#include <tuple>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

// The operator, checked and dense; `data` is what it is applied to, of `pixels` pixels an image.
struct Inputs {
  Tensor matrix, permutation;
  cuda::ProjectArguments arguments;
};

Inputs prepare(const char* name, const Tensor& data, const Tensor& matrix, const Tensor& permutation, int64_t pixels, bool tf32) {
  check_cuda(name, data);
  check_beside("matrix", matrix, name, data);
  check_beside("permutation", permutation, name, data);
  check_same_dtype(name, data, "matrix", matrix);
  check(matrix.dim() == 2 && matrix.size(0) > 0, "matrix is ", shape_of(matrix), ", expected (N, q)");
  check(permutation.scalar_type() == ScalarType::Long, "permutation must be int64");
  check(permutation.dim() == 1 && permutation.size(0) == pixels, "permutation is ", shape_of(permutation), ", expected (", pixels,
        ",), a place for each pixel of an image");
  check(pixels % matrix.size(0) == 0, "matrix is ", shape_of(matrix), ", and ", pixels, " pixels cannot be cut into rows of ",
        matrix.size(0));
  Inputs in{dense(matrix), dense(permutation), {}};
  cuda::ProjectArguments& a = in.arguments;
  a.dtype = dtype_of(name, data);
  a.tf32 = tf32;
  a.images = data.size(0);
  a.pixels = pixels;
  a.N = matrix.size(0);
  a.q = matrix.size(1);
  a.matrix = in.matrix.const_data_ptr();
  a.permutation = static_cast<const int64_t*>(in.permutation.const_data_ptr());
  return in;
}

Inputs prepare_image(const char* name, const Tensor& x, const Tensor& matrix, const Tensor& permutation, bool tf32) {
  check(x.dim() == 4 && x.size(1) == 1, name, " is ", shape_of(x), ", expected (B, 1, H, W)");
  return prepare(name, x, matrix, permutation, x.size(2) * x.size(3), tf32);
}

Tensor new_measurements(const Inputs& in, const Tensor& x) {
  const cuda::ProjectArguments& a = in.arguments;
  return torch::stable::new_empty(x, {a.images, a.pixels / a.N, a.q});
}

Tensor new_images(const Tensor& x, int64_t images, int64_t height, int64_t width) {
  return torch::stable::new_empty(x, {images, int64_t{1}, height, width});
}

void check_measurements(const Tensor& y, const Inputs& in) {
  const cuda::ProjectArguments& a = in.arguments;
  check(y.dim() == 3 && y.size(0) == a.images && y.size(1) == a.pixels / a.N && y.size(2) == a.q, "y is ", shape_of(y),
        ", expected (", a.images, ", ", a.pixels / a.N, ", ", a.q, ")");
}

template <bool TF32>
Tensor measure(Tensor x, Tensor matrix, Tensor permutation) {
  OnDevice device("x", x);
  Inputs in = prepare_image("x", x, matrix, permutation, TF32);
  Tensor y = new_measurements(in, x), x_dense = dense(x);
  in.arguments.x = x_dense.const_data_ptr();
  in.arguments.y_out = y.mutable_data_ptr();
  cuda::measure(in.arguments, device.stream);
  return y;
}

template <bool TF32>
Tensor adjoint(Tensor y, Tensor matrix, Tensor permutation, int64_t height, int64_t width) {
  OnDevice device("y", y);
  check(y.dim() == 3, "y is ", shape_of(y), ", expected (B, H·W/N, q)");
  Inputs in = prepare("y", y, matrix, permutation, product_of("height and width", height, width), TF32);
  check_measurements(y, in);
  Tensor x = new_images(y, y.size(0), height, width), y_dense = dense(y);
  in.arguments.y = y_dense.const_data_ptr();
  in.arguments.x_out = x.mutable_data_ptr();
  cuda::adjoint(in.arguments, device.stream);
  return x;
}

template <bool TF32>
Tensor gram(Tensor x, Tensor matrix, Tensor permutation) {
  OnDevice device("x", x);
  Inputs in = prepare_image("x", x, matrix, permutation, TF32);
  Tensor out = new_images(x, x.size(0), x.size(2), x.size(3)), x_dense = dense(x);
  Tensor measured = new_measurements(in, x);
  in.arguments.x = x_dense.const_data_ptr();
  in.arguments.x_out = out.mutable_data_ptr();
  in.arguments.y_out = measured.mutable_data_ptr();
  cuda::gram(in.arguments, device.stream);
  return out;
}

// What a step and its gradient read, checked and dense.
struct StepInputs {
  Tensor x, e, y, abar_t, abar_prev;  // ᾱ in the dtype of sums
  Inputs in;
};

StepInputs prepare_step(const Tensor& x, const Tensor& e, const Tensor& y, const Tensor& matrix, const Tensor& permutation,
                        const Tensor& abar_t, const Tensor& abar_prev, bool tf32) {
  Inputs in = prepare_image("x", x, matrix, permutation, tf32);
  check_beside("e", e, "x", x);
  check_beside("y", y, "x", x);
  check_beside("abar_t", abar_t, "x", x);
  check_beside("abar_prev", abar_prev, "x", x);
  check_same_shape("x", x, "e", e);
  check_same_dtype("x", x, "e", e);
  check_same_dtype("x", x, "y", y);
  check_measurements(y, in);
  const Dtype sums = accumulate_of(in.arguments.dtype);
  StepInputs step{dense(x), dense(e), dense(y), one_number("abar_t", abar_t, sums), one_number("abar_prev", abar_prev, sums), in};
  step.in.arguments.abar_t = step.abar_t.const_data_ptr();
  step.in.arguments.abar_prev = step.abar_prev.const_data_ptr();
  step.in.arguments.x = step.x.const_data_ptr();
  step.in.arguments.e = step.e.const_data_ptr();
  step.in.arguments.y = step.y.const_data_ptr();
  return step;
}

template <bool TF32>
Tensor project_step(Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t, Tensor abar_prev) {
  OnDevice device("x", x);
  StepInputs step = prepare_step(x, e, y, matrix, permutation, abar_t, abar_prev, TF32);
  Tensor out = new_images(x, x.size(0), x.size(2), x.size(3));
  Tensor residual = new_measurements(step.in, x);
  step.in.arguments.x_out = out.mutable_data_ptr();
  step.in.arguments.y_out = residual.mutable_data_ptr();
  cuda::project_step(step.in.arguments, device.stream);
  return out;
}

template <bool TF32>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_step_backward(Tensor g, Tensor x, Tensor e, Tensor y, Tensor matrix,
                                                                        Tensor permutation, Tensor abar_t, Tensor abar_prev) {
  OnDevice device("x", x);
  StepInputs step = prepare_step(x, e, y, matrix, permutation, abar_t, abar_prev, TF32);
  check_beside("g", g, "x", x);
  check_same_shape("x", x, "g", g);
  check_same_dtype("x", x, "g", g);
  Tensor dx = new_images(x, x.size(0), x.size(2), x.size(3)), de = new_images(x, x.size(0), x.size(2), x.size(3));
  Tensor dy = new_measurements(step.in, y), g_dense = dense(g);
  Tensor dabar_t = torch::stable::empty_like(step.abar_t), dabar_prev = torch::stable::empty_like(step.abar_prev);
  Tensor partial = workspace(x, cuda::project_partials(step.in.arguments), Dtype::float64);
  step.in.arguments.g = g_dense.const_data_ptr();
  step.in.arguments.x_out = dx.mutable_data_ptr();
  step.in.arguments.e_out = de.mutable_data_ptr();
  step.in.arguments.y_out = dy.mutable_data_ptr();
  step.in.arguments.dabar_t = dabar_t.mutable_data_ptr();
  step.in.arguments.dabar_prev = dabar_prev.mutable_data_ptr();
  step.in.arguments.partial = static_cast<double*>(partial.mutable_data_ptr());
  cuda::project_step_backward(step.in.arguments, device.stream);
  return {dx, de, dy, in_dtype(dabar_t, abar_t.scalar_type()), in_dtype(dabar_prev, abar_prev.scalar_type())};
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("measure", TORCH_BOX(&measure<false>));
  m.impl("measure.tf32", TORCH_BOX(&measure<true>));
  m.impl("adjoint", TORCH_BOX(&adjoint<false>));
  m.impl("adjoint.tf32", TORCH_BOX(&adjoint<true>));
  m.impl("gram", TORCH_BOX(&gram<false>));
  m.impl("gram.tf32", TORCH_BOX(&gram<true>));
  m.impl("project_step", TORCH_BOX(&project_step<false>));
  m.impl("project_step.tf32", TORCH_BOX(&project_step<true>));
  m.impl("project_step_backward", TORCH_BOX(&project_step_backward<false>));
  m.impl("project_step_backward.tf32", TORCH_BOX(&project_step_backward<true>));
}

}  // namespace idm::cuda_ops
