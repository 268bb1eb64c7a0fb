// What the registration of the CPU's kernels does with tensors after they have been checked.
#pragma once

#include <array>
#include <optional>

#include <torch/headeronly/util/shim_utils.h>

#include "checks.h"

namespace idm::cpu {

// The value of a CPU tensor of one element.
inline double number(const char* name, const Tensor& x) {
  check_cpu(name, x);
  check(x.numel() == 1, name, " is ", shape_of(x), ", expected one element");
  double value = 0;
  with_type(dtype_of(name, x), [&](auto type) { value = load(*static_cast<const decltype(type)*>(x.const_data_ptr())); });
  return value;
}

inline Tensor number_like(const Tensor& model, double value) {
  Tensor out = torch::stable::empty_like(model);
  with_type(dtype_of("v", model), [&](auto type) {
    *static_cast<decltype(type)*>(out.mutable_data_ptr()) = Store<decltype(type)>::of(value);
  });
  return out;
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// torch.empty_like(model, dtype=dtype).
inline Tensor empty_like(const Tensor& model, ScalarType dtype) {
  using torch::stable::detail::from;
  const auto unset = from(std::nullopt);
  std::array<StableIValue, 6> stack{from(model), from(std::optional<ScalarType>(dtype)), unset, unset, unset, unset};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether x lies densely with its channels last.
inline bool channels_last(const Tensor& x) {
  int64_t expected = 1;
  bool holds = x.dim() > 1;
  const auto next = [&](int64_t d) {
    holds = holds && (x.size(d) == 1 || x.stride(d) == expected);
    expected *= x.size(d);
  };
  if (holds) next(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) next(d);
  if (holds) next(0);
  return holds;
}

// Whether x lies densely in NCHW or NHWC, and `model`, of the same shape, likewise: then empty_like gives that layout, too.
inline bool lies_like(const Tensor& model, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1 && x.stride(d) != model.stride(d)) return false;
  return x.is_contiguous() || channels_last(x);
}

// Gives `result` the layout that empty_like gives a tensor like `model`, if it lies otherwise.
inline Tensor laid_out_as(const Tensor& model, Tensor result) {
  if (lies_like(model, result)) return result;  // without empty_like's memory, which on a GPU would count
  Tensor out = empty_like(model, result.scalar_type());
  for (int64_t d = 0; d < model.dim(); ++d)
    if (model.size(d) > 1 && out.stride(d) != result.stride(d)) return torch::stable::copy_(out, result);
  return result;
}

inline Tensor in_dtype_of(const Tensor& model, const Tensor& x) { return in_dtype(x, model.scalar_type()); }

// What sums over tensors like x are computed in: float64 for float64, else float32.
inline ScalarType accurate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A parameter, dense and in the dtype of sums over tensors like x.
inline Tensor accurate(const Tensor& parameter, const Tensor& x) { return dense(in_dtype(parameter, accurate_dtype(x))); }

}  // namespace idm::cpu
