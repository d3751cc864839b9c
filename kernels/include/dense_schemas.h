// The schemas under which the compiled libraries register the dense layers' launchers.
//
// Shapes: x (M, K), weight (N, K), bias (N,), grad and saved (M, N). `activation` is what parse_activation takes.
// The second output of linear_act is act'(pre-activation), for save_derivative and an activation that stores
// it; `saved` is that derivative where it exists, nothing for identity, else the output. `needs` has bit 0 set if
// x's gradient is wanted, bit 1 weight's, bit 2 bias's.
// mlp: with save, one output and one derivative a layer; without, the last output alone.
#pragma once

#include <array>
#include <cstdint>

namespace aefast::dense {

constexpr std::array<const char*, 2> kLinearActSchemas = {
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_derivative) -> (Tensor, Tensor?)",

    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor? saved, str activation, int needs) "
    "-> (Tensor?, Tensor?, Tensor?)",
};

constexpr int64_t kNeedX = 1, kNeedWeight = 2, kNeedBias = 4;

constexpr std::array<const char*, 2> kMlpSchemas = {
    "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, bool save) -> (Tensor[], Tensor?[])",

    "mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] outputs, Tensor?[] derivatives, "
    "str[] activations, bool need_x, bool[] need_weights, bool[] need_biases) -> (Tensor?, Tensor?[], Tensor?[])",
};

}  // namespace aefast::dense
