#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dense.h"
#include "dense_schemas.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

std::vector<Tensor> mlp(Tensor x, std::vector<Tensor> weights, std::vector<OptionalTensor> biases,
                        String activations, bool save) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights must hold at least one layer");
  STD_TORCH_CHECK(biases.size() == count, "biases must have one entry a layer");
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  const std::vector<ActivationSpec> specs = activation_specs(activations, count);
  std::vector<LayerForward> layers;
  layers.reserve(count);
  std::vector<Tensor> outputs, derivatives;
  outputs.reserve(2 * count);
  int64_t inputs = x.size(1);
  for (size_t index = 0; index < count; ++index) {
    check_layer(weights[index], biases[index], inputs, x);
    inputs = weights[index].size(0);
    Matrix out, derivative;
    if (save || index + 1 == count) {
      outputs.push_back(new_matrix(x, x.size(0), inputs));
      out = matrix_of(outputs.back());
    }
    if (save && stores_derivative(specs[index].activation)) {
      derivatives.push_back(new_matrix(x, x.size(0), inputs));
      derivative = matrix_of(derivatives.back());
    }
    layers.push_back({specs[index], matrix_of(weights[index]), vector_of(biases[index]), out, derivative});
  }
  dense_forward(matrix_of(x), layers.data(), count);
  outputs.insert(outputs.end(), derivatives.begin(), derivatives.end());
  return outputs;
}

std::vector<Tensor> mlp_backward(Tensor grad, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> saved,
                                 String activations, String needs) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights must hold at least one layer");
  STD_TORCH_CHECK(needs.size() == 1 + 2 * count, "needs must have one entry for x and two a layer");
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  const std::vector<ActivationSpec> specs = activation_specs(activations, count);
  const auto stored = static_cast<size_t>(std::count_if(
      specs.begin(), specs.end(), [](const ActivationSpec& spec) { return stores_derivative(spec.activation); }));
  STD_TORCH_CHECK(saved.size() == count + stored, "saved must hold ", count + stored, " tensors");
  std::vector<Tensor> gradients;
  gradients.reserve(needs.size());
  const auto new_gradient = [&](size_t index, int64_t rows, int64_t cols) {
    if (needs[index] != '1') return Matrix();
    gradients.push_back(new_matrix(x, rows, cols));
    return matrix_of(gradients.back());
  };
  const Matrix x_gradient = new_gradient(0, x.size(0), x.size(1));
  std::vector<LayerBackward> layers;
  layers.reserve(count);
  size_t derivative = count;
  for (size_t index = 0; index < count; ++index) {
    const Tensor& weight = weights[index];
    const Tensor& input = index > 0 ? saved[index - 1] : x;
    const Tensor& values = stores_derivative(specs[index].activation) ? saved[derivative++] : saved[index];
    check_layer(weight, std::nullopt, input.size(1), x);
    check_matrix("saved", saved[index], x.size(0), weight.size(0), x);
    check_matrix("saved", values, x.size(0), weight.size(0), x);
    layers.push_back({specs[index], matrix_of(weight), matrix_of(input), matrix_of(values),
                      new_gradient(1 + index, weight.size(0), weight.size(1)), {}});
  }
  for (size_t index = 0; index < count; ++index)
    if (needs[1 + count + index] == '1') {
      gradients.push_back(new_vector(x, weights[index].size(0)));
      layers[index].bias_gradient = vector_of(gradients.back());
    }
  check_matrix("grad", grad, x.size(0), weights.back().size(0), x);
  dense_backward(matrix_of(grad), layers.data(), count, x_gradient);
  return gradients;
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
