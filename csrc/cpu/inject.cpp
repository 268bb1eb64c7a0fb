// The injector's two halves on the CPU with their gradients, alone and with the coupling behind them: one pass over the features.
//
// A channel of the features is a row of r²·height·width elements, in the order that PixelUnshuffle gives the pixels of an image.
// So the images are brought into that order, into scratch, and what is left are products and sums of rows. Work goes by strips of
// the rows: all channels pass over a strip of the images while it is in the cache.
#include "../formulas/coupling.h"
#include "../formulas/injector.h"

#include <cstddef>
#include <initializer_list>
#include <type_traits>

#include "convert.h"
#include "moments.h"

namespace idm::cpu::IDM_ISA {

namespace {

constexpr int64_t STRIP = 8192;  // elements, at most: the shorter, the oftener one begins, with nothing of it in the cache

// Vectors over which sums run before they go on in double.
constexpr int64_t RUN = 16;

struct Rows {
  const InjectArguments& a;
  int64_t plane, length, strips;  // elements of a plane and of a row; strips of a row

  explicit Rows(const InjectArguments& arguments)
      : a(arguments), plane(a.height * a.width), length(a.r * a.r * plane), strips((length + STRIP - 1) / STRIP) {}

  int64_t count() const { return a.images * strips; }
};

// `n` elements of every channel's row.
struct Strip {
  int64_t features, image, length, n;  // where it begins in the first channel, and in the images

  Strip(const Rows& rows, int64_t index) : length(rows.length) {
    const int64_t which = index / rows.strips, begin = index % rows.strips * STRIP;
    n = length - begin < STRIP ? length - begin : STRIP;
    image = which * length + begin;
    features = which * rows.a.channels * length + begin;
  }

  int64_t at(int64_t channel) const { return features + channel * length; }
};

// f(integral r or 0, for every other).
template <int R>
struct Side {
  static constexpr int value = R;
};

template <class Function>
void with_side(int64_t r, const Function& f) {
  if (r == 2) f(Side<2>{});
  else if (r == 4) f(Side<4>{});
  else f(Side<0>{});
}

// each(pixels of the image's line, where they stand in its row, how far apart the positions j of that are) for all lines.
template <class Each>
void over_lines(const Rows& rows, ParallelFor loop, const Each& each) {
  const int64_t r = rows.a.r, width = rows.a.width, lines = rows.a.height * r;
  parallel(loop, rows.a.images * lines, 16384 / (width * r + 1) + 1, [&](int64_t line) {
    const int64_t image = line / lines, y = line % lines;
    each(line * width * r, image * rows.length + y % r * r * rows.plane + y / r * width);
  });
}

// The images one after the other, in the order of the features and the dtype of sums.
template <class S>
void unshuffle(const Rows& rows, std::initializer_list<const void*> images, S* to, ParallelFor loop) {
  with_type(rows.a.dtype, [&](auto type) {
    with_side(rows.a.r, [&](auto side) {
      constexpr int R = decltype(side)::value;
      const int64_t r = R ? R : rows.a.r, width = rows.a.width, plane = rows.plane;
      int64_t image = 0;
      for (const void* pixels : images) {
        S* of_image = to + image++ * rows.a.images * rows.length;
        over_lines(rows, loop, [&](int64_t pixel, int64_t place) {
          const auto* line = static_cast<const decltype(type)*>(pixels) + pixel;
          S* row = of_image + place;
          IDM_VECTOR_LOOP
          for (int64_t x = 0; x < width; ++x)
            for (int64_t j = 0; j < r; ++j) row[j * plane + x] = static_cast<S>(load(line[x * r + j]));
        });
      }
    });
  });
}

template <class S>
void shuffle(const Rows& rows, const S* from, std::initializer_list<void*> images, ParallelFor loop) {
  with_type(rows.a.dtype, [&](auto type) {
    with_side(rows.a.r, [&](auto side) {
      constexpr int R = decltype(side)::value;
      const int64_t r = R ? R : rows.a.r, width = rows.a.width, plane = rows.plane;
      int64_t image = 0;
      for (void* pixels : images) {
        const S* of_image = from + image++ * rows.a.images * rows.length;
        over_lines(rows, loop, [&](int64_t pixel, int64_t place) {
          auto* line = static_cast<decltype(type)*>(pixels) + pixel;
          const S* row = of_image + place;
          IDM_VECTOR_LOOP
          for (int64_t x = 0; x < width; ++x)
            for (int64_t j = 0; j < r; ++j) line[x * r + j] = Store<decltype(type)>::of(row[j * plane + x]);
        });
      }
    });
  });
}

// f(channel, how many): N channels at a time, then one.
template <int N>
struct Together {
  static constexpr int value = N;
};

template <int N, class Function>
IDM_INLINE void over_channels(int64_t channels, const Function& f) {
  int64_t c = 0;
  for (; c + N <= channels; c += N) f(c, Together<N>{});
  for (; c < channels; ++c) f(c, Together<1>{});
}

// out[p] = Σ over the strips of parts[strip][p], in order.
template <class S>
void add_up(const double* parts, int64_t strips, int64_t count, S* out) {
  for (int64_t p = 0; p < count; ++p) {
    double sum = 0;
    for (int64_t strip = 0; strip < strips; ++strip) sum += parts[strip * count + p];
    out[p] = static_cast<S>(sum);
  }
}

// The three images in the order of the features.
template <class S>
struct Images {
  Scratch<S> rows;
  int64_t step;  // from one to the next

