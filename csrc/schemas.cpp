// The schemas of the native ops, one place for all of them. They are those of idm_fast/ops, whose ops call these after having
// chosen an implementation; tests/native/test_schemas.py holds the two together. Products with Φ have an overload "tf32" of the
// same arguments, for CUDA alone, that multiplies float32 on the tensor cores.
#include <string>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(idm_fast_native, m) {
  m.def("couple(Tensor F, Tensor x2, Tensor v) -> Tensor");
  m.def("decouple(Tensor y1, Tensor F, Tensor v) -> Tensor");
  m.def("couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("uncouple_(Tensor(a!) y1, Tensor F, Tensor d1, Tensor v) -> (Tensor, Tensor, Tensor)");
  for (const char* precision : {"", ".tf32"}) {
    const auto product = [&](const char* name, const char* signature) {
      m.def((std::string(name) + precision + signature).c_str());
    };
    product("measure", "(Tensor x, Tensor matrix, Tensor permutation) -> Tensor");
    product("adjoint", "(Tensor y, Tensor matrix, Tensor permutation, int height, int width) -> Tensor");
    product("gram", "(Tensor x, Tensor matrix, Tensor permutation) -> Tensor");
    product("project_step", "(Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation, Tensor abar_t, Tensor abar_prev)"
            " -> Tensor");
    product("project_step_backward", "(Tensor g, Tensor x, Tensor e, Tensor y, Tensor matrix, Tensor permutation,"
            " Tensor abar_t, Tensor abar_prev) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  }
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
  m.def("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, ScalarType? dtype)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("group_norm_silu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
        " Tensor rstd, int groups, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def("geglu(Tensor h) -> Tensor");
  m.def("geglu_backward(Tensor dout, Tensor h) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)");
}
