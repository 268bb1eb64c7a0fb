// GroupNorm with SiLU behind it on the GPU, NCHW and NHWC. x is read twice, and the gradient reads dout and x twice.
//
// First every block leaves, for each channel, the statistics of its part of the positions (the gradient: Σ g and Σ g·(x − mean)); few threads
// put the parts of a group together, in a fixed order and in float64; then a pass over the elements. In NCHW a block takes a part
// of one channel's plane. In NHWC it takes some positions with all channels: a thread keeps its channels, 16 bytes of them.
#include "../formulas/group_norm.h"

#include <initializer_list>

#include "device.h"
#include "launchers.h"

namespace idm::cuda {

namespace {

struct Shape {
  int64_t images, channels, positions, groups;
  int64_t chunks;  // parts of the positions
  int64_t chunk;   // positions of a part
  bool packed;

  __host__ __device__ int64_t per_group() const { return channels / groups; }
  __host__ __device__ int64_t positions_of(int64_t part) const {
    const int64_t left = positions - part * chunk;
    return left < chunk ? left : chunk;
  }
};

// Mean of `count` numbers, and the sum of squares of what they differ from it.
template <class S>
struct Moments {
  S mean, squares;
};

// `first`, of `count` numbers in the end, with one more of them.
template <class S>
__device__ __forceinline__ void add(Moments<S>& first, S x, S inverse_count) {
  const S difference = x - first.mean;
  first.mean += difference * inverse_count;
  first.squares += difference * (x - first.mean);
}

template <class S>
struct Parameters {
  const S *weight, *bias, *mean, *rstd;
  bool silu;
};

// What is done to one channel of one image.
template <class S>
struct Channel {
  S mean, scale, bias;
};

template <class S>
__device__ __forceinline__ Channel<S> channel_of(const Parameters<S>& p, const Shape& shape, int64_t image, int64_t channel) {
  const int64_t group = image * shape.groups + channel / shape.per_group();
  return {p.mean[group], p.rstd[group] * p.weight[channel], p.bias[channel]};
}

template <class S>
__device__ __forceinline__ S forward(S x, const Channel<S>& c, bool with_silu) {
  const S u = normalized(x, c.mean, c.scale, c.bias);
  return with_silu ? silu(u) : u;
}

// The gradient of the norm's output from that of SiLU's.
template <class S>
__device__ __forceinline__ S through_silu(S dout, S x, const Channel<S>& c, bool with_silu) {
  return with_silu ? dout * silu_derivative(normalized(x, c.mean, c.scale, c.bias)) : dout;
}

// NCHW: block (image, channel, part); body(first element in memory, elements there, packed) for each piece of a thread.
template <int W, class Body>
__device__ __forceinline__ void over_plane(const Shape& shape, const Body& body) {
  const int64_t part = blockIdx.x % shape.chunks, plane = blockIdx.x / shape.chunks;
  const int64_t begin = plane * shape.positions + part * shape.chunk, end = begin + shape.positions_of(part);
  for (int64_t at = begin + int64_t(threadIdx.x) * W; at < end; at += NORM_THREADS * W)
    body(at, end - at < W ? int(end - at) : W, shape.packed && end - at >= W);
}

template <class T, class S>
__global__ void __launch_bounds__(NORM_THREADS) plane_statistics_kernel(const T* x, Shape shape, Moments<S>* partial) {
  constexpr int W = WIDTH<T>;
  Moments<S> mine{};
  S count = 0;
  over_plane<W>(shape, [&](int64_t at, int there, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(x + at, there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (i < there) add(mine, read<S>(pack.values[i]), S(1) / (count += S(1)));
  });
  const int64_t part = blockIdx.x % shape.chunks, plane = blockIdx.x / shape.chunks;
  // The threads' sums, not their means, are added up: a mean of few numbers is large, and so is what its rounding loses.
  const S mean = block_sum<NORM_THREADS>(count * mine.mean) / S(shape.positions_of(part)), difference = mine.mean - mean;
  const S squares = block_sum<NORM_THREADS>(mine.squares + count * difference * difference);
  if (threadIdx.x == 0)
    partial[(plane / shape.channels * shape.chunks + part) * shape.channels + plane % shape.channels] = {mean, squares};
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS) plane_apply_kernel(const T* x, O* out, Shape shape, Parameters<S> p) {
  constexpr int W = WIDTH<T>;
  const int64_t plane = blockIdx.x / shape.chunks;
  const Channel<S> c = channel_of(p, shape, plane / shape.channels, plane % shape.channels);
  over_plane<W>(shape, [&](int64_t at, int there, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(x + at, there, packed);
    Pack<O, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) result.values[i] = write<O>(forward(read<S>(pack.values[i]), c, p.silu));
    store_some(out + at, result, there, packed);
  });
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS)
    plane_sums_kernel(const O* dout, const T* x, Shape shape, Parameters<S> p, S* partial) {
  constexpr int W = WIDTH<T>;
  const int64_t part = blockIdx.x % shape.chunks, plane = blockIdx.x / shape.chunks;
  const Channel<S> c = channel_of(p, shape, plane / shape.channels, plane % shape.channels);
  S sum = 0, product = 0;
  over_plane<W>(shape, [&](int64_t at, int there, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + at, there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + at, there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S value = read<S>(xs.values[i]);
      const S g = i < there ? through_silu(read<S>(douts.values[i]), value, c, p.silu) : S(0);
      sum += g;
      product += g * (value - c.mean);
    }
  });
  sum = block_sum<NORM_THREADS>(sum);
  product = block_sum<NORM_THREADS>(product);
  if (threadIdx.x != 0) return;
  const int64_t to = (plane / shape.channels * shape.chunks + part) * shape.channels + plane % shape.channels;
  partial[2 * to] = sum;
  partial[2 * to + 1] = product;
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS)
    plane_gradient_kernel(const O* dout, const T* x, T* dx, Shape shape, Parameters<S> p, const S* per_group) {
  constexpr int W = WIDTH<T>;
  const int64_t plane = blockIdx.x / shape.chunks, image = plane / shape.channels, channel = plane % shape.channels;
  const Channel<S> c = channel_of(p, shape, image, channel);
  const S* group = per_group + 2 * (image * shape.groups + channel / shape.per_group());
  const S shift = group[0], slope = group[1];
  over_plane<W>(shape, [&](int64_t at, int there, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + at, there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + at, there, packed);
    Pack<T, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S value = read<S>(xs.values[i]), g = through_silu(read<S>(douts.values[i]), value, c, p.silu);
      result.values[i] = write<T>(norm_gradient(g, value, c.mean, c.scale, shift, slope));
    }
    store_some(dx + at, result, there, packed);
  });
}

