// GroupNorm with SiLU, in both memory formats, and LayerNorm on the CPU, with their gradients. Statistics take two passes, the
// second about the first's mean: neither a large mean nor an outlier costs digits.
#include "../formulas/group_norm.h"

#include <math.h>

#include <type_traits>

#include "rows.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Number, sum of the deviations from `about` and of their squares; joined in double.
struct Moments {
  double count, mean, squares;  // squares: about the mean

  static Moments of(double count, double about, double deviations, double squares) {
    if (count == 0) return {0, 0, 0};
    return {count, about + deviations / count, squares - deviations * deviations / count};
  }

  Moments joined(const Moments& other) const {
    const double all = count + other.count, difference = other.mean - mean;
    if (all == 0) return *this;
    return {all, mean + difference * other.count / all, squares + other.squares + difference * difference * count * other.count / all};
  }

  double rstd(double eps) const {
    const double variance = squares > 0 ? squares / count : 0;
    return 1 / sqrt(variance + eps);
  }
};

// Of `count` elements that lie in one run.
template <class S, class T>
Moments moments(const T* x, int64_t count) {
  double sums[1], deviations[2];
  sum<S>(count, sums, [&](int64_t i, S* term) IDM_LAMBDA_INLINE { term[0] = load(x[i]); });
  const S about = count > 0 ? static_cast<S>(sums[0] / count) : S(0);
  sum<S>(count, deviations, [&](int64_t i, S* terms) IDM_LAMBDA_INLINE {
    const S d = S(load(x[i])) - about;
    terms[0] = d;
    terms[1] = d * d;
  });
  return Moments::of(count, about, deviations[0], deviations[1]);
}

// f(X{}, O{}) for the pairs of dtypes that the registration lets through: one dtype for both, or x in float32.
template <class Function>
void with_types(const NormArguments& a, const Function& f) {
  if (a.x_dtype == Dtype::float32)
    with_type(a.out_dtype, [&](auto out) {
      if constexpr (!SAME<decltype(out), double>) f(float{}, out);
    });
  else
    with_type(a.x_dtype, [&](auto x) {
      if constexpr (!SAME<decltype(x), float>) f(x, x);
    });
}

// (1 or silu')·dout at one element.
template <bool SILU, class S>
IDM_INLINE S into_norm(S dout, S u) {
  return SILU ? dout * silu_derivative(u) : dout;
}

template <class Function>
void with_silu(bool silu, const Function& f) {
  if (silu) f(std::true_type{});
  else f(std::false_type{});
}

// weight_out and bias_out from the parts of `count` images or pieces, (count, 2, channels), in order.
template <class S>
void add_up(const NormArguments& a, const double* parts, int64_t count) {
  for (int64_t k = 0; k < 2 * a.channels; ++k) {
    double total = 0;
    for (int64_t part = 0; part < count; ++part) total += parts[part * 2 * a.channels + k];
    static_cast<S*>(k < a.channels ? a.weight_out : a.bias_out)[k < a.channels ? k : k - a.channels] = static_cast<S>(total);
  }
}

// ---- (images, channels, positions): a group is one run of elements, and one thread's work.

template <bool SILU, class X, class O>
void channels_first(const NormArguments& a, ParallelFor loop) {
  using S = Accumulate<X>;
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const int64_t depth = a.channels / a.groups;
  parallel(loop, a.images * a.groups, 1, [&](int64_t group) {
    const int64_t offset = group * depth * a.positions;
    const X* x = static_cast<const X*>(a.x) + offset;
    O* out = static_cast<O*>(a.out) + offset;
    const Moments m = moments<S>(x, depth * a.positions);
    const S mean = static_cast<S>(m.mean), rstd = static_cast<S>(m.rstd(a.eps));
    static_cast<S*>(a.mean)[group] = mean;
    static_cast<S*>(a.rstd)[group] = rstd;
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t c = group % a.groups * depth + d;
      const S scale = rstd * weight[c], shift = bias[c];
      const X* from = x + d * a.positions;
      O* to = out + d * a.positions;
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < a.positions; ++i) {
        const S u = normalized(S(load(from[i])), mean, scale, shift);
        to[i] = Store<O>::of(SILU ? silu(u) : u);
      }
    }
  });
}

