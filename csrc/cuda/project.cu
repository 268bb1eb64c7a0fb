// Block compressed sensing on the GPU: measure, adjoint, gram, and one sampling step with its gradient.
//
// Two kernels do all of it. `measure_kernel` gathers rows of pixels by the permutation and multiplies them by Φ; what a pixel is
// (x itself, x0 denoised, the scaled gradient) it computes while it gathers. `scatter_kernel` multiplies measurements by Φᵀ and
// finishes each pixel where the permutation puts it. Between them are the measurements, N/q times less than the image.
// A block makes a tile of the result; the next slices of both factors are fetched into registers while the present ones, in
// shared memory, are multiplied: float32 and float64 exactly, bfloat16, float16 and, on demand, float32 rounded to TF32 on the
// tensor cores with float32 sums.
//
// The slices do not come by asynchronous copies (cp.async). The pixels cannot: they are gathered through the permutation, two loads
// of which one waits for the other, and computed on before they are stored, so a slice takes as long as that, and Φ's, which is
// in the second-level cache and loaded at the same time, comes sooner anyway. And Φ's rows of q elements, 103 at 10 %, begin
// anywhere: copies of 16 bytes, which bypass the registers' way through the first-level cache, cannot be used for them, and 16-bit
// elements at odd places not be copied asynchronously at all, as 4 bytes are the least; TF32 has to be rounded on the way besides.
#include "../formulas/projection.h"

#include <math.h>

#include "device.h"
#include "launchers.h"
#include "sum.h"
#include "tensor_core.h"

namespace idm::cuda {

namespace {

enum class Task { linear, step, gradient };

template <class T, class S>
struct Operands {
  const T* matrix;
  const int64_t* permutation;
  int64_t pixels, N, q, rows;  // rows: of all images
  uint32_t rows_of_image;
  const S *abar_t, *abar_prev;
  const T *g, *x, *e, *y;
  T *x_out, *e_out, *y_out;
  double* partial;
  int64_t first_partial;  // rows of `partial` before this kernel's

  // Where pixel n of a row stands in memory; −1 if the permutation says nonsense.
  __device__ __forceinline__ int64_t place(int64_t row, int64_t n) const {
    const uint32_t image = uint32_t(row) / rows_of_image, row_of_image = uint32_t(row) % rows_of_image;
    const int64_t entry = permutation[row_of_image * N + n];
    return uint64_t(entry) < uint64_t(pixels) ? image * pixels + entry : -1;
  }

  __device__ __forceinline__ Step<S> step() const {
    const S a = *abar_t, b = *abar_prev;
    return {sqrt(a), sqrt(S(1) - a), sqrt(b), sqrt(S(1) - b)};
  }
};

// How a thread's results lie in the tile, and how it multiplies factors F: rows of `left` and of `right` lie along the sum.
template <class F>
struct Product;

// An element as a factor of a product; from S or from memory it is rounded once.
template <class F, class T>
__device__ __forceinline__ F factor(T x) {
  if constexpr (std::is_same_v<F, T>) return x;
  else return write<F>(x);
}

constexpr int STRIDE = TILE_DEPTH + 1;  // of exact tiles: a column of right's is then in 32 banks

template <class S>
struct Exact {
  static constexpr int PITCH = STRIDE;
  S sums[4] = {};

  static __device__ __forceinline__ int row(int) { return int(threadIdx.x) / 8; }
  static __device__ __forceinline__ int column(int i) { return int(threadIdx.x) % 8 + 8 * i; }

  __device__ __forceinline__ void multiply(const S (&left)[TILE_ROWS][PITCH], const S (&right)[TILE_COLUMNS][PITCH]) {
    S slice[4] = {};  // sums of few terms first: the error then grows with the number of slices only
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; ++k) {
      const S a = left[row(0)][k];
#pragma unroll
      for (int i = 0; i < 4; ++i) slice[i] += a * right[column(i)][k];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += slice[i];
  }
};

// Each of the four warps takes eight columns. A register has OF_WORD elements, a fragment 8·OF_WORD along the sum.
template <class T>
struct TensorCore {
  static constexpr int OF_WORD = 4 / int(sizeof(T));
  static constexpr int PITCH = TILE_DEPTH + 4 * OF_WORD;  // lanes of a fragment are then in different banks
  float sums[4] = {};