// NHWC: block (image, part, tile of channels); a thread has W channels and every `rows`-th position of the part.
template <int W>
struct Lane {
  int64_t image, part, channel;    // channel: the first of the thread's
  int row, rows, column, columns;  // column: where its channels are in the tile, in pieces of W
  int there;                       // its channels; 0 for a thread without work

  __device__ explicit Lane(const Shape& shape) {
    const int64_t pieces = (shape.channels + W - 1) / W, tiles = (pieces + NORM_THREADS - 1) / NORM_THREADS;
    columns = int(pieces < NORM_THREADS ? pieces : NORM_THREADS);
    rows = NORM_THREADS / columns;
    row = int(threadIdx.x) / columns;
    column = int(threadIdx.x) % columns;
    part = blockIdx.x / tiles % shape.chunks;
    image = blockIdx.x / tiles / shape.chunks;
    channel = (blockIdx.x % tiles * NORM_THREADS + column) * W;
    const int64_t left = shape.channels - channel;
    there = row >= rows || left <= 0 ? 0 : left < W ? int(left) : W;
  }

  // Where this block's statistics or sums of the thread's first channel stand.
  __device__ int64_t of_part(const Shape& shape) const { return (image * shape.chunks + part) * shape.channels + channel; }

  // How many positions a row of threads has.
  __device__ int64_t positions(const Shape& shape, int of_row) const {
    const int64_t left = shape.positions_of(part) - of_row;
    return left <= 0 ? 0 : (left + rows - 1) / rows;
  }

  // body(first element in memory, packed) for each of its positions.
  template <class Body>
  __device__ __forceinline__ void over_positions(const Shape& shape, const Body& body) const {
    if (there == 0) return;
    const int64_t first = image * shape.positions + part * shape.chunk, end = first + shape.positions_of(part);
    for (int64_t position = first + row; position < end; position += rows)
      body(position * shape.channels + channel, shape.packed && there == W);
  }