template <bool SILU, class X, class O>
void channels_first_backward(const NormArguments& a, ParallelFor loop) {
  using S = Accumulate<X>;
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const int64_t depth = a.channels / a.groups;
  Scratch<double> parts(a.images * 2 * a.channels);
  parallel(loop, a.images * a.groups, 1, [&](int64_t group) {
    const int64_t offset = group * depth * a.positions, first = group % a.groups * depth;
    const X* x = static_cast<const X*>(a.x) + offset;
    const O* dout = static_cast<const O*>(a.dout) + offset;
    X* dx = static_cast<X*>(a.out) + offset;
    const S mean = static_cast<const S*>(a.mean)[group], rstd = static_cast<const S*>(a.rstd)[group];
    double* part = parts + group / a.groups * 2 * a.channels + first;
    Scratch<S> gradient(depth * a.positions);
    double slope = 0, shift = 0;
    for (int64_t d = 0; d < depth; ++d) {
      const S scale = rstd * weight[first + d], b = bias[first + d];
      const X* from = x + d * a.positions;
      const O* g_from = dout + d * a.positions;
      S* g = gradient + d * a.positions;
      double sums[2];
      sum<S>(a.positions, sums, [&](int64_t i, S* terms) IDM_LAMBDA_INLINE {
        const S xi = load(from[i]);
        g[i] = into_norm<SILU>(S(load(g_from[i])), normalized(xi, mean, scale, b));
        terms[0] = g[i] * (xi - mean);
        terms[1] = g[i];
      });
      part[d] = sums[0] * rstd;
      part[a.channels + d] = sums[1];
      slope += sums[0] * weight[first + d];
      shift += sums[1] * weight[first + d];
    }
    const double n = static_cast<double>(depth * a.positions), r = rstd;
    const S by_x = static_cast<S>(slope * r * r * r / n), by_one = static_cast<S>(shift * r / n);
    for (int64_t d = 0; d < depth; ++d) {
      const S scale = rstd * weight[first + d];
      const X* from = x + d * a.positions;
      const S* g = gradient + d * a.positions;
      X* to = dx + d * a.positions;
      IDM_VECTOR_LOOP
      for (int64_t i = 0; i < a.positions; ++i)
        to[i] = Store<X>::of(norm_gradient(g[i], S(load(from[i])), mean, scale, by_one, by_x));
    }
  });
  add_up<S>(a, parts, a.images);
}

// ---- (images, positions, channels): pieces of some positions; what is said of a group is repeated for each of its channels.

struct Pieces {
  static constexpr int64_t MOST = 128;  // positions over which a channel is summed before the sums are joined in double
  int64_t positions, of_image, count;   // a piece's positions; pieces of an image, of all

  explicit Pieces(const NormArguments& a) : positions(a.channels < 16384 / MOST ? MOST : 16384 / a.channels + 1) {
    of_image = (a.positions + positions - 1) / positions;
    count = a.images * of_image;
  }

  int64_t image(int64_t piece) const { return piece / of_image; }
  int64_t begin(int64_t piece) const { return piece % of_image * positions; }
  int64_t end(const NormArguments& a, int64_t piece) const {
    return begin(piece) + positions < a.positions ? begin(piece) + positions : a.positions;
  }
};

