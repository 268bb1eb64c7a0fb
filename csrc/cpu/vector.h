// Vectors of this instruction set's registers, in the compiler's own extension; for the loops that must stay in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formulas/portable.h"

namespace idm::cpu::IDM_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTOR_REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, VECTOR_REGISTERS = 16;
#else
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 16;
#endif

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class S>
using Vector = typename VectorOf<S>::type;

template <class S>
constexpr int LANES = VECTOR_BYTES / sizeof(S);

template <class S>
IDM_INLINE Vector<S> load_vector(const S* from) {
  Vector<S> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class S>
IDM_INLINE void store_vector(S* to, Vector<S> v) {
  std::memcpy(to, &v, sizeof v);
}

}  // namespace idm::cpu::IDM_ISA