  template <class S>
  __device__ __forceinline__ void load_channels(const Shape& shape, const Parameters<S>& p, Channel<S> (&c)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) c[i] = i < there ? channel_of(p, shape, image, channel + i) : Channel<S>{};
  }
};

template <class T, class S>
__global__ void __launch_bounds__(NORM_THREADS) last_statistics_kernel(const T* x, Shape shape, Moments<S>* partial) {
  constexpr int W = WIDTH<T>;
  __shared__ Moments<S> of_thread[W][NORM_THREADS];
  const Lane<W> lane(shape);
  Moments<S> mine[W] = {};
  S count = 0;
  lane.over_positions(shape, [&](int64_t at, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(x + at, lane.there, packed);
    const S inverse_count = S(1) / (count += S(1));
#pragma unroll
    for (int i = 0; i < W; ++i) add(mine[i], read<S>(pack.values[i]), inverse_count);
  });
#pragma unroll
  for (int i = 0; i < W; ++i) of_thread[i][threadIdx.x] = mine[i];
  __syncthreads();
  if (lane.row != 0) return;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= lane.there) continue;
    double mean = double(count) * double(mine[i].mean), squares = 0;
    for (int row = 1; row < lane.rows; ++row)
      mean += double(lane.positions(shape, row)) * double(of_thread[i][row * lane.columns + lane.column].mean);
    mean /= double(shape.positions_of(lane.part));
    for (int row = 0; row < lane.rows; ++row) {
      const Moments<S> of_row = of_thread[i][row * lane.columns + lane.column];
      const double difference = double(of_row.mean) - mean;
      squares += double(of_row.squares) + double(lane.positions(shape, row)) * difference * difference;
    }
    partial[lane.of_part(shape) + i] = {S(mean), S(squares)};
  }
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS) last_apply_kernel(const T* x, O* out, Shape shape, Parameters<S> p) {
  constexpr int W = WIDTH<T>;
  const Lane<W> lane(shape);
  Channel<S> c[W];
  lane.load_channels(shape, p, c);
  lane.over_positions(shape, [&](int64_t at, bool packed) {
    const Pack<T, W> pack = load_some<T, W>(x + at, lane.there, packed);
    Pack<O, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) result.values[i] = write<O>(forward(read<S>(pack.values[i]), c[i], p.silu));
    store_some(out + at, result, lane.there, packed);
  });
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS)
    last_sums_kernel(const O* dout, const T* x, Shape shape, Parameters<S> p, S* partial) {
  constexpr int W = WIDTH<T>;
  __shared__ S of_thread[W][NORM_THREADS][2];
  const Lane<W> lane(shape);
  Channel<S> c[W];
  lane.load_channels(shape, p, c);
  S sum[W] = {}, product[W] = {};
  lane.over_positions(shape, [&](int64_t at, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + at, lane.there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + at, lane.there, packed);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S value = read<S>(xs.values[i]), g = through_silu(read<S>(douts.values[i]), value, c[i], p.silu);
      sum[i] += g;
      product[i] += g * (value - c[i].mean);
    }
  });
#pragma unroll
  for (int i = 0; i < W; ++i) {
    of_thread[i][threadIdx.x][0] = sum[i];
    of_thread[i][threadIdx.x][1] = product[i];
  }
  __syncthreads();
  if (lane.row != 0) return;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= lane.there) continue;
    double sums[2] = {double(sum[i]), double(product[i])};  // few channels make many rows
    for (int row = 1; row < lane.rows; ++row)
      for (int k = 0; k < 2; ++k) sums[k] += double(of_thread[i][row * lane.columns + lane.column][k]);
    for (int k = 0; k < 2; ++k) partial[2 * (lane.of_part(shape) + i) + k] = S(sums[k]);
  }
}

