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

// 2^n for -126 <= n <= 127, 0 for n = -127.
AEFAST_HD float power_of_two(int32_t n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

struct Reduced {
  int32_t n;         // nearest integer to x / ln 2
  float expm1_rest;  // exp(x - n ln 2) - 1
};

// For |x| < 2^20; beyond, any values.
AEFAST_HD Reduced reduce_exp(float x) {
  const float shifted = x * kLog2e + kRoundingShift;
  const float n = shifted - kRoundingShift;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
  const float square = r * r;
  const float low = 1.66665424e-1f * r + 4.99999981e-1f;
  const float high = (1.38824890e-3f * r + 8.36669165e-3f) * r + 4.16672054e-2f;
  const float q = high * square + low;
  return {static_cast<int32_t>(bits_of(shifted) - bits_of(kRoundingShift)), r + square * q};
}

// min(x, limit) for x and limit >= 0, as integers: one instruction where the comparison of floats, which
// has NaN to consider, takes two. A NaN becomes `limit`.
AEFAST_HD float min_nonnegative(float x, float limit) {
  const int32_t bits = static_cast<int32_t>(bits_of(x)), limit_bits = static_cast<int32_t>(bits_of(limit));
  return float_of(static_cast<uint32_t>(bits < limit_bits ? bits : limit_bits));
}

}  // namespace detail

// exp_nonpositive(-kFlush) is 0.
constexpr float kFlush = 88.2f;

// For -kFlush <= x <= 0, 2 ulp; 0 below the smallest normal number.
AEFAST_HD float exp_nonpositive(float x) {
  const detail::Reduced reduced = detail::reduce_exp(x);
  return (1.0f + reduced.expm1_rest) * detail::power_of_two(reduced.n);
}

// For x <= 0, 2 ulp; any value for x > 0.
AEFAST_HD float expm1_nonpositive(float x) {
  const detail::Reduced reduced = detail::reduce_exp(x < -25.0f ? -25.0f : x);
  const float scale = detail::power_of_two(reduced.n);
  return scale * reduced.expm1_rest + (scale - 1.0f);
}

// 3 ulp.
AEFAST_HD float tanh(float x) {
  const float t = expm1_nonpositive(-2.0f * std::fabs(x));
  return std::copysign(-t / (2.0f + t), x);
}

// 3 ulp; 0 below the smallest normal number.
AEFAST_HD float sigmoid(float x) {
  const float magnitude = std::fabs(x);
  const float e = exp_nonpositive(magnitude > kFlush ? -kFlush : -magnitude);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// log(1 + exp(x)), 3 ulp; x itself above `threshold`.
AEFAST_HD float softplus(float x, float threshold) {
  const float magnitude = std::fabs(x);
  const float e = exp_nonpositive(magnitude > kFlush ? -kFlush : -magnitude);
  // log(1 + e) = 2 atanh(s), and (atanh(s) / s - 1) / s^2 on s <= 1/3 is a polynomial in s^2
  const float s = e / (2.0f + e);
  const float square = s * s;
  const float low = 2.00124545e-1f * square + 3.33331574e-1f;
  const float high = 1.40891710e-1f * square + 1.39803049e-1f;
  const float q = high * (square * square) + low;
  const float log1p = 2.0f * (s + s * square * q);
  return x > threshold ? x : (x < 0.0f ? 0.0f : x) + log1p;
}

// Phi(x), the distribution function of N(0, 1), to 2.2e-7 absolute (for NaN any value), and in `density_exp`
// exp(-x^2 / 2), of which the density is a multiple.
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  const float w = 1.0f / (1.0f + 0.28f * std::fabs(x));
  density_exp = exp_nonpositive(-0.5f * detail::min_nonnegative(x * x, 2.0f * kFlush));
  // (1 - Phi(|x|)) / exp(-x^2 / 2) = w P(w)
  const float w2 = w * w;
  const float low = 0.0662296543f * w + 0.116729106f;
  const float middle = -0.240669046f * w + 0.271971992f;
  const float high = -0.106328501f * w + 0.392066785f;
  const float tail = density_exp * w * ((high * w2 + middle) * w2 + low);
  return x < 0.0f ? tail : 1.0f - tail;
}

#else

AEFAST_HD float expm1_nonpositive(float x) { return ::expm1f(x); }
AEFAST_HD float tanh(float x) { return ::tanhf(x); }
AEFAST_HD float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
AEFAST_HD float softplus(float x, float threshold) { return x > threshold ? x : ::log1pf(::expf(x)); }
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  density_exp = ::expf(-0.5f * x * x);
  return ::normcdff(x);
}

#endif

AEFAST_HD double expm1_nonpositive(double x) { return ::expm1(x); }
AEFAST_HD double tanh(double x) { return ::tanh(x); }
AEFAST_HD double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
AEFAST_HD double softplus(double x, double threshold) { return x > threshold ? x : ::log1p(::exp(x)); }
AEFAST_HD double normal_cdf(double x, double& density_exp) {
  density_exp = ::exp(-0.5 * x * x);
  return 0.5 * ::erfc(-x * 0.70710678118654752440);
}

}  // namespace aefast::elementary
