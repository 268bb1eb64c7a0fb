// Checks and registration of GEGLU's CPU kernels.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

GegluArguments prepare(const Tensor& h) {
  check_cpu("h", h);
  check(h.dim() > 0 && h.size(h.dim() - 1) % 2 == 0, "h is ", shape_of(h), ", expected an even last dimension: value and gate");
  GegluArguments a{};
  a.dtype = dtype_of("h", h);
  a.width = h.size(h.dim() - 1) / 2;
  a.rows = a.width > 0 ? h.numel() / (2 * a.width) : 0;
  return a;
}

Tensor geglu(Tensor h) {
  GegluArguments a = prepare(h);
  const Tensor input = dense(h);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < h.dim(); ++d) shape.push_back(h.size(d));
  shape.back() = a.width;
  Tensor out = torch::stable::new_empty(h, shape);
  a.h = input.const_data_ptr();
  a.out = out.mutable_data_ptr();
  launchers().geglu(a, in_torch_threads);
  return out;
}

Tensor geglu_backward(Tensor dout, Tensor h) {
  GegluArguments a = prepare(h);
  check_cpu("dout", dout);
  check_same_dtype("h", h, "dout", dout);
  bool fits = dout.dim() == h.dim() && dout.size(h.dim() - 1) == a.width;
  for (int64_t d = 0; fits && d < h.dim() - 1; ++d) fits = dout.size(d) == h.size(d);
  check(fits, "dout is ", shape_of(dout), ", expected half the last dimension of h, ", shape_of(h));
  const Tensor input = dense(h), gradient = dense(dout);
  Tensor dh = torch::stable::empty_like(input);
  a.h = input.const_data_ptr();
  a.dout = gradient.const_data_ptr();
  a.out = dh.mutable_data_ptr();
  launchers().geglu_backward(a, in_torch_threads);
  return laid_out_as(h, dh);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(idm_fast_native, CPU, m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace idm::cpu
