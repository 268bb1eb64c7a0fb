// layer_norm and layer_norm_backward on the CPU. A row that is not made of whole registers is brought into scratch and filled up:
// rows are short, and a remainder that is not vector code would take most of the time.
#include "../formulas/group_norm.h"

#include "convert.h"
#include "moments.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Over which the gradients of weight and bias are summed before the sums are added in order.
constexpr int64_t ROWS = 64;

// Vectors over which sums run before they go on in double.
constexpr int64_t RUN = 16;

// Scratch of `count` zeros.
template <class S>
class Zeros : public Scratch<S> {
 public:
  explicit Zeros(int64_t count) : Scratch<S>(count) {
    for (int64_t i = 0; i < count; ++i) static_cast<S*>(*this)[i] = 0;
  }
};

constexpr int TOGETHER = 4;

template <int R>
struct Count {
  static constexpr int value = R;
};

template <class S>
struct Norm {
  const LayerNormArguments& a;
  Source<S> x, dout;
  Target<S> out;
  const S *weight, *bias;
  int64_t padded;

  explicit Norm(const LayerNormArguments& arguments)
      : a(arguments),
        x{a.dtype, a.x},
        dout{a.dout_dtype, a.dout},
        out{a.out_dtype, a.out},
        weight(static_cast<const S*>(a.weight)),
        bias(static_cast<const S*>(a.bias)),
        padded((a.width + LANES<S> - 1) / LANES<S> * LANES<S>) {}

  int64_t chunks() const { return (a.rows + ROWS - 1) / ROWS; }
  int64_t chunks_of_thread() const { return 16384 / (ROWS * (a.width + 1)) + 1; }

  // each(first row, integral how many) for the rows of a chunk, TOGETHER at a time, then one: what a row waits for, its sums and a
  // quotient, passes while others are worked on.
  template <class Each>
  IDM_INLINE void over_rows(int64_t chunk, const Each& each) const {
    const int64_t end = (chunk + 1) * ROWS < a.rows ? (chunk + 1) * ROWS : a.rows;
    int64_t row = chunk * ROWS;
    for (; row + TOGETHER <= end; row += TOGETHER) each(row, Count<TOGETHER>{});
    for (; row < end; ++row) each(row, Count<1>{});
  }

  // A row where it lies, if that is made of whole registers, or in `room`, followed by zeros.
  IDM_INLINE const S* bring(const Source<S>& from, int64_t row, S* room) const {
    const S* found = from.read(row * a.width, a.width, room);
    if (a.width == padded) return found;
    if (found != room) {
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < a.width; ++i) room[i] = found[i];
    }
    for (int64_t i = a.width; i < padded; ++i) room[i] = 0;
    return room;
  }

  // The mean, about, of a row that `bring` brought: that of its beginning. The filling, in `room`, becomes it, too, and does not
  // deviate.
  IDM_INLINE S guess_mean(const S* x, S* room) const {
    const int64_t few = padded < 4 * LANES<S> ? padded : 4 * LANES<S>;
    WideSum<S> sum;
    for (int64_t i = 0; i < few; i += LANES<S>) sum.add(load_vector(x + i));
    const S guess = static_cast<S>(sum.total() / static_cast<double>(few < a.width ? few : a.width));
    for (int64_t i = a.width; i < padded; ++i) room[i] = guess;
    return guess;
  }

  IDM_INLINE Moments moments_around(S guess, const S* x) const {
    double sums[2] = {};
    sum_pairs(x, x, padded, sums, [guess](auto value, auto, auto* terms) IDM_LAMBDA_INLINE {
      const auto deviation = value - guess;
      terms[0] += deviation;
      terms[1] += deviation * deviation;
    });
    return Moments::around(static_cast<double>(guess), static_cast<double>(a.width), sums[0], sums[1]);
  }
};

}  // namespace

void layer_norm(const LayerNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Norm<S> norm(a);
    parallel(loop, norm.chunks(), norm.chunks_of_thread(), [&](int64_t chunk) {
      Scratch<S> room(TOGETHER * norm.padded), result_room(norm.padded);
      norm.over_rows(chunk, [&](int64_t first, auto count) {
        constexpr int R = decltype(count)::value;
        const S* rows[R];
        S guess[R], mean[R], lost[R], rstd[R];
        for (int r = 0; r < R; ++r) {
          rows[r] = norm.bring(norm.x, first + r, room + r * norm.padded);
          guess[r] = norm.guess_mean(rows[r], room + r * norm.padded);
        }
        for (int r = 0; r < R; ++r) {
          const Moments m = norm.moments_around(guess[r], rows[r]);
          static_cast<S*>(a.mean_out)[first + r] = mean[r] = static_cast<S>(m.mean);
          static_cast<S*>(a.rstd_out)[first + r] = rstd[r] = static_cast<S>(m.rstd(a.eps));
          lost[r] = static_cast<S>(m.mean - static_cast<double>(mean[r]));
        }
        for (int r = 0; r < R; ++r) {
          const S *x = rows[r], m = mean[r], rest = lost[r], scale = rstd[r];
          const int64_t begin = (first + r) * a.width;
          S* result = norm.out.place(begin, result_room);
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < a.width; ++i) result[i] = normalized(x[i] - m, rest, scale * norm.weight[i], norm.bias[i]);
          norm.out.write(begin, a.width, result);
        }
      });
    });
  });
}

