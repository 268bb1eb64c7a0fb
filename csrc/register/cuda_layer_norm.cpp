// Checks and registration of LayerNorm's CUDA kernels.
#include <tuple>
#include <vector>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

// What a norm and its gradient read, checked and dense; `sizes` are those of x.
struct Inputs {
  Tensor x, weight, bias;  // the last two in the dtype of sums
  std::vector<int64_t> sizes;
  cuda::LayerNormArguments arguments;
};

Inputs prepare(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_cuda("x", x);
  check_beside("weight", weight, "x", x);
  check_beside("bias", bias, "x", x);
  check(x.dim() > 0 && x.size(-1) > 0, "x is ", shape_of(x), ", expected (…, C)");
  const int64_t width = x.size(-1);
  for (const auto& [name, parameter] : {std::pair("weight", &weight), std::pair("bias", &bias)}) {
    check(parameter->dim() == 1 && parameter->size(0) == width, name, " is ", shape_of(*parameter), ", expected (", width, ",)");
    dtype_of(name, *parameter);
  }
  cuda::LayerNormArguments a{};
  a.x_dtype = a.out_dtype = dtype_of("x", x);
  const ScalarType sums = scalar_type_of(accumulate_of(a.x_dtype));
  Inputs in{dense(x), dense(in_dtype(weight, sums)), dense(in_dtype(bias, sums)), {}, a};
  for (int64_t d = 0; d < x.dim(); ++d) in.sizes.push_back(x.size(d));
  in.arguments.rows = x.numel() / width;
  in.arguments.width = width;
  in.arguments.weight = in.weight.const_data_ptr();
  in.arguments.bias = in.bias.const_data_ptr();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps,
                                              std::optional<ScalarType> asked) {
  OnDevice device("x", x);
  Inputs in = prepare(x, weight, bias);
  cuda::LayerNormArguments& a = in.arguments;
  const ScalarType sums = scalar_type_of(accumulate_of(a.x_dtype)), dtype = asked.value_or(x.scalar_type());
  set_norm_dtypes(in, dtype_of("dtype", dtype));
  Tensor out = torch::stable::new_empty(x, in.sizes, scalar_type_of(a.out_dtype));
  in.sizes.back() = 1;
  Tensor mean = torch::stable::new_empty(x, in.sizes, sums), rstd = torch::stable::new_empty(x, in.sizes, sums);
  a.eps = eps;
  a.out = out.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  cuda::layer_norm(a, device.stream);
  return {in_dtype(out, dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                       Tensor rstd) {
  OnDevice device("x", x);
  Inputs in = prepare(x, weight, bias);
  cuda::LayerNormArguments& a = in.arguments;
  const Dtype sums = accumulate_of(a.x_dtype);
  check_beside("dout", dout, "x", x);
  check_same_shape("x", x, "dout", dout);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_beside(name, *statistic, "x", x);
    bool fits = statistic->dim() == x.dim() && statistic->size(-1) == 1;
    for (int64_t d = 0; fits && d + 1 < x.dim(); ++d) fits = statistic->size(d) == x.size(d);
    check(fits, name, " is ", shape_of(*statistic), ", expected one number for each row of x, ", shape_of(x));
    check(statistic->scalar_type() == scalar_type_of(sums), name, " must be float64 for float64 x, else float32");
  }
  set_norm_dtypes(in, dtype_of("dout", dout));
  const Tensor dout_read = dense(in_dtype(dout, scalar_type_of(a.out_dtype)));
  const Tensor mean_read = dense(mean), rstd_read = dense(rstd);
  Tensor dx = torch::stable::new_empty(x, in.sizes, scalar_type_of(a.x_dtype)), dweight = torch::stable::empty_like(in.weight);
  Tensor dbias = torch::stable::empty_like(in.bias), partial = workspace(x, cuda::layer_norm_partials(a), sums);
  a.dout = dout_read.const_data_ptr();
  a.mean = const_cast<void*>(mean_read.const_data_ptr());
  a.rstd = const_cast<void*>(rstd_read.const_data_ptr());
  a.dx = dx.mutable_data_ptr();
  a.dweight = dweight.mutable_data_ptr();
  a.dbias = dbias.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr();
  cuda::layer_norm_backward(a, device.stream);
  return {in_dtype(dx, x.scalar_type()), in_dtype(dweight, weight.scalar_type()), in_dtype(dbias, bias.scalar_type())};
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace idm::cuda_ops