  Images(const Rows& of, ParallelFor loop) : rows(3 * of.a.images * of.length), step(of.a.images * of.length) {
    unshuffle(of, {of.a.z, of.a.gz, of.a.aty}, +rows, loop);
  }

  const S* at(int which, const Strip& strip) { return rows + which * step + strip.image; }
};

template <class S>
IDM_INLINE Spread<S> spread_of(const InjectArguments& a, int64_t channel) {
  const S* weight = static_cast<const S*>(a.weight) + 3 * channel;
  return {weight[0], weight[1], weight[2]};
}

template <class S>
IDM_INLINE S bias_of(const InjectArguments& a, int64_t channel) {
  return static_cast<const S*>(a.bias)[channel];
}

}  // namespace

void inject_read(const InjectArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Rows rows(a);
    const Source<S> features{a.dtype, a.h};
    const S* weight = static_cast<const S*>(a.weight);
    const S bias = *static_cast<const S*>(a.bias);
    Scratch<S> image(a.images * rows.length);
    parallel(loop, rows.count(), 1, [&](int64_t index) {
      const Strip strip(rows, index);
      const int64_t n = strip.n;
      Scratch<S> room(4 * n);
      S* z = image + strip.image;
      for (int64_t k = 0; k < n; ++k) z[k] = bias;
      over_channels<4>(a.channels, [&](int64_t c, auto together) {
        constexpr int COUNT = decltype(together)::value;
        const S* h[COUNT];
        for (int i = 0; i < COUNT; ++i) h[i] = features.read(strip.at(c + i), n, room + i * n);
        if constexpr (COUNT == 4) {
          const S *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
          IDM_VECTOR_LOOP
          for (int64_t k = 0; k < n; ++k)
            z[k] += weight[c] * h0[k] + weight[c + 1] * h1[k] + (weight[c + 2] * h2[k] + weight[c + 3] * h3[k]);
        } else {
          const S* h0 = h[0];
          IDM_VECTOR_LOOP
          for (int64_t k = 0; k < n; ++k) z[k] += weight[c] * h0[k];
        }
      });
    });
    shuffle(rows, +image, {a.z_out}, loop);
  });
}

