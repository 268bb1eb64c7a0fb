// Checks and registration of LayerNorm's CPU kernels.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

// What a norm and its gradient read, checked and dense; `sizes` are those of x.
struct Inputs {
  Tensor x, weight, bias;
  std::vector<int64_t> sizes;
  LayerNormArguments arguments;
};

Inputs prepare(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_cpu("x", x);
  check_cpu("weight", weight);
  check_cpu("bias", bias);
  const Dtype dtype = dtype_of("x", x);
  dtype_of("weight", weight);
  dtype_of("bias", bias);
  check(x.dim() > 0 && x.size(-1) > 0, "x is ", shape_of(x), ", expected (…, C)");
  const int64_t width = x.size(-1);
  check(weight.dim() == 1 && weight.size(0) == width, "weight is ", shape_of(weight), ", expected (", width, ",)");
  check(bias.dim() == 1 && bias.size(0) == width, "bias is ", shape_of(bias), ", expected (", width, ",)");
  Inputs in{dense(x), accurate(weight, x), accurate(bias, x), {}, {}};
  LayerNormArguments& a = in.arguments;
  a.dtype = dtype;
  a.width = width;
  a.rows = 1;
  for (int64_t d = 0; d < x.dim(); ++d) in.sizes.push_back(x.size(d));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) a.rows *= x.size(d);
  a.x = in.x.const_data_ptr();
  a.weight = in.weight.const_data_ptr();
  a.bias = in.bias.const_data_ptr();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps,
                                              std::optional<ScalarType> dtype) {
  Inputs in = prepare(x, weight, bias);
  LayerNormArguments& a = in.arguments;
  Tensor out = torch::stable::new_empty(x, in.sizes, dtype.value_or(x.scalar_type()));
  in.sizes.back() = 1;
  Tensor mean = torch::stable::new_empty(x, in.sizes, accurate_dtype(x));
  Tensor rstd = torch::stable::new_empty(x, in.sizes, accurate_dtype(x));
  a.out_dtype = dtype_of("dtype", out);
  a.eps = eps;
  a.out = out.mutable_data_ptr();
  a.mean_out = mean.mutable_data_ptr();
  a.rstd_out = rstd.mutable_data_ptr();
  launchers().layer_norm(a, in_torch_threads);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) {
  Inputs in = prepare(x, weight, bias);
  LayerNormArguments& a = in.arguments;
  check_cpu("dout", dout);
  check_cpu("mean", mean);
  check_cpu("rstd", rstd);
  check_same_shape("x", x, "dout", dout);
  for (const auto& [name, statistic] : {std::pair{"mean", &mean}, {"rstd", &rstd}}) {
    bool fits = statistic->dim() == x.dim() && statistic->size(-1) == 1;
    for (int64_t d = 0; fits && d + 1 < x.dim(); ++d) fits = statistic->size(d) == x.size(d);
    check(fits, name, " is ", shape_of(*statistic), ", expected one number for each row of x, ", shape_of(x));
    check(statistic->scalar_type() == accurate_dtype(x), name, " must be float64 for float64 x, else float32");
  }
  a.dout_dtype = dtype_of("dout", dout);
  a.out_dtype = a.dtype;
  Tensor dout_dense = dense(dout), mean_dense = dense(mean), rstd_dense = dense(rstd);
  Tensor dx = torch::stable::new_empty(x, in.sizes);
  Tensor dweight = torch::stable::new_empty(in.weight, {a.width}), dbias = torch::stable::new_empty(in.bias, {a.width});
  a.dout = dout_dense.const_data_ptr();
  a.mean = mean_dense.const_data_ptr();
  a.rstd = rstd_dense.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.weight_out = dweight.mutable_data_ptr();
  a.bias_out = dbias.mutable_data_ptr();
  launchers().layer_norm_backward(a, in_torch_threads);
  return {dx, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace idm::cpu
