// The injector's two halves on the GPU, NCHW and NHWC: read an image off the features, write three images back onto them.
//
// Channel ch = c·r² + k of the features at (i, j) belongs to pixel (i·r + k / r, j·r + k % r) of an image. In NCHW a thread has
// one pixel of the image and goes over the channels c, so that neighbours read neighbouring positions of one plane; in NHWC
// neighbours have neighbouring k first, and read neighbouring channels. Sums over positions go through partial sums of blocks.
#include "../formulas/injector.h"

#include "device.h"
#include "launchers.h"

namespace idm::cuda {

namespace {

struct Shape {
  int64_t images, planes, height, width;  // of the features; planes: c
  int r;
  bool last;

  __host__ __device__ int64_t pixels() const { return images * height * width * r * r; }
};

// One pixel of an image, and its place in the features.
struct Pixel {
  int64_t image_at, features_at, stride;  // stride: from one c to the next

  __device__ __forceinline__ Pixel(const Shape& s, int64_t index) {
    const int rr = s.r * s.r;
    const int64_t area = s.height * s.width;
    int64_t k, position, image;
    if (s.last) {
      k = index % rr;
      position = index / rr % area;
      image = index / rr / area;
      features_at = (image * area + position) * s.planes * rr + k;
      stride = rr;
    } else {
      position = index % area;
      k = index / area % rr;
      image = index / area / rr;
      features_at = (image * s.planes * rr + k) * area + position;
      stride = rr * area;
    }
    const int64_t i = position / s.width, j = position % s.width;
    image_at = ((image * s.height + i) * s.r + k / s.r) * s.width * s.r + j * s.r + k % s.r;
  }
};

template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS) read_kernel(const T* h, const S* weight, const S* bias, T* z, Shape s) {
  const int64_t index = int64_t(blockIdx.x) * INJECT_THREADS + threadIdx.x;
  if (index >= s.pixels()) return;
  const Pixel pixel(s, index);
  S sum = 0;
#pragma unroll 8
  for (int64_t c = 0; c < s.planes; ++c) sum += weight[c] * read<S>(h[pixel.features_at + c * pixel.stride]);
  z[pixel.image_at] = write<T>(sum + *bias);
}

template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS)
    write_kernel(const T* h, const T* z, const T* gz, const T* aty, const S* weight, const S* bias, T* out, Shape s) {
  const int64_t index = int64_t(blockIdx.x) * INJECT_THREADS + threadIdx.x;
  if (index >= s.pixels()) return;
  const Pixel pixel(s, index);
  const S of_z = read<S>(z[pixel.image_at]), of_gz = read<S>(gz[pixel.image_at]), of_aty = read<S>(aty[pixel.image_at]);
#pragma unroll 4
  for (int64_t c = 0; c < s.planes; ++c) {
    const int64_t at = pixel.features_at + c * pixel.stride;
    const Spread<S> w{weight[3 * c], weight[3 * c + 1], weight[3 * c + 2]};
    out[at] = write<T>(spread(read<S>(h[at]), of_z, of_gz, of_aty, w, bias[c]));
  }
}

// dh = weight·dz, plus `through` where there is one.
template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS)
    read_gradient_kernel(const T* dz, const S* weight, const T* through, T* dh, Shape s) {
  const int64_t index = int64_t(blockIdx.x) * INJECT_THREADS + threadIdx.x;
  if (index >= s.pixels()) return;
  const Pixel pixel(s, index);
  const S d = read<S>(dz[pixel.image_at]);
#pragma unroll 4
  for (int64_t c = 0; c < s.planes; ++c) {
    const int64_t at = pixel.features_at + c * pixel.stride;
    const S other = through == nullptr ? S(0) : read<S>(through[at]);
    dh[at] = write<T>(weight[c] * d + other);
  }
}

// The gradients of the three images.
template <class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS)
    write_gradient_kernel(const T* dout, const S* weight, T* dz, T* dgz, T* daty, Shape s) {
  const int64_t index = int64_t(blockIdx.x) * INJECT_THREADS + threadIdx.x;
  if (index >= s.pixels()) return;
  const Pixel pixel(s, index);
  S sums[3] = {};
#pragma unroll 4
  for (int64_t c = 0; c < s.planes; ++c) {
    const S d = read<S>(dout[pixel.features_at + c * pixel.stride]);
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += weight[3 * c + k] * d;
  }
  dz[pixel.image_at] = write<T>(sums[0]);
  dgz[pixel.image_at] = write<T>(sums[1]);
  daty[pixel.image_at] = write<T>(sums[2]);
}

