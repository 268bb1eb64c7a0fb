// GEGLU and its gradient on the CPU: one pass.
#include "../formulas/geglu.h"

#include "rows.h"

namespace idm::cpu::IDM_ISA {

namespace {

// f(T{}, first row's index, how many) for pieces of the rows, in threads.
template <class Function>
void over_rows(const GegluArguments& a, ParallelFor loop, const Function& f) {
  with_type(a.dtype, [&](auto element) {
    const int64_t together = a.width < 4096 ? 4096 / (a.width > 0 ? a.width : 1) + 1 : 1;
    parallel(loop, (a.rows + together - 1) / together, 1, [&](int64_t piece) {
      const int64_t end = (piece + 1) * together < a.rows ? (piece + 1) * together : a.rows;
      for (int64_t row = piece * together; row < end; ++row) f(element, row);
    });
  });
}

}  // namespace

void geglu(const GegluArguments& a, ParallelFor loop) {
  over_rows(a, loop, [&](auto element, int64_t row) {
    using T = decltype(element);
    using S = Accumulate<T>;
    const T *value = static_cast<const T*>(a.h) + row * 2 * a.width, *gate = value + a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    IDM_VECTOR_LOOP
    for (int64_t i = 0; i < a.width; ++i) out[i] = Store<T>::of(idm::geglu(S(load(value[i])), S(load(gate[i]))));
  });
}

void geglu_backward(const GegluArguments& a, ParallelFor loop) {
  over_rows(a, loop, [&](auto element, int64_t row) {
    using T = decltype(element);
    using S = Accumulate<T>;
    const T *value = static_cast<const T*>(a.h) + row * 2 * a.width, *gate = value + a.width;
    const T* dout = static_cast<const T*>(a.dout) + row * a.width;
    T *dvalue = static_cast<T*>(a.out) + row * 2 * a.width, *dgate = dvalue + a.width;
    IDM_VECTOR_LOOP
    for (int64_t i = 0; i < a.width; ++i) {
      const GegluGradient<S> g = geglu_gradient(S(load(dout[i])), S(load(value[i])), S(load(gate[i])));
      dvalue[i] = Store<T>::of(g.value);
      dgate[i] = Store<T>::of(g.gate);
    }
  });
}

}  // namespace idm::cpu::IDM_ISA
