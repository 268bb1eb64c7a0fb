// Block compressed sensing on the CPU: measure, adjoint, gram, and one sampling step with its gradient.
//
// A row is N pixels in the permutation's order. Rows are taken by tiles, as many as fit in two registers side by side, and lie
// in scratch transposed: element k of every row of the tile in one line. So both products, Yᵀ = Φᵀ·Xᵀ and Xᵀ = Φ·Yᵀ, read
// single elements of Φ as it lies in memory and multiply them with lines of the tile; nothing is packed but the rows, which
// have to be gathered anyway. A tile goes through gather, product, product and scatter while it is in the cache.
#include "../formulas/projection.h"

#include <math.h>

#include "moments.h"
#include "rows.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Elements over which a sum of a dense pass runs before the sums are added in order, and that a thread takes at a time.
constexpr int64_t CHUNK = 16384;

// Rows of Φ or Φᵀ at a time: their sums, two lines each, take three quarters of the registers.
constexpr int BLOCK = VECTOR_REGISTERS * 3 / 8;

// Terms after which a running sum is ended: it loses digits as it grows.
constexpr int64_t DEPTH = 64;

template <class S>
constexpr int TILE = 2 * LANES<S>;

template <class S>
struct Operator {
  const S* matrix;
  const int64_t* permutation;
  int64_t N, q, pixels, rows;  // rows: of all images

  int64_t tiles() const { return (rows + TILE<S> - 1) / TILE<S>; }
  int64_t rows_of(int64_t tile) const { return rows - tile * TILE<S> < TILE<S> ? rows - tile * TILE<S> : TILE<S>; }
  // Where the pixels of a row stand: in the image that begins at `offset`.
  const int64_t* places(int64_t row, int64_t& offset) const {
    const int64_t first = row * N;
    offset = first / pixels * pixels;
    return permutation + (first - offset);
  }
};

