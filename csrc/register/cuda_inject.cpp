// Checks and registration of the injector's CUDA kernels.
#include <optional>
#include <tuple>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

// The features and the weight, checked; features dense, the weight in the dtype of sums.
struct Inputs {
  Tensor h, weight;
  cuda::InjectArguments arguments;
};

Inputs prepare(const char* name, const Tensor& h, const Tensor& weight, int64_t planes_axis, int64_t columns, int64_t r) {
  check_beside("weight", weight, name, h);
  check(h.dim() == 4, name, " is ", shape_of(h), ", expected (B, C, H, W)");
  check(r > 0 && r <= 64 && h.size(1) > 0 && h.size(1) % (r * r) == 0, "r is ", r, ", expected 1 … 64 with r² a divisor of the ",
        h.size(1), " channels of ", name);
  const int64_t planes = h.size(1) / (r * r);
  check(weight.dim() == 4 && weight.size(planes_axis) == planes && weight.numel() == planes * columns, "weight is ",
        shape_of(weight), ", expected ", planes_axis == 1 ? "(1, C/r², 1, 1)" : "(C/r², 3, 1, 1)", " for ", name, " of ",
        shape_of(h));
  dtype_of("weight", weight);
  const ScalarType sums = scalar_type_of(accumulate_of(dtype_of(name, h)));
  Inputs in{walkable(h), dense(in_dtype(weight, sums)), {}};
  cuda::InjectArguments& a = in.arguments;
  a.dtype = dtype_of(name, h);
  a.images = h.size(0);
  a.planes = planes;
  a.height = h.size(2);
  a.width = h.size(3);
  a.r = static_cast<int>(r);
  a.last = !in.h.is_contiguous();
  a.h = in.h.const_data_ptr();
  a.weight = in.weight.const_data_ptr();
  return in;
}

// An image of the features' full size, checked and dense.
Tensor image(const char* name, const Tensor& x, const Inputs& in) {
  const cuda::InjectArguments& a = in.arguments;
  check_beside(name, x, "h", in.h);
  check_same_dtype("h", in.h, name, x);
  check(x.dim() == 4 && x.size(0) == a.images && x.size(1) == 1 && x.size(2) == a.height * a.r && x.size(3) == a.width * a.r, name,
        " is ", shape_of(x), ", expected (", a.images, ", 1, ", a.height * a.r, ", ", a.width * a.r, ")");
  return dense(x);
}

Tensor new_image(const Inputs& in) {
  const cuda::InjectArguments& a = in.arguments;
  return torch::stable::new_empty(in.h, {a.images, int64_t{1}, a.height * a.r, a.width * a.r});
}

Tensor bias_of(const Tensor& bias, int64_t count, const Inputs& in) {
  check_beside("bias", bias, "h", in.h);
  check(bias.dim() == 1 && bias.size(0) == count, "bias is ", shape_of(bias), ", expected (", count, ",)");
  dtype_of("bias", bias);
  return dense(in_dtype(bias, in.weight.scalar_type()));
}

// What the gradients of weight and bias are written to, with room for partial sums.
struct WeightGradients {
  Tensor dweight, dbias, partial;

  WeightGradients(Inputs& in, int64_t biases)
      : dweight(torch::stable::empty_like(in.weight)),
        dbias(torch::stable::new_empty(in.weight, {biases})),
        partial(workspace(in.h, cuda::inject_partials(in.arguments), Dtype::float64)) {
    in.arguments.dweight = dweight.mutable_data_ptr();
    in.arguments.dbias = dbias.mutable_data_ptr();
    in.arguments.partial = static_cast<double*>(partial.mutable_data_ptr());
  }
};

Tensor inject_read(Tensor h, Tensor weight, Tensor bias, int64_t r) {
  OnDevice device("h", h);
  Inputs in = prepare("h", h, weight, 1, 1, r);
  const Tensor bias_read = bias_of(bias, 1, in);
  Tensor z = new_image(in);
  in.arguments.bias = bias_read.const_data_ptr();
  in.arguments.dz = z.mutable_data_ptr();
  cuda::inject_read(in.arguments, device.stream);
  return z;
}

std::tuple<Tensor, Tensor, Tensor> inject_read_backward(Tensor dz, Tensor h, Tensor weight, int64_t r,
                                                        std::optional<Tensor> through) {
  OnDevice device("h", h);
  Inputs in = prepare("h", h, weight, 1, 1, r);
  const Tensor dz_read = image("dz", dz, in);
  Tensor through_read = in.h;  // where there is none, a tensor that nobody reads
  if (through.has_value()) {
    check_beside("through", *through, "h", h);
    check_same_shape("h", h, "through", *through);
    check_same_dtype("h", h, "through", *through);
    through_read = in_layout_of(in.h, *through);
    in.arguments.through = through_read.const_data_ptr();
  }
  Tensor dh = torch::stable::empty_like(in.h);
  WeightGradients gradients(in, 1);
  in.arguments.z = dz_read.const_data_ptr();
  in.arguments.out = dh.mutable_data_ptr();
  cuda::inject_read_backward(in.arguments, device.stream);
  return {in_layout_of(h, dh), in_dtype(gradients.dweight, weight.scalar_type()), in_dtype(gradients.dbias, weight.scalar_type())};
}

Tensor inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int64_t r) {
  OnDevice device("h", h);
  Inputs in = prepare("h", h, weight, 0, 3, r);
  const Tensor z_read = image("z", z, in), gz_read = image("gz", gz, in), aty_read = image("aty", aty, in);
  const Tensor bias_read = bias_of(bias, in.arguments.planes, in);
  Tensor out = torch::stable::empty_like(in.h);
  in.arguments.z = z_read.const_data_ptr();
  in.arguments.gz = gz_read.const_data_ptr();
  in.arguments.aty = aty_read.const_data_ptr();
  in.arguments.bias = bias_read.const_data_ptr();
  in.arguments.out = out.mutable_data_ptr();
  cuda::inject_write(in.arguments, device.stream);
  return in_layout_of(h, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty,
                                                                        Tensor weight, int64_t r) {
  OnDevice device("dout", dout);
  Inputs in = prepare("dout", dout, weight, 0, 3, r);
  const Tensor z_read = image("z", z, in), gz_read = image("gz", gz, in), aty_read = image("aty", aty, in);
  Tensor dz = new_image(in), dgz = new_image(in), daty = new_image(in);
  WeightGradients gradients(in, in.arguments.planes);
  in.arguments.z = z_read.const_data_ptr();
  in.arguments.gz = gz_read.const_data_ptr();
  in.arguments.aty = aty_read.const_data_ptr();
  in.arguments.dz = dz.mutable_data_ptr();
  in.arguments.dgz = dgz.mutable_data_ptr();
  in.arguments.daty = daty.mutable_data_ptr();
  cuda::inject_write_backward(in.arguments, device.stream);
  return {dz, dgz, daty, in_dtype(gradients.dweight, weight.scalar_type()), in_dtype(gradients.dbias, weight.scalar_type())};
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("inject_read", TORCH_BOX(&inject_read));
  m.impl("inject_read_backward", TORCH_BOX(&inject_read_backward));
  m.impl("inject_write", TORCH_BOX(&inject_write));
  m.impl("inject_write_backward", TORCH_BOX(&inject_write_backward));
}

}  // namespace idm::cuda_ops