  static __device__ __forceinline__ int group() { return int(threadIdx.x) % WARP / 4; }
  static __device__ __forceinline__ int in_group() { return int(threadIdx.x) % 4; }
  static __device__ __forceinline__ int row(int i) { return group() + 8 * (i / 2); }
  static __device__ __forceinline__ int column(int i) { return int(threadIdx.x) / WARP * 8 + in_group() * 2 + i % 2; }
  static __device__ __forceinline__ uint32_t word(const T* at) { return *reinterpret_cast<const uint32_t*>(at); }

  __device__ __forceinline__ void multiply(const T (&left)[TILE_ROWS][PITCH], const T (&right)[TILE_COLUMNS][PITCH]) {
    constexpr int HALF = 4 * OF_WORD;
    const int of_warp = int(threadIdx.x) / WARP * 8 + group(), at = in_group() * OF_WORD;
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; k += 2 * HALF) {
      const uint32_t a[4] = {word(&left[group()][k + at]), word(&left[group() + 8][k + at]), word(&left[group()][k + HALF + at]),
                             word(&left[group() + 8][k + HALF + at])};
      const uint32_t b[2] = {word(&right[of_warp][k + at]), word(&right[of_warp][k + HALF + at])};
      multiply_accumulate<T>(sums, a, b);
    }
  }
};

template <>
struct Product<float> : Exact<float> {};
template <>
struct Product<double> : Exact<double> {};
template <>
struct Product<BFloat16> : TensorCore<BFloat16> {};
template <>
struct Product<Float16> : TensorCore<Float16> {};
template <>
struct Product<TensorFloat32> : TensorCore<TensorFloat32> {};

// The block's tile of left·rightᵀ: left_at(row, k) and right_at(column, k) give the factors, zero beyond their ends. With
// DOWN, neighbouring threads fetch neighbouring columns of `right`, else neighbouring k: as it lies in memory.
template <class F, bool DOWN, class Left, class Right>
__device__ __forceinline__ void tile_product(Product<F>& product, int64_t depth, const Left& left_at, const Right& right_at) {
  constexpr int LEFT = TILE_ROWS * TILE_DEPTH / PRODUCT_THREADS, RIGHT = TILE_COLUMNS * TILE_DEPTH / PRODUCT_THREADS;
  alignas(16) __shared__ F left[TILE_ROWS][Product<F>::PITCH];
  alignas(16) __shared__ F right[TILE_COLUMNS][Product<F>::PITCH];
  F next_left[LEFT], next_right[RIGHT];
  const auto right_row = [](int i) { return DOWN ? i % TILE_COLUMNS : i / TILE_DEPTH; };
  const auto right_k = [](int i) { return DOWN ? i / TILE_COLUMNS : i % TILE_DEPTH; };
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int j = 0; j < LEFT; ++j) {
      const int i = j * PRODUCT_THREADS + int(threadIdx.x);
      next_left[j] = left_at(i / TILE_DEPTH, k + i % TILE_DEPTH);
    }
#pragma unroll
    for (int j = 0; j < RIGHT; ++j) {
      const int i = j * PRODUCT_THREADS + int(threadIdx.x);
      next_right[j] = right_at(right_row(i), k + right_k(i));
    }
  };
  if (depth > 0) fetch(0);
  for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
    __syncthreads();  // the slices before have been multiplied
#pragma unroll
    for (int j = 0; j < LEFT; ++j) {
      const int i = j * PRODUCT_THREADS + int(threadIdx.x);
      left[i / TILE_DEPTH][i % TILE_DEPTH] = next_left[j];
    }
#pragma unroll
    for (int j = 0; j < RIGHT; ++j) {
      const int i = j * PRODUCT_THREADS + int(threadIdx.x);
      right[right_row(i)][right_k(i)] = next_right[j];
    }
    __syncthreads();
    if (k + TILE_DEPTH < depth) fetch(k + TILE_DEPTH);
    product.multiply(left, right);
  }
}

