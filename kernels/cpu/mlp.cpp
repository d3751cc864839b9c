#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"

namespace aefast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<std::vector<Tensor>, std::vector<OptionalTensor>> mlp(Tensor x, std::vector<Tensor> weights,
                                                                 std::vector<OptionalTensor> biases,
                                                                 std::vector<std::string> activations,
                                                                 double negative_slope, double alpha, bool save) {
  std::vector<Tensor> outputs;
  std::vector<OptionalTensor> derivatives;
  Tensor input = x;
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const ActivationSpec spec = activation_spec(activations[layer], negative_slope, alpha);
    const Tensor out = new_matrix(x, x.size(0), weights[layer].size(0));
    OptionalTensor derivative;
    if (save && stores_derivative(spec.activation)) derivative = new_matrix(x, out.size(0), out.size(1));
    dense_forward(spec, matrix_of(input), matrix_of(weights[layer]), data_or_null(biases[layer]), matrix_of(out),
                  const_cast<void*>(data_or_null(derivative)));
    if (!save) {
      outputs.clear();
      derivatives.clear();
    }
    outputs.push_back(out);
    derivatives.push_back(derivative);
    input = out;
  }
  return {outputs, derivatives};
}

std::tuple<OptionalTensor, std::vector<OptionalTensor>, std::vector<OptionalTensor>> mlp_backward(
    Tensor grad, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> outputs,
    std::vector<OptionalTensor> derivatives, std::vector<std::string> activations, double negative_slope, double alpha,
    bool need_x, std::vector<bool> need_weights, std::vector<bool> need_biases) {
  const int64_t layers = static_cast<int64_t>(weights.size());
  std::vector<OptionalTensor> weight_gradients(layers), bias_gradients(layers);
  const auto spec = [&](int64_t layer) { return activation_spec(activations[layer], negative_slope, alpha); };
  const auto saved = [&](int64_t layer) {
    return derivatives[layer] ? derivatives[layer]->data_ptr() : outputs[layer].data_ptr();
  };
  const auto bias_sums = [&](int64_t layer) -> void* {
    if (!need_biases[layer]) return nullptr;
    bias_gradients[layer] = new_vector(grad, weights[layer].size(0));
    return bias_gradients[layer]->data_ptr();
  };
  // The lowest layer that some gradient is asked of; below it nothing is computed.
  int64_t lowest = 0;
  while (!need_x && lowest < layers && !need_weights[lowest] && !need_biases[lowest]) ++lowest;

  // g is the gradient at layer's pre-activation.
  Tensor g = new_matrix(grad, grad.size(0), grad.size(1));
  if (lowest < layers)
    activation_gradient(spec(layers - 1), matrix_of(grad), saved(layers - 1), matrix_of(g), bias_sums(layers - 1));
  for (int64_t layer = layers - 1; layer >= lowest; --layer) {
    const Tensor& input = layer > 0 ? outputs[layer - 1] : x;
    if (need_weights[layer]) {
      weight_gradients[layer] = new_matrix(weights[layer], weights[layer].size(0), weights[layer].size(1));
      weight_gradient(matrix_of(g), matrix_of(input), matrix_of(*weight_gradients[layer]));
    }
    if (layer > lowest) {
      const Tensor below = new_matrix(grad, input.size(0), input.size(1));
      data_gradient(spec(layer - 1), matrix_of(g), matrix_of(weights[layer]), saved(layer - 1), matrix_of(below),
                    bias_sums(layer - 1));
      g = below;
    }
  }
  OptionalTensor x_gradient;
  if (need_x) {
    x_gradient = new_matrix(x, x.size(0), x.size(1));
    data_gradient({Activation::identity, {}}, matrix_of(g), matrix_of(weights[0]), nullptr, matrix_of(*x_gradient),
                  nullptr);
  }
  return {x_gradient, weight_gradients, bias_gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : dense::kMlpSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace aefast::cpu
