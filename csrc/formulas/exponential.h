// e^x and what is made of it. For float, polynomials without branches, which compilers turn into vector code; for double, the
// library's functions.
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

// e^x to one unit in the last place within [-87, 88]; beyond, e^-87 and e^88. NaN stays NaN.
IDM_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);  // the GPU has an instruction for most of it
#else
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
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

IDM_INLINE double exponential(double x) { return exp(x); }

template <class S>
IDM_INLINE S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}

#if defined(__CUDA_ARCH__)
// To two units in the last place, in two instructions.
template <>
IDM_INLINE float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + exponential(-x));
}
#endif

// The normal distribution at x: its density, and its cumulative distribution Φ(x) = (1 + erf(x/√2))/2.
template <class S>
struct Normal {
  S density, cumulative;
};

// Φ(−a) = e^(−a²/2)·R(a), with R(a) = erfcx(a/√2)/2 as t·p(t), t = 1/(1 + a/4), of relative error 8e-9.
IDM_INLINE Normal<float> normal(float x) {
  const float a = x < 0 ? -x : x;
  const float e = exponential(-0.5f * a * a);
  const float t = 1.0f / (1.0f + 0.25f * a);
  const float p =
      0.0997479041f + t * (0.0994925466f + t * (0.0955157929f + t * (0.0719991155f + t * (0.0866576654f + t * (
      0.0127105653f + t * (0.0284371959f + t * (0.0516514306f + t * (-0.0627918f + t * (0.0165795878f)))))))));
  const float tail = e * t * p;
  return {0.398942280f * e, x < 0 ? tail : 1.0f - tail};
}

IDM_INLINE Normal<double> normal(double x) {
  return {0.39894228040143267794 * exp(-0.5 * x * x), 0.5 * erfc(-0.70710678118654752440 * x)};
}

}  // namespace idm
