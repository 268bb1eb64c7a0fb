// Runs of elements in the dtype of sums, whatever their own: hot loops then see float or double alone.
#pragma once

#include "kernels.h"

namespace idm::cpu::IDM_ISA {

template <class T, class S>
constexpr bool SAME = false;
template <class T>
constexpr bool SAME<T, T> = true;

// `count` elements as S: where they lie, or converted into `room`.
template <class S, class T>
IDM_INLINE const S* read_row(const T* from, int64_t count, S* room) {
  if constexpr (SAME<T, S>) return from;
  else {
    for (int64_t i = 0; i < count; ++i) room[i] = load(from[i]);
    return room;
  }
}

// Where to compute elements that will lie at `to`: there, or in `room`; write_row then brings them there.
template <class S, class T>
IDM_INLINE S* row_for(T* to, S* room) {
  if constexpr (SAME<T, S>) return to;
  else return room;
}

template <class S, class T>
IDM_INLINE void write_row(T* to, const S* room, int64_t count) {
  if constexpr (!SAME<T, S>)
    for (int64_t i = 0; i < count; ++i) to[i] = Store<T>::of(room[i]);
}

}  // namespace idm::cpu::IDM_ISA
