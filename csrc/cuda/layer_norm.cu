// LayerNorm over the last dimension on the GPU. A warp takes a row, which it reads from memory once and again from the first-level
// cache. Of the gradient a block takes ROW_CHUNK rows: first its warps make dx, then its threads, each with 16 bytes of columns,
// add up what the rows give to the gradients of weight and bias; a second stage adds the blocks' sums, in a fixed order, in float64.
#include "../formulas/group_norm.h"

#include <initializer_list>

#include "device.h"
#include "launchers.h"

namespace idm::cuda {

namespace {

constexpr int WARPS = NORM_THREADS / WARP;

struct Shape {
  int64_t rows, width;
  bool packed;
};

template <class S>
struct Parameters {
  const S *weight, *bias;
  S *mean, *rstd;
};

// body(column, elements there, packed) for each piece of a row that this lane has.
template <int W, class Body>
__device__ __forceinline__ void over_row(const Shape& shape, const Body& body) {
  for (int64_t column = int64_t(threadIdx.x) % WARP * W; column < shape.width; column += WARP * W) {
    const int64_t left = shape.width - column;
    body(column, left < W ? int(left) : W, shape.packed);
  }
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS) row_norm_kernel(const T* x, O* out, Shape shape, Parameters<S> p, double eps) {
  constexpr int W = WIDTH<T>;
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= shape.rows) return;  // the whole warp
  const T* from = x + row * shape.width;
  S sum = 0;
  over_row<W>(shape, [&](int64_t column, int there, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(from + column, there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i) sum += read<S>(pack.values[i]);
  });
  // This mean is rounded as a sum of large numbers is; what the deviations from it add up to corrects it, and them.
  const S guess = warp_sum(sum) / S(shape.width);
  S deviations = 0, squares = 0;
  over_row<W>(shape, [&](int64_t column, int there, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(from + column, there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S deviation = i < there ? read<S>(pack.values[i]) - guess : S(0);
      deviations += deviation;
      squares += deviation * deviation;
    }
  });
  const double correction = warp_sum(double(deviations)) / double(shape.width);
  const double variance = warp_sum(double(squares)) / double(shape.width) - correction * correction;
  const double exact_mean = double(guess) + correction;
  const S mean = S(exact_mean), lost = S(exact_mean - double(mean));
  const S rstd = S(1 / sqrt((variance < 0 ? 0 : variance) + eps));
  over_row<W>(shape, [&](int64_t column, int there, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(from + column, there, packed);
    Pack<O, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S scale = i < there ? rstd * p.weight[column + i] : S(0), bias = i < there ? p.bias[column + i] : S(0);
      result.values[i] = write<O>(normalized(read<S>(pack.values[i]) - mean, lost, scale, bias));
    }
    store_some(out + row * shape.width + column, result, there, packed);
  });
  if (threadIdx.x % WARP != 0) return;
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// dx of one row, by a warp.
template <class T, class O, class S>
__device__ __forceinline__ void row_gradient(const O* dout, const T* x, T* dx, const Shape& shape, const S* weight, S mean,
                                             S rstd) {
  constexpr int W = WIDTH<T>;
  S sum = 0, product = 0;
  over_row<W>(shape, [&](int64_t column, int there, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + column, there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + column, there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S g = i < there ? read<S>(douts.values[i]) * weight[column + i] : S(0);
      sum += g;
      product += g * (read<S>(xs.values[i]) - mean);
    }
  });
  const double r = double(rstd), n = double(shape.width);
  const S shift = S(r * warp_sum(double(sum)) / n), slope = S(r * r * r * warp_sum(double(product)) / n);
  over_row<W>(shape, [&](int64_t column, int there, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + column, there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + column, there, packed);
    Pack<T, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S g = i < there ? read<S>(douts.values[i]) * weight[column + i] : S(0);
      result.values[i] = write<T>(norm_gradient(g, read<S>(xs.values[i]), mean, rstd, shift, slope));
    }
    store_some(dx + column, result, there, packed);
  });
}