void layer_norm_backward(const LayerNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Norm<S> norm(a);
    Zeros<S> of_weight(norm.chunks() * norm.padded), of_bias(norm.chunks() * norm.padded), weights(norm.padded);
    std::memcpy(weights, norm.weight, a.width * sizeof(S));
    parallel(loop, norm.chunks(), norm.chunks_of_thread(), [&](int64_t chunk) {
      Scratch<S> room(TOGETHER * norm.padded), dout_room(TOGETHER * norm.padded), result_room(norm.padded);
      S *dweight = of_weight + chunk * norm.padded, *dbias = of_bias + chunk * norm.padded;
      norm.over_rows(chunk, [&](int64_t first, auto count) {
        constexpr int R = decltype(count)::value;
        const S *x[R], *d[R], *weight = weights;
        S mean[R], rstd[R];
        for (int r = 0; r < R; ++r) {
          x[r] = norm.bring(norm.x, first + r, room + r * norm.padded);
          d[r] = norm.bring(norm.dout, first + r, dout_room + r * norm.padded);
          mean[r] = static_cast<const S*>(a.mean)[first + r];
          rstd[r] = static_cast<const S*>(a.rstd)[first + r];
        }
        WideSum<S> of_output[R], of_slope[R];
        for (int64_t begin = 0; begin < norm.padded; begin += RUN * LANES<S>) {
          const int64_t end = begin + RUN * LANES<S> < norm.padded ? begin + RUN * LANES<S> : norm.padded;
          Vector<S> outputs[R], slopes[R];
          for (int r = 0; r < R; ++r) outputs[r] = slopes[r] = Vector<S>{};
          for (int64_t i = begin; i < end; i += LANES<S>) {
            const Vector<S> w = load_vector(weight + i);
            Vector<S> to_weight = load_vector(dweight + i), to_bias = load_vector(dbias + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              const Vector<S> gradient = load_vector(d[r] + i), deviation = load_vector(x[r] + i) - mean[r];
              to_weight += gradient * (deviation * rstd[r]);
              to_bias += gradient;
              outputs[r] += gradient * w;
              slopes[r] += gradient * w * deviation;
            }
            store_vector(dweight + i, to_weight);
            store_vector(dbias + i, to_bias);
          }
          for (int r = 0; r < R; ++r) {
            of_output[r].add(outputs[r]);
            of_slope[r].add(slopes[r]);
          }
        }
        S shift[R], slope[R];
        for (int r = 0; r < R; ++r) {
          const double scale = static_cast<double>(rstd[r]), n = static_cast<double>(a.width);
          shift[r] = static_cast<S>(scale * of_output[r].total() / n);
          slope[r] = static_cast<S>(scale * scale * scale * of_slope[r].total() / n);
        }
        for (int r = 0; r < R; ++r) {
          const S *row = x[r], *gradient = d[r], m = mean[r], scale = rstd[r], by = shift[r], along = slope[r];
          S* result = norm.out.place((first + r) * a.width, result_room);
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < a.width; ++i)
            result[i] = norm_gradient(gradient[i] * weight[i], row[i], m, scale, by, along);
          norm.out.write((first + r) * a.width, a.width, result);
        }
      });
    });
    Zeros<double> weight_sums(a.width), bias_sums(a.width);
    for (int64_t chunk = 0; chunk < norm.chunks(); ++chunk)
      for (int64_t i = 0; i < a.width; ++i) {
        weight_sums[i] += static_cast<double>(of_weight[chunk * norm.padded + i]);
        bias_sums[i] += static_cast<double>(of_bias[chunk * norm.padded + i]);
      }
    for (int64_t i = 0; i < a.width; ++i) {
      static_cast<S*>(a.weight_out)[i] = static_cast<S>(weight_sums[i]);
      static_cast<S*>(a.bias_out)[i] = static_cast<S>(bias_sums[i]);
    }
  });
}

}  // namespace idm::cpu::IDM_ISA
