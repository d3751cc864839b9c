// The schemas under which the compiled libraries register the dense layers' launchers.
//
// Shapes: x (M, K), weight (N, K), bias (N,) without gaps, grad and saved (M, N). The second output of
// linear_act is act'(pre-activation), for save_derivative and an activation that stores it; `saved` is that
// derivative where it exists, nothing for identity, else the output.
// mlp: with save, one output and one derivative a layer; without, the last output alone.
#pragma once

#include <array>

namespace aefast::dense {

constexpr std::array<const char*, 2> kLinearActSchemas = {
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, float negative_slope, float alpha, "
    "bool save_derivative) -> (Tensor, Tensor?)",

    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor? saved, str activation, "
    "float negative_slope, float alpha, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor?, Tensor?, Tensor?)",
};

constexpr std::array<const char*, 2> kMlpSchemas = {
    "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, float negative_slope, float alpha, "
    "bool save) -> (Tensor[], Tensor?[])",

    "mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] outputs, Tensor?[] derivatives, "
    "str[] activations, float negative_slope, float alpha, bool need_x, bool[] need_weights, bool[] need_biases) "
    "-> (Tensor?, Tensor?[], Tensor?[])",
};

}  // namespace aefast::dense
