// The schemas under which the compiled libraries register the dense layers' launchers.
//
// Shapes: x (M, K), weight (N, K), bias (N,), grad and saved (M, N). `activation` is what parse_activation takes.
// The second output of linear_act is act'(pre-activation), for save_derivative and an activation that stores
// it; `saved` is that derivative where it exists, nothing for identity, else the output. `needs` has bit 0 set if
// x's gradient is wanted, bit 1 weight's, bit 2 bias's.
// penalized_linear_act: `penalty` is "l1" or "kl", the latter to `rate`; h (M, N), the value, a scalar, float32, or
// float64 for float64, and with `save` for "kl" the sums of h's columns (N,), of the value's dtype, and act' as above.
// The backward reads h for "l1" and the sums for "kl". Of the gradients of h and the value one may be absent, which stands
// for zeros.
// mlp: `activations` has one a layer, between commas; a list of so many strings would cost a short call more than its
// work. With save the result, and what the backward takes as `saved`, is one output a layer and then the derivatives
// of the layers that store one; without, the last output alone. `needs` has a 1 for each gradient that is wanted, else
// a 0, in the order in which the backward gives those wanted: of x, of the weights, of the biases.
#pragma once

#include <array>
#include <cstdint>

namespace aefast::dense {

constexpr std::array<const char*, 2> kLinearActSchemas = {
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_derivative) -> (Tensor, Tensor?)",

    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor? saved, str activation, int needs) "
    "-> (Tensor?, Tensor?, Tensor?)",
};

constexpr std::array<const char*, 2> kPenalizedLinearActSchemas = {
    "penalized_linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, str penalty, float rate, bool save) "
    "-> (Tensor, Tensor, Tensor?, Tensor?)",

    "penalized_linear_act_backward(Tensor? grad, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor? saved, "
    "Tensor? h, Tensor? sums, str activation, str penalty, float rate, int needs) -> (Tensor?, Tensor?, Tensor?)",
};

constexpr int64_t kNeedX = 1, kNeedWeight = 2, kNeedBias = 4;

constexpr std::array<const char*, 2> kMlpSchemas = {
    "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str activations, bool save) -> Tensor[]",

    "mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] saved, str activations, str needs) -> Tensor[]",
};

}  // namespace aefast::dense