template <bool SILU, class X, class O>
void channels_last(const NormArguments& a, ParallelFor loop) {
  using S = Accumulate<X>;
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const int64_t C = a.channels, depth = C / a.groups;
  const Pieces pieces(a);
  Scratch<Moments> parts(pieces.count * a.groups);
  parallel(loop, pieces.count, 1, [&](int64_t piece) {
    const int64_t begin = pieces.begin(piece), end = pieces.end(a, piece);
    const X* x = static_cast<const X*>(a.x) + pieces.image(piece) * a.positions * C;
    Scratch<S> room(3 * C);
    S *about = room, *deviations = about + C, *squares = deviations + C;
    for (int64_t c = 0; c < 3 * C; ++c) room[c] = 0;
    for (int64_t p = begin; p < end; ++p) {
      IDM_VECTOR_LOOP
      for (int64_t c = 0; c < C; ++c) about[c] += S(load(x[p * C + c]));
    }
    for (int64_t c = 0; c < C; ++c) about[c] /= S(end - begin);
    for (int64_t p = begin; p < end; ++p) {
      IDM_VECTOR_LOOP
      for (int64_t c = 0; c < C; ++c) {
        const S d = S(load(x[p * C + c])) - about[c];
        deviations[c] += d;
        squares[c] += d * d;
      }
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      Moments m{0, 0, 0};
      for (int64_t c = g * depth; c < (g + 1) * depth; ++c)
        m = m.joined(Moments::of(static_cast<double>(end - begin), about[c], deviations[c], squares[c]));
      parts[piece * a.groups + g] = m;
    }
  });
  Scratch<S> means(a.images * C), scales(a.images * C);
  for (int64_t image = 0; image < a.images; ++image)
    for (int64_t g = 0; g < a.groups; ++g) {
      Moments m{0, 0, 0};
      for (int64_t piece = image * pieces.of_image; piece < (image + 1) * pieces.of_image; ++piece)
        m = m.joined(parts[piece * a.groups + g]);
      const S mean = static_cast<S>(m.mean), rstd = static_cast<S>(m.rstd(a.eps));
      static_cast<S*>(a.mean)[image * a.groups + g] = mean;
      static_cast<S*>(a.rstd)[image * a.groups + g] = rstd;
      for (int64_t c = g * depth; c < (g + 1) * depth; ++c) {
        means[image * C + c] = mean;
        scales[image * C + c] = rstd * weight[c];
      }
    }
  parallel(loop, pieces.count, 1, [&](int64_t piece) {
    const int64_t image = pieces.image(piece), offset = image * a.positions * C;
    const X* x = static_cast<const X*>(a.x) + offset;
    O* out = static_cast<O*>(a.out) + offset;
    const S *mean = means + image * C, *scale = scales + image * C;
    for (int64_t p = pieces.begin(piece); p < pieces.end(a, piece); ++p) {
      IDM_VECTOR_LOOP
      for (int64_t c = 0; c < C; ++c) {
        const S u = normalized(S(load(x[p * C + c])), mean[c], scale[c], bias[c]);
        out[p * C + c] = Store<O>::of(SILU ? silu(u) : u);
      }
    }
  });
}

