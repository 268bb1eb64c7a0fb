// Elements whose dtype is known when a kernel runs, a run of them at a time as float or double: kernels are then made for these
// two alone.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace idm::cpu::IDM_ISA {

// f(float{}) or f(double{}): what sums over elements of `dtype` are computed in.
template <class Function>
IDM_INLINE void with_accumulate(Dtype dtype, const Function& f) {
  if (dtype == Dtype::float64) f(double{});
  else f(float{});
}

template <class S>
constexpr Dtype DTYPE_OF = std::is_same_v<S, double> ? Dtype::float64 : Dtype::float32;

template <class S>
struct Source {
  Dtype dtype;
  const void* data;

  // `count` elements from `begin` on: where they lie, or in `room`.
  const S* read(int64_t begin, int64_t count, S* room) const {
    if (dtype == DTYPE_OF<S>) return static_cast<const S*>(data) + begin;
    convert(begin, count, room);
    return room;
  }

  __attribute__((noinline)) void convert(int64_t begin, int64_t count, S* room) const {
    with_type(dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(data) + begin;
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < count; ++i) room[i] = static_cast<S>(load(from[i]));
    });
  }
};

template <class S>
struct Target {
  Dtype dtype;
  void* data;

  bool is_exact() const { return dtype == DTYPE_OF<S>; }

  // Where to compute the elements from `begin` on: where they will lie, or in `room`; `write` then brings them there.
  S* place(int64_t begin, S* room) const { return is_exact() ? static_cast<S*>(data) + begin : room; }

  void write(int64_t begin, int64_t count, const S* room) const {
    if (!is_exact()) convert(begin, count, room);
  }

  __attribute__((noinline)) void convert(int64_t begin, int64_t count, const S* room) const {
    with_type(dtype, [&](auto type) {
      auto* to = static_cast<decltype(type)*>(data) + begin;
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < count; ++i) to[i] = Store<decltype(type)>::of(room[i]);
    });
  }
};

}  // namespace idm::cpu::IDM_ISA