namespace {

// dh = w·dz + more, which may be null; gives Σ h·dz.
template <class S, class More>
IDM_INLINE double read_gradient(const S* dz, const S* h, S w, More more, int64_t n, S* dh) {
  constexpr int SIDE_BY_SIDE = 2, STEP = SIDE_BY_SIDE * LANES<S>;
  constexpr bool THROUGH = !std::is_same_v<More, std::nullptr_t>;
  WideSum<S> products;
  double rest = 0;
  for (int64_t begin = 0; begin < n; begin += RUN * STEP) {
    const int64_t end = begin + RUN * STEP < n ? begin + RUN * STEP : n;
    Vector<S> run[SIDE_BY_SIDE];
    for (int i = 0; i < SIDE_BY_SIDE; ++i) run[i] = Vector<S>{};
    int64_t k = begin;
    for (; k + STEP <= end; k += STEP)
      for (int i = 0; i < SIDE_BY_SIDE; ++i) {
        const int64_t at = k + i * LANES<S>;
        const Vector<S> d = load_vector(dz + at);
        run[i] += d * load_vector(h + at);
        if constexpr (THROUGH) store_vector(dh + at, w * d + load_vector(more + at));
        else store_vector(dh + at, w * d);
      }
    products.add(run[0] + run[1]);
    for (; k < end; ++k) {
      rest += static_cast<double>(dz[k] * h[k]);
      if constexpr (THROUGH) dh[k] = w * dz[k] + more[k];
      else dh[k] = w * dz[k];
    }
  }
  return products.total() + rest;
}

}  // namespace

void inject_read_backward(const InjectArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Rows rows(a);
    const Source<S> features{a.dtype, a.h}, through{a.dtype, a.through};
    const Target<S> gradient{a.dtype, a.h_out};
    Scratch<S> image(a.images * rows.length);
    unshuffle(rows, {a.z}, +image, loop);
    Scratch<double> parts(rows.count() * (a.channels + 1));
    parallel(loop, rows.count(), 1, [&](int64_t index) {
      const Strip strip(rows, index);
      const int64_t n = strip.n;
      Scratch<S> room(2 * n), result_room(n);
      const S* dz = image + strip.image;
      double* sums = parts + index * (a.channels + 1);
      for (int64_t c = 0; c < a.channels; ++c) {
        const S w = static_cast<const S*>(a.weight)[c];
        const S *h = features.read(strip.at(c), n, room);
        const S* more = a.through != nullptr ? through.read(strip.at(c), n, room + n) : nullptr;
        S* dh = gradient.place(strip.at(c), result_room);
        sums[c] = more != nullptr ? read_gradient(dz, h, w, more, n, dh) : read_gradient(dz, h, w, nullptr, n, dh);
        gradient.write(strip.at(c), n, dh);
      }
      double of_bias[1] = {};
      sum_pairs(dz, dz, n, of_bias, [](auto d, auto, auto* terms) IDM_LAMBDA_INLINE { terms[0] += d; });
      sums[a.channels] = of_bias[0];
    });
    Scratch<S> all(a.channels + 1);
    add_up(parts, rows.count(), a.channels + 1, +all);
    std::memcpy(a.weight_out, all, a.channels * sizeof(S));
    *static_cast<S*>(a.bias_out) = all[a.channels];
  });
}

void inject_write(const InjectArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Rows rows(a);
    const Source<S> features{a.dtype, a.h};
    const Target<S> written{a.dtype, a.h_out};
    Images<S> images(rows, loop);
    parallel(loop, rows.count(), 1, [&](int64_t index) {
      const Strip strip(rows, index);
      const int64_t n = strip.n;
      Scratch<S> room(n), result_room(n);
      const S *z = images.at(0, strip), *gz = images.at(1, strip), *aty = images.at(2, strip);
      for (int64_t c = 0; c < a.channels; ++c) {
        const S* h = features.read(strip.at(c), n, room);
        S* out = written.place(strip.at(c), result_room);
        const Spread<S> w = spread_of<S>(a, c);
        const S bias = bias_of<S>(a, c);
        IDM_VECTOR_LOOP
        for (int64_t k = 0; k < n; ++k) out[k] = spread(h[k], z[k], gz[k], aty[k], w, bias);
        written.write(strip.at(c), n, out);
      }
    });
  });
}

