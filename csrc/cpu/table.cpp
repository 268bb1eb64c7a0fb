// This instruction set's kernels as a table.
#include "kernels.h"

#define IDM_QUOTE(name) #name
#define IDM_NAME(isa) IDM_QUOTE(isa)

namespace idm::cpu::IDM_ISA {

extern const Launchers launchers;
#define IDM_ENTRY(kernel, arguments) kernel,
const Launchers launchers = {IDM_NAME(IDM_ISA), IDM_FOR_EACH_KERNEL(IDM_ENTRY)};

}  // namespace idm::cpu::IDM_ISA
