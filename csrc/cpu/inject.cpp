// The injector's two halves on the CPU, with their gradients: the features are read once.
//
// Work goes by strips: some lines of one image's features. For each i < r the images' lines y·r + i of a strip are unshuffled
// into r rows of scratch, one for each position j, in which an element stands where its features do; then all channels of the
// planes (i, j) pass over these rows.
#include "../formulas/injector.h"

#include <initializer_list>

#include "rows.h"
#include "vector.h"

namespace idm::cpu::IDM_ISA {

namespace {

constexpr int64_t STRIP = 512;  // elements, about; scratch rows stay in the first cache

// Elements over which sums run in a vector, before they go on in double.
template <class S>
constexpr int64_t RUN = 8 * LANES<S>;

template <class T>
struct Features {
  InjectArguments a;
  int64_t lines, strips;  // lines of a strip; strips of an image

  explicit Features(const InjectArguments& arguments) : a(arguments) {
    // So many lines that a strip is made of whole vectors, as far as the image has them.
    int64_t together = 16;
    while (together > 1 && a.width * (together / 2) % 16 == 0) together /= 2;
    lines = (STRIP / (a.width > 0 ? a.width : 1) + together) / together * together;
    if (lines > a.height) lines = a.height;
    strips = lines > 0 ? (a.height + lines - 1) / lines : 0;
  }

  int64_t count() const { return a.images * strips; }
};

// One strip: `n` elements of every plane.
template <class T>
struct Strip {
  const InjectArguments& a;
  int64_t image, first, lines, n;

  Strip(const Features<T>& f, int64_t index) : a(f.a), image(index / f.strips), first(index % f.strips * f.lines) {
    lines = a.height - first < f.lines ? a.height - first : f.lines;
    n = lines * a.width;
  }

  // Where plane (i, j) of channel c begins.
  template <class P>
  P* plane(P* features, int64_t c, int64_t i, int64_t j) const {
    return features + (((image * a.channels + c) * a.r + i) * a.r + j) * a.height * a.width + first * a.width;
  }

  // Line y of the strip, number i of the r image lines that belong to it.
  template <class P>
  P* line(P* pixels, int64_t y, int64_t i) const {
    return pixels + ((image * a.height + first + y) * a.r + i) * a.width * a.r;
  }
};

// rows[j·n + …] = the image's pixels at positions (i, j). R is r, where that is known when compiling, else 0.
template <int R, class T, class S>
void unshuffle(const Strip<T>& strip, const T* pixels, int64_t i, S* rows) {
  const int64_t width = strip.a.width, r = R ? R : strip.a.r;
  for (int64_t y = 0; y < strip.lines; ++y) {
    const T* line = strip.line(pixels, y, i);
    S* at = rows + y * width;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t j = 0; j < r; ++j) at[j * strip.n + x] = load(line[x * r + j]);
  }
}

template <int R, class T, class S>
void shuffle(const Strip<T>& strip, const S* rows, int64_t i, T* pixels) {
  const int64_t width = strip.a.width, r = R ? R : strip.a.r;
  for (int64_t y = 0; y < strip.lines; ++y) {
    T* line = strip.line(pixels, y, i);
    const S* at = rows + y * width;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t j = 0; j < r; ++j) line[x * r + j] = Store<T>::of(at[j * strip.n + x]);
  }
}

// f(T{}, S{}, integral r or 0) for the dtype and r of `a`.
template <int R>
struct Side {
  static constexpr int value = R;
};

template <class Function>
void with_types(const InjectArguments& a, const Function& f) {
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.r == 2) f(element, Accumulate<T>{}, Side<2>{});
    else if (a.r == 4) f(element, Accumulate<T>{}, Side<4>{});
    else f(element, Accumulate<T>{}, Side<0>{});
  });
}

// The sum over the lanes.
template <class S>
IDM_INLINE double total(Vector<S> v) {
  S lanes[LANES<S>];
  store_vector(lanes, v);
  double wide[LANES<S>];
  for (int lane = 0; lane < LANES<S>; ++lane) wide[lane] = lanes[lane];
  for (int half = LANES<S> / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) wide[lane] += wide[lane + half];
  return wide[0];
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

}  // namespace

