// group_norm_silu and group_norm_silu_backward on the CPU, for NCHW and NHWC.
//
// NCHW: a group of an image is one run of memory; a thread takes a group through all passes while it is in the cache.
// NHWC: a thread takes a chunk of positions, whose sums stand side by side, one for each channel; the sums of all chunks are
// put together between the passes. Positions are handled by lines of several, so that few channels fill the registers too.
#include "../formulas/group_norm.h"

#include "convert.h"
#include "moments.h"

namespace idm::cpu::IDM_ISA {

namespace {

// Elements that are worked on while they are in the first cache.
constexpr int64_t RUN = 2048;

template <class S>
struct Norm {
  const GroupNormArguments& a;
  Source<S> x, dout;
  Target<S> out;
  const S *weight, *bias, *mean, *rstd;

  explicit Norm(const GroupNormArguments& arguments)
      : a(arguments),
        x{a.dtype, a.x},
        dout{a.dout_dtype, a.dout},
        out{a.out_dtype, a.out},
        weight(static_cast<const S*>(a.weight)),
        bias(static_cast<const S*>(a.bias)),
        mean(static_cast<const S*>(a.mean)),
        rstd(static_cast<const S*>(a.rstd)) {}

  int64_t channels_of_group() const { return a.channels / a.groups; }
  int64_t elements_of_group() const { return channels_of_group() * a.positions; }

  // Keeps a group's mean and reciprocal deviation; `mean_lost` is what rounding took from the mean.
  S keep_statistics(int64_t group_of_all, const Moments& m, double& mean_lost) const {
    const S rounded = static_cast<S>(m.mean), rstd_rounded = static_cast<S>(m.rstd(a.eps));
    static_cast<S*>(a.mean_out)[group_of_all] = rounded;
    static_cast<S*>(a.rstd_out)[group_of_all] = rstd_rounded;
    mean_lost = m.mean - static_cast<double>(rounded);
    return rstd_rounded;
  }
};

// each(begin, count) for runs of at most RUN elements of [begin, end).
template <class Each>
IDM_INLINE void over_runs(int64_t begin, int64_t end, const Each& each) {
  for (; begin < end; begin += RUN) each(begin, begin + RUN < end ? RUN : end - begin);
}

template <class S>
void forward_contiguous(const Norm<S>& norm, ParallelFor loop) {
  const GroupNormArguments& a = norm.a;
  const int64_t channels = norm.channels_of_group(), elements = norm.elements_of_group();
  parallel(loop, a.images * a.groups, elements < RUN ? RUN / (elements + 1) + 1 : 1, [&](int64_t group) {
    alignas(64) S room[RUN], result_room[RUN];
    const int64_t first = group * elements, first_channel = group % a.groups * channels;
    Moments of_group;
    over_runs(first, first + elements,
              [&](int64_t begin, int64_t count) { add_run(of_group, norm.x.read(begin, count, room), count); });
    double mean_lost;
    const S rstd = norm.keep_statistics(group, of_group, mean_lost), mean = static_cast<S>(of_group.mean);
    for (int64_t c = 0; c < channels; ++c) {
      const S scale = rstd * norm.weight[first_channel + c];
      const S bias = static_cast<S>(norm.bias[first_channel + c] - mean_lost * scale);
      over_runs(first + c * a.positions, first + (c + 1) * a.positions, [&](int64_t begin, int64_t count) {
        const S* x = norm.x.read(begin, count, room);
        S* result = norm.out.place(begin, result_room);
        if (a.silu) {
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < count; ++i) result[i] = silu(normalized(x[i], mean, scale, bias));
        } else {
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < count; ++i) result[i] = normalized(x[i], mean, scale, bias);
        }
        norm.out.write(begin, count, result_room);
      });
    }
  });
}

