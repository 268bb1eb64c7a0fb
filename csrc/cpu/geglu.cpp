// geglu and geglu_backward on the CPU: one pass over memory each.
#include "../formulas/geglu.h"
#include "convert.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Elements of a row that are computed at a time, and that one thread handles at least.
constexpr int64_t RUN = 1024, CHUNK = 16384;

// each(begin of the values in h, begin in out, count) for runs of all rows: value and gate stand `width` apart in h.
template <class Each>
void over_runs(const GegluArguments& a, ParallelFor loop, const Each& each) {
  if (a.width == 0) return;
  const int64_t rows = a.width < CHUNK ? CHUNK / a.width : 1, chunks = (a.rows + rows - 1) / rows;
  parallel(loop, chunks, 1, [&](int64_t chunk) {
    const int64_t last = (chunk + 1) * rows < a.rows ? (chunk + 1) * rows : a.rows;
    for (int64_t row = chunk * rows; row < last; ++row)
      for (int64_t begin = 0; begin < a.width; begin += RUN)
        each(2 * row * a.width + begin, row * a.width + begin, begin + RUN < a.width ? RUN : a.width - begin);
  });
}

}  // namespace

void geglu(const GegluArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Source<S> h{a.dtype, a.h};
    const Target<S> out{a.dtype, a.out};
    over_runs(a, loop, [&](int64_t at, int64_t to, int64_t count) {
      alignas(64) S values[RUN], gates[RUN], results[RUN];
      const S *value = h.read(at, count, values), *gate = h.read(at + a.width, count, gates);
      S* result = out.place(to, results);
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < count; ++i) result[i] = idm::geglu(value[i], gate[i]);
      out.write(to, count, results);
    });
  });
}

void geglu_backward(const GegluArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Source<S> h{a.dtype, a.h}, dout{a.dout_dtype, a.dout};
    const Target<S> dh{a.dtype, a.out};
    over_runs(a, loop, [&](int64_t at, int64_t from, int64_t count) {
      alignas(64) S values[RUN], gates[RUN], gradients[RUN], value_results[RUN], gate_results[RUN];
      const S *value = h.read(at, count, values), *gate = h.read(at + a.width, count, gates);
      const S* gradient = dout.read(from, count, gradients);
      S *dvalue = dh.place(at, value_results), *dgate = dh.place(at + a.width, gate_results);
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < count; ++i) {
        const GegluGradient<S> g = geglu_gradient(gradient[i], value[i], gate[i]);
        dvalue[i] = g.value;
        dgate[i] = g.gate;
      }
      dh.write(at, count, value_results);
      dh.write(at + a.width, count, gate_results);
    });
  });
}

}  // namespace idm::cpu::IDM_ISA
