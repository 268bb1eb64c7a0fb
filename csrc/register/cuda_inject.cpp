// Checks and registration of the injector's CUDA kernels.
#include <optional>
#include <tuple>
#include <utility>

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
  a.stream_dtype = accumulate_of(a.dtype);
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
    through_read = laid_out_as(in.h, *through);
    in.arguments.through = through_read.const_data_ptr();
  }
  Tensor dh = torch::stable::empty_like(in.h);
  WeightGradients gradients(in, 1);
  in.arguments.z = dz_read.const_data_ptr();
  in.arguments.out = dh.mutable_data_ptr();
  cuda::inject_read_backward(in.arguments, device.stream);
  return {laid_out_as(h, dh), in_dtype(gradients.dweight, weight.scalar_type()), in_dtype(gradients.dbias, weight.scalar_type())};
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
  return laid_out_as(h, out);
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

// What a coupling behind the injector reads besides: features in the order of the stream, and all that the write reads.
struct CoupledInputs {
  Inputs in;
  Tensor stream, d1, z, gz, aty, bias, v;
  bool copied;  // `stream` is not the caller's

  CoupledInputs(const Tensor& h, const char* stream_name, const Tensor& given, const Tensor& d1_given, const Tensor& z_given,
                const Tensor& gz_given, const Tensor& aty_given, const Tensor& weight, const Tensor& bias_given,
                const Tensor& v_given, int64_t r)
      : in(prepare("h", h, weight, 0, 3, r)),
        stream(checked(stream_name, given)),
        d1(checked("d1", d1_given)),
        z(image("z", z_given, in)),
        gz(image("gz", gz_given, in)),
        aty(image("aty", aty_given, in)),
        bias(bias_of(bias_given, in.arguments.planes, in)),
        v(v_given) {
    check_same_dtype(stream_name, stream, "d1", d1);
    cuda::InjectArguments& a = in.arguments;
    a.stream_dtype = dtype_of(stream_name, stream);
    check(a.stream_dtype == Dtype::float32 || a.stream_dtype == Dtype::float64, stream_name, " must be float32 or float64");
    check_beside("v", v, "h", h);
    v = one_number("v", v, a.stream_dtype);
    copied = !stream.is_contiguous() && !channels_last(stream);
    if (copied) stream = torch::stable::contiguous(stream);
    d1 = laid_out_as(stream, d1);
    in.h = laid_out_as(stream, in.h);
    a.last = !stream.is_contiguous();
    a.h = in.h.const_data_ptr();
    a.stream = stream.const_data_ptr();
    a.d1 = d1.const_data_ptr();
    a.z = z.const_data_ptr();
    a.gz = gz.const_data_ptr();
    a.aty = aty.const_data_ptr();
    a.bias = bias.const_data_ptr();
    a.v = v.const_data_ptr();
  }

  const Tensor& checked(const char* name, const Tensor& x) const {
    check_beside(name, x, "h", in.h);
    check_same_shape("h", in.h, name, x);
    return x;
  }
};

using Coupled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// All gradients of the coupling and the injector; `launch` makes them, with x2 into `x2` where it is asked for.
Coupled coupled_gradients(CoupledInputs& coupled, void (*launch)(const cuda::InjectArguments&, void*), Tensor* x2,
                          const Tensor& h, const Tensor& d1, const Tensor& weight, const Tensor& bias, const Tensor& v,
                          void* stream) {
  Inputs& in = coupled.in;
  Tensor dh = torch::stable::empty_like(in.h), dx2 = torch::stable::empty_like(coupled.d1);
  Tensor dz = new_image(in), dgz = new_image(in), daty = new_image(in), dv = torch::stable::empty_like(coupled.v);
  WeightGradients gradients(in, in.arguments.planes);
  in.arguments.out = dh.mutable_data_ptr();
  in.arguments.dx2 = dx2.mutable_data_ptr();
  in.arguments.dz = dz.mutable_data_ptr();
  in.arguments.dgz = dgz.mutable_data_ptr();
  in.arguments.daty = daty.mutable_data_ptr();
  in.arguments.dv = dv.mutable_data_ptr();
  if (x2 != nullptr) in.arguments.stream_out = x2->mutable_data_ptr();
  launch(in.arguments, stream);
  return {laid_out_as(h, dh), dz, dgz, daty, in_dtype(gradients.dweight, weight.scalar_type()),
          in_dtype(gradients.dbias, bias.scalar_type()), laid_out_as(d1, dx2), in_dtype(dv, v.scalar_type())};
}

Tensor inject_couple(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2, Tensor v, int64_t r) {
  OnDevice device("h", h);
  CoupledInputs coupled(h, "x2", x2, x2, z, gz, aty, weight, bias, v, r);
  Tensor y1 = torch::stable::empty_like(coupled.stream);
  coupled.in.arguments.stream_out = y1.mutable_data_ptr();
  cuda::inject_couple(coupled.in.arguments, device.stream);
  return laid_out_as(x2, y1);
}

Coupled inject_couple_backward(Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2,
                               Tensor v, int64_t r) {
  OnDevice device("h", h);
  CoupledInputs coupled(h, "x2", x2, d1, z, gz, aty, weight, bias, v, r);
  return coupled_gradients(coupled, cuda::inject_couple_backward, nullptr, h, d1, weight, bias, v, device.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inject_uncouple(
    Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor v, int64_t r) {
  OnDevice device("h", h);
  CoupledInputs coupled(h, "y1", y1, d1, z, gz, aty, weight, bias, v, r);
  Tensor x2 = torch::stable::empty_like(coupled.stream);
  Coupled gradients = coupled_gradients(coupled, cuda::inject_uncouple, &x2, h, d1, weight, bias, v, device.stream);
  return std::tuple_cat(std::tuple<Tensor>(laid_out_as(y1, x2)), std::move(gradients));
}

Coupled inject_uncouple_in_place(Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias,
                                 Tensor v, int64_t r) {
  OnDevice device("h", h);
  CoupledInputs coupled(h, "y1", y1, d1, z, gz, aty, weight, bias, v, r);
  Coupled gradients =
      coupled_gradients(coupled, cuda::inject_uncouple, &coupled.stream, h, d1, weight, bias, v, device.stream);
  if (coupled.copied) torch::stable::copy_(y1, coupled.stream);
  return gradients;
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("inject_read", TORCH_BOX(&inject_read));
  m.impl("inject_read_backward", TORCH_BOX(&inject_read_backward));
  m.impl("inject_write", TORCH_BOX(&inject_write));
  m.impl("inject_write_backward", TORCH_BOX(&inject_write_backward));
  m.impl("inject_couple", TORCH_BOX(&inject_couple));
  m.impl("inject_couple_backward", TORCH_BOX(&inject_couple_backward));
  m.impl("inject_uncouple", TORCH_BOX(&inject_uncouple));
  m.impl("inject_uncouple_", TORCH_BOX(&inject_uncouple_in_place));
}

}  // namespace idm::cuda_ops
