// Checks and registration of the coupling's CPU kernels.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

// F, the streams that are read, and v; checked, and in one dense order.
struct Inputs {
  Tensor F, first, second;
  bool copied;
  CoupleArguments arguments;
};

Inputs prepare(Tensor F, const char* first_name, Tensor first, const char* second_name, Tensor second, const Tensor& v) {
  check_cpu("F", F);
  check_cpu(first_name, first);
  check_cpu(second_name, second);
  check_same_shape("F", F, first_name, first);
  check_same_shape("F", F, second_name, second);
  check_same_dtype(first_name, first, second_name, second);
  const Dtype body = dtype_of("F", F), stream = dtype_of(first_name, first);
  check(stream == Dtype::float32 || stream == Dtype::float64, first_name, " must be float32 or float64");
  const bool copied = !one_dense_row({&first, &second, &F});
  if (copied) {
    F = torch::stable::contiguous(F);
    first = torch::stable::contiguous(first);
    second = torch::stable::contiguous(second);
  }
  CoupleArguments a{};
  a.body = body;
  a.stream = stream;
  a.count = F.numel();
  a.v = number("v", v);
  a.F = F.const_data_ptr();
  return {F, first, second, copied, a};
}

// Gives `result`, which lies as its kernel wrote it, the layout that empty_like gives a tensor like `model`.
Tensor laid_out_as(const Tensor& model, bool copied, Tensor result) {
  if (!copied) return result;
  Tensor out = torch::stable::empty_like(model);
  return torch::stable::copy_(out, result);
}

Tensor couple(Tensor F, Tensor x2, Tensor v) {
  Inputs in = prepare(F, "x2", x2, "x2", x2, v);
  Tensor y1 = torch::stable::empty_like(in.first);
  in.arguments.x2 = in.first.const_data_ptr();
  in.arguments.y1_out = y1.mutable_data_ptr();
  launchers().couple(in.arguments, in_torch_threads);
  return laid_out_as(x2, in.copied, y1);
}

Tensor decouple(Tensor y1, Tensor F, Tensor v) {
  Inputs in = prepare(F, "y1", y1, "y1", y1, v);
  Tensor x2 = torch::stable::empty_like(in.first);
  in.arguments.y1 = in.first.const_data_ptr();
  in.arguments.x2_out = x2.mutable_data_ptr();
  launchers().decouple(in.arguments, in_torch_threads);
  return laid_out_as(y1, in.copied, x2);
}

std::tuple<Tensor, Tensor, Tensor> couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) {
  Inputs in = prepare(F, "d1", d1, "x2", x2, v);
  Tensor dF = torch::stable::empty_like(in.F), dx2 = torch::stable::empty_like(in.first);
  double dv;
  in.arguments.d1 = in.first.const_data_ptr();
  in.arguments.x2 = in.second.const_data_ptr();
  in.arguments.dF = dF.mutable_data_ptr();
  in.arguments.dx2 = dx2.mutable_data_ptr();
  in.arguments.dv = &dv;
  launchers().couple_backward(in.arguments, in_torch_threads);
  return {laid_out_as(F, in.copied, dF), laid_out_as(d1, in.copied, dx2), number_like(v, dv)};
}

// x2 into `x2`, which may be `in.first`.
std::tuple<Tensor, Tensor, Tensor> uncouple_into(Inputs& in, Tensor& x2, const Tensor& F, const Tensor& d1, const Tensor& v) {
  Tensor dF = torch::stable::empty_like(in.F), dx2 = torch::stable::empty_like(in.second);
  double dv;
  in.arguments.y1 = in.first.const_data_ptr();
  in.arguments.d1 = in.second.const_data_ptr();
  in.arguments.x2_out = x2.mutable_data_ptr();
  in.arguments.dF = dF.mutable_data_ptr();
  in.arguments.dx2 = dx2.mutable_data_ptr();
  in.arguments.dv = &dv;
  launchers().uncouple(in.arguments, in_torch_threads);
  return {laid_out_as(F, in.copied, dF), laid_out_as(d1, in.copied, dx2), number_like(v, dv)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) {
  Inputs in = prepare(F, "y1", y1, "d1", d1, v);
  Tensor x2 = torch::stable::empty_like(in.first);
  auto [dF, dx2, dv] = uncouple_into(in, x2, F, d1, v);
  return {laid_out_as(y1, in.copied, x2), dF, dx2, dv};
}

std::tuple<Tensor, Tensor, Tensor> uncouple_in_place(Tensor y1, Tensor F, Tensor d1, Tensor v) {
  Inputs in = prepare(F, "y1", y1, "d1", d1, v);
  auto gradients = uncouple_into(in, in.first, F, d1, v);
  if (in.copied) torch::stable::copy_(y1, in.first);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("couple", TORCH_BOX(&couple));
  m.impl("decouple", TORCH_BOX(&decouple));
  m.impl("couple_backward", TORCH_BOX(&couple_backward));
  m.impl("uncouple", TORCH_BOX(&uncouple));
  m.impl("uncouple_", TORCH_BOX(&uncouple_in_place));
}

}  // namespace idm::cpu
