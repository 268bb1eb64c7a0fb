// couple, decouple, couple_backward, uncouple on the GPU: one pass over memory each, 16 bytes of a stream at a time.
#include "../formulas/coupling.h"

#include "device.h"
#include "launchers.h"
#include "sum.h"

namespace idm::cuda {

namespace {

enum class Op { couple, decouple, gradient, uncouple };

// `first` is the stream that is read (x2, y1), `second` d1; `recovered` is the stream that is written.
template <class T, class S>
struct Streams {
  const T* F;
  const S *first, *second, *v;
  S* recovered;
  T* dF;
  S* dx2;
  double* partial;
  int64_t count;
  bool packed;
};

template <Op OP>
constexpr bool GRADIENT = OP == Op::gradient || OP == Op::uncouple;

// One element; returns its term of dv.
template <Op OP, class T, class S>
__device__ __forceinline__ S element(T F, S first, S second, S v, S& recovered, T& dF, S& dx2) {
  const S f = read<S>(F);
  if constexpr (OP == Op::couple) recovered = idm::couple(f, first, v);
  if constexpr (OP == Op::decouple || OP == Op::uncouple) recovered = idm::decouple(first, f, v);
  if constexpr (!GRADIENT<OP>) return S(0);
  const CoupleGradient<S> g = couple_gradient(second, f, OP == Op::uncouple ? recovered : first, v);
  dF = write<T>(g.dF);
  dx2 = g.dx2;
  return g.dv;
}

template <Op OP, class T, class S>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) couple_kernel(Streams<T, S> a) {
  constexpr int W = WIDTH<S>;
  constexpr int64_t BLOCK = int64_t(ELEMENTWISE_THREADS) * W * PIECES;
  const int64_t begin = blockIdx.x * BLOCK + int64_t(threadIdx.x) * W;
  const S v = *a.v;
  // A block that is whole loads everything before it uses anything; the last one, and unaligned memory, element by element.
  const bool packed = a.packed && (blockIdx.x + 1) * BLOCK <= a.count;
  Pack<T, W> F[PIECES], dF[PIECES];
  Pack<S, W> first[PIECES], second[PIECES], recovered[PIECES], dx2[PIECES];
  int there[PIECES];
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int64_t at = begin + int64_t(p) * ELEMENTWISE_THREADS * W, left = a.count - at;
    there[p] = packed ? W : left < 0 ? 0 : left < W ? int(left) : W;
    F[p] = load_some<T, W>(a.F + at, there[p], packed);
    first[p] = load_some<S, W>(a.first + at, there[p], packed);
    if constexpr (GRADIENT<OP>) second[p] = load_some<S, W>(a.second + at, there[p], packed);
  }
  S dv = 0;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int64_t at = begin + int64_t(p) * ELEMENTWISE_THREADS * W;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S term = element<OP>(F[p].values[i], first[p].values[i], GRADIENT<OP> ? second[p].values[i] : S(0), v,
                                 recovered[p].values[i], dF[p].values[i], dx2[p].values[i]);
      if (i < there[p]) dv += term;
    }
    if constexpr (OP != Op::gradient) store_some(a.recovered + at, recovered[p], there[p], packed);
    if constexpr (GRADIENT<OP>) {
      store_some(a.dF + at, dF[p], there[p], packed);
      store_some(a.dx2 + at, dx2[p], there[p], packed);
    }
  }
  if constexpr (GRADIENT<OP>) {
    const S sum = block_sum<ELEMENTWISE_THREADS>(dv);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
  }
}

template <class S>
int64_t blocks(int64_t count) {
  return pieces_of(count, int64_t(ELEMENTWISE_THREADS) * WIDTH<S> * PIECES);
}

template <Op OP, class T, class S>
void run(const CoupleArguments& a, const void* first, void* recovered, void* stream) {
  Streams<T, S> s{static_cast<const T*>(a.F),  static_cast<const S*>(first), static_cast<const S*>(a.d1),
                  static_cast<const S*>(a.v),  static_cast<S*>(recovered),   static_cast<T*>(a.dF),
                  static_cast<S*>(a.dx2),      a.partial,                    a.count,
                  false};
  s.packed = aligned_for<T, WIDTH<S>>(a.F) && aligned_for<T, WIDTH<S>>(a.dF);
  for (const void* pointer : {first, a.d1, const_cast<const void*>(recovered), const_cast<const void*>(a.dx2)})
    s.packed = s.packed && aligned_for<S, WIDTH<S>>(pointer);
  launch(couple_kernel<OP, T, S>, blocks<S>(a.count), ELEMENTWISE_THREADS, stream, s);
  if constexpr (GRADIENT<OP>)
    launch(total_kernel<S>, 1, SUM_THREADS, stream, a.partial, blocks<S>(a.count), static_cast<S*>(a.dv));
}

template <Op OP>
void run(const CoupleArguments& a, const void* first, void* recovered, void* stream) {
  for_type(a.body, [&](auto body) {
    using T = decltype(body);
    if (a.stream == Dtype::float64) run<OP, T, double>(a, first, recovered, stream);
    else run<OP, T, float>(a, first, recovered, stream);
  });
}

}  // namespace

int64_t couple_partials(Dtype stream, int64_t count) {
  return stream == Dtype::float64 ? blocks<double>(count) : blocks<float>(count);
}

void couple(const CoupleArguments& a, void* stream) { run<Op::couple>(a, a.x2, a.y1_out, stream); }
void decouple(const CoupleArguments& a, void* stream) { run<Op::decouple>(a, a.y1, a.x2_out, stream); }
void couple_backward(const CoupleArguments& a, void* stream) { run<Op::gradient>(a, a.x2, nullptr, stream); }
void uncouple(const CoupleArguments& a, void* stream) { run<Op::uncouple>(a, a.y1, a.x2_out, stream); }

}  // namespace idm::cuda