template <class T, class O, class S>
__global__ void __launch_bounds__(NORM_THREADS)
    last_gradient_kernel(const O* dout, const T* x, T* dx, Shape shape, Parameters<S> p, const S* per_group) {
  constexpr int W = WIDTH<T>;
  const Lane<W> lane(shape);
  Channel<S> c[W];
  S shift[W], slope[W];
  lane.load_channels(shape, p, c);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const S* group = per_group + 2 * (lane.image * shape.groups + (lane.channel + i) / shape.per_group());
    shift[i] = i < lane.there ? group[0] : S(0);
    slope[i] = i < lane.there ? group[1] : S(0);
  }
  lane.over_positions(shape, [&](int64_t at, bool packed) {
    const Pack<T, W> xs = load_some<T, W>(x + at, lane.there, packed);
    const Pack<O, W> douts = load_some<O, W>(dout + at, lane.there, packed);
    Pack<T, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S value = read<S>(xs.values[i]), g = through_silu(read<S>(douts.values[i]), value, c[i], p.silu);
      result.values[i] = write<T>(norm_gradient(g, value, c[i].mean, c[i].scale, shift[i], slope[i]));
    }
    store_some(dx + at, result, lane.there, packed);
  });
}

// Block (image, group): all parts of its channels together.
template <class S>
__global__ void __launch_bounds__(COMBINE_THREADS)
    group_statistics_kernel(const Moments<S>* partial, Shape shape, double eps, S* mean, S* rstd) {
  const int64_t image = blockIdx.x / shape.groups, first = blockIdx.x % shape.groups * shape.per_group();
  const int64_t parts = shape.chunks * shape.per_group();
  const auto part_of = [&](int64_t i, double& count) {
    const int64_t part = i / shape.per_group();
    count = double(shape.positions_of(part));
    return partial[(image * shape.chunks + part) * shape.channels + first + i % shape.per_group()];
  };
  double sum = 0, squares = 0, count;
  for (int64_t i = threadIdx.x; i < parts; i += COMBINE_THREADS) {
    const Moments<S> part = part_of(i, count);
    sum += count * double(part.mean);
  }
  const double elements = double(shape.positions * shape.per_group());
  const double whole = block_sum<COMBINE_THREADS>(sum) / elements;
  for (int64_t i = threadIdx.x; i < parts; i += COMBINE_THREADS) {
    const Moments<S> part = part_of(i, count);
    const double difference = double(part.mean) - whole;
    squares += double(part.squares) + count * difference * difference;
  }
  squares = block_sum<COMBINE_THREADS>(squares);
  if (threadIdx.x != 0) return;
  mean[blockIdx.x] = S(whole);
  rstd[blockIdx.x] = S(1 / sqrt(squares / elements + eps));
}

// Block (image, group): a warp adds up the parts of a channel; what the group's elements have in common comes of all channels.
template <class S>
__global__ void __launch_bounds__(COMBINE_THREADS)
    group_sums_kernel(const S* partial, Shape shape, Parameters<S> p, double* sums, S* per_group) {
  const int64_t image = blockIdx.x / shape.groups, first = blockIdx.x % shape.groups * shape.per_group();
  const int lane = int(threadIdx.x) % WARP;
  const double rstd = double(p.rstd[blockIdx.x]), elements = double(shape.positions * shape.per_group());
  double shift = 0, slope = 0;
  for (int64_t i = threadIdx.x / WARP; i < shape.per_group(); i += COMBINE_THREADS / WARP) {
    double sum = 0, product = 0;
    for (int64_t part = lane; part < shape.chunks; part += WARP) {
      const S* two = partial + 2 * ((image * shape.chunks + part) * shape.channels + first + i);
      sum += double(two[0]);
      product += double(two[1]);
    }
    sum = warp_sum(sum);
    product = warp_sum(product) * rstd;
    if (lane != 0) continue;
    sums[2 * (image * shape.channels + first + i)] = sum;
    sums[2 * (image * shape.channels + first + i) + 1] = product;
    shift += double(p.weight[first + i]) * sum;
    slope += double(p.weight[first + i]) * product;
  }
  shift = block_sum<COMBINE_THREADS>(shift);
  slope = block_sum<COMBINE_THREADS>(slope);
  if (threadIdx.x != 0) return;
  per_group[2 * blockIdx.x] = S(rstd * shift / elements);
  per_group[2 * blockIdx.x + 1] = S(rstd * rstd * slope / elements);
}

// A thread adds up the images of one channel.
template <class S>
__global__ void __launch_bounds__(COMBINE_THREADS) parameters_kernel(const double* sums, Shape shape, S* dweight, S* dbias) {
  const int64_t channel = int64_t(blockIdx.x) * COMBINE_THREADS + threadIdx.x;
  if (channel >= shape.channels) return;
  double sum = 0, product = 0;
  for (int64_t image = 0; image < shape.images; ++image) {
    sum += sums[2 * (image * shape.channels + channel)];
    product += sums[2 * (image * shape.channels + channel) + 1];
  }
  dweight[channel] = S(product);
  dbias[channel] = S(sum);
}

