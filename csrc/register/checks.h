// What the registration layer asks of tensors before a kernel touches their memory, and how it speaks to the kernels.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../cpu/numbers.h"

namespace idm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// RuntimeError in Python, with the parts of the message joined. torch's own macro would add the path of this file.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

// a·b for sizes that nobody has allocated yet: a caller can pass any number.
inline int64_t product_of(const char* name, int64_t a, int64_t b) {
  int64_t product = 0;
  check(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), name, ": ", a, " and ", b, " are no sizes of a tensor");
  return product;
}

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + ")";
}

inline Dtype dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: fail(name, ": its dtype is none of float32, float64, bfloat16, float16");
  }
}

inline Dtype dtype_of(const char* name, const Tensor& x) { return dtype_of(name, x.scalar_type()); }

inline void check_same_shape(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  check(same, b_name, " is ", shape_of(b), ", expected ", shape_of(a), " as ", a_name);
}

inline void check_same_dtype(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  check(a.scalar_type() == b.scalar_type(), b_name, " must have the dtype of ", a_name);
}

inline void check_cpu(const char* name, const Tensor& x) { check(x.is_cpu(), name, " must be a CPU tensor"); }

// Whether the elements of all tensors, which have one shape, lie densely and in one order, so that they can be walked as one row.
inline bool one_dense_row(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  int64_t expected = 1, seen = 0, elements = first.numel();
  for (const Tensor* x : tensors)
    for (int64_t d = 0; d < first.dim(); ++d)
      if (first.size(d) > 1 && x->stride(d) != first.stride(d)) return false;
  // Dimensions in the order of their strides, innermost first: each stride is what lies inside it.
  for (; seen < elements && expected < elements;) {
    bool found = false;
    for (int64_t d = 0; d < first.dim() && !found; ++d)
      if (first.size(d) > 1 && first.stride(d) == expected) {
        expected *= first.size(d);
        found = true;
      }
    if (!found) return false;
  }
  return true;
}

}  // namespace idm
