// Checks and registration of GroupNorm–SiLU's CPU kernels.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

// Whether x (B, C, …) lies densely with the channels innermost, NHWC and its kin, and not also as NCHW.
bool is_channels_last(const Tensor& x) { return x.dim() > 2 && !x.is_contiguous() && channels_last(x); }

// What a norm and its gradient read, checked and dense.
struct Inputs {
  Tensor x, weight, bias;
  GroupNormArguments arguments;
};

Inputs prepare(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, bool silu) {
  check_cpu("x", x);
  check_cpu("weight", weight);
  check_cpu("bias", bias);
  const Dtype dtype = dtype_of("x", x);
  dtype_of("weight", weight);
  dtype_of("bias", bias);
  check(x.dim() >= 2 && x.size(1) > 0, "x is ", shape_of(x), ", expected (B, C, …)");
  const int64_t channels = x.size(1);
  check(groups > 0 && channels % groups == 0, "groups is ", groups, ", which does not divide the ", channels, " channels of x");
  check(weight.dim() == 1 && weight.size(0) == channels, "weight is ", shape_of(weight), ", expected (", channels, ",)");
  check(bias.dim() == 1 && bias.size(0) == channels, "bias is ", shape_of(bias), ", expected (", channels, ",)");
  const bool channels_last = is_channels_last(x);
  Inputs in{channels_last ? x : dense(x), accurate(weight, x), accurate(bias, x), {}};
  GroupNormArguments& a = in.arguments;
  a.dtype = dtype;
  a.channels_last = channels_last;
  a.silu = silu;
  a.images = x.size(0);
  a.channels = channels;
  a.groups = groups;
  a.positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) a.positions *= x.size(d);
  a.x = in.x.const_data_ptr();
  a.weight = in.weight.const_data_ptr();
  a.bias = in.bias.const_data_ptr();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, bool silu,
                                                  std::optional<ScalarType> dtype) {
  Inputs in = prepare(x, weight, bias, groups, silu);
  GroupNormArguments& a = in.arguments;
  Tensor out = empty_like(in.x, dtype.value_or(x.scalar_type()));
  Tensor mean = torch::stable::new_empty(x, {a.images, groups}, accurate_dtype(x));
  Tensor rstd = torch::stable::new_empty(x, {a.images, groups}, accurate_dtype(x));
  a.out_dtype = dtype_of("dtype", out);
  a.eps = eps;
  a.out = out.mutable_data_ptr();
  a.mean_out = mean.mutable_data_ptr();
  a.rstd_out = rstd.mutable_data_ptr();
  launchers().group_norm_silu(a, in_torch_threads);
  return {laid_out_as(x, out), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                           Tensor rstd, int64_t groups, bool silu) {
  Inputs in = prepare(x, weight, bias, groups, silu);
  GroupNormArguments& a = in.arguments;
  check_cpu("dout", dout);
  check_cpu("mean", mean);
  check_cpu("rstd", rstd);
  check_same_shape("x", x, "dout", dout);
  for (const auto& [name, statistic] : {std::pair{"mean", &mean}, {"rstd", &rstd}}) {
    check(statistic->dim() == 2 && statistic->size(0) == a.images && statistic->size(1) == groups, name, " is ",
          shape_of(*statistic), ", expected (", a.images, ", ", groups, ")");
    check(statistic->scalar_type() == accurate_dtype(x), name, " must be float64 for float64 x, else float32");
  }
  a.dout_dtype = dtype_of("dout", dout);
  a.out_dtype = a.dtype;
  Tensor dout_dense = a.channels_last ? dout : dense(dout), mean_dense = dense(mean), rstd_dense = dense(rstd);
  if (a.channels_last && !is_channels_last(dout)) {
    dout_dense = empty_like(in.x, dout.scalar_type());
    torch::stable::copy_(dout_dense, dout);
  }
  Tensor dx = torch::stable::empty_like(in.x);
  Tensor dweight = torch::stable::new_empty(in.weight, {a.channels}), dbias = torch::stable::new_empty(in.bias, {a.channels});
  a.dout = dout_dense.const_data_ptr();
  a.mean = mean_dense.const_data_ptr();
  a.rstd = rstd_dense.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  if (x.numel() > 0) {
    launchers().group_norm_silu_backward(a, in_torch_threads);
  } else {  // the statistics of nothing may be NaN
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  }
  return {laid_out_as(x, dx), in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace idm::cpu
