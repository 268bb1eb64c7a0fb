// Checks and registration of the coupling's CUDA kernels.
#include <tuple>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

// F, the streams that are read, and v; checked, in one dense order, and v in the streams' dtype.
struct Inputs {
  Tensor F, first, second, v;
  bool copied;
  cuda::CoupleArguments arguments;
};

Inputs prepare(Tensor F, const char* first_name, Tensor first, const char* second_name, Tensor second, const Tensor& v) {
  check_cuda("F", F);
  check_beside(first_name, first, "F", F);
  check_beside(second_name, second, "F", F);
  check_beside("v", v, "F", F);
  check_same_shape("F", F, first_name, first);
  check_same_shape("F", F, second_name, second);
  check_same_dtype(first_name, first, second_name, second);
  cuda::CoupleArguments a{};
  a.body = dtype_of("F", F);
  a.stream = dtype_of(first_name, first);
  check(a.stream == Dtype::float32 || a.stream == Dtype::float64, first_name, " must be float32 or float64");
  const Tensor weight = one_number("v", v, a.stream);
  const bool copied = !one_dense_row({&first, &second, &F});
  if (copied) {
    F = torch::stable::contiguous(F);
    first = torch::stable::contiguous(first);
    second = torch::stable::contiguous(second);
  }
  a.count = F.numel();
  a.F = F.const_data_ptr();
  a.v = weight.const_data_ptr();
  return {F, first, second, weight, copied, a};
}

Tensor couple(Tensor F, Tensor x2, Tensor v) {
  OnDevice device("F", F);
  Inputs in = prepare(F, "x2", x2, "x2", x2, v);
  Tensor y1 = torch::stable::empty_like(in.first);
  in.arguments.x2 = in.first.const_data_ptr();
  in.arguments.y1_out = y1.mutable_data_ptr();
  cuda::couple(in.arguments, device.stream);
  return laid_out_as(x2, y1);
}

Tensor decouple(Tensor y1, Tensor F, Tensor v) {
  OnDevice device("y1", y1);
  Inputs in = prepare(F, "y1", y1, "y1", y1, v);
  Tensor x2 = torch::stable::empty_like(in.first);
  in.arguments.y1 = in.first.const_data_ptr();
  in.arguments.x2_out = x2.mutable_data_ptr();
  cuda::decouple(in.arguments, device.stream);
  return laid_out_as(y1, x2);
}

// What a gradient writes besides x2, with room for its partial sums.
struct Gradient {
  Tensor dF, dx2, dv, partial;

  Gradient(Inputs& in)
      : dF(torch::stable::empty_like(in.F)),
        dx2(torch::stable::empty_like(in.second)),
        dv(torch::stable::empty_like(in.v)),
        partial(workspace(in.F, cuda::couple_partials(in.arguments.stream, in.arguments.count), Dtype::float64)) {
    in.arguments.dF = dF.mutable_data_ptr();
    in.arguments.dx2 = dx2.mutable_data_ptr();
    in.arguments.dv = dv.mutable_data_ptr();
    in.arguments.partial = static_cast<double*>(partial.mutable_data_ptr());
  }

  std::tuple<Tensor, Tensor, Tensor> like(const Tensor& F, const Tensor& d1, const Tensor& v) const {
    return {laid_out_as(F, dF), laid_out_as(d1, dx2), in_dtype(dv, v.scalar_type())};
  }
};

std::tuple<Tensor, Tensor, Tensor> couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) {
  OnDevice device("d1", d1);
  Inputs in = prepare(F, "x2", x2, "d1", d1, v);
  Gradient gradient(in);
  in.arguments.x2 = in.first.const_data_ptr();
  in.arguments.d1 = in.second.const_data_ptr();
  cuda::couple_backward(in.arguments, device.stream);
  return gradient.like(F, d1, v);
}

// x2 into `x2`, which may be `in.first`.
std::tuple<Tensor, Tensor, Tensor> uncouple_into(Inputs& in, Tensor& x2, const Tensor& F, const Tensor& d1, const Tensor& v,
                                                 void* stream) {
  Gradient gradient(in);
  in.arguments.y1 = in.first.const_data_ptr();
  in.arguments.d1 = in.second.const_data_ptr();
  in.arguments.x2_out = x2.mutable_data_ptr();
  cuda::uncouple(in.arguments, stream);
  return gradient.like(F, d1, v);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) {
  OnDevice device("y1", y1);
  Inputs in = prepare(F, "y1", y1, "d1", d1, v);
  Tensor x2 = torch::stable::empty_like(in.first);
  auto [dF, dx2, dv] = uncouple_into(in, x2, F, d1, v, device.stream);
  return {laid_out_as(y1, x2), dF, dx2, dv};
}

std::tuple<Tensor, Tensor, Tensor> uncouple_in_place(Tensor y1, Tensor F, Tensor d1, Tensor v) {
  OnDevice device("y1", y1);
  Inputs in = prepare(F, "y1", y1, "d1", d1, v);
  auto gradients = uncouple_into(in, in.first, F, d1, v, device.stream);
  if (in.copied) torch::stable::copy_(y1, in.first);
  return gradients;
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("couple", TORCH_BOX(&couple));
  m.impl("decouple", TORCH_BOX(&decouple));
  m.impl("couple_backward", TORCH_BOX(&couple_backward));
  m.impl("uncouple", TORCH_BOX(&uncouple));
  m.impl("uncouple_", TORCH_BOX(&uncouple_in_place));
}

}  // namespace idm::cuda_ops
