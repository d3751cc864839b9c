#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"

namespace aefast::cpu {
namespace {

std::tuple<std::vector<Tensor>, std::vector<OptionalTensor>> mlp(Tensor x, std::vector<Tensor> weights,
                                                                 std::vector<OptionalTensor> biases,
                                                                 std::vector<std::string> activations, bool save) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights must hold at least one layer");
  STD_TORCH_CHECK(biases.size() == count && activations.size() == count,
                  "biases and activations must have one entry a layer");
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  std::vector<LayerForward> layers;
  layers.reserve(count);
  std::vector<Tensor> outputs;
  std::vector<OptionalTensor> derivatives;
  int64_t inputs = x.size(1);
  for (size_t index = 0; index < count; ++index) {
    check_layer(weights[index], biases[index], inputs, x);
    inputs = weights[index].size(0);
    const ActivationSpec spec = activation_spec(activations[index]);
    OptionalTensor out, derivative;
    if (save || index + 1 == count) {
      out = new_matrix(x, x.size(0), inputs);
      if (save && stores_derivative(spec.activation)) derivative = new_matrix(x, x.size(0), inputs);
      outputs.push_back(*out);
      derivatives.push_back(derivative);
    }
    layers.push_back({spec, matrix_of(weights[index]), vector_of(biases[index]), matrix_of(out), matrix_of(derivative)});
  }
  dense_forward(matrix_of(x), layers.data(), count);
  return {outputs, derivatives};
}

std::tuple<OptionalTensor, std::vector<OptionalTensor>, std::vector<OptionalTensor>> mlp_backward(
    Tensor grad, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> outputs,
    std::vector<OptionalTensor> derivatives, std::vector<std::string> activations, bool need_x,
    std::vector<bool> need_weights, std::vector<bool> need_biases) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && outputs.size() == count && derivatives.size() == count && activations.size() == count &&
                      need_weights.size() == count && need_biases.size() == count,
                  "outputs, derivatives, activations, need_weights and need_biases must have one entry a layer");
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  std::vector<OptionalTensor> weight_gradients(count), bias_gradients(count);
  std::vector<LayerBackward> layers;
  layers.reserve(count);
  const Tensor* input = &x;
  for (size_t index = 0; index < count; ++index) {
    const Tensor& weight = weights[index];
    check_layer(weight, std::nullopt, input->size(1), x);
    check_matrix("outputs", outputs[index], x.size(0), weight.size(0), x);
    const ActivationSpec spec = activation_spec(activations[index]);
    OptionalTensor saved = outputs[index];
    if (stores_derivative(spec.activation)) {
      saved = derivatives[index];
      STD_TORCH_CHECK(saved, "derivatives must be given for the activations that store one");
      check_matrix("derivatives", *saved, x.size(0), weight.size(0), x);
    }
    if (need_weights[index]) weight_gradients[index] = new_matrix(x, weight.size(0), weight.size(1));
    if (need_biases[index]) bias_gradients[index] = new_vector(x, weight.size(0));
    layers.push_back({spec, matrix_of(weight), matrix_of(*input), matrix_of(saved), matrix_of(weight_gradients[index]),
                      vector_of(bias_gradients[index])});
    input = &outputs[index];
  }
  check_matrix("grad", grad, x.size(0), input->size(1), x);
  OptionalTensor x_gradient;
  if (need_x) x_gradient = new_matrix(x, x.size(0), x.size(1));
  dense_backward(matrix_of(grad), layers.data(), count, matrix_of(x_gradient));
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
