// couple, decouple, couple_backward, uncouple on the CPU: one pass over memory each.
#include "../formulas/coupling.h"
#include "moments.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Elements that one thread handles at a time, and over which dv is summed before the sums are added in order.
constexpr int64_t CHUNK = 16384;

int64_t chunks(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

// f(T{}, S{}) for the body's and the stream's element types.
template <class Function>
void with_types(const CoupleArguments& a, Function f) {
  with_type(a.body, [&](auto body) {
    if (a.stream == Dtype::float64) f(body, double{});
    else f(body, float{});
  });
}

template <class Each>
void over_chunks(int64_t count, ParallelFor loop, Each each) {
  parallel(loop, chunks(count), 2, [&](int64_t chunk) {
    const int64_t begin = chunk * CHUNK;
    each(chunk, begin, begin + CHUNK < count ? begin + CHUNK : count);
  });
}

}  // namespace

void couple(const CoupleArguments& a, ParallelFor loop) {
  with_types(a, [&](auto body, auto stream) {
    using T = decltype(body);
    using S = decltype(stream);
    const T* F = static_cast<const T*>(a.F);
    const S* x2 = static_cast<const S*>(a.x2);
    S* y1 = static_cast<S*>(a.y1_out);
    const S v = static_cast<S>(a.v);
    over_chunks(a.count, loop, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y1[i] = idm::couple(static_cast<S>(load(F[i])), x2[i], v);
    });
  });
}

void decouple(const CoupleArguments& a, ParallelFor loop) {
  with_types(a, [&](auto body, auto stream) {
    using T = decltype(body);
    using S = decltype(stream);
    const T* F = static_cast<const T*>(a.F);
    const S* y1 = static_cast<const S*>(a.y1);
    S* x2 = static_cast<S*>(a.x2_out);
    const S v = static_cast<S>(a.v);
    over_chunks(a.count, loop, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) x2[i] = idm::decouple(y1[i], static_cast<S>(load(F[i])), v);
    });
  });
}

namespace {

// The gradient, with x2 given or recovered; each output may lie where an input of its dtype does.
template <bool RECOVER>
void gradient(const CoupleArguments& a, ParallelFor loop) {
  double* sums = new double[chunks(a.count)];
  with_types(a, [&](auto body, auto stream) {
    using T = decltype(body);
    using S = decltype(stream);
    const T* F = static_cast<const T*>(a.F);
    const S* given = static_cast<const S*>(RECOVER ? a.y1 : a.x2);
    const S* d1 = static_cast<const S*>(a.d1);
    S* x2_out = static_cast<S*>(a.x2_out);
    T* dF = static_cast<T*>(a.dF);
    S* dx2 = static_cast<S*>(a.dx2);
    const S v = static_cast<S>(a.v);
    over_chunks(a.count, loop, [&](int64_t chunk, int64_t begin, int64_t end) {
      double of_chunk[1];
      sum<S>(end - begin, of_chunk, [=](int64_t offset, S* term) IDM_LAMBDA_INLINE {
        const int64_t i = begin + offset;
        const S f = static_cast<S>(load(F[i])), d = d1[i];
        const S x2 = RECOVER ? idm::decouple(given[i], f, v) : given[i];
        const CoupleGradient<S> g = couple_gradient(d, f, x2, v);
        if (RECOVER) x2_out[i] = x2;
        dF[i] = Store<T>::of(g.dF);
        dx2[i] = g.dx2;
        term[0] = g.dv;
      });
      sums[chunk] = of_chunk[0];
    });
  });
  double dv = 0;
  for (int64_t chunk = 0; chunk < chunks(a.count); ++chunk) dv += sums[chunk];
  *a.dv = dv;
  delete[] sums;
}

}  // namespace

void couple_backward(const CoupleArguments& a, ParallelFor loop) { gradient<false>(a, loop); }
void uncouple(const CoupleArguments& a, ParallelFor loop) { gradient<true>(a, loop); }

}  // namespace idm::cpu::IDM_ISA
