#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"

namespace aefast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, OptionalTensor> linear_act(Tensor x, Tensor weight, OptionalTensor bias, std::string activation,
                                              double negative_slope, double alpha, bool save_derivative) {
  const ActivationSpec spec = activation_spec(activation, negative_slope, alpha);
  const Tensor out = new_matrix(x, x.size(0), weight.size(0));
  OptionalTensor derivative;
  if (save_derivative && stores_derivative(spec.activation)) derivative = new_matrix(x, x.size(0), weight.size(0));
  dense_forward(spec, matrix_of(x), matrix_of(weight), data_or_null(bias), matrix_of(out),
                const_cast<void*>(data_or_null(derivative)));
  return {out, derivative};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> linear_act_backward(
    Tensor grad, Tensor x, Tensor weight, OptionalTensor saved, std::string activation, double negative_slope,
    double alpha, bool need_x, bool need_weight, bool need_bias) {
  const ActivationSpec spec = activation_spec(activation, negative_slope, alpha);
  OptionalTensor x_gradient, weight_gradient_, bias_gradient;
  if (need_bias) bias_gradient = new_vector(grad, grad.size(1));
  void* bias_sums = const_cast<void*>(data_or_null(bias_gradient));

  Tensor g = grad;
  const bool identity = spec.activation == Activation::identity;
  if (!identity || need_bias) {
    g = new_matrix(grad, grad.size(0), grad.size(1));
    activation_gradient(spec, matrix_of(grad), data_or_null(saved), matrix_of(g), bias_sums);
  }
  if (need_x) {
    x_gradient = new_matrix(x, x.size(0), x.size(1));
    data_gradient({Activation::identity, {}}, matrix_of(g), matrix_of(weight), nullptr, matrix_of(*x_gradient), nullptr);
  }
  if (need_weight) {
    weight_gradient_ = new_matrix(weight, weight.size(0), weight.size(1));
    weight_gradient(matrix_of(g), matrix_of(x), matrix_of(*weight_gradient_));
  }
  return {x_gradient, weight_gradient_, bias_gradient};
}

std::string instruction_set() { return pointwise().instruction_set; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : dense::kLinearActSchemas) m.def(schema);
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&linear_act));
  m.impl("linear_act_backward", TORCH_BOX(&linear_act_backward));
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace aefast::cpu