// A·(what the task makes of the pixels): for a step minus y, which is the residual; for the gradient also this block's <dy, y>.
template <Task TASK, class F, class T, class S>
__global__ void __launch_bounds__(PRODUCT_THREADS) measure_kernel(Operands<T, S> o) {
  const int64_t tiles = (o.q + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t first_row = blockIdx.x / tiles * TILE_ROWS, first_column = blockIdx.x % tiles * TILE_COLUMNS;
  Step<S> step{};
  if constexpr (TASK != Task::linear) step = o.step();
  Product<F> product;
  tile_product<F, true>(
      product, o.N,
      [&](int row, int64_t n) {
        if (first_row + row >= o.rows || n >= o.N) return F{};
        const int64_t at = o.place(first_row + row, n);
        if (at < 0) return write<F>(S(NAN));
        if constexpr (TASK == Task::step) return write<F>(denoised(read<S>(o.x[at]), read<S>(o.e[at]), step));
        if constexpr (TASK == Task::gradient) return write<F>(step.s_prev * read<S>(o.g[at]));
        return factor<F>(o.x[at]);
      },
      [&](int column, int64_t n) {
        return first_column + column < o.q && n < o.N ? factor<F>(o.matrix[n * o.q + first_column + column]) : F{};
      });
  S dy_y = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + product.row(i), column = first_column + product.column(i);
    if (row >= o.rows || column >= o.q) continue;
    const int64_t at = row * o.q + column;
    S value = product.sums[i];
    if constexpr (TASK == Task::step) value -= read<S>(o.y[at]);
    if constexpr (TASK == Task::gradient) dy_y += value * read<S>(o.y[at]);
    o.y_out[at] = write<T>(value);
  }
  if constexpr (TASK == Task::gradient) {
    const S sum = block_sum<PRODUCT_THREADS>(dy_y);
    if (threadIdx.x != 0) return;
    double* mine = o.partial + 4 * (o.first_partial + blockIdx.x);
    mine[0] = mine[1] = mine[2] = 0;
    mine[3] = sum;
  }
}

// Aᵀ·(measurements), and what the task makes of it at each pixel: the sum itself; the step's result; the gradients of x and e,
// with this block's sums for those of ᾱ.
template <Task TASK, class F, class T, class S>
__global__ void __launch_bounds__(PRODUCT_THREADS) scatter_kernel(Operands<T, S> o, const T* measurements) {
  const int64_t tiles = (o.N + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t first_row = blockIdx.x / tiles * TILE_ROWS, first_column = blockIdx.x % tiles * TILE_COLUMNS;
  Product<F> product;
  tile_product<F, false>(
      product, o.q,
      [&](int row, int64_t k) {
        return first_row + row < o.rows && k < o.q ? factor<F>(measurements[(first_row + row) * o.q + k]) : F{};
      },
      [&](int column, int64_t k) {
        return first_column + column < o.N && k < o.q ? factor<F>(o.matrix[(first_column + column) * o.q + k]) : F{};
      });
  Step<S> step{};
  if constexpr (TASK != Task::linear) step = o.step();
  S dx0_x0 = 0, dx0_e = 0, g_e = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + product.row(i), n = first_column + product.column(i);
    if (row >= o.rows || n >= o.N) continue;
    const int64_t at = o.place(row, n);
    if (at < 0) continue;
    const S value = product.sums[i];
    if constexpr (TASK == Task::linear) {
      o.x_out[at] = write<T>(value);
    } else {
      const S x = read<S>(o.x[at]), e = read<S>(o.e[at]), x0 = denoised(x, e, step);
      if constexpr (TASK == Task::step) {
        o.x_out[at] = write<T>(ddim_update(x0 - value, e, step));
      } else {
        const S g = read<S>(o.g[at]), dx0 = step.s_prev * g - value;
        o.x_out[at] = write<T>(dx0 / step.s);
        o.e_out[at] = write<T>(noise_gradient(g, dx0, step));
        dx0_x0 += dx0 * x0;
        dx0_e += dx0 * e;
        g_e += g * e;
      }
    }
  }
  if constexpr (TASK == Task::gradient) {
    const S sums[3] = {block_sum<PRODUCT_THREADS>(dx0_x0), block_sum<PRODUCT_THREADS>(dx0_e), block_sum<PRODUCT_THREADS>(g_e)};
    if (threadIdx.x != 0) return;
    double* mine = o.partial + 4 * (o.first_partial + blockIdx.x);
    for (int k = 0; k < 3; ++k) mine[k] = sums[k];
    mine[3] = 0;
  }
}

template <class S>
__global__ void __launch_bounds__(SUM_THREADS)
    abar_kernel(const double* partial, int64_t count, const S* abar_t, const S* abar_prev, S* dabar_t, S* dabar_prev) {
  double sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[k] = column_sum<4>(partial, count, k);
  if (threadIdx.x != 0) return;
  const double a = double(*abar_t), b = double(*abar_prev);
  const Step<double> step{sqrt(a), sqrt(1 - a), sqrt(b), sqrt(1 - b)};
  const AbarGradient<double> gradient = abar_gradient(sums[0], sums[1], sums[2], sums[3], step);
  *dabar_t = S(gradient.of_t);
  *dabar_prev = S(gradient.of_prev);
}

