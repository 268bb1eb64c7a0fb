// The injector on the GPU, NCHW and NHWC: read an image off the features, write three images back onto them, the latter also with
// the coupling of a reversible chain behind it, which then makes what was written on the fly and never stores it. Each is one
// pass over the features, forward and backward.
//
// Channel c·r² + k of the features at (i, j) belongs to pixel (i·r + k / r, j·r + k % r) of an image. A thread has a run of pixels
// whose features lie side by side, neighbouring positions of one plane in NCHW, neighbouring k of one position in NHWC, and goes
// over c. It keeps what it needs of the images, or sums for them. In NHWC INJECT_LANES threads have the same run and take c in
// turn. Sums for the weights, over pixels, are made at each c: over the warp, over the block in shared memory, then over the blocks.
#include "../formulas/coupling.h"
#include "../formulas/injector.h"

#include "device.h"
#include "launchers.h"
#include "sum.h"

namespace idm::cuda {

namespace {

static_assert(INJECT_CHUNK % (INJECT_LANES * INJECT_DEPTH) == 0, "the c's that threads take at a time are of one chunk");

struct Shape {
  int64_t planes;  // c
  uint32_t height, width, r;
  bool last, packed;
  int lanes;               // threads of a run
  uint32_t runs, blocks;   // of an image
  int64_t images;

  __host__ __device__ uint32_t area() const { return height * width; }
  __host__ __device__ int64_t all_blocks() const { return images * blocks; }
};

// S: of sums, and of weights and biases; R: of the streams of a coupling.
template <class T, class S, class R>
struct Arrays {
  const T *h, *through, *z, *gz, *aty;
  const S *weight, *bias;
  const R *stream, *d1, *v;  // stream: x2, or y1 where that is inverted
  T *out, *dz, *dgz, *daty;
  R *stream_out, *dx2;
  double* partial;  // rows of a block's sums for each c; then, of each block, one for all c
};

// A thread's run of pixels and the place of its features; `there` is 0 for a thread without pixels.
template <int W>
struct Run {
  int64_t features_at, stride;  // stride: from one c to the next
  int64_t image;
  uint32_t position, k;  // of the first pixel
  int there, lane;

  __device__ __forceinline__ explicit Run(const Shape& s) {
    const uint32_t rr = s.r * s.r, area = s.area();
    const uint32_t run = (blockIdx.x % s.blocks * INJECT_THREADS + threadIdx.x) / uint32_t(s.lanes);
    image = blockIdx.x / s.blocks;
    lane = int(threadIdx.x) % s.lanes;
    uint32_t left;
    if (s.last) {
      const uint32_t pieces = (rr + W - 1) / W;
      position = run / pieces;
      k = run % pieces * W;
      left = rr - k;
      features_at = (image * area + position) * s.planes * rr + k;
      stride = rr;
    } else {
      const uint32_t pieces = (area + W - 1) / W;
      k = run / pieces;
      position = run % pieces * W;
      left = area - position;
      features_at = (image * s.planes * rr + k) * area + position;
      stride = int64_t(rr) * area;
    }
    there = run >= s.runs ? 0 : left < W ? int(left) : W;
  }

  __device__ __forceinline__ int64_t pixel(const Shape& s, int i) const {
    const uint32_t p = s.last ? position : position + i, of_k = s.last ? k + i : k;
    const uint32_t row = p / s.width * s.r + of_k / s.r, column = p % s.width * s.r + of_k % s.r;
    return image * s.area() * s.r * s.r + int64_t(row) * s.width * s.r + column;
  }

  template <class T, class S>
  __device__ __forceinline__ void load_pixels(const T* from, const Shape& s, S (&values)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = i < there ? read<S>(from[pixel(s, i)]) : S(0);
  }

  // `values` summed over the threads of the run, plus `bias`.
  template <class T, class S>
  __device__ __forceinline__ void store_pixels(T* to, const Shape& s, S (&values)[W], S bias) const {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      for (int step = 1; step < s.lanes; step *= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
      if (lane == 0 && i < there) to[pixel(s, i)] = write<T>(values[i] + bias);
    }
  }

  // How many of its features there are at c.
  __device__ __forceinline__ int at(const Shape& s, int64_t c) const { return c < s.planes ? there : 0; }
  __device__ __forceinline__ bool packed(const Shape& s, int64_t c) const { return s.packed && at(s, c) == W; }
};

template <class S>
__device__ __forceinline__ Spread<S> spread_of(const S* weight, int64_t c) {
  return {weight[3 * c], weight[3 * c + 1], weight[3 * c + 2]};
}

// COUNT sums for each c, on their way from the threads to the second stage.
template <int COUNT, class S>
struct WeightSums {
  using OfWarps = S[INJECT_THREADS / WARP][INJECT_CHUNK][COUNT];
  OfWarps& of_warps;  // in shared memory