// The gradient before SiLU goes where dx will lie if that has the dtype of sums, else into scratch.
template <class S>
void backward_contiguous(const Norm<S>& norm, ParallelFor loop) {
  const GroupNormArguments& a = norm.a;
  const int64_t channels = norm.channels_of_group(), elements = norm.elements_of_group();
  Scratch<double> of_weight(a.images * a.channels), of_bias(a.images * a.channels);
  parallel(loop, a.images * a.groups, elements < RUN ? RUN / (elements + 1) + 1 : 1, [&](int64_t group) {
    alignas(64) S room[RUN], dout_room[RUN];
    Scratch<S> gradient_room(norm.out.is_exact() ? 0 : elements);
    const int64_t first = group * elements, first_channel = group % a.groups * channels;
    S* gradient = norm.out.place(first, gradient_room);
    const S mean = norm.mean[group], rstd = norm.rstd[group];
    double weighted_bias = 0, weighted_slope = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const S weight = norm.weight[first_channel + c], scale = rstd * weight, bias = norm.bias[first_channel + c];
      double sums[2] = {};
      over_runs(first + c * a.positions, first + (c + 1) * a.positions, [&](int64_t begin, int64_t count) {
        const S *x = norm.x.read(begin, count, room), *d = norm.dout.read(begin, count, dout_room);
        S* g = gradient + (begin - first);
        if (a.silu) {
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < count; ++i) g[i] = d[i] * silu_derivative(normalized(x[i], mean, scale, bias));
        } else {
          IDM_VECTOR_LOOP
          for (int64_t i = 0; i < count; ++i) g[i] = d[i];
        }
        sum_pairs(g, x, count, sums, [mean](auto of_output, auto value, auto* terms) IDM_LAMBDA_INLINE {
          terms[0] += of_output;
          terms[1] += of_output * (value - mean);
        });
      });
      of_bias[group * channels + c] = sums[0];
      of_weight[group * channels + c] = sums[1] * static_cast<double>(rstd);
      weighted_bias += sums[0] * static_cast<double>(weight);
      weighted_slope += sums[1] * static_cast<double>(weight);
    }
    const double r = static_cast<double>(rstd), n = static_cast<double>(elements);
    const S shift = static_cast<S>(r * weighted_bias / n), slope = static_cast<S>(r * r * r * weighted_slope / n);
    for (int64_t c = 0; c < channels; ++c) {
      const S scale = rstd * norm.weight[first_channel + c];
      over_runs(first + c * a.positions, first + (c + 1) * a.positions, [&](int64_t begin, int64_t count) {
        const S* x = norm.x.read(begin, count, room);
        S* g = gradient + (begin - first);
        IDM_VECTOR_LOOP
        for (int64_t i = 0; i < count; ++i) g[i] = norm_gradient(g[i], x[i], mean, scale, shift, slope);
        norm.out.write(begin, count, g);
      });
    }
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t image = 0; image < a.images; ++image) {
      weight += of_weight[image * a.channels + c];
      bias += of_bias[image * a.channels + c];
    }
    static_cast<S*>(a.weight_out)[c] = static_cast<S>(weight);
    static_cast<S*>(a.bias_out)[c] = static_cast<S>(bias);
  }
}

// How an image that lies as NHWC is cut: chunks of lines of `length` elements, the last of each kind shorter.
struct Lines {
  int64_t channels, length, chunk, elements;

  explicit Lines(const GroupNormArguments& a)
      : channels(a.channels), length(a.channels), elements(a.channels * a.positions) {
    if (channels < 256) length = 16 * channels * (channels < 16 ? 16 / channels : 1);
    chunk = (16384 + length - 1) / length * length;
  }

  int64_t chunks() const { return (elements + chunk - 1) / chunk; }
  int64_t end_of(int64_t which) const { return (which + 1) * chunk < elements ? (which + 1) * chunk : elements; }

  // each(begin in the image, count) for the lines of a chunk.
  template <class Each>
  IDM_INLINE void over_lines(int64_t which, const Each& each) const {
    const int64_t end = end_of(which);
    for (int64_t begin = which * chunk; begin < end; begin += length) each(begin, begin + length < end ? length : end - begin);
  }

  // line[j] = f(channel of j) for a whole line.
  template <class S, class Function>
  void fill(S* line, const Function& f) const {
    for (int64_t c = 0; c < channels; ++c) line[c] = static_cast<S>(f(c));
    repeat(line);
  }

  // What stands for the channels, once more for every position of the line.
  template <class S>
  void repeat(S* line) const {
    for (int64_t j = channels; j < length; ++j) line[j] = line[j - channels];
  }

  // of_channels[c] = the sum of a line's elements of channel c.
  template <class S>
  void fold(const S* line, double* of_channels) const {
    for (int64_t c = 0; c < channels; ++c) of_channels[c] = 0;
    for (int64_t begin = 0; begin < length; begin += channels)
      for (int64_t c = 0; c < channels; ++c) of_channels[c] += static_cast<double>(line[begin + c]);
  }
};

