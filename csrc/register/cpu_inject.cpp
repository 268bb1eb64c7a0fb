// Checks and registration of the injector's CPU kernels.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_couple.h"
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

Tensor inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int64_t r) {
  InjectArguments a = prepare("h", h, weight, r, true);
  check_image("z", z, "h", h, a);
  check_image("gz", gz, "h", h, a);
  check_image("aty", aty, "h", h, a);
  check_cpu("bias", bias);
  dtype_of("bias", bias);
  check(bias.dim() == 1 && bias.size(0) == a.channels, "bias is ", shape_of(bias), ", expected (", a.channels, ",)");
  const Tensor features = dense(h), w = accurate(weight, h), b = accurate(bias, h);
  const Tensor images[3] = {dense(z), dense(gz), dense(aty)};
  Tensor out = new_features(h);
  a.h = features.const_data_ptr();
  a.z = images[0].const_data_ptr();
  a.gz = images[1].const_data_ptr();
  a.aty = images[2].const_data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.h_out = out.mutable_data_ptr();
  launchers().inject_write(a, in_torch_threads);
  return laid_out_as(h, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty,
                                                                        Tensor weight, int64_t r) {
  InjectArguments a = prepare("dout", dout, weight, r, true);
  check_image("z", z, "dout", dout, a);
  check_image("gz", gz, "dout", dout, a);
  check_image("aty", aty, "dout", dout, a);
  const Tensor features = dense(dout), w = accurate(weight, dout);
  const Tensor images[3] = {dense(z), dense(gz), dense(aty)};
  Tensor dz = new_image(dout, a), dgz = new_image(dout, a), daty = new_image(dout, a);
  Tensor dweight = torch::stable::empty_like(w), dbias = torch::stable::new_empty(w, {a.channels});
  a.h = features.const_data_ptr();
  a.z = images[0].const_data_ptr();
  a.gz = images[1].const_data_ptr();
  a.aty = images[2].const_data_ptr();
  a.weight = w.const_data_ptr();
  a.z_out = dz.mutable_data_ptr();
  a.gz_out = dgz.mutable_data_ptr();
  a.aty_out = daty.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  launchers().inject_write_backward(a, in_torch_threads);
  return {dz, dgz, daty, laid_out_as(weight, in_dtype_of(weight, dweight)), in_dtype_of(weight, dbias)};
}

using Coupled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// An injector's inputs in the dtype of sums: its output, which the coupling reads, must not be rounded to 16 bits in between.
struct Accurate {
  Tensor h, z, gz, aty;

  Accurate(const Tensor& h, const Tensor& z, const Tensor& gz, const Tensor& aty)
      : h(in_dtype(h, accurate_dtype(h))),
        z(like("z", z, h)),
        gz(like("gz", gz, h)),
        aty(like("aty", aty, h)) {
    dtype_of("h", h);
  }

  static Tensor like(const char* name, const Tensor& image, const Tensor& h) {
    check_same_dtype("h", h, name, image);
    return in_dtype(image, accurate_dtype(h));
  }

  Tensor write(const Tensor& weight, const Tensor& bias, int64_t r) const { return inject_write(h, z, gz, aty, weight, bias, r); }

  // What the coupling's gradient, (dF, dx2, dv), becomes behind the injector: dF is that of h, and goes on to the images.
  Coupled gradients(const std::tuple<Tensor, Tensor, Tensor>& of_coupling, const Tensor& model, const Tensor& weight,
                    int64_t r) const {
    const auto& [dF, dx2, dv] = of_coupling;
    auto [dz, dgz, daty, dweight, dbias] = inject_write_backward(dF, z, gz, aty, weight, r);
    const auto as = [&](const Tensor& x) { return in_dtype_of(model, x); };
    return {as(dF), as(dz), as(dgz), as(daty), dweight, dbias, dx2, dv};
  }
};

Tensor inject_couple(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2, Tensor v, int64_t r) {
  return couple(Accurate(h, z, gz, aty).write(weight, bias, r), x2, v);
}

Coupled inject_couple_backward(Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2,
                               Tensor v, int64_t r) {
  const Accurate in(h, z, gz, aty);
  return in.gradients(couple_backward(d1, in.write(weight, bias, r), x2, v), h, weight, r);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inject_uncouple(
    Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor v, int64_t r) {
  const Accurate in(h, z, gz, aty);
  auto [x2, dF, dx2, dv] = uncouple(y1, in.write(weight, bias, r), d1, v);
  return std::tuple_cat(std::tuple<Tensor>(x2), in.gradients({dF, dx2, dv}, h, weight, r));
}

Coupled inject_uncouple_in_place(Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias,
                                 Tensor v, int64_t r) {
  const Accurate in(h, z, gz, aty);
  return in.gradients(uncouple_in_place(y1, in.write(weight, bias, r), d1, v), h, weight, r);
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
