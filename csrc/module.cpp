// idm_fast._C: importing it registers the CPU ops (idm_fast_native); it also tells what it is.
#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include "cpu/launchers.h"

#define IDM_QUOTE(value) #value
#define IDM_TEXT(value) IDM_QUOTE(value)

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ ops of idm_fast; importing it registers them as torch.ops.idm_fast_native";
  m.def("instruction_set", [] { return idm::cpu::launchers().name; }, "The CPU kernels in use: portable, avx2 or avx512");
  m.def("use_instruction_set", &idm::cpu::use_instruction_set, pybind11::arg("name"),
        "Use the kernels of another instruction set from now on; RuntimeError when this machine does not run it. For tests");
  m.attr("torch_headers") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
}
