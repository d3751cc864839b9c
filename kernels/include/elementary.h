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

AEFAST_HD float expm1_nonpositive(float x) { return ::expm1f(x); }
AEFAST_HD float tanh(float x) { return ::tanhf(x); }
AEFAST_HD float softplus(float x, float threshold) { return x > threshold ? x : ::log1pf(::expf(x)); }

// sigmoid(x), and in `complement` 1 - sigmoid(x) without cancellation.
AEFAST_HD float sigmoid_and_complement(float x, float& complement) {
  const float e = ::expf(-::fabsf(x));
  const float large = 1.0f / (1.0f + e), small = e * large;
  complement = x < 0.0f ? large : small;
  return x < 0.0f ? small : large;
}

// Phi(x), the distribution function of N(0, 1), and in `density_exp` exp(-x^2 / 2), of which the density is a
// multiple.
AEFAST_HD float normal_cdf(float x, float& density_exp) {
  density_exp = ::expf(-0.5f * x * x);
#if defined(__CUDA_ARCH__)
  return ::normcdff(x);
#else
  return 0.5f * ::erfcf(-0.70710678f * x);
#endif
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

template <typename T>
AEFAST_HD T sigmoid(T x) {
  T complement;
  return sigmoid_and_complement(x, complement);
}

}  // namespace aefast::elementary