// Mean and Σ (x − mean)² of every group over a chunk of positions.
template <class S>
void chunk_moments(const Norm<S>& norm, const Lines& lines, int64_t image, int64_t chunk, Moments* of_groups) {
  const GroupNormArguments& a = norm.a;
  const int64_t offset = image * lines.elements, channels = norm.channels_of_group();
  const double count = static_cast<double>((lines.end_of(chunk) - chunk * lines.chunk) / a.channels * channels);
  Scratch<S> room(lines.length), sums(lines.length), squares(lines.length), guess(lines.length);
  Scratch<double> of_channels(lines.channels), squares_of_channels(lines.channels);
  const auto of_group = [&](const double* values, int64_t group) {
    double sum = 0;
    for (int64_t c = group * channels; c < (group + 1) * channels; ++c) sum += values[c];
    return sum;
  };
  lines.fill(+sums, [](int64_t) { return 0; });
  lines.over_lines(chunk, [&](int64_t begin, int64_t here) {
    const S* x = norm.x.read(offset + begin, here, room);
    S* sum = sums;
    IDM_VECTOR_LOOP
    for (int64_t j = 0; j < here; ++j) sum[j] += x[j];
  });
  lines.fold(+sums, +of_channels);
  for (int64_t g = 0; g < a.groups; ++g) {
    const S mean = static_cast<S>(of_group(of_channels, g) / count);
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) guess[c] = mean;
  }
  lines.repeat(+guess);
  lines.fill(+sums, [](int64_t) { return 0; });
  lines.fill(+squares, [](int64_t) { return 0; });
  lines.over_lines(chunk, [&](int64_t begin, int64_t here) {
    const S *x = norm.x.read(offset + begin, here, room), *around = guess;
    S *sum = sums, *square = squares;
    IDM_VECTOR_LOOP
    for (int64_t j = 0; j < here; ++j) {
      const S deviation = x[j] - around[j];
      sum[j] += deviation;
      square[j] += deviation * deviation;
    }
  });
  lines.fold(+sums, +of_channels);
  lines.fold(+squares, +squares_of_channels);
  for (int64_t g = 0; g < a.groups; ++g)
    of_groups[g] = Moments::around(static_cast<double>(guess[g * channels]), count, of_group(of_channels, g),
                                   of_group(squares_of_channels, g));
}

template <class S>
void forward_channels_last(const Norm<S>& norm, ParallelFor loop) {
  const GroupNormArguments& a = norm.a;
  const Lines lines(a);
  const int64_t chunks = lines.chunks(), channels = norm.channels_of_group();
  Scratch<Moments> of_chunks(chunks * a.groups);
  Scratch<S> means(lines.length), scales(lines.length), biases(lines.length);
  for (int64_t image = 0; image < a.images; ++image) {
    parallel(loop, chunks, 1, [&](int64_t chunk) { chunk_moments(norm, lines, image, chunk, of_chunks + chunk * a.groups); });
    for (int64_t g = 0; g < a.groups; ++g) {
      Moments m;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) m.merge(of_chunks[chunk * a.groups + g]);
      double mean_lost;
      const S rstd = norm.keep_statistics(image * a.groups + g, m, mean_lost);
      for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
        means[c] = static_cast<S>(m.mean);
        scales[c] = rstd * norm.weight[c];
        biases[c] = static_cast<S>(norm.bias[c] - mean_lost * scales[c]);
      }
    }
    lines.repeat(+means);
    lines.repeat(+scales);
    lines.repeat(+biases);
    parallel(loop, chunks, 1, [&](int64_t chunk) {
      Scratch<S> room(lines.length), result_room(lines.length);
      lines.over_lines(chunk, [&](int64_t begin, int64_t here) {
        const int64_t at = image * lines.elements + begin;
        const S *x = norm.x.read(at, here, room), *mean = means, *scale = scales, *bias = biases;
        S* result = norm.out.place(at, result_room);
        if (a.silu) {
          IDM_VECTOR_LOOP
          for (int64_t j = 0; j < here; ++j) result[j] = silu(normalized(x[j], mean[j], scale[j], bias[j]));
        } else {
          IDM_VECTOR_LOOP
          for (int64_t j = 0; j < here; ++j) result[j] = normalized(x[j], mean[j], scale[j], bias[j]);
        }
        norm.out.write(at, here, result_room);
      });
    });
  }
}

