// Element types as they lie in memory, and what they are computed in. Inlined into every instruction set's objects; nothing
// here may be an out-of-line function, or the linker could keep the copy that an older CPU cannot run.
#pragma once

#include <cstdint>

#include "../formulas/exponential.h"

namespace idm {

enum class Dtype : int { float32, float64, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

// IEEE half precision. Converted by integer arithmetic without branches, as compilers before GCC 12 and clang 15 lack _Float16.
struct Float16 {
  uint16_t bits;
};

// A float whose significand has 10 stored bits, as tensor cores take their factors; it lies in memory as that float.
struct TensorFloat32 {
  uint32_t bits;
};

IDM_INLINE float load(float x) { return x; }
IDM_INLINE double load(double x) { return x; }
IDM_INLINE float load(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

IDM_INLINE float load(TensorFloat32 x) { return float_of_bits(x.bits); }

IDM_INLINE float load(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);  // above: infinities and NaN
  const uint32_t subnormal = bits_of_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of_bits((magnitude < 0x0400u ? subnormal : normal) | sign);
}

template <class T>
struct Store;

template <>
struct Store<float> {
  template <class S>
  static IDM_INLINE float of(S x) { return static_cast<float>(x); }
};

template <>
struct Store<double> {
  template <class S>
  static IDM_INLINE double of(S x) { return static_cast<double>(x); }
};

// Round to nearest, ties to even; NaN stays NaN.
template <>
struct Store<Float16> {
  template <class S>
  static IDM_INLINE Float16 of(S x) {
    const uint32_t bits = bits_of_float(static_cast<float>(x)), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2, whose last place is the smallest subnormal number, rounds to a multiple of that.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : large))};
  }
};

// Round to nearest, ties to even; NaN stays NaN.
template <>
struct Store<BFloat16> {
  template <class S>
  static IDM_INLINE BFloat16 of(S x) {
    const float value = static_cast<float>(x);
    const uint32_t bits = bits_of_float(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
  }
};

// Round to nearest, ties away from zero, as the GPU's cvt.rna.tf32.f32 does; NaN stays NaN.
template <>
struct Store<TensorFloat32> {
  template <class S>
  static IDM_INLINE TensorFloat32 of(S x) {
    const float value = static_cast<float>(x);
    return {value != value ? 0x7fffffffu : (bits_of_float(value) + 0x1000u) & ~0x1fffu};
  }
};

// What sums and formulas of a dtype are computed in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// Calls f with a value of the type that `dtype` names; used as f(auto tag) { using T = decltype(tag); … }.
template <class Function>
IDM_INLINE void with_type(Dtype dtype, Function f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
  }
}

}  // namespace idm
