// Checks and registration of the CPU kernels of GroupNorm with SiLU and of LayerNorm.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

void check_parameters(const Tensor& weight, const Tensor& bias, int64_t channels) {
  check_cpu("weight", weight);
  check_cpu("bias", bias);
  check(weight.dim() == 1 && weight.size(0) == channels, "weight is ", shape_of(weight), ", expected (", channels, ",)");
  check(bias.dim() == 1 && bias.size(0) == channels, "bias is ", shape_of(bias), ", expected (", channels, ",)");
}

// Whether the channels, dimension 1, lie innermost, and all else densely around them in order.
bool channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  bool last = x.dim() > 2 && x.stride(1) == 1 && !x.is_contiguous();
  for (int64_t d = x.dim() - 1; d != 1 && last; d = d == 2 ? 0 : d - 1) {
    last = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    if (d == 0) break;
  }
  return last;
}

// x as it lies, if that is one of the two formats, else contiguous.
Tensor in_a_format(const Tensor& x) { return channels_last(x) ? x : dense(x); }

// `other`, of x's shape, in the format of `x`.
Tensor in_format_of(const Tensor& x, const Tensor& other) {
  bool same = true;
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == 1 || x.stride(d) == other.stride(d);
  if (same) return other;
  Tensor out = in_dtype_of(other, torch::stable::empty_like(x));
  return torch::stable::copy_(out, other);
}

// A tensor of the shape and format of `x`, in another dtype.
Tensor empty_like_in(const Tensor& x, ScalarType dtype) {
  const Tensor model = torch::stable::empty_like(x);
  return model.scalar_type() == dtype ? model : torch::stable::to(model, dtype);
}

// Kernels take one dtype for x and out (or dout), or float32 for x; else x is converted first.
bool taken(const Tensor& x, ScalarType other) {
  return x.scalar_type() == other || (x.scalar_type() == ScalarType::Float && other != ScalarType::Double);
}

NormArguments group_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, bool silu) {
  check_cpu("x", x);
  check(x.dim() >= 2, "x is ", shape_of(x), ", expected (B, C, …)");
  check(groups > 0 && x.size(1) % groups == 0, "groups is ", groups, ", and does not divide the ", x.size(1), " channels of x");
  check_parameters(weight, bias, x.size(1));
  NormArguments a{};
  a.silu = silu;
  a.images = x.size(0);
  a.channels = x.size(1);
  a.positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) a.positions *= x.size(d);
  a.groups = groups;
  return a;
}

Three group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, bool silu, ScalarType dtype) {
  NormArguments a = group_arguments(x, weight, bias, groups, silu);
  const Tensor w = accurate(weight, x), b = accurate(bias, x);
  const Tensor input = in_a_format(taken(x, dtype) ? x : in_dtype(x, accurate_dtype(x)));
  const ScalarType made = taken(input, dtype) ? dtype : input.scalar_type();
  Tensor out = empty_like_in(input, made);
  Tensor mean = torch::stable::new_empty(w, {a.images, groups}), rstd = torch::stable::new_empty(w, {a.images, groups});
  a.x_dtype = dtype_of("x", input);
  a.out_dtype = dtype_of("out", out);
  a.last = channels_last(input);
  a.eps = eps;
  a.x = input.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  launchers().group_norm_silu(a, in_torch_threads);
  return {laid_out_as(x, in_dtype(out, dtype)), mean, rstd};
}

void check_statistics(const char* name, const Tensor& statistics, const Tensor& w, int64_t count, const std::string& expected) {
  check_cpu(name, statistics);
  check_same_dtype("sums over x", w, name, statistics);
  check(statistics.numel() == count, name, " is ", shape_of(statistics), ", expected ", expected);
}

