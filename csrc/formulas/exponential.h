// e^x and what is made of it, without branches, which compilers turn into vector code; only the normal distribution in double
// is the library's.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "portable.h"

namespace idm {

IDM_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

IDM_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

IDM_INLINE double double_of_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

IDM_INLINE int64_t bits_of_double(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x to one unit in the last place within [-87, 88]; beyond, e^-87 and e^88, as for NaN.
IDM_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);  // the GPU has an instruction for most of it
#else
  // The bounds as integers, in whose order floats of one sign stand: compilers make branches of two comparisons of floats.
  const int32_t upper = 0x42b00000, bits = static_cast<int32_t>(bits_of_float(x));
  const uint32_t lower = 0xc2ae0000u, below = static_cast<uint32_t>(bits < upper ? bits : upper);
  x = float_of_bits(below < lower ? below : lower);
  // Adding 1.5·2²³ rounds to an integer, which then stands in the lowest bits: x = n·ln 2 + r.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; the first times n is exact
  // e^r = 1 + r + r²·q(r); q is the polynomial with the smallest largest relative error on |r| ≤ ln 2/2.
  const float q =
      0.5f + r * (0.16666577756404877f + r * (0.04166685417294502f + r * (0.008363140746951103f + r * 0.0013901303755119443f)));
  const float scale = float_of_bits((bits_of_float(shifted) << 23) + 0x3f800000u);  // 2ⁿ: the shift leaves n alone
  return (1.0f + (r + r * r * q)) * scale;
#endif
}

// The same for double, within [-708, 709], with the first fourteen terms of e^r.
IDM_INLINE double exponential(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  const int64_t upper = 0x4086280000000000, bits = bits_of_double(x);
  const uint64_t lower = 0xc086200000000000u, below = static_cast<uint64_t>(bits < upper ? bits : upper);
  x = double_of_bits(below < lower ? below : lower);
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double q = 1.0 / 6227020800.0;
  q = 1.0 / 479001600.0 + r * q;
  q = 1.0 / 39916800.0 + r * q;
  q = 1.0 / 3628800.0 + r * q;
  q = 1.0 / 362880.0 + r * q;
  q = 1.0 / 40320.0 + r * q;
  q = 1.0 / 5040.0 + r * q;
  q = 1.0 / 720.0 + r * q;
  q = 1.0 / 120.0 + r * q;
  q = 1.0 / 24.0 + r * q;
  q = 1.0 / 6.0 + r * q;
  q = 0.5 + r * q;
  const double scale = double_of_bits((static_cast<uint64_t>(bits_of_double(shifted)) << 52) + 0x3ff0000000000000u);
  return (1.0 + (r + r * r * q)) * scale;
#endif
}

// 1 + e^-x: what the logistic function divides by.
template <class S>
IDM_INLINE S one_and_exponential(S x) {
  return S(1) + exponential(-x);
}

#if !defined(__CUDA_ARCH__)
// In two thirds of the operations. e^-x is taken as a power of two, 2^t with t = −x·log2(e), whose rounded factor costs |x|·2e-8 of
// it beside the polynomial's 1e-7: where x is large that is little of the sum, or (x < 0) of a quotient that is next to nothing.
template <>
IDM_INLINE float one_and_exponential(float x) {
  const int32_t upper = 0x42ae0000, bits = static_cast<int32_t>(bits_of_float(x));  // ±87 as integers; see `exponential`
  const uint32_t lower = 0xc2ae0000u, below = static_cast<uint32_t>(bits < upper ? bits : upper);
  x = float_of_bits(below < lower ? below : lower);
  // 1.5·2²³ + 127: the lowest bits are the integer next to t with the exponent's bias.
  const float shifted = x * -1.44269504f + 12583039.0f;
  const float f = x * -1.44269504f - (shifted - 12583039.0f);
  // 2^f with the smallest largest relative error on |f| ≤ 1/2.
  const float p =
      1.0f + f * (0.693146976f + f * (0.240222405f + f * (0.0555073503f + f * (0.00967161922f + f * 0.00132645907f))));
  return 1.0f + p * float_of_bits(bits_of_float(shifted) << 23);
}
#endif

template <class S>
IDM_INLINE S sigmoid(S x) {
  return S(1) / one_and_exponential(x);
}

#if defined(__CUDA_ARCH__)
// To two units in the last place, in two instructions.
template <>
IDM_INLINE float sigmoid(float x) {
  return __fdividef(1.0f, one_and_exponential(x));
}
#endif

// The normal distribution at x: its density, and its cumulative distribution Φ(x) = (1 + erf(x/√2))/2.
template <class S>
struct Normal {
  S density, cumulative;
};

// Φ(−a) = e^(−a²/2)·R(a), with R(a) = erfcx(a/√2)/2 as t·p(t), t = 1/(1 + a/4), of relative error 8e-9. Up to 1.5, where
// that would cost digits of Φ, it is 1/2 + x·c(x²), of error 3e-11.
IDM_INLINE Normal<float> normal(float x) {
  const float a = x < 0 ? -x : x, u = x * x;
  const float e = exponential(-0.5f * u);
  const float t = 1.0f / (1.0f + 0.25f * a);
  const float p =
      0.0997479041f + t * (0.0994925466f + t * (0.0955157929f + t * (0.0719991155f + t * (0.0866576654f + t * (
      0.0127105653f + t * (0.0284371959f + t * (0.0516514306f + t * (-0.0627918f + t * (0.0165795878f)))))))));
  const float tail = e * t * p;
  const float c =
      0.39894229f + u * (-0.066490382f + u * (0.0099735418f + u * (-0.0011872726f + u * (1.1533579e-4f + u * (-9.3482531e-6f +
      u * (6.1294025e-7f + u * -2.5336371e-8f))))));
  const float outside = x < 0 ? tail : 1.0f - tail, inside = 0.5f + x * c;
  return {0.398942280f * e, a < 1.5f ? inside : outside};
}

IDM_INLINE Normal<double> normal(double x) {
  return {0.39894228040143267794 * exp(-0.5 * x * x), 0.5 * erfc(-0.70710678118654752440 * x)};
}

}  // namespace idm
