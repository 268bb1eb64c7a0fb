// Checks and registration of GEGLU's CUDA kernels.
#include <vector>

#include "../cuda/launchers.h"
#include "cuda_tensors.h"

namespace idm::cuda_ops {

namespace {

cuda::GegluArguments arguments(const Tensor& h, const Tensor& dense_h) {
  check(h.dim() >= 1 && h.size(h.dim() - 1) % 2 == 0, "h is ", shape_of(h), ", expected an even last dimension: value and gate");
  cuda::GegluArguments a{};
  a.dtype = dtype_of("h", h);
  a.width = h.size(h.dim() - 1) / 2;
  a.rows = a.width == 0 ? 0 : h.numel() / (2 * a.width);
  a.h = dense_h.const_data_ptr();
  return a;
}

std::vector<int64_t> output_shape(const Tensor& h) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < h.dim(); ++d) shape.push_back(d == h.dim() - 1 ? h.size(d) / 2 : h.size(d));
  return shape;
}

Tensor geglu(Tensor h) {
  OnDevice device("h", h);
  const Tensor dense_h = dense(h);
  cuda::GegluArguments a = arguments(h, dense_h);
  const std::vector<int64_t> shape = output_shape(h);
  Tensor out = torch::stable::new_empty(h, {shape.data(), shape.size()});
  a.out = out.mutable_data_ptr();
  cuda::geglu(a, device.stream);
  return out;
}

Tensor geglu_backward(Tensor dout, Tensor h) {
  OnDevice device("h", h);
  check_beside("dout", dout, "h", h);
  check_same_dtype("h", h, "dout", dout);
  const Tensor dense_h = dense(h), dense_dout = dense(dout);
  cuda::GegluArguments a = arguments(h, dense_h);
  const std::vector<int64_t> shape = output_shape(h);
  bool same = dout.dim() == h.dim();
  for (int64_t d = 0; same && d < h.dim(); ++d) same = dout.size(d) == shape[d];
  check(same, "dout is ", shape_of(dout), ", expected the shape of h, ", shape_of(h), ", with half its last dimension");
  Tensor dh = torch::stable::empty_like(dense_h);
  a.dout = dense_dout.const_data_ptr();
  a.dh = dh.mutable_data_ptr();
  cuda::geglu_backward(a, device.stream);
  return laid_out_as(h, dh);
}

}  // namespace

IDM_CUDA_LIBRARY(m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace idm::cuda_ops