  // What the threads of a warp have for their c's. All of the warp must come.
  __device__ __forceinline__ void leave(const Shape& s, int64_t c, S (&sums)[COUNT]) const {
    const int lane = int(threadIdx.x) % WARP;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      for (int step = s.lanes; step < WARP; step *= 2) sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], step);
      if (lane < s.lanes && c < s.planes) of_warps[threadIdx.x / WARP][c % INJECT_CHUNK][n] = sums[n];
    }
  }

  // The block's, for all c of the chunk that starts at `chunk`. All of the block must come.
  __device__ __forceinline__ void write_out(const Shape& s, int64_t chunk, double* partial) const {
    __syncthreads();
    for (int i = int(threadIdx.x); i < INJECT_CHUNK * COUNT; i += INJECT_THREADS) {
      const int64_t c = chunk + i / COUNT;
      if (c >= s.planes) break;
      double sum = 0;
#pragma unroll
      for (int warp = 0; warp < INJECT_THREADS / WARP; ++warp) sum += double(of_warps[warp][i / COUNT][i % COUNT]);
      partial[(blockIdx.x * s.planes + c) * COUNT + i % COUNT] = sum;
    }
    __syncthreads();  // before the next chunk is left there
  }
};

template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS, INJECT_BLOCKS) read_kernel(Arrays<T, S, S> a, Shape s) {
  constexpr int W = WIDTH<S>, DEPTH = 2 * INJECT_DEPTH;
  const Run<W> run(s);
  S sums[W] = {};
  for (int64_t first = run.lane; first < s.planes; first += s.lanes * DEPTH) {
    Pack<T, W> h[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int64_t c = first + d * s.lanes;
      h[d] = load_some<T, W>(a.h + run.features_at + c * run.stride, run.at(s, c), run.packed(s, c));
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int64_t c = first + d * s.lanes;
      if (c >= s.planes) break;
#pragma unroll
      for (int i = 0; i < W; ++i) sums[i] += a.weight[c] * read<S>(h[d].values[i]);
    }
  }
  run.store_pixels(a.dz, s, sums, *a.bias);
}

// dh = weight·dz, plus `through` where there is one; sums for weight and bias.
template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS, INJECT_BLOCKS) read_gradient_kernel(Arrays<T, S, S> a, Shape s) {
  constexpr int W = WIDTH<S>, DEPTH = INJECT_DEPTH;
  __shared__ typename WeightSums<1, S>::OfWarps of_warps;
  const WeightSums<1, S> weight_sums{of_warps};
  const Run<W> run(s);
  S dz[W];
  run.load_pixels(a.z, s, dz);
  for (int64_t chunk = 0; chunk < s.planes; chunk += INJECT_CHUNK) {
    const int64_t end = chunk + INJECT_CHUNK < s.planes ? chunk + INJECT_CHUNK : s.planes;
    for (int64_t begin = chunk; begin < end; begin += s.lanes * DEPTH) {
      Pack<T, W> h[DEPTH], through[DEPTH] = {};
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int64_t c = begin + run.lane + d * s.lanes, at = run.features_at + c * run.stride;
        h[d] = load_some<T, W>(a.h + at, run.at(s, c), run.packed(s, c));
        if (a.through != nullptr) through[d] = load_some<T, W>(a.through + at, run.at(s, c), run.packed(s, c));
      }
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int64_t c = begin + run.lane + d * s.lanes, at = run.features_at + c * run.stride;
        const S weight = c < s.planes ? a.weight[c] : S(0);
        Pack<T, W> dh;
        S sums[1] = {};
#pragma unroll
        for (int i = 0; i < W; ++i) {
          dh.values[i] = write<T>(weight * dz[i] + read<S>(through[d].values[i]));
          sums[0] += read<S>(h[d].values[i]) * dz[i];
        }
        store_some(a.out + at, dh, run.at(s, c), run.packed(s, c));
        weight_sums.leave(s, c, sums);
      }
    }
    weight_sums.write_out(s, chunk, a.partial);
  }
  S dbias = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) dbias += dz[i];
  dbias = block_sum<INJECT_THREADS>(run.lane == 0 ? dbias : S(0));
  if (threadIdx.x == 0) a.partial[s.all_blocks() * s.planes + blockIdx.x] = dbias;
}