template <class S>
void backward_channels_last(const Norm<S>& norm, ParallelFor loop) {
  const GroupNormArguments& a = norm.a;
  const Lines lines(a);
  const int64_t chunks = lines.chunks(), channels = norm.channels_of_group();
  Scratch<double> of_bias(chunks * a.channels), of_weight(chunks * a.channels), bias_sums(a.channels), weight_sums(a.channels);
  Scratch<S> means(lines.length), scales(lines.length), biases(lines.length), shifts(lines.length), slopes(lines.length);
  Scratch<S> gradient_room(norm.out.is_exact() ? 0 : lines.elements);
  for (int64_t c = 0; c < a.channels; ++c) bias_sums[c] = weight_sums[c] = 0;
  for (int64_t image = 0; image < a.images; ++image) {
    const int64_t offset = image * lines.elements;
    const S *mean_of = norm.mean + image * a.groups, *rstd_of = norm.rstd + image * a.groups;
    S* gradient = norm.out.place(offset, gradient_room);
    lines.fill(+means, [&](int64_t c) { return mean_of[c / channels]; });
    lines.fill(+scales, [&](int64_t c) { return rstd_of[c / channels] * norm.weight[c]; });
    lines.fill(+biases, [&](int64_t c) { return norm.bias[c]; });
    parallel(loop, chunks, 1, [&](int64_t chunk) {
      Scratch<S> room(lines.length), dout_room(lines.length), sums(lines.length), products(lines.length);
      lines.fill(+sums, [](int64_t) { return 0; });
      lines.fill(+products, [](int64_t) { return 0; });
      lines.over_lines(chunk, [&](int64_t begin, int64_t here) {
        const S *x = norm.x.read(offset + begin, here, room), *d = norm.dout.read(offset + begin, here, dout_room);
        const S *mean = means, *scale = scales, *bias = biases;
        S *g = gradient + begin, *sum = sums, *product = products;
        if (a.silu) {
          IDM_VECTOR_LOOP
          for (int64_t j = 0; j < here; ++j) g[j] = d[j] * silu_derivative(normalized(x[j], mean[j], scale[j], bias[j]));
        } else {
          IDM_VECTOR_LOOP
          for (int64_t j = 0; j < here; ++j) g[j] = d[j];
        }
        IDM_VECTOR_LOOP
        for (int64_t j = 0; j < here; ++j) {
          sum[j] += g[j];
          product[j] += g[j] * (x[j] - mean[j]);
        }
      });
      lines.fold(+sums, of_bias + chunk * a.channels);
      lines.fold(+products, of_weight + chunk * a.channels);
    });
    for (int64_t g = 0; g < a.groups; ++g) {
      const double r = static_cast<double>(rstd_of[g]), n = static_cast<double>(norm.elements_of_group());
      double weighted_bias = 0, weighted_slope = 0;
      for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
        double bias = 0, weight = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          bias += of_bias[chunk * a.channels + c];
          weight += of_weight[chunk * a.channels + c];
        }
        bias_sums[c] += bias;
        weight_sums[c] += weight * r;
        weighted_bias += bias * static_cast<double>(norm.weight[c]);
        weighted_slope += weight * static_cast<double>(norm.weight[c]);
      }
      for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
        shifts[c] = static_cast<S>(r * weighted_bias / n);
        slopes[c] = static_cast<S>(r * r * r * weighted_slope / n);
      }
    }
    lines.repeat(+shifts);
    lines.repeat(+slopes);
    parallel(loop, chunks, 1, [&](int64_t chunk) {
      Scratch<S> room(lines.length);
      lines.over_lines(chunk, [&](int64_t begin, int64_t here) {
        const S* x = norm.x.read(offset + begin, here, room);
        const S *mean = means, *scale = scales, *shift = shifts, *slope = slopes;
        S* g = gradient + begin;
        IDM_VECTOR_LOOP
        for (int64_t j = 0; j < here; ++j) g[j] = norm_gradient(g[j], x[j], mean[j], scale[j], shift[j], slope[j]);
        norm.out.write(offset + begin, here, g);
      });
    });
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    static_cast<S*>(a.weight_out)[c] = static_cast<S>(weight_sums[c]);
    static_cast<S*>(a.bias_out)[c] = static_cast<S>(bias_sums[c]);
  }
}

}  // namespace

void group_norm_silu(const GroupNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    const Norm<decltype(accumulate)> norm(a);
    if (a.channels_last) forward_channels_last(norm, loop);
    else forward_contiguous(norm, loop);
  });
}

void group_norm_silu_backward(const GroupNormArguments& a, ParallelFor loop) {
  with_accumulate(a.dtype, [&](auto accumulate) {
    const Norm<decltype(accumulate)> norm(a);
    if (a.channels_last) backward_channels_last(norm, loop);
    else backward_contiguous(norm, loop);
  });
}

}  // namespace idm::cpu::IDM_ISA
