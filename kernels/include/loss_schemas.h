// The schemas under which the compiled libraries register the launchers of losses.
//
// input and target are of one shape, dtype and layout: without gaps, and in the same order of dimensions. A gradient is
// of the input's dtype and layout, or of no elements if it is not wanted.
// reconstruction_loss: `kind` and `parameter` as in Loss of aefast/ops/_loss.py; the value, float32, or float64 for
// float64, is normalizer * Σ losses, of which with `root` the root is taken; the gradient is scale * the losses'
// derivative. `checked` makes numbers outside of [0, 1] where bce has none an error.
// reconstruction_loss_elements: the losses, in the value's dtype and the input's layout. Its gradient is normalizer *
// grad * the losses' derivative; grad in the value's dtype, a scalar or of the input's layout.
// linear_reconstruction_loss, which only the CPU has: the arguments as in aefast/ops/linear_reconstruction_loss.py, of any
// strides, and the elements of the reconstruction that exist at a time.
// pyramid_loss: input and target (B, C, H, W), contiguous or channels_last; `pyramid`, `penalty`, `parameter` and
// `factors` as in Form of aefast/ops/pyramid_loss.py. The samples' sums (B,) are float32, or float64 for float64; the
// gradient is that of their sum.
// loss_gradient: normalizer * grad * gradient; grad, in the value's dtype, is a scalar or (B,) for a gradient (B, ...),
// whose first dimension is then the outermost in memory.
#pragma once

#include <array>

namespace aefast::loss {

constexpr std::array<const char*, 3> kReconstructionLossSchemas = {
    "reconstruction_loss(Tensor input, Tensor target, str kind, float parameter, float normalizer, bool root, "
    "float scale, bool with_gradient, bool checked) -> (Tensor, Tensor)",

    "reconstruction_loss_elements(Tensor input, Tensor target, str kind, float parameter, bool checked) -> Tensor",

    "reconstruction_loss_backward(Tensor grad, Tensor input, Tensor target, str kind, float parameter, "
    "float normalizer) -> Tensor",
};

constexpr std::array<const char*, 1> kPyramidLossSchemas = {
    "pyramid_loss(Tensor input, Tensor target, str pyramid, str penalty, float parameter, float[] factors, "
    "bool needs_gradient) -> (Tensor, Tensor)",
};

constexpr std::array<const char*, 1> kLinearReconstructionLossSchemas = {
    "linear_reconstruction_loss(Tensor h, Tensor weight, Tensor? bias, Tensor target, str activation, str kind, "
    "float parameter, float normalizer, float scale, int needs, bool checked, int part_size) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
};

constexpr std::array<const char*, 1> kLossGradientSchemas = {
    "loss_gradient(Tensor gradient, Tensor grad, float normalizer) -> Tensor",
};

}  // namespace aefast::loss
