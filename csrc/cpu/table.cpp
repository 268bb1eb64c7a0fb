// This instruction set's kernels as a table.
#include "kernels.h"

#define IDM_QUOTE(name) #name
#define IDM_NAME(isa) IDM_QUOTE(isa)

namespace idm::cpu::IDM_ISA {

extern const Launchers launchers;
const Launchers launchers = {IDM_NAME(IDM_ISA), couple, decouple, couple_backward, uncouple};

}  // namespace idm::cpu::IDM_ISA