Shape shape_of(const NormArguments& a) {
  const int64_t chunk = a.last ? POSITION_CHUNK : PLANE_CHUNK;
  return {a.images, a.channels, a.positions, a.groups, pieces_of(a.positions, chunk), chunk, false};
}

template <class T>
int64_t blocks(const Shape& shape, bool last) {
  const int64_t tiles = pieces_of(pieces_of(shape.channels, WIDTH<T>), NORM_THREADS);
  return shape.images * shape.chunks * (last ? tiles : shape.channels);
}

template <class S>
Parameters<S> parameters_of(const NormArguments& a) {
  return {static_cast<const S*>(a.weight), static_cast<const S*>(a.bias), static_cast<const S*>(a.mean),
          static_cast<const S*>(a.rstd), a.silu};
}

// Whether pieces of WIDTH<T> elements lie at addresses that 16-byte accesses can use.
template <class T, class O>
bool packed(const NormArguments& a, std::initializer_list<const void*> like_x, const void* like_out) {
  bool holds = (a.last ? a.channels : a.positions) % WIDTH<T> == 0 && aligned_for<O, WIDTH<T>>(like_out);
  for (const void* pointer : like_x) holds = holds && aligned_for<T, WIDTH<T>>(pointer);
  return holds;
}

}  // namespace

int64_t norm_partials(const NormArguments& a) { return 2 * a.images * shape_of(a).chunks * a.channels; }

void group_norm_silu(const NormArguments& a, void* stream) {
  for_norm_types(a.x_dtype, a.out_dtype, [&](auto x_type, auto out_type) {
    using T = decltype(x_type);
    using O = decltype(out_type);
    using S = Accumulate<T>;
    const T* x = static_cast<const T*>(a.x);
    O* out = static_cast<O*>(a.out);
    Moments<S>* partial = static_cast<Moments<S>*>(a.partial);
    Shape shape = shape_of(a);
    shape.packed = packed<T, O>(a, {x}, out);
    const int64_t count = blocks<T>(shape, a.last);
    const Parameters<S> p = parameters_of<S>(a);
    launch(a.last ? last_statistics_kernel<T, S> : plane_statistics_kernel<T, S>, count, NORM_THREADS, stream, x, shape, partial);
    launch(group_statistics_kernel<S>, a.images * a.groups, COMBINE_THREADS, stream, partial, shape, a.eps,
           static_cast<S*>(a.mean), static_cast<S*>(a.rstd));
    launch(a.last ? last_apply_kernel<T, O, S> : plane_apply_kernel<T, O, S>, count, NORM_THREADS, stream, x, out, shape, p);
  });
}

void group_norm_silu_backward(const NormArguments& a, void* stream) {
  for_norm_types(a.x_dtype, a.out_dtype, [&](auto x_type, auto out_type) {
    using T = decltype(x_type);
    using O = decltype(out_type);
    using S = Accumulate<T>;
    const T* x = static_cast<const T*>(a.x);
    const O* dout = static_cast<const O*>(a.dout);
    T* dx = static_cast<T*>(a.dx);
    S *partial = static_cast<S*>(a.partial), *per_group = static_cast<S*>(a.per_group);
    Shape shape = shape_of(a);
    shape.packed = packed<T, O>(a, {x, dx}, dout);
    const int64_t count = blocks<T>(shape, a.last);
    const Parameters<S> p = parameters_of<S>(a);
    launch(a.last ? last_sums_kernel<T, O, S> : plane_sums_kernel<T, O, S>, count, NORM_THREADS, stream, dout, x, shape, p,
           partial);
    launch(group_sums_kernel<S>, a.images * a.groups, COMBINE_THREADS, stream, partial, shape, p, a.sums, per_group);
    launch(parameters_kernel<S>, pieces_of(a.channels, COMBINE_THREADS), COMBINE_THREADS, stream, a.sums, shape,
           static_cast<S*>(a.dweight), static_cast<S*>(a.dbias));
    launch(a.last ? last_gradient_kernel<T, O, S> : plane_gradient_kernel<T, O, S>, count, NORM_THREADS, stream, dout, x, dx,
           shape, p, per_group);
  });
}

}  // namespace idm::cuda
