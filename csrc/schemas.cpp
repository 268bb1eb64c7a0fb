// The schemas of the native ops, one place for all of them. They are those of idm_fast/ops, whose ops call these after having
// chosen an implementation; tests/native/test_schemas.py holds the two together.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(idm_fast_native, m) {
  m.def("couple(Tensor F, Tensor x2, Tensor v) -> Tensor");
  m.def("decouple(Tensor y1, Tensor F, Tensor v) -> Tensor");
  m.def("couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("uncouple_(Tensor(a!) y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor)");
}
