// The dense layers' operators on the LibTorch stable ABI: the order in which matrix
// products and pointwise kernels run. What a backend supplies:
//
//   struct Backend {
//     struct Scope { explicit Scope(const Tensor&); };  // makes the tensor's device current
//     static void addmm(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b);
//     static void mm(const Tensor& out, const Tensor& a, const Tensor& b);
//     // values = act(values); derivative = act'(values before), or null. Same shape, contiguous.
//     static void activate(const Tensor& values, const Tensor* derivative, const ActivationSpec& spec);
//     // g = grad * act', bias_grad = column sums of g; each of g and bias_grad may be null. `saved` is the
//     // derivative or the output, null for identity. All (M, N) and contiguous; bias_grad (N,).
//     static void activation_gradient(const Tensor& grad, const Tensor* saved, const Tensor* g,
//                                     const Tensor* bias_grad, const ActivationSpec& spec);
//   };
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "dense_arguments.h"
#include "dense_schemas.h"
#include "tensors.h"

namespace aefast::dense {

template <typename Backend>
struct Operators {
  static std::tuple<Tensor, OptionalTensor> linear_act(const Tensor& x, const Tensor& weight,
                                                       const OptionalTensor& bias, const String& activation,
                                                       bool save_derivative) {
    const typename Backend::Scope scope(x);
    return layer(x, weight, bias, activation_spec(activation), save_derivative);
  }

  static std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> linear_act_backward(
      const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& saved, const String& activation,
      int64_t needs) {
    const typename Backend::Scope scope(x);
    LayerGradients gradients = layer_backward(grad, x, weight, saved, activation_spec(activation), needs & kNeedX,
                                              needs & kNeedWeight, needs & kNeedBias);
    return {gradients.x, gradients.weight, gradients.bias};
  }

  static std::vector<Tensor> mlp(const Tensor& x, const std::vector<Tensor>& weights,
                                 const std::vector<OptionalTensor>& biases, const String& specifications,
                                 bool save) {
    const size_t layers = weights.size();
    STD_TORCH_CHECK(layers > 0, "weights must hold at least one layer");
    STD_TORCH_CHECK(biases.size() == layers, "biases must have one entry a layer");
    const std::vector<ActivationSpec> specs = activation_specs(specifications, layers);
    const typename Backend::Scope scope(x);
    std::vector<Tensor> outputs, derivatives;
    Tensor hidden = x;
    for (size_t l = 0; l < layers; ++l) {
      auto [out, derivative] = layer(hidden, weights[l], biases[l], specs[l], save);
      hidden = out;
      if (save) {
        outputs.push_back(out);
        if (derivative) derivatives.push_back(*derivative);
      }
    }
    if (!save) outputs.push_back(hidden);
    outputs.insert(outputs.end(), derivatives.begin(), derivatives.end());
    return outputs;
  }

  static std::vector<Tensor> mlp_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& saved, const String& specifications,
                                          const String& needs) {
    const size_t layers = weights.size();
    const std::vector<ActivationSpec> specs = activation_specs(specifications, layers);
    STD_TORCH_CHECK(needs.size() == 1 + 2 * layers, "needs must have one entry for x and two a layer");
    size_t stored = layers;
    for (const ActivationSpec& spec : specs) stored += stores_derivative(spec.activation);
    STD_TORCH_CHECK(saved.size() == stored, "saved must hold ", stored, " tensors");
    const auto is_needed = [&](size_t index) { return needs[index] == '1'; };
    const typename Backend::Scope scope(x);
    // need_input[l]: x or a parameter of a layer below l wants a gradient.
    std::vector<bool> need_input(layers);
    bool needed = is_needed(0);
    for (size_t l = 0; l < layers; ++l) {
      need_input[l] = needed;
      needed = needed || is_needed(1 + l) || is_needed(1 + layers + l);
    }
    std::vector<OptionalTensor> gradients(1 + 2 * layers);
    OptionalTensor gradient = grad;
    for (size_t l = layers; l-- > 0 && gradient;) {
      OptionalTensor values;
      if (stores_derivative(specs[l].activation)) {
        values = saved[--stored];
      } else if (specs[l].activation != Activation::identity) {
        values = saved[l];
      }
      const Tensor& input = l > 0 ? saved[l - 1] : x;
      LayerGradients found = layer_backward(*gradient, input, weights[l], values, specs[l], need_input[l],
                                            is_needed(1 + l), is_needed(1 + layers + l));
      gradients[1 + l] = found.weight;
      gradients[1 + layers + l] = found.bias;
      gradient = found.x;
    }
    gradients[0] = is_needed(0) ? gradient : std::nullopt;
    std::vector<Tensor> wanted;
    for (const OptionalTensor& found : gradients)
      if (found) wanted.push_back(*found);
    return wanted;
  }

 private:
  struct LayerGradients {
    OptionalTensor x, weight, bias;
  };

  static std::tuple<Tensor, OptionalTensor> layer(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  const ActivationSpec& spec, bool save_derivative) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
    check_layer(weight, bias, x.size(1), x);
    Tensor out = empty(x, {x.size(0), weight.size(0)});
    if (bias) {
      Backend::addmm(out, *bias, x, transposed(weight));
    } else {
      Backend::mm(out, x, transposed(weight));
    }
    if (spec.activation == Activation::identity) return {out, std::nullopt};
    OptionalTensor derivative;
    if (save_derivative && stores_derivative(spec.activation)) derivative = empty(x, {x.size(0), weight.size(0)});
    Backend::activate(out, derivative ? &*derivative : nullptr, spec);
    return {out, derivative};
  }

  static LayerGradients layer_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& saved, const ActivationSpec& spec, bool need_x,
                                       bool need_weight, bool need_bias) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
    check_layer(weight, std::nullopt, x.size(1), x);
    const int64_t rows = x.size(0), cols = weight.size(0);
    const bool is_identity = spec.activation == Activation::identity;
    check_matrix("grad", grad, rows, cols, x);
    STD_TORCH_CHECK(is_identity || saved, "saved must be given for every activation but identity");

    LayerGradients gradients;
    if (need_bias) gradients.bias = empty(x, {cols});
    const Tensor* bias_gradient = need_bias ? &*gradients.bias : nullptr;
    Tensor g = as_contiguous(grad);
    if (is_identity) {
      if (need_bias) Backend::activation_gradient(g, nullptr, nullptr, bias_gradient, spec);
    } else if (need_x || need_weight || need_bias) {
      check_matrix("saved", *saved, rows, cols, x);
      const Tensor contiguous_saved = as_contiguous(*saved), contiguous_grad = g;
      if (need_x || need_weight) g = empty(x, {rows, cols});
      Backend::activation_gradient(contiguous_grad, &contiguous_saved, need_x || need_weight ? &g : nullptr,
                                   bias_gradient, spec);
    }
    if (need_x) {
      gradients.x = empty(x, {rows, x.size(1)});
      Backend::mm(*gradients.x, g, weight);
    }
    if (need_weight) {
      gradients.weight = empty(x, {cols, x.size(1)});
      Backend::mm(*gradients.weight, transposed(g), x);
    }
    return gradients;
  }
};

template <typename Backend>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("linear_act", TORCH_BOX(&Operators<Backend>::linear_act));
  library.impl("linear_act_backward", TORCH_BOX(&Operators<Backend>::linear_act_backward));
  library.impl("mlp", TORCH_BOX(&Operators<Backend>::mlp));
  library.impl("mlp_backward", TORCH_BOX(&Operators<Backend>::mlp_backward));
}

}  // namespace aefast::dense