// partial: for each block Σ dout·x̂, then Σ dout, of every column.
template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS)
    row_norm_gradient_kernel(const O* dout, const T* x, T* dx, Shape shape, Parameters<S> p, S* partial) {
  constexpr int W = WIDTH<T>;
  __shared__ S of_thread[W][2][NORM_THREADS];
  const int64_t begin = blockIdx.x * ROW_CHUNK, end = begin + ROW_CHUNK < shape.rows ? begin + ROW_CHUNK : shape.rows;
  for (int64_t row = begin + threadIdx.x / WARP; row < end; row += WARPS) {
    const int64_t at = row * shape.width;
    row_gradient<T, O, S>(dout + at, x + at, dx + at, shape, p.weight, p.mean[row], p.rstd[row]);
  }
  // Threads that are left over take every `groups`-th row of the same columns.
  const int64_t pieces = (shape.width + W - 1) / W;
  for (int64_t tile = 0; tile < pieces; tile += NORM_THREADS) {
    const int columns = int(pieces - tile < NORM_THREADS ? pieces - tile : NORM_THREADS), groups = NORM_THREADS / columns;
    const int group = int(threadIdx.x) / columns;
    const int64_t column = (tile + int(threadIdx.x) % columns) * W, left = shape.width - column;
    const int there = left < W ? int(left) : W;
    S sums[2][W] = {};
    if (group < groups)
      for (int64_t row = begin + group; row < end; row += groups) {
        const int64_t at = row * shape.width + column;
        const Pack<T, W> xs = load_some<T, W>(x + at, there, shape.packed);
        const Pack<O, W> douts = load_some<O, W>(dout + at, there, shape.packed);
        const S mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const S g = read<S>(douts.values[i]);
          sums[0][i] += g * ((read<S>(xs.values[i]) - mean) * rstd);
          sums[1][i] += g;
        }
      }
    __syncthreads();  // the tile before has been added up
#pragma unroll
    for (int i = 0; i < W; ++i)
      for (int k = 0; k < 2; ++k) of_thread[i][k][threadIdx.x] = sums[k][i];
    __syncthreads();
    if (group != 0) continue;
#pragma unroll
    for (int i = 0; i < W; ++i)
      for (int k = 0; k < 2; ++k) {
        if (i >= there) continue;
        double sum = 0;
        for (int other = 0; other < groups; ++other) sum += double(of_thread[i][k][other * columns + threadIdx.x]);
        partial[(2 * int64_t(blockIdx.x) + k) * shape.width + column + i] = S(sum);
      }
  }
}

// Block (tile of SUM_COLUMNS columns): a thread adds up every so many blocks' sums of a column.
template <class S>
__global__ void __launch_bounds__(SUM_THREADS)
    row_parameters_kernel(const S* partial, int64_t parts, int64_t width, S* dweight, S* dbias) {
  constexpr int LINES = SUM_THREADS / SUM_COLUMNS;
  __shared__ double of_thread[2][SUM_THREADS];
  const int64_t column = int64_t(blockIdx.x) * SUM_COLUMNS + threadIdx.x % SUM_COLUMNS;
  double sums[2] = {};
  if (column < width)
    for (int64_t part = threadIdx.x / SUM_COLUMNS; part < parts; part += LINES)
      for (int k = 0; k < 2; ++k) sums[k] += double(partial[(2 * part + k) * width + column]);
  for (int k = 0; k < 2; ++k) of_thread[k][threadIdx.x] = sums[k];
  __syncthreads();
  if (threadIdx.x >= SUM_COLUMNS || column >= width) return;
  for (int k = 0; k < 2; ++k)
    for (int line = 1; line < LINES; ++line) sums[k] += of_thread[k][line * SUM_COLUMNS + threadIdx.x];
  dweight[column] = S(sums[0]);
  dbias[column] = S(sums[1]);
}

template <class T, class O>
Shape shape_of(const LayerNormArguments& a) {
  bool packed = a.width % WIDTH<T> == 0;
  for (const void* pointer : {a.x, const_cast<const void*>(a.dx)}) packed = packed && aligned_for<T, WIDTH<T>>(pointer);
  for (const void* pointer : {a.dout, const_cast<const void*>(a.out)}) packed = packed && aligned_for<O, WIDTH<T>>(pointer);
  return {a.rows, a.width, packed};
}

template <class S>
Parameters<S> parameters_of(const LayerNormArguments& a) {
  return {static_cast<const S*>(a.weight), static_cast<const S*>(a.bias), static_cast<S*>(a.mean), static_cast<S*>(a.rstd)};
}

int64_t chunks(const LayerNormArguments& a) { return pieces_of(a.rows, ROW_CHUNK); }

}  // namespace

int64_t layer_norm_partials(const LayerNormArguments& a) { return 2 * chunks(a) * a.width; }

void layer_norm(const LayerNormArguments& a, void* stream) {
  for_norm_types(a.x_dtype, a.out_dtype, [&](auto x_type, auto out_type) {
    using T = decltype(x_type);
    using O = decltype(out_type);
    using S = Accumulate<T>;
    launch(row_norm_kernel<T, O, S>, pieces_of(a.rows, WARPS), NORM_THREADS, stream, static_cast<const T*>(a.x),
           static_cast<O*>(a.out), shape_of<T, O>(a), parameters_of<S>(a), a.eps);
  });
}

void layer_norm_backward(const LayerNormArguments& a, void* stream) {
  for_norm_types(a.x_dtype, a.out_dtype, [&](auto x_type, auto out_type) {
    using T = decltype(x_type);
    using O = decltype(out_type);
    using S = Accumulate<T>;
    S* partial = static_cast<S*>(a.partial);
    launch(row_norm_gradient_kernel<T, O, S>, chunks(a), NORM_THREADS, stream, static_cast<const O*>(a.dout),
           static_cast<const T*>(a.x), static_cast<T*>(a.dx), shape_of<T, O>(a), parameters_of<S>(a), partial);
    launch(row_parameters_kernel<S>, pieces_of(a.width, SUM_COLUMNS), SUM_THREADS, stream, partial, chunks(a), a.width,
           static_cast<S*>(a.dweight), static_cast<S*>(a.dbias));
  });
}

}  // namespace idm::cuda
