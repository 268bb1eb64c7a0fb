// The schemas of the native ops, one place for all of them. They are those of idm_fast/ops, whose ops call these after having
// chosen an implementation; tests/native/test_schemas.py holds the two together.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(idm_fast_native, m) {
  m.def("couple(Tensor F, Tensor x2, Tensor v) -> Tensor");
  m.def("decouple(Tensor y1, Tensor F, Tensor v) -> Tensor");
  m.def("couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("uncouple_(Tensor(a!) y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("measure(Tensor x, Tensor matrix, Tensor permutation) -> Tensor");
  m.def("adjoint(Tensor y, Tensor matrix, Tensor permutation, int height, int width) -> Tensor");
  m.def("gram(Tensor x, Tensor matrix, Tensor permutation) -> Tensor");
  m.def("project_step(Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t, Tensor abar_prev)"
        " -> Tensor");
  m.def("project_step_backward(Tensor g, Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation,"
        " Tensor abar_t, Tensor abar_prev) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("inject_read(Tensor h, Tensor weight, Tensor bias, int r) -> Tensor");
  m.def("inject_read_backward(Tensor dz, Tensor h, Tensor weight, int r, Tensor? through) -> (Tensor, Tensor, Tensor)");
  m.def("inject_write(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, int r) -> Tensor");
  m.def("inject_write_backward(Tensor dout, Tensor z, Tensor gz, Tensor aty, Tensor weight, int r)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("inject_couple(Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2, Tensor v, int r)"
        " -> Tensor");
  m.def("inject_couple_backward(Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias, Tensor x2,"
        " Tensor v, int r) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("inject_uncouple(Tensor y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias,"
        " Tensor v, int r) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("inject_uncouple_(Tensor(a!) y1, Tensor d1, Tensor h, Tensor z, Tensor gz, Tensor aty, Tensor weight, Tensor bias,"
        " Tensor v, int r) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, ScalarType dtype)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
        " Tensor rstd, int groups, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def("geglu(Tensor h) -> Tensor");
  m.def("geglu_backward(Tensor dout, Tensor h) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)");
}
