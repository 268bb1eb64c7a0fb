// Checks and registration of the projection's CPU kernels.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

// The operator, checked and dense; `data` is what it is applied to, of `pixels` pixels an image.
struct Inputs {
  Tensor matrix, permutation;
  ProjectArguments arguments;
};

Inputs prepare(const char* name, const Tensor& data, const Tensor& matrix, const Tensor& permutation, int64_t pixels) {
  check_cpu(name, data);
  check_cpu("matrix", matrix);
  check_cpu("permutation", permutation);
  check_same_dtype(name, data, "matrix", matrix);
  check(matrix.dim() == 2 && matrix.size(0) > 0, "matrix is ", shape_of(matrix), ", expected (N, q)");
  check(permutation.scalar_type() == ScalarType::Long, "permutation must be int64");
  check(permutation.dim() == 1 && permutation.size(0) == pixels, "permutation is ", shape_of(permutation), ", expected (", pixels,
        ",), a place for each pixel of an image");
  check(pixels % matrix.size(0) == 0, "matrix is ", shape_of(matrix), ", and ", pixels, " pixels cannot be cut into rows of ",
        matrix.size(0));
  Inputs in{dense(matrix), dense(permutation), {}};
  bool holds = true;
  launchers().check_permutation({static_cast<const int64_t*>(in.permutation.const_data_ptr()), pixels, &holds}, in_torch_threads);
  check(holds, "permutation has entries outside of [0, ", pixels, ")");
  ProjectArguments& a = in.arguments;
  a.dtype = dtype_of(name, data);
  a.images = data.size(0);
  a.pixels = pixels;
  a.N = matrix.size(0);
  a.q = matrix.size(1);
  a.matrix = in.matrix.const_data_ptr();
  a.permutation = static_cast<const int64_t*>(in.permutation.const_data_ptr());
  return in;
}

Inputs prepare_image(const char* name, const Tensor& x, const Tensor& matrix, const Tensor& permutation) {
  check(x.dim() == 4 && x.size(1) == 1, name, " is ", shape_of(x), ", expected (B, 1, H, W)");
  return prepare(name, x, matrix, permutation, x.size(2) * x.size(3));
}

Tensor new_measurements(const Inputs& in, const Tensor& x) {
  const ProjectArguments& a = in.arguments;
  return torch::stable::new_empty(x, {a.images, a.pixels / a.N, a.q});
}

Tensor new_images(const Tensor& x, int64_t images, int64_t height, int64_t width) {
  return torch::stable::new_empty(x, {images, int64_t{1}, height, width});
}

void check_measurements(const Tensor& y, const Inputs& in) {
  const ProjectArguments& a = in.arguments;
  check(y.dim() == 3 && y.size(0) == a.images && y.size(1) == a.pixels / a.N && y.size(2) == a.q, "y is ", shape_of(y),
        ", expected (", a.images, ", ", a.pixels / a.N, ", ", a.q, ")");
}

Tensor measure(Tensor x, Tensor matrix, Tensor permutation) {
  Inputs in = prepare_image("x", x, matrix, permutation);
  Tensor y = new_measurements(in, x), x_dense = dense(x);
  in.arguments.x = x_dense.const_data_ptr();
  in.arguments.y_out = y.mutable_data_ptr();
  launchers().measure(in.arguments, in_torch_threads);
  return y;
}

Tensor adjoint(Tensor y, Tensor matrix, Tensor permutation, int64_t height, int64_t width) {
  check(y.dim() == 3, "y is ", shape_of(y), ", expected (B, H·W/N, q)");
  Inputs in = prepare("y", y, matrix, permutation, product_of("height and width", height, width));
  check_measurements(y, in);
  Tensor x = new_images(y, y.size(0), height, width), y_dense = dense(y);
  in.arguments.y = y_dense.const_data_ptr();
  in.arguments.x_out = x.mutable_data_ptr();
  launchers().adjoint(in.arguments, in_torch_threads);
  return x;
}

Tensor gram(Tensor x, Tensor matrix, Tensor permutation) {
  Inputs in = prepare_image("x", x, matrix, permutation);
  Tensor out = new_images(x, x.size(0), x.size(2), x.size(3)), x_dense = dense(x);
  in.arguments.x = x_dense.const_data_ptr();
  in.arguments.x_out = out.mutable_data_ptr();
  launchers().gram(in.arguments, in_torch_threads);
  return out;
}

// What a step and its gradient read, checked and dense.
struct StepInputs {
  Tensor x, e, y;
  Inputs in;
};

StepInputs prepare_step(const Tensor& x, const Tensor& e, const Tensor& y, const Tensor& matrix, const Tensor& permutation,
                        const Tensor& abar_t, const Tensor& abar_prev) {
  Inputs in = prepare_image("x", x, matrix, permutation);
  check_cpu("e", e);
  check_cpu("y", y);
  check_same_shape("x", x, "e", e);
  check_same_dtype("x", x, "e", e);
  check_same_dtype("x", x, "y", y);
  check_measurements(y, in);
  in.arguments.abar_t = number("abar_t", abar_t);
  in.arguments.abar_prev = number("abar_prev", abar_prev);
  StepInputs step{dense(x), dense(e), dense(y), in};
  step.in.arguments.x = step.x.const_data_ptr();
  step.in.arguments.e = step.e.const_data_ptr();
  step.in.arguments.y = step.y.const_data_ptr();
  return step;
}

Tensor project_step(Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t, Tensor abar_prev) {
  StepInputs step = prepare_step(x, e, y, matrix, permutation, abar_t, abar_prev);
  Tensor out = new_images(x, x.size(0), x.size(2), x.size(3));
  step.in.arguments.x_out = out.mutable_data_ptr();
  launchers().project_step(step.in.arguments, in_torch_threads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_step_backward(Tensor g, Tensor x, Tensor e, Tensor y, Tensor matrix,
                                                                        Tensor permutation, Tensor abar_t, Tensor abar_prev) {
  StepInputs step = prepare_step(x, e, y, matrix, permutation, abar_t, abar_prev);
  check_cpu("g", g);
  check_same_shape("x", x, "g", g);
  check_same_dtype("x", x, "g", g);
  Tensor dx = new_images(x, x.size(0), x.size(2), x.size(3)), de = new_images(x, x.size(0), x.size(2), x.size(3));
  Tensor dy = new_measurements(step.in, y), g_dense = dense(g);
  double dabar[2];
  step.in.arguments.g = g_dense.const_data_ptr();
  step.in.arguments.x_out = dx.mutable_data_ptr();
  step.in.arguments.e_out = de.mutable_data_ptr();
  step.in.arguments.y_out = dy.mutable_data_ptr();
  step.in.arguments.dabar = dabar;
  launchers().project_step_backward(step.in.arguments, in_torch_threads);
  return {dx, de, dy, number_like(abar_t, dabar[0]), number_like(abar_prev, dabar[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("measure", TORCH_BOX(&measure));
  m.impl("adjoint", TORCH_BOX(&adjoint));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("project_step", TORCH_BOX(&project_step));
  m.impl("project_step_backward", TORCH_BOX(&project_step_backward));
}

}  // namespace idm::cpu
