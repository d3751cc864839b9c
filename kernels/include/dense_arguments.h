// The arguments of dense layers, of the shapes that dense_schemas.h says.
#pragma once

#include <string>
#include <vector>

#include "activation.h"
#include "arguments.h"

namespace aefast {

inline ActivationSpec activation_spec(const std::string& specification) {
  ActivationSpec spec;
  STD_TORCH_CHECK(parse_activation(specification, spec), "aefast: unknown activation ", specification);
  return spec;
}

// Of a list between commas, one a layer.
inline std::vector<ActivationSpec> activation_specs(const std::string& specifications, size_t layers) {
  const std::vector<std::string> activations = split_activations(specifications);
  STD_TORCH_CHECK(activations.size() == layers, "activations must have one entry a layer");
  std::vector<ActivationSpec> specs;
  specs.reserve(layers);
  for (const std::string& activation : activations) specs.push_back(activation_spec(activation));
  return specs;
}

// Of a layer of so many inputs.
inline void check_layer(const Tensor& weight, const OptionalTensor& bias, int64_t inputs, const Tensor& like) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  check_matrix("weight", weight, weight.size(0), inputs, like);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                            bias->scalar_type() == like.scalar_type()),
                  "bias must be (", weight.size(0), ",) of the dtype of the other tensors");
}

}  // namespace aefast
