// Checks and registration of the injector's CPU kernels.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

InjectArguments prepare(const char* name, const Tensor& h, const Tensor& weight, int64_t r, bool write) {
  check_cpu(name, h);
  check_cpu("weight", weight);
  dtype_of("weight", weight);
  check(h.dim() == 4, name, " is ", shape_of(h), ", expected (B, C, H/r, W/r)");
  check(r > 0 && h.size(1) % product_of("r and r", r, r) == 0, "r is ", r, ", and ", name, " has ", h.size(1),
        " channels; they must be a multiple of r²");
  const int64_t channels = h.size(1) / (r * r);
  const bool fits = write ? weight.dim() > 1 && weight.size(0) == channels && weight.numel() == 3 * channels
                          : weight.numel() == channels;
  check(fits, "weight is ", shape_of(weight), ", expected ",
        write ? "(C/r², 3, 1, 1)" : "(1, C/r², 1, 1)", " for ", name, " of ", shape_of(h), " and r = ", r);
  InjectArguments a{};
  a.dtype = dtype_of(name, h);
  a.images = h.size(0);
  a.channels = channels;
  a.height = h.size(2);
  a.width = h.size(3);
  a.r = r;
  return a;
}

void check_image(const char* name, const Tensor& image, const char* h_name, const Tensor& h, const InjectArguments& a) {
  check_cpu(name, image);
  check_same_dtype(h_name, h, name, image);
  check(image.dim() == 4 && image.size(0) == a.images && image.size(1) == 1 && image.size(2) == a.height * a.r &&
            image.size(3) == a.width * a.r,
        name, " is ", shape_of(image), ", expected (", a.images, ", 1, ", a.height * a.r, ", ", a.width * a.r, ")");
}

Tensor new_image(const Tensor& h, const InjectArguments& a) {
  return torch::stable::new_empty(h, {a.images, int64_t{1}, a.height * a.r, a.width * a.r});
}

Tensor new_features(const Tensor& h) {
  return torch::stable::new_empty(h, {h.size(0), h.size(1), h.size(2), h.size(3)});
}

Tensor inject_read(Tensor h, Tensor weight, Tensor bias, int64_t r) {
  InjectArguments a = prepare("h", h, weight, r, false);
  check_cpu("bias", bias);
  dtype_of("bias", bias);
  check(bias.numel() == 1, "bias is ", shape_of(bias), ", expected one element");
  const Tensor features = dense(h), w = accurate(weight, h), b = accurate(bias, h);
  Tensor z = new_image(h, a);
  a.h = features.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.z_out = z.mutable_data_ptr();
  launchers().inject_read(a, in_torch_threads);
  return z;
}

std::tuple<Tensor, Tensor, Tensor> inject_read_backward(Tensor dz, Tensor h, Tensor weight, int64_t r,
                                                         std::optional<Tensor> through) {
  InjectArguments a = prepare("h", h, weight, r, false);
  check_image("dz", dz, "h", h, a);
  Tensor more = h;
  if (through) {
    check_cpu("through", *through);
    check_same_shape("h", h, "through", *through);
    check_same_dtype("h", h, "through", *through);
    more = dense(*through);
    a.through = more.const_data_ptr();
  }
  const Tensor features = dense(h), images = dense(dz), w = accurate(weight, h);
  Tensor dh = new_features(h), dweight = torch::stable::empty_like(w);
  Tensor dbias = torch::stable::new_empty(w, {int64_t{1}});
  a.z = images.const_data_ptr();
  a.h = features.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.h_out = dh.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  launchers().inject_read_backward(a, in_torch_threads);
  return {laid_out_as(h, dh), laid_out_as(weight, in_dtype_of(weight, dweight)), in_dtype_of(weight, dbias)};
}

// What inject_write reads, checked, dense, and named in the arguments.
struct WriteInputs {
  Tensor h, images[3], weight, bias;
  InjectArguments arguments;

  WriteInputs(const char* name, const Tensor& features, const Tensor& z, const Tensor& gz, const Tensor& aty, const Tensor& weight_,
              int64_t r)
      : arguments(prepare(name, features, weight_, r, true)) {
    check_image("z", z, name, features, arguments);
    check_image("gz", gz, name, features, arguments);
    check_image("aty", aty, name, features, arguments);
    h = dense(features);
    images[0] = dense(z);
    images[1] = dense(gz);
    images[2] = dense(aty);
    weight = accurate(weight_, features);
    arguments.h = h.const_data_ptr();
    arguments.z = images[0].const_data_ptr();
    arguments.gz = images[1].const_data_ptr();
    arguments.aty = images[2].const_data_ptr();
    arguments.weight = weight.const_data_ptr();
  }

  void set_bias(const Tensor& given) {
    const InjectArguments& a = arguments;
    check_cpu("bias", given);
    dtype_of("bias", given);
    check(given.dim() == 1 && given.size(0) == a.channels, "bias is ", shape_of(given), ", expected (", a.channels, ",)");
    bias = accurate(given, h);
    arguments.bias = bias.const_data_ptr();
  }

  // A stream of the coupling, checked and dense.
  Tensor stream(const char* name, const Tensor& given) {
    check_cpu(name, given);
    check_same_shape("h", h, name, given);
    arguments.stream = dtype_of(name, given);
    check(arguments.stream == Dtype::float32 || arguments.stream == Dtype::float64, name, " must be float32 or float64");
    return dense(given);
  }
};