namespace {

// CHANNELS rows of the gradient, d: their part in the gradients of the images, dimages, and in those of each channel's
// weights and bias, the four sums; `step` and `dstep` elements lie between the rows of the three images.
template <int CHANNELS, class S>
IDM_INLINE void write_gradient(const S* const* d, const S* weight, const S* images, int64_t step, S* dimages, int64_t dstep,
                               int64_t n, double* sums) {
  WideSum<S> wide[CHANNELS][4];
  for (int64_t begin = 0; begin < n; begin += RUN * LANES<S>) {
    const int64_t end = begin + RUN * LANES<S> < n ? begin + RUN * LANES<S> : n, whole = end - (end - begin) % LANES<S>;
    Vector<S> run[CHANNELS][4];
    for (int c = 0; c < CHANNELS; ++c)
      for (int s = 0; s < 4; ++s) run[c][s] = Vector<S>{};
    for (int64_t k = begin; k < whole; k += LANES<S>) {
      Vector<S> pixels[3], gradients[3];
      for (int s = 0; s < 3; ++s) {
        pixels[s] = load_vector(images + s * step + k);
        gradients[s] = load_vector(dimages + s * dstep + k);
      }
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) {
        const Vector<S> of_channel = load_vector(d[c] + k);
        for (int s = 0; s < 3; ++s) {
          gradients[s] += weight[3 * c + s] * of_channel;
          run[c][s] += of_channel * pixels[s];
        }
        run[c][3] += of_channel;
      }
      for (int s = 0; s < 3; ++s) store_vector(dimages + s * dstep + k, gradients[s]);
    }
    for (int c = 0; c < CHANNELS; ++c) {
      for (int64_t k = whole; k < end; ++k) {
        for (int s = 0; s < 3; ++s) {
          dimages[s * dstep + k] += weight[3 * c + s] * d[c][k];
          run[c][s][k - whole] += d[c][k] * images[s * step + k];
        }
        run[c][3][k - whole] += d[c][k];
      }
      for (int s = 0; s < 4; ++s) wide[c][s].add(run[c][s]);
    }
  }
  for (int c = 0; c < CHANNELS; ++c)
    for (int s = 0; s < 4; ++s) sums[4 * c + s] = wide[c][s].total();
}

// What write_gradient makes of all channels' rows; row(strip, channel, place, dv) brings one, in which a coupling sums its dv.
template <class S, class Row, class Done>
void write_gradients(const Rows& rows, Images<S>& images, ParallelFor loop, const Row& row, const Done& done, double* dv) {
  const InjectArguments& a = rows.a;
  const int64_t of_strip = 4 * a.channels + 1;
  const S* weight = static_cast<const S*>(a.weight);
  Scratch<S> dimages(3 * images.step);
  Scratch<double> parts(rows.count() * of_strip);
  parallel(loop, rows.count(), 1, [&](int64_t index) {
    constexpr int AT_ONCE = VECTOR_REGISTERS / 8;
    const Strip strip(rows, index);
    Scratch<S> room(2 * AT_ONCE * strip.n), gradients(3 * strip.n);
    double* sums = parts + index * of_strip;
    sums[of_strip - 1] = 0;
    for (int64_t k = 0; k < 3 * strip.n; ++k) gradients[k] = 0;
    over_channels<AT_ONCE>(a.channels, [&](int64_t c, auto together) {
      constexpr int COUNT = decltype(together)::value;
      const S* d[COUNT];
      for (int i = 0; i < COUNT; ++i) d[i] = row(strip, c + i, room + 2 * i * strip.n, sums[of_strip - 1]);
      write_gradient<COUNT>(d, weight + 3 * c, images.at(0, strip), images.step, +gradients, strip.n, strip.n, sums + 4 * c);
      for (int i = 0; i < COUNT; ++i) done(strip, c + i, d[i]);
    });
    for (int s = 0; s < 3; ++s)
      std::memcpy(dimages + s * images.step + strip.image, gradients + s * strip.n, strip.n * sizeof(S));
  });
  shuffle(rows, +dimages, {a.z_out, a.gz_out, a.aty_out}, loop);
  Scratch<double> all(of_strip);
  add_up(parts, rows.count(), of_strip, +all);
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int s = 0; s < 3; ++s) static_cast<S*>(a.weight_out)[3 * c + s] = static_cast<S>(all[4 * c + s]);
    static_cast<S*>(a.bias_out)[c] = static_cast<S>(all[4 * c + 3]);
  }
  if (dv != nullptr) *dv = all[of_strip - 1];
}

}  // namespace

void inject_write_backward(const InjectArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    using S = decltype(accumulate);
    const Rows rows(a);
    const Source<S> gradient{a.dtype, a.h};
    Images<S> images(rows, loop);
    const auto row = [&](const Strip& strip, int64_t c, S* room, double&) {
      return gradient.read(strip.at(c), strip.n, room);
    };
    write_gradients(rows, images, loop, row, [](const Strip&, int64_t, const S*) {}, nullptr);
  });
}