// `out` from h and the images; COUPLED: y1 from that and x2.
template <bool COUPLED, class T, class S, class R>
__global__ void __launch_bounds__(INJECT_THREADS, INJECT_BLOCKS) write_kernel(Arrays<T, S, R> a, Shape s) {
  constexpr int W = WIDTH<R>, DEPTH = INJECT_DEPTH;
  const Run<W> run(s);
  if (run.there == 0) return;
  S z[W], gz[W], aty[W];
  run.load_pixels(a.z, s, z);
  run.load_pixels(a.gz, s, gz);
  run.load_pixels(a.aty, s, aty);
  const R v = COUPLED ? *a.v : R(0);
  for (int64_t first = run.lane; first < s.planes; first += s.lanes * DEPTH) {
    Pack<T, W> h[DEPTH];
    Pack<R, W> x2[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int64_t c = first + d * s.lanes, at = run.features_at + c * run.stride;
      h[d] = load_some<T, W>(a.h + at, run.at(s, c), run.packed(s, c));
      if constexpr (COUPLED) x2[d] = load_some<R, W>(a.stream + at, run.at(s, c), run.packed(s, c));
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int64_t c = first + d * s.lanes, at = run.features_at + c * run.stride;
      if (c >= s.planes) break;
      const Spread<S> weight = spread_of(a.weight, c);
      const S bias = a.bias[c];
      Pack<T, W> out;
      Pack<R, W> y1;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const S written = spread(read<S>(h[d].values[i]), z[i], gz[i], aty[i], weight, bias);
        if constexpr (COUPLED) y1.values[i] = idm::couple(R(written), x2[d].values[i], v);
        else out.values[i] = write<T>(written);
      }
      if constexpr (COUPLED) store_some(a.stream_out + at, y1, run.at(s, c), run.packed(s, c));
      else store_some(a.out + at, out, run.at(s, c), run.packed(s, c));
    }
  }
}

enum class Gradient { write, couple, uncouple };

// The gradients of the images, and sums for weight and bias, from the gradient of what was written: it comes as `h`, or is that of
// the coupling, with those of h and x2 and a sum for v; `uncouple` also recovers x2.
template <Gradient OF, class T, class S, class R>
__global__ void __launch_bounds__(INJECT_THREADS, INJECT_BLOCKS) write_gradient_kernel(Arrays<T, S, R> a, Shape s) {
  constexpr bool COUPLED = OF != Gradient::write;
  constexpr int W = WIDTH<R>, DEPTH = COUPLED ? 1 : INJECT_DEPTH;  // of a coupling there are three tensors to load from
  __shared__ typename WeightSums<4, S>::OfWarps of_warps;
  const WeightSums<4, S> weight_sums{of_warps};
  const Run<W> run(s);
  S pixels[3][W], gradients[3][W] = {};
  run.load_pixels(a.z, s, pixels[0]);
  run.load_pixels(a.gz, s, pixels[1]);
  run.load_pixels(a.aty, s, pixels[2]);
  const R v = COUPLED ? *a.v : R(0);
  double dv = 0;
  for (int64_t chunk = 0; chunk < s.planes; chunk += INJECT_CHUNK) {
    const int64_t end = chunk + INJECT_CHUNK < s.planes ? chunk + INJECT_CHUNK : s.planes;
    for (int64_t begin = chunk; begin < end; begin += s.lanes * DEPTH) {
      Pack<T, W> h[DEPTH];
      Pack<R, W> stream[DEPTH], d1[DEPTH];
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int64_t c = begin + run.lane + d * s.lanes, at = run.features_at + c * run.stride;
        h[d] = load_some<T, W>(a.h + at, run.at(s, c), run.packed(s, c));
        if constexpr (COUPLED) {
          stream[d] = load_some<R, W>(a.stream + at, run.at(s, c), run.packed(s, c));
          d1[d] = load_some<R, W>(a.d1 + at, run.at(s, c), run.packed(s, c));
        }
      }
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int64_t c = begin + run.lane + d * s.lanes, at = run.features_at + c * run.stride;
        const int there = run.at(s, c);
        const Spread<S> weight = there > 0 ? spread_of(a.weight, c) : Spread<S>{};
        const S bias = COUPLED && there > 0 ? a.bias[c] : S(0);
        Pack<T, W> dh;
        Pack<R, W> x2, dx2;
        S sums[4] = {};
        R of_v = 0;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          S g = read<S>(h[d].values[i]);
          if constexpr (COUPLED) {
            const R written = R(spread(g, pixels[0][i], pixels[1][i], pixels[2][i], weight, bias));
            const R read_stream = stream[d].values[i];
            x2.values[i] = OF == Gradient::uncouple ? idm::decouple(read_stream, written, v) : read_stream;
            const CoupleGradient<R> of_coupling = couple_gradient(d1[d].values[i], written, x2.values[i], v);
            dh.values[i] = write<T>(of_coupling.dF);
            dx2.values[i] = of_coupling.dx2;
            if (i < there) of_v += of_coupling.dv;
            g = i < there ? S(of_coupling.dF) : S(0);
          }
          gradients[0][i] += weight.z * g;
          gradients[1][i] += weight.gz * g;
          gradients[2][i] += weight.aty * g;
#pragma unroll
          for (int k = 0; k < 3; ++k) sums[k] += g * pixels[k][i];
          sums[3] += g;
        }
        if constexpr (COUPLED) {
          dv += of_v;
          store_some(a.out + at, dh, there, run.packed(s, c));
          store_some(a.dx2 + at, dx2, there, run.packed(s, c));
        }
        if constexpr (OF == Gradient::uncouple) store_some(a.stream_out + at, x2, there, run.packed(s, c));
        weight_sums.leave(s, c, sums);
      }
    }
    weight_sums.write_out(s, chunk, a.partial);
  }
  run.store_pixels(a.dz, s, gradients[0], S(0));
  run.store_pixels(a.dgz, s, gradients[1], S(0));
  run.store_pixels(a.daty, s, gradients[2], S(0));
  if constexpr (COUPLED) {
    dv = block_sum<INJECT_THREADS>(dv);
    if (threadIdx.x == 0) a.partial[s.all_blocks() * s.planes * 4 + blockIdx.x] = dv;
  }
}