// The gradients of what inject_write spreads over the features.
struct WriteGradients {
  Tensor dz, dgz, daty, dweight, dbias;

  explicit WriteGradients(WriteInputs& in)
      : dz(new_image(in.h, in.arguments)),
        dgz(new_image(in.h, in.arguments)),
        daty(new_image(in.h, in.arguments)),
        dweight(torch::stable::empty_like(in.weight)),
        dbias(torch::stable::new_empty(in.weight, {in.arguments.channels})) {
    InjectArguments& a = in.arguments;
    a.z_out = dz.mutable_data_ptr();
    a.gz_out = dgz.mutable_data_ptr();
    a.aty_out = daty.mutable_data_ptr();
    a.weight_out = dweight.mutable_data_ptr();
    a.bias_out = dbias.mutable_data_ptr();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> in_dtypes_of(const Tensor& weight) const {
    return {dz, dgz, daty, laid_out_as(weight, in_dtype_of(weight, dweight)), in_dtype_of(weight, dbias)};
  }
};

Tensor inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int64_t r) {
  WriteInputs in("h", h, z, gz, aty, weight, r);
  in.set_bias(bias);
  Tensor out = new_features(h);
  in.arguments.h_out = out.mutable_data_ptr();
  launchers().inject_write(in.arguments, in_torch_threads);
  return laid_out_as(h, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty,
                                                                        Tensor weight, int64_t r) {
  WriteInputs in("dout", dout, z, gz, aty, weight, r);
  const WriteGradients gradients(in);
  launchers().inject_write_backward(in.arguments, in_torch_threads);
  return gradients.in_dtypes_of(weight);
}

Tensor inject_couple(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2, Tensor v, int64_t r) {
  WriteInputs in("h", h, z, gz, aty, weight, r);
  in.set_bias(bias);
  const Tensor second = in.stream("x2", x2);
  Tensor y1 = torch::stable::empty_like(second);
  in.arguments.v = number("v", v);
  in.arguments.x2 = second.const_data_ptr();
  in.arguments.y1_out = y1.mutable_data_ptr();
  launchers().inject_couple(in.arguments, in_torch_threads);
  return laid_out_as(x2, y1);
}

using Coupled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// With x2 given, or recovered from y1 into `recovered`, which may be y1; both dense.
Coupled coupled_gradient(WriteInputs& in, const Tensor& d1, const Tensor& given, Tensor* recovered, const Tensor& h,
                         const Tensor& weight, const Tensor& bias, const Tensor& v) {
  in.set_bias(bias);
  const Tensor gradient = in.stream("d1", d1);
  check_same_dtype("d1", d1, recovered ? "y1" : "x2", given);
  const WriteGradients gradients(in);
  Tensor dh = new_features(h), dx2 = torch::stable::empty_like(gradient);
  double dv = 0;
  InjectArguments& a = in.arguments;
  a.v = number("v", v);
  a.d1 = gradient.const_data_ptr();
  (recovered ? a.y1 : a.x2) = given.const_data_ptr();
  if (recovered) a.x2_out = recovered->mutable_data_ptr();
  a.h_out = dh.mutable_data_ptr();
  a.dx2 = dx2.mutable_data_ptr();
  a.dv = &dv;
  (recovered ? launchers().inject_uncouple : launchers().inject_couple_backward)(a, in_torch_threads);
  return std::tuple_cat(std::tuple<Tensor>(laid_out_as(h, dh)), gradients.in_dtypes_of(weight),
                        std::tuple<Tensor, Tensor>(laid_out_as(d1, dx2), number_like(v, dv)));
}

Coupled inject_couple_backward(Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2,
                               Tensor v, int64_t r) {
  WriteInputs in("h", h, z, gz, aty, weight, r);
  return coupled_gradient(in, d1, in.stream("x2", x2), nullptr, h, weight, bias, v);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inject_uncouple(
    Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor v, int64_t r) {
  WriteInputs in("h", h, z, gz, aty, weight, r);
  const Tensor first = in.stream("y1", y1);
  Tensor x2 = torch::stable::empty_like(first);
  const Coupled gradients = coupled_gradient(in, d1, first, &x2, h, weight, bias, v);
  return std::tuple_cat(std::tuple<Tensor>(laid_out_as(y1, x2)), gradients);
}

Coupled inject_uncouple_in_place(Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias,
                                 Tensor v, int64_t r) {
  WriteInputs in("h", h, z, gz, aty, weight, r);
  Tensor x2 = in.stream("y1", y1);
  const Coupled gradients = coupled_gradient(in, d1, x2, &x2, h, weight, bias, v);
  if (x2.const_data_ptr() != y1.const_data_ptr()) torch::stable::copy_(y1, x2);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("inject_read", TORCH_BOX(&inject_read));
  m.impl("inject_read_backward", TORCH_BOX(&inject_read_backward));
  m.impl("inject_write", TORCH_BOX(&inject_write));
  m.impl("inject_write_backward", TORCH_BOX(&inject_write_backward));
  m.impl("inject_couple", TORCH_BOX(&inject_couple));
  m.impl("inject_couple_backward", TORCH_BOX(&inject_couple_backward));
  m.impl("inject_uncouple", TORCH_BOX(&inject_uncouple));
  m.impl("inject_uncouple_", TORCH_BOX(&inject_uncouple_in_place));
}

}  // namespace idm::cpu
