// The activations of the dense layers, for C++ and CUDA alike.
//
// Everything here is branch-free straight-line code on one scalar, so that a C++ compiler turns a
// plain loop over it into vector code of whatever width the translation unit is compiled for.
// The names are those of `ACTIVATIONS` in kernels/activation.py.
#pragma once

#include <string>

#include "elementary.h"

namespace aefast {

enum class Activation : int {
  identity,
  relu,
  leaky_relu,
  elu,
  selu,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  sigmoid,
  softplus,
};

constexpr const char* kActivationNames[] = {"identity", "relu",      "leaky_relu", "elu",     "selu",    "silu",
                                            "gelu",     "gelu_tanh", "tanh",       "sigmoid", "softplus"};
constexpr int kActivationCount = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

// False if there is no such activation.
inline bool activation_named(const std::string& name, Activation& activation) {
  for (int code = 0; code < kActivationCount; ++code) {
    if (name == kActivationNames[code]) {
      activation = static_cast<Activation>(code);
      return true;
    }
  }
  return false;
}

// silu and the gelus are not monotonic: their derivative is no function of their output, so the
// forward stores it. The other derivatives are computed from the output.
AEFAST_HD constexpr bool stores_derivative(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu || activation == Activation::gelu_tanh;
}

// `slope` is leaky_relu's negative slope, `alpha` is elu's; both at least 0, which keeps these
// activations monotonic and their derivatives functions of the output.
template <typename T>
struct ActivationParameters {
  T slope;
  T alpha;
};

// Self-normalizing networks, Klambauer et al. 2017 (arXiv:1706.02515).
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSeluScale = 1.0507009873554804934193349852946;

constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;

// Above this input softplus is the identity to rounding, as torch.nn.functional.softplus defines it.
constexpr double kSoftplusThreshold = 20.0;

template <typename T>
AEFAST_HD T gelu_tanh_inner(T x) {
  return elementary::tanh(T(kSqrt2OverPi) * x * (T(1) + T(kGeluTanhCubic) * x * x));
}

template <Activation A, typename T>
AEFAST_HD T activate(T x, ActivationParameters<T> p) {
  if constexpr (A == Activation::identity) {
    return x;
  } else if constexpr (A == Activation::relu) {
    return x < T(0) ? T(0) : x;  // NaN stays NaN
  } else if constexpr (A == Activation::leaky_relu) {
    return x > T(0) ? x : x * p.slope;
  } else if constexpr (A == Activation::elu) {
    return x > T(0) ? x : p.alpha * elementary::expm1_nonpositive(x);
  } else if constexpr (A == Activation::selu) {
    return T(kSeluScale) * (x > T(0) ? x : T(kSeluAlpha) * elementary::expm1_nonpositive(x));
  } else if constexpr (A == Activation::silu) {
    return x * elementary::sigmoid(x);
  } else if constexpr (A == Activation::gelu) {
    T density_exp;
    return x * elementary::normal_cdf(x, density_exp);
  } else if constexpr (A == Activation::gelu_tanh) {
    return T(0.5) * x * (T(1) + gelu_tanh_inner(x));
  } else if constexpr (A == Activation::tanh) {
    return elementary::tanh(x);
  } else if constexpr (A == Activation::sigmoid) {
    return elementary::sigmoid(x);
  } else {
    static_assert(A == Activation::softplus);
    return elementary::softplus(x, T(kSoftplusThreshold));
  }
}

// act'(x) given y = act(x), for the smooth and the leaky activations with !stores_derivative(A).
template <Activation A, typename T>
AEFAST_HD T derivative_from_output(T y, ActivationParameters<T> p) {
  static_assert(!stores_derivative(A));
  if constexpr (A == Activation::leaky_relu) {
    return y > T(0) ? T(1) : p.slope;
  } else if constexpr (A == Activation::elu) {
    return y > T(0) ? T(1) : y + p.alpha;
  } else if constexpr (A == Activation::selu) {
    return y > T(0) ? T(kSeluScale) : y + T(kSeluScale * kSeluAlpha);
  } else if constexpr (A == Activation::tanh) {
    return T(1) - y * y;
  } else if constexpr (A == Activation::sigmoid) {
    return y * (T(1) - y);
  } else {
    static_assert(A == Activation::softplus);
    return -elementary::expm1_nonpositive(-y);  // sigmoid(x) = 1 - exp(-softplus(x))
  }
}

// upstream * act'(x), with act' from `saved`: the derivative where it is stored, else the output. relu selects
// instead of multiplying, so that an infinite upstream gradient of a dead unit gives 0, as torch has it.
template <Activation A, typename T>
AEFAST_HD T gradient(T upstream, T saved, ActivationParameters<T> p) {
  if constexpr (A == Activation::identity)
    return upstream;
  else if constexpr (A == Activation::relu)
    return saved <= T(0) ? T(0) : upstream;
  else if constexpr (stores_derivative(A))
    return upstream * saved;
  else
    return upstream * derivative_from_output<A>(saved, p);
}

// act(x), and act'(x) into `derivative`, for the activations with stores_derivative(A).
template <Activation A, typename T>
AEFAST_HD T activate_with_derivative(T x, T& derivative) {
  static_assert(stores_derivative(A));
  if constexpr (A == Activation::silu) {
    const T s = elementary::sigmoid(x);
    derivative = s + x * s * (T(1) - s);
    return x * s;
  } else if constexpr (A == Activation::gelu) {
    T density_exp;
    const T cdf = elementary::normal_cdf(x, density_exp);
    derivative = cdf + x * T(kInvSqrt2Pi) * density_exp;
    return x * cdf;
  } else {
    const T square = x * x;
    const T t = gelu_tanh_inner(x);
    const T slope = T(kSqrt2OverPi) * (T(1) + T(3 * kGeluTanhCubic) * square);
    derivative = T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * slope;
    return T(0.5) * x * (T(1) + t);
  }
}

}  // namespace aefast
