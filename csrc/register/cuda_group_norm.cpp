// Checks and registration of group_norm_silu's CUDA kernels.
#include <tuple>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

struct Inputs {
  Tensor x, weight, bias;  // x dense, the others in the dtype of sums
  cuda::NormArguments arguments;
};

Inputs prepare(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, bool silu) {
  check_cuda("x", x);
  check_beside("weight", weight, "x", x);
  check_beside("bias", bias, "x", x);
  check(x.dim() >= 2, "x is ", shape_of(x), ", expected (B, C, …)");
  const int64_t channels = x.size(1);
  check(groups > 0 && channels % groups == 0, "groups is ", groups, ", expected a divisor of the ", channels, " channels of x");
  for (const auto& [name, parameter] : {std::pair("weight", &weight), std::pair("bias", &bias)}) {
    check(parameter->dim() == 1 && parameter->size(0) == channels, name, " is ", shape_of(*parameter), ", expected (", channels,
          ",) as x has channels");
    dtype_of(name, *parameter);
  }
  cuda::NormArguments a{};
  a.x_dtype = a.out_dtype = dtype_of("x", x);
  const ScalarType sums = scalar_type_of(accumulate_of(a.x_dtype));
  Inputs in{walkable(x), dense(in_dtype(weight, sums)), dense(in_dtype(bias, sums)), a};
  in.arguments.images = x.size(0);
  in.arguments.channels = channels;
  in.arguments.positions = channels == 0 || x.size(0) == 0 ? 0 : x.numel() / (x.size(0) * channels);
  in.arguments.groups = groups;
  in.arguments.silu = silu;
  in.arguments.last = !in.x.is_contiguous();
  in.arguments.x = in.x.const_data_ptr();
  in.arguments.weight = in.weight.const_data_ptr();
  in.arguments.bias = in.bias.const_data_ptr();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, bool silu,
                                                   std::optional<ScalarType> asked) {
  OnDevice device("x", x);
  Inputs in = prepare(x, weight, bias, groups, silu);
  cuda::NormArguments& a = in.arguments;
  const Dtype sums = accumulate_of(a.x_dtype);
  const ScalarType dtype = asked.value_or(x.scalar_type());
  set_norm_dtypes(in, dtype_of("dtype", dtype));
  Tensor mean = torch::stable::new_empty(x, {a.images, groups}, scalar_type_of(sums));
  Tensor rstd = torch::stable::new_empty(x, {a.images, groups}, scalar_type_of(sums));
  Tensor out = empty_like(in.x, scalar_type_of(a.out_dtype)), partial = workspace(x, cuda::norm_partials(a), sums);
  a.eps = eps;
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr();
  cuda::group_norm_silu(a, device.stream);
  return {laid_out_as(x, in_dtype(out, dtype)), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                            Tensor rstd, int64_t groups, bool silu) {
  OnDevice device("x", x);
  Inputs in = prepare(x, weight, bias, groups, silu);
  cuda::NormArguments& a = in.arguments;
  const Dtype sums = accumulate_of(a.x_dtype);
  check_beside("dout", dout, "x", x);
  check_same_shape("x", x, "dout", dout);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_beside(name, *statistic, "x", x);
    check(statistic->dim() == 2 && statistic->size(0) == a.images && statistic->size(1) == groups, name, " is ",
          shape_of(*statistic), ", expected (", a.images, ", ", groups, ")");
    check(statistic->scalar_type() == scalar_type_of(sums), name, " must be float64 for float64 x, else float32");
  }
  set_norm_dtypes(in, dtype_of("dout", dout));
  const Tensor dout_read = laid_out_as(in.x, in_dtype(dout, scalar_type_of(a.out_dtype)));
  const Tensor mean_read = dense(mean), rstd_read = dense(rstd);
  Tensor dx = torch::stable::empty_like(in.x), dweight = torch::stable::empty_like(in.weight);
  Tensor dbias = torch::stable::empty_like(in.bias), partial = workspace(x, cuda::norm_partials(a), sums);
  Tensor channel_sums = workspace(x, 2 * a.images * a.channels, Dtype::float64), per_group = workspace(x, 2 * a.images * groups, sums);
  a.dout = dout_read.const_data_ptr();
  a.mean = const_cast<void*>(mean_read.const_data_ptr());
  a.rstd = const_cast<void*>(rstd_read.const_data_ptr());
  a.dx = dx.mutable_data_ptr();
  a.dweight = dweight.mutable_data_ptr();
  a.dbias = dbias.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr();
  a.sums = static_cast<double*>(channel_sums.mutable_data_ptr());
  a.per_group = per_group.mutable_data_ptr();
  cuda::group_norm_silu_backward(a, device.stream);
  return {laid_out_as(x, in_dtype(dx, x.scalar_type())), in_dtype(dweight, weight.scalar_type()),
          in_dtype(dbias, bias.scalar_type())};
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace idm::cuda_ops