int64_t rows(const ProjectArguments& a) { return a.images * (a.pixels / a.N); }
int64_t measure_blocks(const ProjectArguments& a) { return pieces_of(rows(a), TILE_ROWS) * pieces_of(a.q, TILE_COLUMNS); }
int64_t scatter_blocks(const ProjectArguments& a) { return pieces_of(rows(a), TILE_ROWS) * pieces_of(a.N, TILE_COLUMNS); }

template <class T, class S>
Operands<T, S> operands(const ProjectArguments& a) {
  const auto in = [](const void* pointer) { return static_cast<const T*>(pointer); };
  const auto out = [](void* pointer) { return static_cast<T*>(pointer); };
  if (rows(a) > 0x7fffffff) throw std::runtime_error("a projection of " + std::to_string(rows(a)) + " rows; split the batch");
  const uint32_t rows_of_image = uint32_t(a.pixels / a.N);
  return {in(a.matrix), a.permutation, a.pixels, a.N, a.q, rows(a), rows_of_image, static_cast<const S*>(a.abar_t),
          static_cast<const S*>(a.abar_prev), in(a.g), in(a.x), in(a.e), in(a.y), out(a.x_out), out(a.e_out), out(a.y_out),
          a.partial, 0};
}

// f(F{}, operands): the type of factors, and operands in the element type of `a`.
template <class Function>
void with_operands(const ProjectArguments& a, const Function& f) {
  for_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto o = operands<T, Accumulate<T>>(a);
    if constexpr (std::is_same_v<T, float>)
      if (a.tf32) return f(TensorFloat32{}, o);
    f(T{}, o);
  });
}

template <Task TASK, class F, class T, class S>
void launch_measure(const ProjectArguments& a, F, const Operands<T, S>& o, void* stream) {
  launch(measure_kernel<TASK, F, T, S>, measure_blocks(a), PRODUCT_THREADS, stream, o);
}

template <Task TASK, class F, class T, class S>
void launch_scatter(const ProjectArguments& a, F, const Operands<T, S>& o, const T* measurements, void* stream) {
  launch(scatter_kernel<TASK, F, T, S>, scatter_blocks(a), PRODUCT_THREADS, stream, o, measurements);
}

}  // namespace

int64_t project_partials(const ProjectArguments& a) { return 4 * (measure_blocks(a) + scatter_blocks(a)); }

void measure(const ProjectArguments& a, void* stream) {
  with_operands(a, [&](auto factor_type, auto o) { launch_measure<Task::linear>(a, factor_type, o, stream); });
}

void adjoint(const ProjectArguments& a, void* stream) {
  with_operands(a, [&](auto factor_type, auto o) { launch_scatter<Task::linear>(a, factor_type, o, o.y, stream); });
}

void gram(const ProjectArguments& a, void* stream) {
  with_operands(a, [&](auto factor_type, auto o) {
    launch_measure<Task::linear>(a, factor_type, o, stream);
    launch_scatter<Task::linear>(a, factor_type, o, decltype(o.y)(o.y_out), stream);
  });
}

void project_step(const ProjectArguments& a, void* stream) {
  with_operands(a, [&](auto factor_type, auto o) {
    launch_measure<Task::step>(a, factor_type, o, stream);
    launch_scatter<Task::step>(a, factor_type, o, decltype(o.y)(o.y_out), stream);
  });
}

void project_step_backward(const ProjectArguments& a, void* stream) {
  with_operands(a, [&](auto factor_type, auto o) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(o.abar_t)>>;
    launch_measure<Task::gradient>(a, factor_type, o, stream);
    o.first_partial = measure_blocks(a);
    launch_scatter<Task::gradient>(a, factor_type, o, decltype(o.y)(o.y_out), stream);
    launch(abar_kernel<S>, 1, SUM_THREADS, stream, a.partial, measure_blocks(a) + scatter_blocks(a), o.abar_t, o.abar_prev,
           static_cast<S*>(a.dabar_t), static_cast<S*>(a.dabar_prev));
  });
}

}  // namespace idm::cuda
