// layer_norm and layer_norm_backward on the CPU. A row is brought into scratch and filled up to whole registers, where it goes
// through all passes: rows are short, and a remainder that is not vector code would take most of the time.
#include "../formulas/group_norm.h"

#include "convert.h"
#include "moments.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Over which the gradients of weight and bias are summed before the sums are added in order.
constexpr int64_t ROWS = 64;

// Scratch of `count` zeros.
template <class S>
class Zeros : public Scratch<S> {
 public:
  explicit Zeros(int64_t count) : Scratch<S>(count) {
    for (int64_t i = 0; i < count; ++i) static_cast<S*>(*this)[i] = 0;
  }
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

  template <class Each>
  IDM_INLINE void over_rows(int64_t chunk, const Each& each) const {
    const int64_t end = (chunk + 1) * ROWS < a.rows ? (chunk + 1) * ROWS : a.rows;
    for (int64_t row = chunk * ROWS; row < end; ++row) each(row);
  }

  // A row in `room`, followed by zeros.
  IDM_INLINE void bring(const Source<S>& from, int64_t row, S* room) const {
    const S* found = from.read(row * a.width, a.width, room);
    if (found != room) {
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < a.width; ++i) room[i] = found[i];
    }
    for (int64_t i = a.width; i < padded; ++i) room[i] = 0;
  }

  // Of a row that `bring` brought; the filling becomes the mean, which does not deviate.
  IDM_INLINE Moments moments_of(S* room) const {
    const double n = static_cast<double>(a.width);
    double total[1] = {}, sums[2] = {};
    sum_pairs(room, room, padded, total, [](auto value, auto, auto* terms) IDM_LAMBDA_INLINE { terms[0] += value; });
    const S guess = static_cast<S>(total[0] / n);
    for (int64_t i = a.width; i < padded; ++i) room[i] = guess;
    sum_pairs(room, room, padded, sums, [guess](auto value, auto, auto* terms) IDM_LAMBDA_INLINE {
      const auto deviation = value - guess;
      terms[0] += deviation;
      terms[1] += deviation * deviation;
    });
    return Moments::around(static_cast<double>(guess), n, sums[0], sums[1]);
  }
};

}  // namespace

void layer_norm(const LayerNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Norm<S> norm(a);
    parallel(loop, norm.chunks(), norm.chunks_of_thread(), [&](int64_t chunk) {
      Scratch<S> room(norm.padded), result_room(norm.padded);
      norm.over_rows(chunk, [&](int64_t row) {
        S* x = room;
        norm.bring(norm.x, row, x);
        const Moments m = norm.moments_of(x);
        const S mean = static_cast<S>(m.mean), lost = static_cast<S>(m.mean - static_cast<double>(mean));
        const S rstd = static_cast<S>(m.rstd(a.eps));
        S* result = norm.out.place(row * a.width, result_room);
        IDM_VECTOR_LOOP
        for (int64_t i = 0; i < a.width; ++i) result[i] = normalized(x[i] - mean, lost, rstd * norm.weight[i], norm.bias[i]);
        norm.out.write(row * a.width, a.width, result);
        static_cast<S*>(a.mean_out)[row] = mean;
        static_cast<S*>(a.rstd_out)[row] = rstd;
      });
    });
  });
}

void layer_norm_backward(const LayerNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Norm<S> norm(a);
    Scratch<S> of_weight(norm.chunks() * a.width), of_bias(norm.chunks() * a.width);
    parallel(loop, norm.chunks(), norm.chunks_of_thread(), [&](int64_t chunk) {
      Scratch<S> room(norm.padded), dout_room(norm.padded), result_room(norm.padded);
      S *dweight = of_weight + chunk * a.width, *dbias = of_bias + chunk * a.width;
      for (int64_t i = 0; i < a.width; ++i) dweight[i] = dbias[i] = 0;
      norm.over_rows(chunk, [&](int64_t row) {
        S *x = room, *g = dout_room;
        norm.bring(norm.x, row, x);
        norm.bring(norm.dout, row, g);
        const S mean = static_cast<const S*>(a.mean)[row], rstd = static_cast<const S*>(a.rstd)[row];
        IDM_VECTOR_LOOP
        for (int64_t i = 0; i < a.width; ++i) {
          dweight[i] += g[i] * ((x[i] - mean) * rstd);
          dbias[i] += g[i];
          g[i] *= norm.weight[i];
        }
        double sums[2] = {};
        sum_pairs(g, x, norm.padded, sums, [mean](auto of_output, auto value, auto* terms) IDM_LAMBDA_INLINE {
          terms[0] += of_output;
          terms[1] += of_output * (value - mean);
        });
        const double r = static_cast<double>(rstd), n = static_cast<double>(a.width);
        const S shift = static_cast<S>(r * sums[0] / n), slope = static_cast<S>(r * r * r * sums[1] / n);
        S* result = norm.out.place(row * a.width, result_room);
        IDM_VECTOR_LOOP
        for (int64_t i = 0; i < a.width; ++i) result[i] = norm_gradient(g[i], x[i], mean, rstd, shift, slope);
        norm.out.write(row * a.width, a.width, result);
      });
    });
    Zeros<double> weight_sums(a.width), bias_sums(a.width);
    for (int64_t chunk = 0; chunk < norm.chunks(); ++chunk)
      for (int64_t i = 0; i < a.width; ++i) {
        weight_sums[i] += static_cast<double>(of_weight[chunk * a.width + i]);
        bias_sums[i] += static_cast<double>(of_bias[chunk * a.width + i]);
      }
    for (int64_t i = 0; i < a.width; ++i) {
      static_cast<S*>(a.weight_out)[i] = static_cast<S>(weight_sums[i]);
      static_cast<S*>(a.bias_out)[i] = static_cast<S>(bias_sums[i]);
    }
  });
}

}  // namespace idm::cpu::IDM_ISA
