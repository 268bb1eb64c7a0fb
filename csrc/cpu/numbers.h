// Element types as they lie in memory, and what they are computed in. Inlined into every instruction set's objects; nothing
// here may be an out-of-line function, or the linker could keep the copy that an older CPU cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formulas/portable.h"

namespace idm {

enum class Dtype : int { float32, float64, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  _Float16 value;
};

IDM_INLINE float load(float x) { return x; }
IDM_INLINE double load(double x) { return x; }
IDM_INLINE float load(Float16 x) { return static_cast<float>(x.value); }

IDM_INLINE float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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

template <>
struct Store<Float16> {
  template <class S>
  static IDM_INLINE Float16 of(S x) { return {static_cast<_Float16>(static_cast<float>(x))}; }
};

// Round to nearest, ties to even; NaN stays NaN.
template <>
struct Store<BFloat16> {
  template <class S>
  static IDM_INLINE BFloat16 of(S x) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
  }
};

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
