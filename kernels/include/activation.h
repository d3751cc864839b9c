// The activations of the dense layers, for C++ and CUDA alike.
//
// Everything here is branch-free straight-line code on a T, which is a float, a double, or a vector of floats with
// their arithmetic; `select` and the elementary functions are found by T.
// The names are those of `ACTIVATIONS` in kernels/activation.py.
#pragma once

#include <charconv>
#include <limits>
#include <string>
#include <system_error>
#include <vector>

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

struct ActivationSpec {
  Activation activation;
  ActivationParameters<double> parameters;
};

// From a name, or for leaky_relu and elu "name:parameter"; false if it says neither.
inline bool parse_activation(const std::string& specification, ActivationSpec& spec) {
  const size_t colon = specification.find(':');
  const std::string name = specification.substr(0, colon);
  int code = 0;
  while (code < kActivationCount && name != kActivationNames[code]) ++code;
  if (code == kActivationCount) return false;
  spec = {static_cast<Activation>(code), {0.0, 0.0}};
  const bool has_parameter = spec.activation == Activation::leaky_relu || spec.activation == Activation::elu;
  if (has_parameter != (colon != std::string::npos)) return false;
  if (!has_parameter) return true;
  double parameter = -1.0;
  const char* const end = specification.data() + specification.size();
  const auto [stopped, error] = std::from_chars(specification.data() + colon + 1, end, parameter);
  (spec.activation == Activation::elu ? spec.parameters.alpha : spec.parameters.slope) = parameter;
  return error == std::errc() && stopped == end && parameter >= 0.0 && parameter <= std::numeric_limits<double>::max();
}

// The parts of a list between commas.
inline std::vector<std::string> split_activations(const std::string& specifications) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t comma; (comma = specifications.find(',', begin)) != std::string::npos; begin = comma + 1)
    parts.push_back(specifications.substr(begin, comma - begin));
  parts.push_back(specifications.substr(begin));
  return parts;
}

// Self-normalizing networks, Klambauer et al. 2017 (arXiv:1706.02515).
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSeluScale = 1.0507009873554804934193349852946;

constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluTanhCubic = 0.044715;

// Above this input softplus is the identity to rounding, as torch.nn.functional.softplus defines it.
constexpr double kSoftplusThreshold = 20.0;

// tanh's argument in gelu_tanh, twice over: 0.5 (1 + tanh(u)) = sigmoid(2 u).
template <typename T>
AEFAST_HD T gelu_tanh_argument(T x) {
  return T(2 * kSqrt2OverPi) * x * (T(kGeluTanhCubic) * (x * x) + T(1));
}

template <Activation A, typename T>
AEFAST_HD T activate(T x, ActivationParameters<T> p) {
  using namespace elementary;
  if constexpr (A == Activation::identity) {
    return x;
  } else if constexpr (A == Activation::relu) {
    return select(x < T(0), T(0), x);  // NaN stays NaN
  } else if constexpr (A == Activation::leaky_relu) {
    return select(x > T(0), x, x * p.slope);
  } else if constexpr (A == Activation::elu) {
    return select(x > T(0), x, p.alpha * expm1_nonpositive(x));
  } else if constexpr (A == Activation::selu) {
    return T(kSeluScale) * select(x > T(0), x, T(kSeluAlpha) * expm1_nonpositive(x));
  } else if constexpr (A == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (A == Activation::gelu) {
    T density_exp;
    return x * normal_cdf(x, density_exp);
  } else if constexpr (A == Activation::gelu_tanh) {
    return x * sigmoid(gelu_tanh_argument(x));
  } else if constexpr (A == Activation::tanh) {
    return tanh(x);
  } else if constexpr (A == Activation::sigmoid) {
    return sigmoid(x);
  } else {
    static_assert(A == Activation::softplus);
    return softplus(x, T(kSoftplusThreshold));
  }
}

// act'(x) given y = act(x), for the smooth and the leaky activations with !stores_derivative(A).
template <Activation A, typename T>
AEFAST_HD T derivative_from_output(T y, ActivationParameters<T> p) {
  using namespace elementary;
  static_assert(!stores_derivative(A));
  if constexpr (A == Activation::leaky_relu) {
    return select(y > T(0), T(1), p.slope);
  } else if constexpr (A == Activation::elu) {
    return select(y > T(0), T(1), y + p.alpha);
  } else if constexpr (A == Activation::selu) {
    return select(y > T(0), T(kSeluScale), y + T(kSeluScale * kSeluAlpha));
  } else if constexpr (A == Activation::tanh) {
    return T(1) - y * y;
  } else if constexpr (A == Activation::sigmoid) {
    return y * (T(1) - y);
  } else {
    static_assert(A == Activation::softplus);
    return -expm1_nonpositive(-y);  // sigmoid(x) = 1 - exp(-softplus(x))
  }
}

// upstream * act'(x), with act' from `saved`: the derivative where it is stored, else the output. relu selects
// instead of multiplying, so that an infinite upstream gradient of a dead unit gives 0, as torch has it.
template <Activation A, typename T>
AEFAST_HD T gradient(T upstream, T saved, ActivationParameters<T> p) {
  using namespace elementary;
  if constexpr (A == Activation::identity)
    return upstream;
  else if constexpr (A == Activation::relu)
    return select(saved <= T(0), T(0), upstream);
  else if constexpr (stores_derivative(A))
    return upstream * saved;
  else
    return upstream * derivative_from_output<A>(saved, p);
}

// act(x), and act'(x) into `derivative`, for the activations with stores_derivative(A).
template <Activation A, typename T>
AEFAST_HD T activate_with_derivative(T x, T& derivative) {
  using namespace elementary;
  static_assert(stores_derivative(A));
  if constexpr (A == Activation::silu) {
    T complement;
    const T s = sigmoid_and_complement(x, complement);
    derivative = s * (x * complement + T(1));
    return x * s;
  } else if constexpr (A == Activation::gelu) {
    T density_exp;
    const T cdf = normal_cdf(x, density_exp);
    derivative = x * T(kInvSqrt2Pi) * density_exp + cdf;
    return x * cdf;
  } else {
    T complement;
    const T s = sigmoid_and_complement(gelu_tanh_argument(x), complement);
    const T y = x * s, rest = y * complement;
    // In the tails rest is 0, and so is x times it, where x's cube would overflow.
    derivative = T(2 * kSqrt2OverPi) * (T(3 * kGeluTanhCubic) * x * (x * rest) + rest) + s;
    return y;
  }
}

}  // namespace aefast
