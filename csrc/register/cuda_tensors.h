// What the registration of the CUDA kernels does with tensors, and where it registers. Under IDM_EMULATED (tests/native) the
// same ops are registered for CPU tensors, as a library of their own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/launchers.h"
#include "cpu_tensors.h"

#if defined(IDM_EMULATED)
#define IDM_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(idm_fast_emulated, CPU, m)
#else
#define IDM_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CUDA, m)
#endif

namespace idm::cuda_ops {

using cpu::channels_last;
using cpu::dense;
using cpu::empty_like;
using cpu::in_dtype;
using cpu::laid_out_as;

inline void check_cuda(const char* name, const Tensor& x) {
#if defined(IDM_EMULATED)
  check(x.is_cpu(), name, " must be a CPU tensor");
#else
  check(x.is_cuda(), name, " must be a CUDA tensor");
#endif
}

inline void check_beside(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  check_cuda(name, x);
  check(x.get_device_index() == other.get_device_index(), name, " is on GPU ", x.get_device_index(), ", expected GPU ",
        other.get_device_index(), " as ", other_name);
}

// Makes the GPU of `x`, the argument of that name, the current one while it lives; `stream` is torch's current one there.
class OnDevice {
#if !defined(IDM_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif

  static int32_t checked_index(const char* name, const Tensor& x) {
    check_cuda(name, x);
    return x.get_device_index();
  }

 public:
  void* stream = nullptr;

#if defined(IDM_EMULATED)
  OnDevice(const char* name, const Tensor& x) { checked_index(name, x); }
#else
  OnDevice(const char* name, const Tensor& x) : guard_(checked_index(name, x)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
#endif
};

inline ScalarType scalar_type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return ScalarType::Float;
    case Dtype::float64: return ScalarType::Double;
    case Dtype::bfloat16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

// float64 for float64, else float32: what sums of a dtype are made in.
inline Dtype accumulate_of(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

// A norm's x, and out or dout, as a kernel takes them: without one for their dtypes x goes in as the dtype of sums, and `out` too
// where that does not suffice. `in` has the tensor x and the `arguments` of a norm.
template <class Inputs>
void set_norm_dtypes(Inputs& in, Dtype out) {
  auto& a = in.arguments;
  const Dtype sums = accumulate_of(a.x_dtype);
  if (!cuda::norm_serves(a.x_dtype, out)) a.x_dtype = sums;
  a.out_dtype = cuda::norm_serves(a.x_dtype, out) ? out : sums;
  in.x = in_dtype(in.x, scalar_type_of(a.x_dtype));
  a.x = in.x.const_data_ptr();
}

// A tensor of one element, as `dtype`; it stays on the GPU.
inline Tensor one_number(const char* name, const Tensor& x, Dtype dtype) {
  check(x.numel() == 1, name, " is ", shape_of(x), ", expected one element");
  dtype_of(name, x);
  return in_dtype(x, scalar_type_of(dtype));
}

// `x` as the kernels walk it: as it lies, NCHW or NHWC, or as a contiguous copy.
inline Tensor walkable(const Tensor& x) { return x.is_contiguous() || channels_last(x) ? x : torch::stable::contiguous(x); }

// Memory for `count` elements of `dtype` on the device of `model`, from torch's allocator.
inline Tensor workspace(const Tensor& model, int64_t count, Dtype dtype) {
  return torch::stable::new_empty(model, {count}, scalar_type_of(dtype));
}

}  // namespace idm::cuda_ops