// out[r] = Σ_k A[r·across + k·along]·lines[k] for R rows r and `terms` terms; added to what is there with `add`.
template <int R, class S>
IDM_INLINE void multiply(const S* A, int64_t across, int64_t along, const S* lines, int64_t terms, bool add, S* out) {
  Vector<S> sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vector<S>{};
  for (int64_t k = 0; k < terms; ++k) {
    const Vector<S> left = load_vector(lines + k * TILE<S>), right = load_vector(lines + k * TILE<S> + LANES<S>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const S a = A[r * across + k * along];
      sums[r][0] += a * left;
      sums[r][1] += a * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    S* line = out + r * TILE<S>;
    store_vector(line, add ? load_vector(line) + sums[r][0] : sums[r][0]);
    store_vector(line + LANES<S>, add ? load_vector(line + LANES<S>) + sums[r][1] : sums[r][1]);
  }
}

// each(first row, integral how many) for `count` rows from `first` on, R at a time, then fewer.
template <int R>
struct Count {
  static constexpr int value = R;
};

template <int R, class Each>
IDM_INLINE void by_blocks(int64_t first, int64_t count, const Each& each) {
  for (; first + R <= count; first += R) each(first, Count<R>{});
  if constexpr (R > 1) {
    if (first < count) by_blocks<R / 2>(first, count, each);
  }
}

// measurements = Φᵀ·Xᵀ. Φ goes by in bands of rows, as it lies in memory; a row of the product is a column of Φ.
template <class S>
void times_matrix(const Operator<S>& op, const S* pixels, S* measurements) {
  for (int64_t begin = 0; begin < op.N; begin += DEPTH) {
    const int64_t terms = begin + DEPTH < op.N ? DEPTH : op.N - begin;
    by_blocks<BLOCK>(0, op.q, [&](int64_t j, auto count) {
      multiply<decltype(count)::value>(op.matrix + begin * op.q + j, 1, op.q, pixels + begin * TILE<S>, terms, begin > 0,
                                       measurements + j * TILE<S>);
    });
  }
}

// Xᵀ = Φ·Yᵀ; take(first pixel, how many, lines) gets the product's rows, to change as it likes.
template <class S, class Take>
IDM_INLINE void times_transposed(const Operator<S>& op, const S* measurements, const Take& take) {
  by_blocks<BLOCK>(0, op.N, [&](int64_t n, auto count) {
    constexpr int R = decltype(count)::value;
    alignas(64) S lines[R * TILE<S>];
    int64_t begin = 0;
    do {  // once at least: without measurements the pixels are zero
      multiply<R>(op.matrix + n * op.q + begin, op.q, 1, measurements + begin * TILE<S>,
                  begin + DEPTH < op.q ? DEPTH : op.q - begin, begin > 0, lines);
      begin += DEPTH;
    } while (begin < op.q);
    take(n, R, lines);
  });
}

// Brings the images that the tile's pixels stand in into the cache, in order: faster than to meet their lines at random, unless
// the tile has few of their pixels.
template <bool WRITE, class S, class T>
void prefetch(const Operator<S>& op, const T* images, int64_t tile) {
  const int64_t last = tile * TILE<S> + op.rows_of(tile) - 1;
  const T* begin = images + tile * TILE<S> * op.N / op.pixels * op.pixels;
  const T* end = images + (last * op.N / op.pixels + 1) * op.pixels;
  if (end - begin > 4 * TILE<S> * op.N) return;
  for (const T* line = begin; line < end; line += 64 / sizeof(T)) __builtin_prefetch(line, WRITE, 2);
}

// each(place of a pixel in the images, its element in the transposed tile) for all pixels of the tile.
template <class S, class Each>
IDM_INLINE void visit(const Operator<S>& op, int64_t tile, const Each& each) {
  constexpr int64_t BAND = 64;
  for (int64_t begin = 0; begin < op.N; begin += BAND) {
    const int64_t end = begin + BAND < op.N ? begin + BAND : op.N;
    for (int64_t m = 0; m < op.rows_of(tile); ++m) {
      int64_t offset;
      const int64_t* places = op.places(tile * TILE<S> + m, offset);
      for (int64_t n = begin; n < end; ++n) each(offset + places[n], n * TILE<S> + m);
    }
  }
}

// The elements of rows that are not there.
template <class S>
void clear_missing(const Operator<S>& op, int64_t tile, S* pixels) {
  if (op.rows_of(tile) < TILE<S>)
    for (int64_t k = 0; k < op.N * TILE<S>; ++k) pixels[k] = 0;
}

// The tile's pixels out of `images`, transposed; rows that are not there are zero.
template <class S, class T>
void gather(const Operator<S>& op, const T* images, int64_t tile, S* pixels) {
  prefetch<false>(op, images, tile);
  clear_missing(op, tile, pixels);
  visit(op, tile, [&](int64_t from, int64_t to) IDM_LAMBDA_INLINE { pixels[to] = load(images[from]); });
}

// The pixels of the tile that times_transposed gives into `images`, after finish(first element of the tile, how many, values).
template <class S, class T, class Finish>
IDM_INLINE void scatter(const Operator<S>& op, const S* measurements, int64_t tile, T* images, const Finish& finish) {
  const int64_t rows = op.rows_of(tile);
  prefetch<true>(op, images, tile);
  times_transposed(op, measurements, [&](int64_t n, int64_t count, S* lines) {
    finish(n * TILE<S>, count * TILE<S>, lines);
    for (int64_t m = 0; m < rows; ++m) {
      int64_t offset;
      const int64_t* places = op.places(tile * TILE<S> + m, offset) + n;
      for (int64_t r = 0; r < count; ++r) images[offset + places[r]] = Store<T>::of(lines[r * TILE<S> + m]);
    }
  });
}

template <class S, class T>
void scatter(const Operator<S>& op, const S* measurements, int64_t tile, T* images) {
  scatter(op, measurements, tile, images, [](int64_t, int64_t, S*) {});
}

// The tile's measurements out of y, transposed; rows that are not there are zero.
template <class S, class T>
void load_measurements(const Operator<S>& op, const T* y, int64_t tile, S* measurements) {
  const int64_t rows = op.rows_of(tile);
  for (int64_t j = 0; j < op.q; ++j)
    for (int64_t m = 0; m < TILE<S>; ++m)
      measurements[j * TILE<S> + m] = m < rows ? S(load(y[(tile * TILE<S> + m) * op.q + j])) : S(0);
}

template <class S, class T>
void store_measurements(const Operator<S>& op, const S* measurements, int64_t tile, T* y) {
  for (int64_t m = 0; m < op.rows_of(tile); ++m)
    for (int64_t j = 0; j < op.q; ++j)
      y[(tile * TILE<S> + m) * op.q + j] = Store<T>::of(measurements[j * TILE<S> + m]);
}

// each(chunk, begin, end) for all chunks of [0, count).
template <class Each>
void over_chunks(int64_t count, ParallelFor loop, const Each& each) {
  parallel(loop, (count + CHUNK - 1) / CHUNK, 1, [&](int64_t chunk) {
    const int64_t begin = chunk * CHUNK;
    each(chunk, begin, begin + CHUNK < count ? begin + CHUNK : count);
  });
}

// f(T{}, op): the operator with its matrix in the dtype of sums.
template <class Function>
void with_operator(const ProjectArguments& a, ParallelFor loop, const Function& f) {
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Accumulate<T>;
    const int64_t rows = a.images * (a.pixels / a.N), size = a.N * a.q;
    if (rows == 0) return;
    const T* matrix = static_cast<const T*>(a.matrix);
    Scratch<S> room(SAME<T, S> ? 0 : size);
    const S* factor;
    if constexpr (SAME<T, S>) factor = matrix;
    else {
      over_chunks(size, loop, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) room[i] = load(matrix[i]);
      });
      factor = room;
    }
    f(element, Operator<S>{factor, a.permutation, a.N, a.q, a.pixels, rows});
  });
}

