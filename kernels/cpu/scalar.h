// The element types of the CPU kernels.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace aefast::cpu {

using elementary::bits_of;
using elementary::float_of;

enum class Scalar : int { float32, float64, bfloat16, float16 };

constexpr int64_t size_of(Scalar scalar) {
  return scalar == Scalar::float64 ? 8 : scalar == Scalar::float32 ? 4 : 2;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type in which elements of T are computed and summed.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

AEFAST_HD double load(double value) { return value; }
AEFAST_HD float load(float value) { return value; }
AEFAST_HD float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
AEFAST_HD float load(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The product moves the exponent's bias from 15 to 127, and makes half's subnormals normal.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite));
}

template <typename T>
AEFAST_HD T store(Accumulator<T> x) {
  return static_cast<T>(x);
}
// Round to nearest, ties to even; a NaN stays a quiet NaN.
template <>
AEFAST_HD BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <>
AEFAST_HD Float16 store<Float16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Beside 1/2 a float's last place is 2^-24, half's smallest subnormal.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

}  // namespace aefast::cpu
