// Elementary functions on one scalar, for C++ and CUDA alike.
//
// The float versions for the CPU are branch-free polynomials, so that a loop over them becomes vector
// code; the standard library's would stay scalar calls. Their polynomials are minimax fits of the
// function named beside them; each function states its error in units of the last place (ulp).
// Double goes to the standard library, CUDA to its own.
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

#if !defined(__CUDA_ARCH__)

namespace detail {

constexpr float kLog2e = 1.44269504f;
// ln 2 as a sum whose first part has trailing zeros: n * kLn2High is exact for |n| < 2^12.
constexpr float kLn2High = 0.693145752f;
constexpr float kLn2Low = 1.42860677e-6f;
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the significand.
constexpr float kRoundingShift = 12582912.0f;

// 2^n for -126 <= n <= 127.
AEFAST_HD float power_of_two(int32_t n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

struct Reduced {
  int32_t n;         // nearest integer to x / ln 2
  float expm1_rest;  // exp(x - n ln 2) - 1
};

AEFAST_HD Reduced reduce_exp(float x) {
  const float shifted = x * kLog2e + kRoundingShift;
  const float n = shifted - kRoundingShift;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
  float q = 1.38824890e-3f;
  q = q * r + 8.36669165e-3f;
  q = q * r + 4.16672054e-2f;
  q = q * r + 1.66665424e-1f;
  q = q * r + 4.99999981e-1f;
  return {static_cast<int32_t>(bits_of(shifted) - bits_of(kRoundingShift)), r + r * r * q};
}

}  // namespace detail

// 2 ulp; gradual underflow to 0 and overflow to infinity as exp has.
AEFAST_HD float exp(float x) {
  const float above = x < -104.0f ? -104.0f : x;
  const float clamped = above > 89.0f ? 89.0f : above;
  const detail::Reduced reduced = detail::reduce_exp(clamped);
  // Two factors: 2^n alone would over- or underflow before the product does.
  const int32_t half = reduced.n >> 1;
  const float value = (1.0f + reduced.expm1_rest) * detail::power_of_two(half);
  return value * detail::power_of_two(reduced.n - half);
}

// 2 ulp for x <= 88.
AEFAST_HD float expm1(float x) {
  const float above = x < -25.0f ? -25.0f : x;
  const float clamped = above > 88.0f ? 88.0f : above;
  const detail::Reduced reduced = detail::reduce_exp(clamped);
  const float scale = detail::power_of_two(reduced.n);
  return scale * reduced.expm1_rest + (scale - 1.0f);
}

// 3 ulp.
AEFAST_HD float tanh(float x) {
  const float t = expm1(-2.0f * std::fabs(x));
  return std::copysign(-t / (2.0f + t), x);
}

// log(1 + u) for 0 <= u <= 1, 2 ulp: 2 atanh(s) with s = u / (2 + u).
AEFAST_HD float log1p_unit(float u) {
  const float s = u / (2.0f + u);
  const float square = s * s;
  // (atanh(s) / s - 1) / s^2 on s <= 1/3
  float q = 1.40891710e-1f;
  q = q * square + 1.39803049e-1f;
  q = q * square + 2.00124545e-1f;
  q = q * square + 3.33331574e-1f;
  return 2.0f * (s + s * square * q);
}

// Phi(x), the distribution function of N(0, 1), and in `density_exp` exp(-x^2 / 2), of which the density
// is a multiple. 7 ulp for x >= -3; further down the rounding of x^2 / 2 grows it to 70 ulp at -12.
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  const float t = std::fabs(x) * 0.70710678f;
  density_exp = exp(-0.5f * x * x);
  // exp(t^2) erfc(t) in (t - 2.5) / (t + 2.5), on t <= 10; beyond, the factor above is 0.
  const float capped = t > 10.0f ? 10.0f : t;
  const float u = (capped - 2.5f) / (capped + 2.5f);
  float r = -5.73163332e-05f;
  r = r * u + 0.000210332276f;
  r = r * u + 0.000815995432f;
  r = r * u - 0.00263988821f;
  r = r * u - 0.003974204f;
  r = r * u + 0.0399222377f;
  r = r * u - 0.125035541f;
  r = r * u + 0.251713273f;
  r = r * u - 0.371736649f;
  r = r * u + 0.210806362f;
  const float tail = 0.5f * density_exp * r;
  return x < 0.0f ? tail : 1.0f - tail;
}

#else

AEFAST_HD float exp(float x) { return ::expf(x); }
AEFAST_HD float expm1(float x) { return ::expm1f(x); }
AEFAST_HD float tanh(float x) { return ::tanhf(x); }
AEFAST_HD float log1p_unit(float u) { return ::log1pf(u); }
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  density_exp = ::expf(-0.5f * x * x);
  return ::normcdff(x);
}

#endif

AEFAST_HD double exp(double x) { return ::exp(x); }
AEFAST_HD double expm1(double x) { return ::expm1(x); }
AEFAST_HD double tanh(double x) { return ::tanh(x); }
AEFAST_HD double log1p_unit(double u) { return ::log1p(u); }
AEFAST_HD double normal_cdf(double x, double& density_exp) {
  density_exp = ::exp(-0.5 * x * x);
  return 0.5 * ::erfc(-x * 0.70710678118654752440);
}

// 3 ulp; 0 where exp(-x) overflows.
template <typename T>
AEFAST_HD T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// log(1 + exp(x)), and x itself above `threshold`.
template <typename T>
AEFAST_HD T softplus(T x, T threshold) {
  const T magnitude = x < T(0) ? -x : x;
  const T positive_part = x < T(0) ? T(0) : x;
  return x > threshold ? x : positive_part + log1p_unit(exp(-magnitude));
}

}  // namespace aefast::elementary
