// Elementary functions on one scalar, for C++ and CUDA alike: the standard library's, and what it lacks.
// kernels/cpu/vector.h has the same names for vectors of floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// The CPU sources are compiled once per instruction set. A function that stays out of line would be
// merged across them by the linker, and a baseline machine would run AVX-512 code: always inline.
#if defined(__CUDACC__)
#define AEFAST_HD __host__ __device__ __forceinline__
#else
#define AEFAST_HD inline __attribute__((always_inline))
#endif

namespace aefast::elementary {

AEFAST_HD uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

AEFAST_HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename T>
AEFAST_HD T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// All bits where the first bit is set, else none.
AEFAST_HD uint32_t sign_mask(uint32_t word) { return static_cast<uint32_t>(static_cast<int32_t>(word) >> 31); }
AEFAST_HD float select_bits(uint32_t mask, float a, float b) { return mask != 0 ? a : b; }
AEFAST_HD float signed_float(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word)); }

AEFAST_HD void wide_product(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  // One instruction; of a 64-bit product the compiler makes two.
  high = ::__umulhi(a, b);
  low = a * b;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

AEFAST_HD float square_root(float x) { return ::sqrtf(x); }
AEFAST_HD double square_root(double x) { return ::sqrt(x); }

AEFAST_HD bool is_zero(float x) { return x == 0.0f; }
AEFAST_HD bool is_zero(double x) { return x == 0.0; }
AEFAST_HD float magnitude(float x) { return ::fabsf(x); }
AEFAST_HD double magnitude(double x) { return ::fabs(x); }
// The greater and the lesser of x and a limit; NaN if x is.
AEFAST_HD float at_least(float limit, float x) { return x < limit ? limit : x; }
AEFAST_HD double at_least(double limit, double x) { return x < limit ? limit : x; }
AEFAST_HD float at_most(float limit, float x) { return x > limit ? limit : x; }
AEFAST_HD double at_most(double limit, double x) { return x > limit ? limit : x; }
AEFAST_HD float log(float x) { return ::logf(x); }
AEFAST_HD double log(double x) { return ::log(x); }
// log(1 - x) for x <= 1.
AEFAST_HD float log_of_rest(float x) { return ::log1pf(-x); }
AEFAST_HD double log_of_rest(double x) { return ::log1p(-x); }
// x^exponent for x >= 0 and a positive exponent.
AEFAST_HD float power(float x, float exponent) { return ::powf(x, exponent); }
AEFAST_HD double power(double x, double exponent) { return ::pow(x, exponent); }

// 2^x for x <= 0.
AEFAST_HD float exp2_nonpositive(float x) { return ::exp2f(x); }
AEFAST_HD double exp2_nonpositive(double x) { return ::exp2(x); }

// 1 / x for x >= 1, and 1 / sqrt(x) for x > 0.
AEFAST_HD float reciprocal(float x) { return 1.0f / x; }
AEFAST_HD double reciprocal(double x) { return 1.0 / x; }
AEFAST_HD float reciprocal_root(float x) { return 1.0f / ::sqrtf(x); }
AEFAST_HD double reciprocal_root(double x) { return 1.0 / ::sqrt(x); }

AEFAST_HD float expm1_nonpositive(float x) { return ::expm1f(x); }
AEFAST_HD float tanh(float x) { return ::tanhf(x); }

// x / y to two spacings of the result, for y of ordinary size.
AEFAST_HD float quick_quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return ::__fdividef(x, y);
#else
  return x / y;
#endif
}

// log(1 + e) for 0 <= e <= 1, given s = e / (e + 2), without log1p's branches: it is 2 atanh(s), and
// (atanh(s) / s - 1) / s^2 on s <= 1/3 is a polynomial in s^2.
AEFAST_HD float twice_atanh(float s) {
  const float square = s * s;
  const float low = ::fmaf(2.00124545e-1f, square, 3.33331574e-1f), high = ::fmaf(1.40891710e-1f, square, 1.39803049e-1f);
  return 2.0f * ::fmaf(s * square, ::fmaf(high, square * square, low), s);
}

// log(1 + exp(x)), x itself above the threshold, to two spacings.
AEFAST_HD float softplus(float x, float threshold) {
  const float e = ::expf(-::fabsf(x));
  return x > threshold ? x : (x < 0.0f ? 0.0f : x) + twice_atanh(quick_quotient(e, e + 2.0f));
}

// sigmoid(x), and in `complement` 1 - sigmoid(x) without cancellation.
AEFAST_HD float sigmoid_and_complement(float x, float& complement) {
  const float e = ::expf(-::fabsf(x));
  const float large = 1.0f / (1.0f + e), small = e * large;
  complement = x < 0.0f ? large : small;
  return x < 0.0f ? small : large;
}

// Phi(x), the distribution function of N(0, 1), to 1e-7 absolute, and in `density_exp` exp(-x^2 / 2), of which the
// density is a multiple. The standard library's takes twice the instructions, with an exponential of its own.
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  density_exp = ::expf(-0.5f * x * x);
  // (1 - Phi(|x|)) / density_exp is a polynomial in u = |x| / (1 + 0.27 |x|). Its constant is exact, and u small where
  // it is the greater part: the polynomial's rounding errors hardly reach the result. From 13.25 on density_exp is 0.
  const float magnitude = ::fabsf(x), size = magnitude > 13.25f ? 13.25f : magnitude;
  const float u = quick_quotient(size, ::fmaf(0.27f, size, 1.0f)), u2 = u * u;
  const float low = ::fmaf(0.142285004f, u, -0.398942292f);
  const float middle = ::fmaf(1.58846425e-3f, u, -0.0270575937f);
  const float high = ::fmaf(-5.07874865e-5f, u, 3.30206472e-4f);
  const float tail = density_exp * ::fmaf(u, ::fmaf(::fmaf(high, u2, middle), u2, low), 0.5f);
  return x < 0.0f ? tail : 1.0f - tail;
}

AEFAST_HD double expm1_nonpositive(double x) { return ::expm1(x); }
AEFAST_HD double tanh(double x) { return ::tanh(x); }
AEFAST_HD double softplus(double x, double threshold) { return x > threshold ? x : ::log1p(::exp(x)); }
AEFAST_HD double sigmoid_and_complement(double x, double& complement) {
  const double e = ::exp(-::fabs(x));
  const double large = 1.0 / (1.0 + e), small = e * large;
  complement = x < 0.0 ? large : small;
  return x < 0.0 ? small : large;
}
AEFAST_HD double normal_cdf(double x, double& density_exp) {
  density_exp = ::exp(-0.5 * x * x);
  return 0.5 * ::erfc(-x * 0.70710678118654752440);
}

// log(1 + exp(-|x|)), and in `sigmoid` sigmoid(x).
AEFAST_HD float log1p_exp_and_sigmoid(float x, float& sigmoid) {
  const float e = ::expf(-::fabsf(x));
  // One division for both.
  const float inverse = quick_quotient(1.0f, (e + 1.0f) * (e + 2.0f));
  const float large = (e + 2.0f) * inverse;
  sigmoid = x < 0.0f ? e * large : large;
  return twice_atanh(e * ((e + 1.0f) * inverse));
}
AEFAST_HD double log1p_exp_and_sigmoid(double x, double& sigmoid) {
  const double e = ::exp(-::fabs(x)), large = 1.0 / (1.0 + e);
  sigmoid = x < 0.0 ? e * large : large;
  return ::log1p(e);
}

template <typename T>
AEFAST_HD T sigmoid(T x) {
  T complement;
  return sigmoid_and_complement(x, complement);
}

}  // namespace aefast::elementary