void inject_read(const InjectArguments& a, ParallelFor loop) {
  with_types(a, [&](auto element, auto number, auto side) {
    using T = decltype(element);
    using S = decltype(number);
    constexpr int R = decltype(side)::value;
    const Features<T> features(a);
    const S* weight = static_cast<const S*>(a.weight);
    const S bias = *static_cast<const S*>(a.bias);
    parallel(loop, features.count(), 1, [&](int64_t index) {
      const Strip<T> strip(features, index);
      const int64_t n = strip.n;
      Scratch<S> rows(a.r * n), room(4 * n);
      for (int64_t i = 0; i < a.r; ++i) {
        for (int64_t j = 0; j < a.r; ++j) {
          S* z = rows + j * n;
          for (int64_t k = 0; k < n; ++k) z[k] = bias;
          int64_t c = 0;
          const auto row = [&](int64_t channel, int64_t place) {
            return read_row<S>(strip.plane(static_cast<const T*>(a.h), channel, i, j), n, room + place * n);
          };
          for (; c + 4 <= a.channels; c += 4) {
            const S *h0 = row(c, 0), *h1 = row(c + 1, 1), *h2 = row(c + 2, 2), *h3 = row(c + 3, 3);
            IDM_VECTOR_LOOP
            for (int64_t k = 0; k < n; ++k)
              z[k] += weight[c] * h0[k] + weight[c + 1] * h1[k] + (weight[c + 2] * h2[k] + weight[c + 3] * h3[k]);
          }
          for (; c < a.channels; ++c) {
            const S* h = row(c, 0);
            IDM_VECTOR_LOOP
            for (int64_t k = 0; k < n; ++k) z[k] += weight[c] * h[k];
          }
        }
        shuffle<R>(strip, +rows, i, static_cast<T*>(a.z_out));
      }
    });
  });
}

void inject_read_backward(const InjectArguments& a, ParallelFor loop) {
  with_types(a, [&](auto element, auto number, auto side) {
    using T = decltype(element);
    using S = decltype(number);
    constexpr int R = decltype(side)::value;
    const Features<T> features(a);
    const S* weight = static_cast<const S*>(a.weight);
    Scratch<double> parts(features.count() * (a.channels + 1));
    parallel(loop, features.count(), 1, [&](int64_t index) {
      const Strip<T> strip(features, index);
      const int64_t n = strip.n;
      Scratch<S> rows(a.r * n), room(3 * n);
      double* sums = parts + index * (a.channels + 1);
      for (int64_t c = 0; c <= a.channels; ++c) sums[c] = 0;
      for (int64_t i = 0; i < a.r; ++i) {
        unshuffle<R>(strip, static_cast<const T*>(a.z), i, +rows);
        double of_rows[1];
        sum<S>(a.r * n, of_rows, [&](int64_t k, S* term) IDM_LAMBDA_INLINE { term[0] = rows[k]; });
        sums[a.channels] += of_rows[0];
        for (int64_t c = 0; c < a.channels; ++c)
          for (int64_t j = 0; j < a.r; ++j) {
            const S *dz = rows + j * n, *h = read_row<S>(strip.plane(static_cast<const T*>(a.h), c, i, j), n, +room);
            T* out = strip.plane(static_cast<T*>(a.h_out), c, i, j);
            S* dh = row_for<S>(out, room + n);
            const S* more = nullptr;
            if (a.through != nullptr)
              more = read_row<S>(strip.plane(static_cast<const T*>(a.through), c, i, j), n, room + 2 * n);
            const S w = weight[c];
            for (int64_t begin = 0; begin < n; begin += RUN<S>) {
              const int64_t end = begin + RUN<S> < n ? begin + RUN<S> : n, whole = end - (end - begin) % LANES<S>;
              Vector<S> products = {};
              for (int64_t k = begin; k < whole; k += LANES<S>) {
                const Vector<S> d = load_vector(dz + k);
                products += d * load_vector(h + k);
                store_vector(dh + k, more != nullptr ? w * d + load_vector(more + k) : w * d);
              }
              for (int64_t k = whole; k < end; ++k) {
                products[k - whole] += dz[k] * h[k];
                dh[k] = w * dz[k] + (more != nullptr ? more[k] : S(0));
              }
              sums[c] += total<S>(products);
            }
            write_row(out, dh, n);
          }
      }
    });
    Scratch<S> all(a.channels + 1);
    add_up(parts, features.count(), a.channels + 1, +all);
    std::memcpy(a.weight_out, all, a.channels * sizeof(S));
    *static_cast<S*>(a.bias_out) = all[a.channels];
  });
}

void inject_write(const InjectArguments& a, ParallelFor loop) {
  with_types(a, [&](auto element, auto number, auto side) {
    using T = decltype(element);
    using S = decltype(number);
    constexpr int R = decltype(side)::value;
    const Features<T> features(a);
    const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
    parallel(loop, features.count(), 1, [&](int64_t index) {
      const Strip<T> strip(features, index);
      const int64_t n = strip.n;
      Scratch<S> rows(3 * a.r * n), room(2 * n);
      for (int64_t i = 0; i < a.r; ++i) {
        int64_t image = 0;
        for (const void* pixels : {a.z, a.gz, a.aty})
          unshuffle<R>(strip, static_cast<const T*>(pixels), i, rows + a.r * n * image++);
        for (int64_t c = 0; c < a.channels; ++c)
          for (int64_t j = 0; j < a.r; ++j) {
            const S *z = rows + j * n, *gz = z + a.r * n, *aty = gz + a.r * n;
            const S* h = read_row<S>(strip.plane(static_cast<const T*>(a.h), c, i, j), n, +room);
            T* to = strip.plane(static_cast<T*>(a.h_out), c, i, j);
            S* out = row_for<S>(to, room + n);
            const Spread<S> w{weight[3 * c], weight[3 * c + 1], weight[3 * c + 2]};
            const S shift = bias[c];
            IDM_VECTOR_LOOP
            for (int64_t k = 0; k < n; ++k) out[k] = spread(h[k], z[k], gz[k], aty[k], w, shift);
            write_row(to, out, n);
          }
      }
    });
  });
}