namespace {

// f(S{}, D{}): what features and streams are computed in.
template <class Function>
void with_stream(const InjectArguments& a, const Function& f) {
  with_accumulate(a.dtype, [&](auto number) {
    if (a.stream == Dtype::float64) f(number, double{});
    else f(number, float{});
  });
}

}  // namespace

void inject_couple(const InjectArguments& a, ParallelFor loop) {
  with_stream(a, [&](auto number, auto stream) {
    using S = decltype(number);
    using D = decltype(stream);
    const Rows rows(a);
    const Source<S> features{a.dtype, a.h};
    const D v = static_cast<D>(a.v);
    Images<S> images(rows, loop);
    parallel(loop, rows.count(), 1, [&](int64_t index) {
      const Strip strip(rows, index);
      const int64_t n = strip.n;
      Scratch<S> room(n);
      const S *z = images.at(0, strip), *gz = images.at(1, strip), *aty = images.at(2, strip);
      for (int64_t c = 0; c < a.channels; ++c) {
        const S* h = features.read(strip.at(c), n, room);
        const D* x2 = static_cast<const D*>(a.x2) + strip.at(c);
        D* y1 = static_cast<D*>(a.y1_out) + strip.at(c);
        const Spread<S> w = spread_of<S>(a, c);
        const S bias = bias_of<S>(a, c);
        IDM_VECTOR_LOOP
        for (int64_t k = 0; k < n; ++k)
          y1[k] = idm::couple(static_cast<D>(spread(h[k], z[k], gz[k], aty[k], w, bias)), x2[k], v);
      }
    });
  });
}

namespace {

// The gradient of both, with x2 given or recovered; x2_out may be y1, and dx2 d1.
template <bool RECOVER>
void coupled_gradient(const InjectArguments& a, ParallelFor loop) {
  with_stream(a, [&](auto number, auto stream) {
    using S = decltype(number);
    using D = decltype(stream);
    const Rows rows(a);
    const Source<S> features{a.dtype, a.h};
    const Target<S> gradient{a.dtype, a.h_out};
    const D v = static_cast<D>(a.v);
    Images<S> images(rows, loop);
    const auto row = [&](const Strip& strip, int64_t c, S* room, double& dv) {
      const int64_t at = strip.at(c);
      const S *z = images.at(0, strip), *gz = images.at(1, strip), *aty = images.at(2, strip);
      const S* h = features.read(at, strip.n, room + strip.n);
      const D *given = static_cast<const D*>(RECOVER ? a.y1 : a.x2) + at, *d1 = static_cast<const D*>(a.d1) + at;
      D *x2_out = RECOVER ? static_cast<D*>(a.x2_out) + at : nullptr, *dx2 = static_cast<D*>(a.dx2) + at;
      S* dF = gradient.place(at, room);
      const Spread<S> w = spread_of<S>(a, c);
      const S bias = bias_of<S>(a, c);
      double of_row[1];
      sum<D>(strip.n, of_row, [=](int64_t k, D* term) IDM_LAMBDA_INLINE {
        const D F = static_cast<D>(spread(h[k], z[k], gz[k], aty[k], w, bias));
        const D x2 = RECOVER ? idm::decouple(given[k], F, v) : given[k];
        const CoupleGradient<D> g = couple_gradient(d1[k], F, x2, v);
        if (RECOVER) x2_out[k] = x2;
        dF[k] = static_cast<S>(g.dF);
        dx2[k] = g.dx2;
        term[0] = g.dv;
      });
      dv += of_row[0];
      return static_cast<const S*>(dF);
    };
    const auto done = [&](const Strip& strip, int64_t c, const S* dF) { gradient.write(strip.at(c), strip.n, dF); };
    write_gradients(rows, images, loop, row, done, a.dv);
  });
}

}  // namespace

void inject_couple_backward(const InjectArguments& a, ParallelFor loop) { coupled_gradient<false>(a, loop); }
void inject_uncouple(const InjectArguments& a, ParallelFor loop) { coupled_gradient<true>(a, loop); }

}  // namespace idm::cpu::IDM_ISA