// Block c: the sums of all blocks for it, in order. COUNT − 1 of them are the weight's and one the bias's; the one of COUNT = 1 is
// the weight's.
template <int COUNT, class S>
__global__ void __launch_bounds__(COMBINE_THREADS)
    weights_kernel(const double* partial, int64_t parts, int64_t planes, S* dweight, S* dbias) {
  constexpr int WEIGHTS = COUNT == 1 ? 1 : COUNT - 1;
  double sums[COUNT] = {};
  for (int64_t part = threadIdx.x; part < parts; part += COMBINE_THREADS)
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums[k] += partial[(part * planes + blockIdx.x) * COUNT + k];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const double sum = block_sum<COMBINE_THREADS>(sums[k]);
    if (threadIdx.x != 0) continue;
    if (k < WEIGHTS) dweight[blockIdx.x * WEIGHTS + k] = S(sum);
    else dbias[blockIdx.x] = S(sum);
  }
}

template <class T, class S, class R>
Arrays<T, S, R> arrays_of(const InjectArguments& a) {
  const auto in = [](const void* pointer) { return static_cast<const T*>(pointer); };
  const auto out = [](void* pointer) { return static_cast<T*>(pointer); };
  return {in(a.h), in(a.through), in(a.z), in(a.gz), in(a.aty), static_cast<const S*>(a.weight), static_cast<const S*>(a.bias),
          static_cast<const R*>(a.stream), static_cast<const R*>(a.d1), static_cast<const R*>(a.v), out(a.out), out(a.dz),
          out(a.dgz), out(a.daty), static_cast<R*>(a.stream_out), static_cast<R*>(a.dx2), a.partial};
}

// With runs of W pixels; not yet told whether 16-byte accesses can be used.
Shape shape_of(const InjectArguments& a, int W) {
  const int64_t rr = int64_t(a.r) * a.r, area = a.height * a.width;
  const int64_t runs = a.last ? area * pieces_of(rr, W) : rr * pieces_of(area, W);
  const int lanes = a.last ? INJECT_LANES : 1;
  if (a.images > 0 && (area * rr > 0x7fffffff || runs * lanes > 0x7fffffff))  // what is inside an image is counted in 32 bits
    throw std::runtime_error("an injector's image of " + std::to_string(area * rr) + " pixels");
  return {a.planes, uint32_t(a.height), uint32_t(a.width), uint32_t(a.r), a.last, false, lanes,
          uint32_t(runs), uint32_t(pieces_of(runs * lanes, INJECT_THREADS)), a.images};
}

