// Elements of any type as vectors of what they are computed in. Included once per instruction set, as vector.h is.
#pragma once

#include <type_traits>

#include "vector.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {

// What elements are computed in: a vector of floats, or one double.
template <typename C>
struct LanesOf {
  using type = Floats;
  using words = Words;  // one a lane
  static constexpr int64_t count = kFloats;
};
template <>
struct LanesOf<double> {
  using type = double;
  using words = uint32_t;
  static constexpr int64_t count = 1;
};
template <typename T>
using Lanes = typename LanesOf<Accumulator<T>>::type;
template <typename T>
constexpr int64_t kLanes = LanesOf<Accumulator<T>>::count;

template <typename T>
AEFAST_HD Lanes<T> read_lanes(const T* from) {
  if constexpr (std::is_same_v<T, double>) {
    return *from;
  } else if constexpr (std::is_same_v<T, float>) {
    return read_floats(from);
  } else {
    float values[kFloats];
#pragma omp simd
    for (int lane = 0; lane < kFloats; ++lane) values[lane] = load(from[lane]);
    return read_floats(values);
  }
}

template <typename T>
AEFAST_HD void write_lanes(T* to, Lanes<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    *to = value;
  } else if constexpr (std::is_same_v<T, float>) {
    write_floats(to, value);
  } else {
    float values[kFloats];
    write_floats(values, value);
#pragma omp simd
    for (int lane = 0; lane < kFloats; ++lane) to[lane] = store<T>(values[lane]);
  }
}

// The first `valid` lanes; those read beyond them are 0.
template <typename T>
AEFAST_HD Lanes<T> read_lanes(const T* from, int64_t valid) {
  T padded[kLanes<T>] = {};
  for (int64_t lane = 0; lane < valid; ++lane) padded[lane] = from[lane];
  return read_lanes(padded);
}

template <typename T>
AEFAST_HD void write_lanes(T* to, Lanes<T> value, int64_t valid) {
  T padded[kLanes<T>];
  write_lanes(padded, value);
  for (int64_t lane = 0; lane < valid; ++lane) to[lane] = padded[lane];
}

// body(column) for whole vectors, body(column, valid) for the rest.
template <typename T, typename Body>
AEFAST_HD void for_lanes(int64_t cols, const Body& body) {
  const int64_t rest = cols % kLanes<T>;
  for (int64_t col = 0; col < cols - rest; col += kLanes<T>) body(col);
  if constexpr (kLanes<T> > 1)
    if (rest > 0) body(cols - rest, rest);
}

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Body>
void with_type(Scalar scalar, const Body& body) {
  switch (scalar) {
    case Scalar::float32: return body(TypeTag<float>());
    case Scalar::float64: return body(TypeTag<double>());
    case Scalar::bfloat16: return body(TypeTag<BFloat16>());
    case Scalar::float16: return body(TypeTag<Float16>());
  }
}

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
