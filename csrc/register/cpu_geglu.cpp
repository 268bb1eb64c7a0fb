// Checks and registration of GEGLU's CPU kernels.
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../cpu/launchers.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace idm::cpu {

namespace {

// h (…, 2·width), checked; `sizes` is (…, width).
GegluArguments prepare(const Tensor& h, std::vector<int64_t>& sizes) {
  check_cpu("h", h);
  check(h.dim() > 0 && h.size(-1) % 2 == 0, "h is ", shape_of(h), ", expected (…, 2·d): value and gate side by side");
  GegluArguments a{};
  a.dtype = dtype_of("h", h);
  a.width = h.size(-1) / 2;
  a.rows = 1;
  for (int64_t d = 0; d + 1 < h.dim(); ++d) {
    sizes.push_back(h.size(d));
    a.rows *= h.size(d);
  }
  sizes.push_back(a.width);
  return a;
}

Tensor geglu(Tensor h) {
  std::vector<int64_t> sizes;
  GegluArguments a = prepare(h, sizes);
  Tensor h_dense = dense(h), out = torch::stable::new_empty(h, sizes);
  a.h = h_dense.const_data_ptr();
  a.out = out.mutable_data_ptr();
  launchers().geglu(a, in_torch_threads);
  return out;
}

Tensor geglu_backward(Tensor dout, Tensor h) {
  std::vector<int64_t> sizes, dout_sizes;
  GegluArguments a = prepare(h, sizes);
  check_cpu("dout", dout);
  a.dout_dtype = dtype_of("dout", dout);
  for (int64_t d = 0; d < dout.dim(); ++d) dout_sizes.push_back(dout.size(d));
  check(dout_sizes == sizes, "dout is ", shape_of(dout), ", and h ", shape_of(h), ", which has twice the last dimension");
  Tensor h_dense = dense(h), dout_dense = dense(dout), dh = torch::stable::empty_like(h_dense);
  a.h = h_dense.const_data_ptr();
  a.dout = dout_dense.const_data_ptr();
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
