// Sums over runs of numbers, and mean and variance that keep their digits where the mean is large.
#pragma once

#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace idm::cpu::IDM_ISA {

// Takes sums of runs, in S, lane by lane: in double from run to run, as sums lose digits while they grow.
template <class S>
class WideSum {
 public:
  // Not by a list of nothing: compilers make a loop over memory of that.
  IDM_INLINE WideSum() {
    for (int part = 0; part < PARTS; ++part) parts_[part] = Vector<double>{};
  }

  IDM_INLINE void add(Vector<S> run) {
    S lanes[LANES<S>];
    store_vector(lanes, run);
    for (int part = 0; part < PARTS; ++part) {
      double wide[LANES<double>];
      for (int lane = 0; lane < LANES<double>; ++lane) wide[lane] = static_cast<double>(lanes[part * LANES<double> + lane]);
      parts_[part] += load_vector(wide);
    }
  }

  IDM_INLINE double total() const {
    double lanes[LANES<double>];
    Vector<double> sum = parts_[0];
    for (int part = 1; part < PARTS; ++part) sum += parts_[part];
    store_vector(lanes, sum);
    for (int half = LANES<double> / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
  }

 private:
  static constexpr int PARTS = LANES<S> / LANES<double>;
  Vector<double> parts_[PARTS];
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
    Vector<S> sums[SIDE_BY_SIDE][N];
    S rest[N];
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < SIDE_BY_SIDE; ++k) sums[k][n] = Vector<S>{};
      rest[n] = 0;
    }
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

// sums[n] = Σ terms[n] over i < count, where term(i, terms) gives N terms of type S. They stand in the first cache until they are
// summed, so that what else `term` computes is a loop of its own for the compiler.
template <class S, int N, class Term>
IDM_INLINE void sum(int64_t count, double (&sums)[N], const Term& term) {
  constexpr int64_t RUN = 512;
  alignas(64) S terms[N][RUN];
  for (int n = 0; n < N; ++n) sums[n] = 0;
  for (int64_t begin = 0; begin < count; begin += RUN) {
    const int64_t here = begin + RUN < count ? RUN : count - begin;
    IDM_VECTOR_LOOP
    for (int64_t i = 0; i < here; ++i) {
      S of_element[N];
      term(begin + i, of_element);
      for (int n = 0; n < N; ++n) terms[n][i] = of_element[n];
    }
    for (int n = 0; n < N; ++n) {
      double of_run[1] = {};
      sum_pairs(terms[n], terms[n], here, of_run, [](auto value, auto, auto* to) IDM_LAMBDA_INLINE { to[0] += value; });
      sums[n] += of_run[0];
    }
  }
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
