// GEGLU on the GPU: one pass over memory forward, and one backward that computes the gate again.
#include "../formulas/geglu.h"

#include "device.h"
#include "launchers.h"

namespace idm::cuda {

namespace {

// h is `rows` rows of 2·width elements, value and gate; out has rows of `width`.
template <class T>
struct Rows {
  const T *h, *dout;
  T *out, *dh;
  int64_t rows, width;
  bool packed;
};

template <bool BACKWARD, class T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) geglu_kernel(Rows<T> a) {
  using S = Accumulate<T>;
  constexpr int W = WIDTH<T>;
  const int64_t pieces = (a.width + W - 1) / W, piece = int64_t(blockIdx.x) * ELEMENTWISE_THREADS + threadIdx.x;
  if (piece >= a.rows * pieces) return;
  const int64_t row = piece / pieces, column = piece % pieces * W, left = a.width - column;
  const int there = left < W ? int(left) : W;
  const int64_t value_at = row * 2 * a.width + column, gate_at = value_at + a.width, out_at = row * a.width + column;
  const Pack<T, W> value = load_some<T, W>(a.h + value_at, there, a.packed);
  const Pack<T, W> gate = load_some<T, W>(a.h + gate_at, there, a.packed);
  if constexpr (!BACKWARD) {
    Pack<T, W> out;
#pragma unroll
    for (int i = 0; i < W; ++i) out.values[i] = write<T>(idm::geglu(read<S>(value.values[i]), read<S>(gate.values[i])));
    store_some(a.out + out_at, out, there, a.packed);
  } else {
    const Pack<T, W> dout = load_some<T, W>(a.dout + out_at, there, a.packed);
    Pack<T, W> dvalue, dgate;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const GegluGradient<S> g =
          geglu_gradient(read<S>(dout.values[i]), read<S>(value.values[i]), read<S>(gate.values[i]));
      dvalue.values[i] = write<T>(g.value);
      dgate.values[i] = write<T>(g.gate);
    }
    store_some(a.dh + value_at, dvalue, there, a.packed);
    store_some(a.dh + gate_at, dgate, there, a.packed);
  }
}

template <bool BACKWARD>
void run(const GegluArguments& a, void* stream) {
  for_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    bool packed = a.width % WIDTH<T> == 0;
    for (const void* pointer : {a.h, a.dout, const_cast<const void*>(a.out), const_cast<const void*>(a.dh)})
      packed = packed && aligned_for<T, WIDTH<T>>(pointer);
    const Rows<T> rows{static_cast<const T*>(a.h), static_cast<const T*>(a.dout), static_cast<T*>(a.out),
                       static_cast<T*>(a.dh),      a.rows,                        a.width,
                       packed};
    launch(geglu_kernel<BACKWARD, T>, pieces_of(a.rows * pieces_of(a.width, WIDTH<T>), ELEMENTWISE_THREADS),
           ELEMENTWISE_THREADS, stream, rows);
  });
}

}  // namespace

void geglu(const GegluArguments& a, void* stream) { run<false>(a, stream); }
void geglu_backward(const GegluArguments& a, void* stream) { run<true>(a, stream); }

}  // namespace idm::cuda