Three group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int64_t groups,
                               bool silu) {
  NormArguments a = group_arguments(x, weight, bias, groups, silu);
  check_cpu("dout", dout);
  check_same_shape("x", x, "dout", dout);
  const Tensor w = accurate(weight, x), b = accurate(bias, x);
  for (auto& [name, statistics] : {std::pair<const char*, Tensor>{"mean", mean}, {"rstd", rstd}})
    check_statistics(name, statistics, w, a.images * groups, "(B, groups)");
  const bool converted = !taken(x, dout.scalar_type());
  const Tensor input = in_a_format(converted ? in_dtype(x, accurate_dtype(x)) : x);
  const Tensor gradient = in_format_of(input, converted ? in_dtype_of(input, dout) : dout);
  const Tensor m = dense(mean), r = dense(rstd);
  Tensor dx = torch::stable::empty_like(input), dweight = torch::stable::empty_like(w), dbias = torch::stable::empty_like(b);
  a.x_dtype = dtype_of("x", input);
  a.out_dtype = dtype_of("dout", gradient);
  a.last = channels_last(input);
  a.x = input.const_data_ptr();
  a.dout = gradient.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.mean = const_cast<void*>(m.const_data_ptr());
  a.rstd = const_cast<void*>(r.const_data_ptr());
  a.out = dx.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  launchers().group_norm_silu_backward(a, in_torch_threads);
  return {laid_out_as(x, in_dtype_of(x, dx)), in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)};
}

NormArguments layer_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_cpu("x", x);
  check(x.dim() >= 1, "x is ", shape_of(x), ", expected (…, C)");
  NormArguments a{};
  a.channels = x.size(x.dim() - 1);
  check_parameters(weight, bias, a.channels);
  a.images = a.channels > 0 ? x.numel() / a.channels : 0;
  return a;
}

Three layer_norm(Tensor x, Tensor weight, Tensor bias, double eps, ScalarType dtype) {
  NormArguments a = layer_arguments(x, weight, bias);
  const Tensor w = accurate(weight, x), b = accurate(bias, x);
  const Tensor input = dense(taken(x, dtype) ? x : in_dtype(x, accurate_dtype(x)));
  const ScalarType made = taken(input, dtype) ? dtype : input.scalar_type();
  Tensor out = empty_like_in(input, made);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(1);
  Tensor mean = torch::stable::new_empty(w, shape), rstd = torch::stable::new_empty(w, shape);
  a.x_dtype = dtype_of("x", input);
  a.out_dtype = dtype_of("out", out);
  a.eps = eps;
  a.x = input.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.bias = b.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  launchers().layer_norm(a, in_torch_threads);
  return {in_dtype(out, dtype), mean, rstd};
}

Three layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) {
  NormArguments a = layer_arguments(x, weight, bias);
  check_cpu("dout", dout);
  check_same_shape("x", x, "dout", dout);
  const Tensor w = accurate(weight, x);
  for (auto& [name, statistics] : {std::pair<const char*, Tensor>{"mean", mean}, {"rstd", rstd}})
    check_statistics(name, statistics, w, a.images, "(…, 1)");
  const bool converted = !taken(x, dout.scalar_type());
  const Tensor input = dense(converted ? in_dtype(x, accurate_dtype(x)) : x);
  const Tensor gradient = dense(converted ? in_dtype_of(input, dout) : dout), m = dense(mean), r = dense(rstd);
  Tensor dx = torch::stable::empty_like(input), dweight = torch::stable::empty_like(w), dbias = torch::stable::empty_like(w);
  a.x_dtype = dtype_of("x", input);
  a.out_dtype = dtype_of("dout", gradient);
  a.x = input.const_data_ptr();
  a.dout = gradient.const_data_ptr();
  a.weight = w.const_data_ptr();
  a.mean = const_cast<void*>(m.const_data_ptr());
  a.rstd = const_cast<void*>(r.const_data_ptr());
  a.out = dx.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  launchers().layer_norm_backward(a, in_torch_threads);
  return {in_dtype_of(x, dx), in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace idm::cpu