template <class S>
Step<S> step_of(const ProjectArguments& a) {
  return {S(sqrt(a.abar_t)), S(sqrt(1 - a.abar_t)), S(sqrt(a.abar_prev)), S(sqrt(1 - a.abar_prev))};
}

}  // namespace

void check_permutation(const PermutationArguments& a, ParallelFor) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < a.count; ++i) outside |= uint64_t(uint64_t(a.entries[i]) >= uint64_t(a.count));
  *a.holds = outside == 0;
}

void measure(const ProjectArguments& a, ParallelFor loop) {
  with_operator(a, loop, [&](auto element, auto op) {
    using T = decltype(element);
    using S = Accumulate<T>;
    parallel(loop, op.tiles(), 1, [&](int64_t tile) {
      Scratch<S> pixels(op.N * TILE<S>), measurements(op.q * TILE<S>);
      gather(op, static_cast<const T*>(a.x), tile, +pixels);
      times_matrix(op, +pixels, +measurements);
      store_measurements(op, +measurements, tile, static_cast<T*>(a.y_out));
    });
  });
}

void adjoint(const ProjectArguments& a, ParallelFor loop) {
  with_operator(a, loop, [&](auto element, auto op) {
    using T = decltype(element);
    using S = Accumulate<T>;
    parallel(loop, op.tiles(), 1, [&](int64_t tile) {
      Scratch<S> measurements(op.q * TILE<S>);
      load_measurements(op, static_cast<const T*>(a.y), tile, +measurements);
      scatter(op, +measurements, tile, static_cast<T*>(a.x_out));
    });
  });
}

void gram(const ProjectArguments& a, ParallelFor loop) {
  with_operator(a, loop, [&](auto element, auto op) {
    using T = decltype(element);
    using S = Accumulate<T>;
    parallel(loop, op.tiles(), 1, [&](int64_t tile) {
      Scratch<S> pixels(op.N * TILE<S>), measurements(op.q * TILE<S>);
      gather(op, static_cast<const T*>(a.x), tile, +pixels);
      times_matrix(op, +pixels, +measurements);
      scatter(op, +measurements, tile, static_cast<T*>(a.x_out));
    });
  });
}

// x0, minus Aᵀ(A x0 − y), and the update, tile by tile: each pixel belongs to one.
void project_step(const ProjectArguments& a, ParallelFor loop) {
  with_operator(a, loop, [&](auto element, auto op) {
    using T = decltype(element);
    using S = Accumulate<T>;
    const Step<S> step = step_of<S>(a);
    const T *x = static_cast<const T*>(a.x), *e = static_cast<const T*>(a.e);
    parallel(loop, op.tiles(), 1, [&](int64_t tile) {
      Scratch<S> pixels(op.N * TILE<S>), noise(op.N * TILE<S>), residual(op.q * TILE<S>), y(op.q * TILE<S>);
      prefetch<false>(op, x, tile);
      prefetch<false>(op, e, tile);
      clear_missing(op, tile, +pixels);
      clear_missing(op, tile, +noise);
      visit(op, tile, [&](int64_t from, int64_t to) IDM_LAMBDA_INLINE {
        pixels[to] = load(x[from]);
        noise[to] = load(e[from]);
      });
      IDM_VECTOR_LOOP
      for (int64_t k = 0; k < op.N * TILE<S>; ++k) pixels[k] = denoised(pixels[k], noise[k], step);
      times_matrix(op, +pixels, +residual);
      load_measurements(op, static_cast<const T*>(a.y), tile, +y);
      IDM_VECTOR_LOOP
      for (int64_t k = 0; k < op.q * TILE<S>; ++k) residual[k] -= y[k];
      scatter(op, +residual, tile, static_cast<T*>(a.x_out), [&](int64_t first, int64_t count, S* values) IDM_LAMBDA_INLINE {
        IDM_VECTOR_LOOP
        for (int64_t k = 0; k < count; ++k) values[k] = ddim_update(pixels[first + k] - values[k], noise[first + k], step);
      });
    });
  });
}