namespace {

// CHANNELS planes (i, j) of the gradient, d: their part in the gradients of the images, dimages, and in those of each
// channel's weights and bias, the four sums; `step` elements lie between the three images' rows.
template <int CHANNELS, class S>
IDM_INLINE void write_gradient(const S* const* d, const S* weight, const S* images, S* dimages, int64_t step, int64_t n,
                               double* sums) {
  for (int64_t begin = 0; begin < n; begin += RUN<S>) {
    const int64_t end = begin + RUN<S> < n ? begin + RUN<S> : n, whole = end - (end - begin) % LANES<S>;
    Vector<S> run[CHANNELS][4] = {};
    for (int64_t k = begin; k < whole; k += LANES<S>) {
      Vector<S> pixels[3], gradients[3];
      for (int s = 0; s < 3; ++s) {
        pixels[s] = load_vector(images + s * step + k);
        gradients[s] = load_vector(dimages + s * step + k);
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
      for (int s = 0; s < 3; ++s) store_vector(dimages + s * step + k, gradients[s]);
    }
    for (int c = 0; c < CHANNELS; ++c) {
      for (int64_t k = whole; k < end; ++k) {
        for (int s = 0; s < 3; ++s) {
          dimages[s * step + k] += weight[3 * c + s] * d[c][k];
          run[c][s][k - whole] += d[c][k] * images[s * step + k];
        }
        run[c][3][k - whole] += d[c][k];
      }
      for (int s = 0; s < 4; ++s) sums[4 * c + s] += total<S>(run[c][s]);
    }
  }
}

}  // namespace

void inject_write_backward(const InjectArguments& a, ParallelFor loop) {
  with_types(a, [&](auto element, auto number, auto side) {
    using T = decltype(element);
    using S = decltype(number);
    constexpr int R = decltype(side)::value, TOGETHER = VECTOR_REGISTERS / 8;
    const Features<T> features(a);
    const S* weight = static_cast<const S*>(a.weight);
    Scratch<double> parts(features.count() * a.channels * 4);
    parallel(loop, features.count(), 1, [&](int64_t index) {
      const Strip<T> strip(features, index);
      const int64_t n = strip.n, step = a.r * n;
      Scratch<S> images(3 * step), dimages(3 * step), room(TOGETHER * n);
      double* sums = parts + index * a.channels * 4;
      for (int64_t k = 0; k < 4 * a.channels; ++k) sums[k] = 0;
      for (int64_t i = 0; i < a.r; ++i) {
        int64_t image = 0;
        for (const void* pixels : {a.z, a.gz, a.aty})
          unshuffle<R>(strip, static_cast<const T*>(pixels), i, images + step * image++);
        for (int64_t k = 0; k < 3 * step; ++k) dimages[k] = 0;
        for (int64_t j = 0; j < a.r; ++j) {
          const S* d[TOGETHER];
          int64_t c = 0;
          const auto row = [&](int64_t channel, int64_t place) {
            return read_row<S>(strip.plane(static_cast<const T*>(a.h), channel, i, j), n, room + place * n);
          };
          for (; c + TOGETHER <= a.channels; c += TOGETHER) {
            for (int k = 0; k < TOGETHER; ++k) d[k] = row(c + k, k);
            write_gradient<TOGETHER>(d, weight + 3 * c, images + j * n, dimages + j * n, step, n, sums + 4 * c);
          }
          for (; c < a.channels; ++c) {
            d[0] = row(c, 0);
            write_gradient<1>(d, weight + 3 * c, images + j * n, dimages + j * n, step, n, sums + 4 * c);
          }
        }
        image = 0;
        for (void* pixels : {a.z_out, a.gz_out, a.aty_out})
          shuffle<R>(strip, dimages + step * image++, i, static_cast<T*>(pixels));
      }
    });
    Scratch<S> all(4 * a.channels);
    add_up(parts, features.count(), 4 * a.channels, +all);
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int s = 0; s < 3; ++s) static_cast<S*>(a.weight_out)[3 * c + s] = all[4 * c + s];
      static_cast<S*>(a.bias_out)[c] = all[4 * c + 3];
    }
  });
}

}  // namespace idm::cpu::IDM_ISA
