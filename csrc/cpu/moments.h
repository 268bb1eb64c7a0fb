// Sums over runs of numbers, and mean and variance that keep their digits where the mean is large.
#pragma once

#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace idm::cpu::IDM_ISA {

// Takes sums of runs, in S, lane by lane: in double from run to run, as sums lose digits while they grow.
template <class S>
struct WideSum {
  double lanes[LANES<S>] = {};

  IDM_INLINE void add(Vector<S> run) {
    S of_run[LANES<S>];
    store_vector(of_run, run);
    for (int lane = 0; lane < LANES<S>; ++lane) lanes[lane] += static_cast<double>(of_run[lane]);
  }

  IDM_INLINE double total() {
    for (int half = LANES<S> / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
  }
};

// totals[n] += Σ terms[n] over i < count, where add(a[i], b[i], terms) adds to N terms; a and b come as numbers or as vectors.
// Many sums side by side, or each addition would wait for the one before.
template <int N, class S, class Add>
IDM_INLINE void sum_pairs(const S* a, const S* b, int64_t count, double (&totals)[N], const Add& add) {
  constexpr int SIDE_BY_SIDE = 4, STEP = SIDE_BY_SIDE * LANES<S>;
  constexpr int64_t BLOCK = 16 * STEP;
  WideSum<S> wide[N];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int64_t end = begin + BLOCK < count ? begin + BLOCK : count;
    Vector<S> sums[SIDE_BY_SIDE][N] = {};
    S rest[N] = {};
    int64_t i = begin;
    for (; i + STEP <= end; i += STEP)
#pragma GCC unroll 4
      for (int k = 0; k < SIDE_BY_SIDE; ++k)
        add(load_vector(a + i + k * LANES<S>), load_vector(b + i + k * LANES<S>), sums[k]);
    for (; i + LANES<S> <= end; i += LANES<S>) add(load_vector(a + i), load_vector(b + i), sums[0]);
    for (; i < end; ++i) add(a[i], b[i], rest);
    for (int n = 0; n < N; ++n) {
      wide[n].add((sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]));
      totals[n] += static_cast<double>(rest[n]);
    }
  }
  for (int n = 0; n < N; ++n) totals[n] += wide[n].total();
}

// Mean of `count` numbers and Σ (x − mean)².
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // From a guess of the mean, Σ (x − guess) and Σ (x − guess)².
  static IDM_INLINE Moments around(double guess, double count, double deviations, double squares) {
    return {count, guess + deviations / count, squares - deviations * deviations / count};
  }

  // The moments of both sets of numbers (Chan, Golub, LeVeque 1979).
  IDM_INLINE void merge(const Moments& other) {
    const double total = count + other.count, difference = other.mean - mean;
    if (other.count == 0) return;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * other.count / total);
    count = total;
  }

  IDM_INLINE double rstd(double eps) const {
    const double variance = count > 0 && squares > 0 ? squares / count : 0;
    return 1 / sqrt((squares != squares ? squares : variance) + eps);
  }
};

// Adds `count` numbers to those that `all` describes, in one pass around the mean so far; at first around that of a few numbers.
// What cancels where a run's mean lies far from the guess is small beside the squares of that distance, which the merge adds.
template <class S>
IDM_INLINE void add_run(Moments& all, const S* x, int64_t count) {
  double mean = all.mean, sums[2] = {};
  if (all.count == 0) {
    const int64_t few = count < 256 ? count : 256;
    sum_pairs(x, x, few, sums, [](auto value, auto, auto* terms) IDM_LAMBDA_INLINE { terms[0] += value; });
    mean = sums[0] / static_cast<double>(few);
    sums[0] = 0;
  }
  const S guess = static_cast<S>(mean);
  sum_pairs(x, x, count, sums, [guess](auto value, auto, auto* terms) IDM_LAMBDA_INLINE {
    const auto deviation = value - guess;
    terms[0] += deviation;
    terms[1] += deviation * deviation;
  });
  all.merge(Moments::around(static_cast<double>(guess), static_cast<double>(count), sums[0], sums[1]));
}

}  // namespace idm::cpu::IDM_ISA