template <bool SILU, class X, class O>
void channels_last_backward(const NormArguments& a, ParallelFor loop) {
  using S = Accumulate<X>;
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const int64_t C = a.channels, depth = C / a.groups;
  const Pieces pieces(a);
  Scratch<S> means(a.images * C), scales(a.images * C), shifts(a.images * C), slopes(a.images * C);
  const auto group_of = [&](int64_t image, int64_t c) { return image * a.groups + c / depth; };
  for (int64_t image = 0; image < a.images; ++image)
    for (int64_t c = 0; c < C; ++c) {
      means[image * C + c] = static_cast<const S*>(a.mean)[group_of(image, c)];
      scales[image * C + c] = static_cast<const S*>(a.rstd)[group_of(image, c)] * weight[c];
    }
  const auto at = [&](int64_t image, int64_t p, int64_t c) { return (image * a.positions + p) * C + c; };
  const auto gradient = [&](const X* x, const O* dout, const S* mean, const S* scale, int64_t c) IDM_LAMBDA_INLINE {
    return into_norm<SILU>(S(load(dout[c])), normalized(S(load(x[c])), mean[c], scale[c], bias[c]));
  };
  // Of each image: Σ g·(x − mean) and Σ g for every channel; in the end times rstd the gradients of weight and bias.
  Scratch<double> parts(pieces.count * 2 * C), of_images(a.images * 2 * C);
  parallel(loop, pieces.count, 1, [&](int64_t piece) {
    const int64_t image = pieces.image(piece);
    const S *mean = means + image * C, *scale = scales + image * C;
    Scratch<S> room(2 * C);
    S *products = room, *sums = products + C;
    double* part = parts + piece * 2 * C;
    for (int64_t k = 0; k < 2 * C; ++k) room[k] = 0;
    for (int64_t p = pieces.begin(piece); p < pieces.end(a, piece); ++p) {
      const X* x = static_cast<const X*>(a.x) + at(image, p, 0);
      const O* dout = static_cast<const O*>(a.dout) + at(image, p, 0);
      IDM_VECTOR_LOOP
      for (int64_t c = 0; c < C; ++c) {
        const S g = gradient(x, dout, mean, scale, c);
        products[c] += g * (S(load(x[c])) - mean[c]);
        sums[c] += g;
      }
    }
    for (int64_t k = 0; k < 2 * C; ++k) part[k] = room[k];
  });
  for (int64_t image = 0; image < a.images; ++image) {
    double* sums = of_images + image * 2 * C;
    for (int64_t k = 0; k < 2 * C; ++k) {
      sums[k] = 0;
      for (int64_t piece = image * pieces.of_image; piece < (image + 1) * pieces.of_image; ++piece)
        sums[k] += parts[piece * 2 * C + k];
    }
    for (int64_t first = 0; first < C; first += depth) {
      const double rstd = static_cast<const S*>(a.rstd)[group_of(image, first)], n = static_cast<double>(depth * a.positions);
      double slope = 0, shift = 0;
      for (int64_t c = first; c < first + depth; ++c) {
        slope += sums[c] * weight[c];
        shift += sums[C + c] * weight[c];
        sums[c] *= rstd;
      }
      for (int64_t c = first; c < first + depth; ++c) {
        slopes[image * C + c] = static_cast<S>(slope * rstd * rstd * rstd / n);
        shifts[image * C + c] = static_cast<S>(shift * rstd / n);
      }
    }
  }
  add_up<S>(a, of_images, a.images);
  parallel(loop, pieces.count, 1, [&](int64_t piece) {
    const int64_t image = pieces.image(piece);
    const S *mean = means + image * C, *scale = scales + image * C, *shift = shifts + image * C, *slope = slopes + image * C;
    for (int64_t p = pieces.begin(piece); p < pieces.end(a, piece); ++p) {
      const X* x = static_cast<const X*>(a.x) + at(image, p, 0);
      const O* dout = static_cast<const O*>(a.dout) + at(image, p, 0);
      X* dx = static_cast<X*>(a.out) + at(image, p, 0);
      IDM_VECTOR_LOOP
      for (int64_t c = 0; c < C; ++c)
        dx[c] = Store<X>::of(
            norm_gradient(gradient(x, dout, mean, scale, c), S(load(x[c])), mean[c], scale[c], shift[c], slope[c]));
    }
  });
}

}  // namespace

void group_norm_silu(const NormArguments& a, ParallelFor loop) {
  with_types(a, [&](auto x, auto out) {
    with_silu(a.silu, [&](auto silu) {
      using X = decltype(x);
      using O = decltype(out);
      if (a.last) channels_last<decltype(silu)::value, X, O>(a, loop);
      else channels_first<decltype(silu)::value, X, O>(a, loop);
    });
  });
}