template <class T, class R>
Shape shape_of(const InjectArguments& a) {
  constexpr int W = WIDTH<R>;
  Shape shape = shape_of(a, W);
  shape.packed = (a.last ? a.r * a.r : a.height * a.width) % W == 0;
  for (const void* pointer : {a.h, a.through, const_cast<const void*>(a.out)})
    shape.packed = shape.packed && aligned_for<T, W>(pointer);
  for (const void* pointer : {a.stream, a.d1, const_cast<const void*>(a.stream_out), const_cast<const void*>(a.dx2)})
    shape.packed = shape.packed && aligned_for<R, W>(pointer);
  return shape;
}

// f(T{}, S{}) for the features' dtype and that of sums.
template <class Function>
void with_types(const InjectArguments& a, const Function& f) {
  for_type(a.dtype, [&](auto element) { f(element, Accumulate<decltype(element)>{}); });
}

// f(T{}, S{}, R{}), with the streams' dtype.
template <class Function>
void with_stream_types(const InjectArguments& a, const Function& f) {
  with_types(a, [&](auto element, auto sum) {
    if (a.stream_dtype == Dtype::float64) f(element, sum, double{});
    else f(element, sum, float{});
  });
}

// The second stage of the sums that `blocks` blocks left.
template <int COUNT, class S>
void sum_weights(const InjectArguments& a, int64_t blocks, void* stream) {
  launch(weights_kernel<COUNT, S>, a.planes, COMBINE_THREADS, stream, a.partial, blocks, a.planes, static_cast<S*>(a.dweight),
         static_cast<S*>(a.dbias));
}

template <Gradient OF>
void coupled_gradient(const InjectArguments& a, void* stream) {
  with_stream_types(a, [&](auto element, auto sum, auto of_stream) {
    using T = decltype(element);
    using S = decltype(sum);
    using R = decltype(of_stream);
    const Shape s = shape_of<T, R>(a);
    launch(write_gradient_kernel<OF, T, S, R>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, R>(a), s);
    sum_weights<4, S>(a, s.all_blocks(), stream);
    launch(total_kernel<R>, 1, SUM_THREADS, stream, a.partial + s.all_blocks() * s.planes * 4, s.all_blocks(),
           static_cast<R*>(a.dv));
  });
}

}  // namespace

int64_t inject_partials(const InjectArguments& a) {
  const int W = a.stream_dtype == Dtype::float64 ? WIDTH<double> : WIDTH<float>;
  return shape_of(a, W).all_blocks() * (4 * a.planes + 1);
}

void inject_read(const InjectArguments& a, void* stream) {
  with_types(a, [&](auto element, auto sum) {
    using T = decltype(element);
    using S = decltype(sum);
    const Shape s = shape_of<T, S>(a);
    launch(read_kernel<T, S>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, S>(a), s);
  });
}

void inject_read_backward(const InjectArguments& a, void* stream) {
  with_types(a, [&](auto element, auto sum) {
    using T = decltype(element);
    using S = decltype(sum);
    const Shape s = shape_of<T, S>(a);
    launch(read_gradient_kernel<T, S>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, S>(a), s);
    sum_weights<1, S>(a, s.all_blocks(), stream);
    launch(total_kernel<S>, 1, SUM_THREADS, stream, a.partial + s.all_blocks() * s.planes, s.all_blocks(),
           static_cast<S*>(a.dbias));
  });
}

void inject_write(const InjectArguments& a, void* stream) {
  with_types(a, [&](auto element, auto sum) {
    using T = decltype(element);
    using S = decltype(sum);
    const Shape s = shape_of<T, S>(a);
    launch(write_kernel<false, T, S, S>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, S>(a), s);
  });
}

void inject_write_backward(const InjectArguments& a, void* stream) {
  with_types(a, [&](auto element, auto sum) {
    using T = decltype(element);
    using S = decltype(sum);
    const Shape s = shape_of<T, S>(a);
    launch(write_gradient_kernel<Gradient::write, T, S, S>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, S>(a), s);
    sum_weights<4, S>(a, s.all_blocks(), stream);
  });
}

void inject_couple(const InjectArguments& a, void* stream) {
  with_stream_types(a, [&](auto element, auto sum, auto of_stream) {
    using T = decltype(element);
    using S = decltype(sum);
    using R = decltype(of_stream);
    const Shape s = shape_of<T, R>(a);
    launch(write_kernel<true, T, S, R>, s.all_blocks(), INJECT_THREADS, stream, arrays_of<T, S, R>(a), s);
  });
}

void inject_couple_backward(const InjectArguments& a, void* stream) { coupled_gradient<Gradient::couple>(a, stream); }
void inject_uncouple(const InjectArguments& a, void* stream) { coupled_gradient<Gradient::uncouple>(a, stream); }

}  // namespace idm::cuda
