// What the kernels need of CUDA: launching, 16-byte accesses, conversions, sums over a block. Under IDM_EMULATED a header of
// the tests stands in for CUDA, and the same sources run on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(IDM_EMULATED)
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../cpu/numbers.h"
#include "configurations.h"

namespace idm::cuda {

// kernel<<<blocks, threads>>>(arguments...) on `stream`; no blocks is no launch. std::runtime_error when CUDA refuses it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("a CUDA launch of " + std::to_string(blocks) + " blocks; split the batch");
#if defined(IDM_EMULATED)
  (void)stream;
  emulation::run(static_cast<unsigned>(blocks), threads, [&] { kernel(arguments...); });
#else
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("a CUDA launch failed: ") + cudaGetErrorString(error));
#endif
}

inline int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Elements that make 16 bytes.
template <class T>
constexpr int WIDTH = 16 / sizeof(T);

// W elements that are loaded and stored by accesses of 16 bytes, or of all their bytes if those are fewer.
template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Pack {
  T values[W];
};

template <class T, int W>
inline bool aligned_for(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, W>) == 0;
}

template <int BYTES>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

// By instructions of their own: plain accesses are torn apart where the compiler merges them with those of single elements.
template <class Word>
__device__ __forceinline__ Word load_word(const Word* from) {
#if defined(__CUDA_ARCH__)
  Word w;
  if constexpr (sizeof(Word) == 16) {
    asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
    return w;
  } else if constexpr (sizeof(Word) == 8) {
    asm volatile("ld.global.v2.b32 {%0,%1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(from) : "memory");
    return w;
  }
#endif
  return *from;
}

template <class Word>
__device__ __forceinline__ void store_word(Word* to, Word w) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Word) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  else if constexpr (sizeof(Word) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(w.x), "r"(w.y) : "memory");
  else
    *to = w;
#else
  *to = w;
#endif
}

template <class T, int W>
__device__ __forceinline__ Pack<T, W> load_pack(const T* from) {
  using Word = typename WordOf<alignof(Pack<T, W>)>::type;
  Pack<T, W> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(Word)); ++i)
    reinterpret_cast<Word*>(&pack)[i] = load_word(reinterpret_cast<const Word*>(from) + i);
  return pack;
}

template <class T, int W>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, W>& pack) {
  using Word = typename WordOf<alignof(Pack<T, W>)>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(Word)); ++i)
    store_word(reinterpret_cast<Word*>(to) + i, reinterpret_cast<const Word*>(&pack)[i]);
}

// The first `count` of W elements; by accesses of 16 bytes when `packed` says that `from` is aligned and all are there.
template <class T, int W>
__device__ __forceinline__ Pack<T, W> load_some(const T* from, int count, bool packed) {
  if (packed) return load_pack<T, W>(from);
  Pack<T, W> pack{};
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i < count) pack.values[i] = from[i];
  return pack;
}

template <class T, int W>
__device__ __forceinline__ void store_some(T* to, const Pack<T, W>& pack, int count, bool packed) {
  if (packed) return store_pack<T, W>(to, pack);
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i < count) to[i] = pack.values[i];
}

// An element as S, float or double.
template <class S, class T>
__device__ __forceinline__ S read(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Float16>) return S(__half2float(__ushort_as_half(x.bits)));
#endif
  return S(load(x));
}

// S as an element, rounded to nearest; by the GPU's own instruction where it has one.
template <class T, class S>
__device__ __forceinline__ T write(S x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(float(x)))};
  if constexpr (std::is_same_v<T, Float16>) return {__half_as_ushort(__float2half_rn(float(x)))};
  if constexpr (std::is_same_v<T, TensorFloat32>) {
    T rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded.bits) : "f"(float(x)));
    return rounded;
  }
#endif
  return Store<T>::of(x);
}

constexpr int WARP = 32;

template <class S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The sum over a block of THREADS threads, in every thread; always in the same order.
template <int THREADS, class S>
__device__ __forceinline__ S block_sum(S value) {
  __shared__ S of_warp[THREADS / WARP];
  value = warp_sum(value);
  __syncthreads();  // what an earlier sum left there has been read
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
  __syncthreads();
  S sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; ++warp) sum += of_warp[warp];
  return sum;
}

// f(T{}) for the type that `dtype` names, on the host.
template <class Function>
void for_type(Dtype dtype, const Function& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
  }
}

// f(T{}, O{}): the element types of a norm's x, and of its out or dout.
template <class Function>
void for_norm_types(Dtype x, Dtype out, const Function& f) {
  for_type(x, [&](auto x_type) {
    if (out == x) return f(x_type, x_type);
    if constexpr (std::is_same_v<decltype(x_type), float>) {
      if (out == Dtype::bfloat16) return f(x_type, BFloat16{});
      if (out == Dtype::float16) return f(x_type, Float16{});
    }
    throw std::runtime_error("no kernel of a norm for this pair of dtypes");
  });
}

}  // namespace idm::cuda