void group_norm_silu_backward(const NormArguments& a, ParallelFor loop) {
  with_types(a, [&](auto x, auto out) {
    with_silu(a.silu, [&](auto silu) {
      using X = decltype(x);
      using O = decltype(out);
      if (a.last) channels_last_backward<decltype(silu)::value, X, O>(a, loop);
      else channels_first_backward<decltype(silu)::value, X, O>(a, loop);
    });
  });
}

namespace {

constexpr int64_t ROWS = 64;  // LayerNorm: a thread's rows, over which a weight's gradient is summed before the sums are added

template <class Each>
void over_rows(const NormArguments& a, ParallelFor loop, const Each& each) {
  parallel(loop, (a.images + ROWS - 1) / ROWS, 1, [&](int64_t piece) {
    each(piece, piece * ROWS, (piece + 1) * ROWS < a.images ? (piece + 1) * ROWS : a.images);
  });
}

}  // namespace

void layer_norm(const NormArguments& a, ParallelFor loop) {
  with_types(a, [&](auto x_element, auto out_element) {
    using X = decltype(x_element);
    using O = decltype(out_element);
    using S = Accumulate<X>;
    const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
    over_rows(a, loop, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const X* x = static_cast<const X*>(a.x) + row * a.channels;
        O* out = static_cast<O*>(a.out) + row * a.channels;
        const Moments m = moments<S>(x, a.channels);
        const S mean = static_cast<S>(m.mean), rstd = static_cast<S>(m.rstd(a.eps));
        static_cast<S*>(a.mean)[row] = mean;
        static_cast<S*>(a.rstd)[row] = rstd;
        IDM_VECTOR_LOOP
        for (int64_t c = 0; c < a.channels; ++c)
          out[c] = Store<O>::of(normalized(S(load(x[c])), mean, rstd * weight[c], bias[c]));
      }
    });
  });
}

void layer_norm_backward(const NormArguments& a, ParallelFor loop) {
  with_types(a, [&](auto x_element, auto out_element) {
    using X = decltype(x_element);
    using O = decltype(out_element);
    using S = Accumulate<X>;
    const int64_t C = a.channels, pieces = (a.images + ROWS - 1) / ROWS;
    const S* weight = static_cast<const S*>(a.weight);
    Scratch<double> parts(pieces * 2 * C);
    over_rows(a, loop, [&](int64_t piece, int64_t begin, int64_t end) {
      Scratch<S> room(2 * C);
      S *products = room, *totals = products + C;
      for (int64_t k = 0; k < 2 * C; ++k) room[k] = 0;
      for (int64_t row = begin; row < end; ++row) {
        const X* x = static_cast<const X*>(a.x) + row * C;
        const O* dout = static_cast<const O*>(a.dout) + row * C;
        X* dx = static_cast<X*>(a.out) + row * C;
        const S mean = static_cast<const S*>(a.mean)[row], rstd = static_cast<const S*>(a.rstd)[row];
        double sums[2];
        sum<S>(C, sums, [&](int64_t c, S* terms) IDM_LAMBDA_INLINE {
          const S g = load(dout[c]), deviation = S(load(x[c])) - mean;
          products[c] += g * (deviation * rstd);
          totals[c] += g;
          terms[0] = g * weight[c] * deviation;
          terms[1] = g * weight[c];
        });
        const double r = rstd;
        const S slope = static_cast<S>(sums[0] * r * r * r / C), shift = static_cast<S>(sums[1] * r / C);
        IDM_VECTOR_LOOP
        for (int64_t c = 0; c < C; ++c)
          dx[c] = Store<X>::of(norm_gradient(S(load(dout[c])), S(load(x[c])), mean, rstd * weight[c], shift, slope));
      }
      for (int64_t k = 0; k < 2 * C; ++k) parts[piece * 2 * C + k] = room[k];
    });
    add_up<S>(a, parts, pieces);
  });
}

}  // namespace idm::cpu::IDM_ISA