// With P = I − AᵀA, symmetric: dx0 = P·s'·g and dy = A·s'·g, by one product with Φ and one with Φᵀ. The projected image
// p = P·x0 + Aᵀy is needed in <g, p> alone, which is (<dx0, x0> + <dy, y>)/s': two more products are saved.
void project_step_backward(const ProjectArguments& a, ParallelFor loop) {
  double dx0_x0 = 0, dx0_e = 0, g_e = 0, dy_y = 0;
  with_operator(a, loop, [&](auto element, auto op) {
    using T = decltype(element);
    using S = Accumulate<T>;
    const int64_t count = a.images * a.pixels, chunks = (count + CHUNK - 1) / CHUNK;
    const Step<S> step = step_of<S>(a);
    const T *g = static_cast<const T*>(a.g), *x = static_cast<const T*>(a.x), *e = static_cast<const T*>(a.e);
    const T* y = static_cast<const T*>(a.y);
    T *de = static_cast<T*>(a.e_out), *dy = static_cast<T*>(a.y_out);
    T* dx = static_cast<T*>(a.x_out);
    Scratch<S> room(SAME<T, S> ? 0 : count);
    S* dx0 = row_for(dx, +room);
    Scratch<double> of_tile(op.tiles());
    parallel(loop, op.tiles(), 1, [&](int64_t tile) {
      Scratch<S> pixels(op.N * TILE<S>), measured(op.q * TILE<S>);
      gather(op, g, tile, +pixels);
      IDM_VECTOR_LOOP
      for (int64_t k = 0; k < op.N * TILE<S>; ++k) pixels[k] *= step.s_prev;
      times_matrix(op, +pixels, +measured);
      store_measurements(op, +measured, tile, dy);
      double total = 0;
      for (int64_t m = 0; m < op.rows_of(tile); ++m) {
        const T* row = y + (tile * TILE<S> + m) * op.q;
        double of_row[1];
        sum<S>(op.q, of_row, [&](int64_t j, S* term) IDM_LAMBDA_INLINE { term[0] = measured[j * TILE<S> + m] * S(load(row[j])); });
        total += of_row[0];
      }
      of_tile[tile] = total;
      scatter(op, +measured, tile, dx0, [&](int64_t first, int64_t count, S* values) IDM_LAMBDA_INLINE {
        IDM_VECTOR_LOOP
        for (int64_t k = 0; k < count; ++k) values[k] = pixels[first + k] - values[k];
      });
    });
    Scratch<double> of_chunk(3 * chunks);
    over_chunks(count, loop, [&](int64_t chunk, int64_t begin, int64_t end) {
      double sums[3];
      sum<S>(end - begin, sums, [&](int64_t offset, S* terms) IDM_LAMBDA_INLINE {
        const int64_t i = begin + offset;
        const S noise = load(e[i]), gradient = load(g[i]), of_x0 = dx0[i];
        terms[0] = of_x0 * denoised(S(load(x[i])), noise, step);
        terms[1] = of_x0 * noise;
        terms[2] = gradient * noise;
        de[i] = Store<T>::of(noise_gradient(gradient, of_x0, step));
        dx[i] = Store<T>::of(of_x0 / step.s);
      });
      for (int k = 0; k < 3; ++k) of_chunk[3 * chunk + k] = sums[k];
    });
    for (int64_t tile = 0; tile < op.tiles(); ++tile) dy_y += of_tile[tile];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      dx0_x0 += of_chunk[3 * chunk];
      dx0_e += of_chunk[3 * chunk + 1];
      g_e += of_chunk[3 * chunk + 2];
    }
  });
  const Step<double> step = step_of<double>(a);
  const AbarGradient<double> gradient = abar_gradient(dx0_x0, dx0_e, g_e, dy_y, step);
  a.dabar[0] = gradient.of_t;
  a.dabar[1] = gradient.of_prev;
}

}  // namespace idm::cpu::IDM_ISA