// Block (part of the pixels, c): the sums over its pixels of features times each of COUNT images, and of `alone`: the features
// (the write's bias) or, once, the image (the read's).
template <int COUNT, class T, class S>
__global__ void __launch_bounds__(INJECT_THREADS)
    weight_sums_kernel(const T* features, const T* first, const T* second, const T* third, double* partial, Shape s) {
  const int64_t c = blockIdx.x % s.planes, part = blockIdx.x / s.planes;
  const int64_t begin = part * INJECT_PIXELS, end = begin + INJECT_PIXELS < s.pixels() ? begin + INJECT_PIXELS : s.pixels();
  S sums[COUNT + 1] = {};
  for (int64_t index = begin + threadIdx.x; index < end; index += INJECT_THREADS) {
    const Pixel pixel(s, index);
    const S feature = read<S>(features[pixel.features_at + c * pixel.stride]);
    const T* images[3] = {first, second, third};
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums[k] += feature * read<S>(images[k][pixel.image_at]);
    sums[COUNT] += COUNT == 1 ? read<S>(first[pixel.image_at]) : feature;
  }
#pragma unroll
  for (int k = 0; k <= COUNT; ++k) {
    const S sum = block_sum<INJECT_THREADS>(sums[k]);
    if (threadIdx.x == 0) partial[blockIdx.x * (COUNT + 1) + k] = sum;
  }
}

// Block c: its parts in order.
template <int COUNT, class S>
__global__ void __launch_bounds__(COMBINE_THREADS)
    weights_kernel(const double* partial, int64_t parts, int64_t planes, S* dweight, S* dbias) {
#pragma unroll
  for (int k = 0; k <= COUNT; ++k) {
    double sum = 0;
    for (int64_t part = threadIdx.x; part < parts; part += COMBINE_THREADS)
      sum += partial[(part * planes + blockIdx.x) * (COUNT + 1) + k];
    sum = block_sum<COMBINE_THREADS>(sum);
    if (threadIdx.x != 0) continue;
    if (k < COUNT) dweight[blockIdx.x * COUNT + k] = S(sum);
    else if (COUNT > 1 || blockIdx.x == 0) dbias[blockIdx.x] = S(sum);
  }
}

Shape shape_of(const InjectArguments& a) { return {a.images, a.planes, a.height, a.width, a.r, a.last}; }

int64_t parts_of(const InjectArguments& a) { return pieces_of(shape_of(a).pixels(), INJECT_PIXELS); }

// f(T{}) with the kernel's blocks of one pixel a thread.
template <class Function>
void with_type_and_blocks(const InjectArguments& a, const Function& f) {
  for_type(a.dtype, [&](auto element) { f(element, pieces_of(shape_of(a).pixels(), INJECT_THREADS)); });
}

template <int COUNT, class T>
void weight_gradient(const InjectArguments& a, const void* features, const void* first, void* stream) {
  using S = Accumulate<T>;
  const auto in = [](const void* pointer) { return static_cast<const T*>(pointer); };
  launch(weight_sums_kernel<COUNT, T, S>, parts_of(a) * a.planes, INJECT_THREADS, stream, in(features), in(first), in(a.gz),
         in(a.aty), a.partial, shape_of(a));
  launch(weights_kernel<COUNT, S>, a.planes, COMBINE_THREADS, stream, a.partial, parts_of(a), a.planes,
         static_cast<S*>(a.dweight), static_cast<S*>(a.dbias));
}

}  // namespace

int64_t inject_partials(const InjectArguments& a) { return 4 * parts_of(a) * a.planes; }

void inject_read(const InjectArguments& a, void* stream) {
  with_type_and_blocks(a, [&](auto element, int64_t blocks) {
    using T = decltype(element);
    using S = Accumulate<T>;
    launch(read_kernel<T, S>, blocks, INJECT_THREADS, stream, static_cast<const T*>(a.h), static_cast<const S*>(a.weight),
           static_cast<const S*>(a.bias), static_cast<T*>(a.dz), shape_of(a));
  });
}

void inject_read_backward(const InjectArguments& a, void* stream) {
  with_type_and_blocks(a, [&](auto element, int64_t blocks) {
    using T = decltype(element);
    using S = Accumulate<T>;
    launch(read_gradient_kernel<T, S>, blocks, INJECT_THREADS, stream, static_cast<const T*>(a.z),
           static_cast<const S*>(a.weight), static_cast<const T*>(a.through), static_cast<T*>(a.out), shape_of(a));
    weight_gradient<1, T>(a, a.h, a.z, stream);
  });
}

void inject_write(const InjectArguments& a, void* stream) {
  with_type_and_blocks(a, [&](auto element, int64_t blocks) {
    using T = decltype(element);
    using S = Accumulate<T>;
    launch(write_kernel<T, S>, blocks, INJECT_THREADS, stream, static_cast<const T*>(a.h), static_cast<const T*>(a.z),
           static_cast<const T*>(a.gz), static_cast<const T*>(a.aty), static_cast<const S*>(a.weight),
           static_cast<const S*>(a.bias), static_cast<T*>(a.out), shape_of(a));
  });
}

void inject_write_backward(const InjectArguments& a, void* stream) {
  with_type_and_blocks(a, [&](auto element, int64_t blocks) {
    using T = decltype(element);
    using S = Accumulate<T>;
    launch(write_gradient_kernel<T, S>, blocks, INJECT_THREADS, stream, static_cast<const T*>(a.h),
           static_cast<const S*>(a.weight), static_cast<T*>(a.dz), static_cast<T*>(a.dgz), static_cast<T*>(a.daty), shape_of(a));
    weight_gradient<3, T>(a, a.h, a.z, stream);
  });
}

}  // namespace idm::cuda
