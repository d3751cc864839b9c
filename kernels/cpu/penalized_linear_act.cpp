#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "dense.h"
#include "dense_schemas.h"

namespace aefast::cpu {
namespace {

// Whether the activity is the sum of the outputs' magnitudes, and not those of their columns.
bool is_of_magnitudes(const std::string& penalty) {
  STD_TORCH_CHECK(penalty == "l1" || penalty == "kl", "aefast: unknown penalty ", penalty);
  return penalty == "l1";
}

// body(pointer to the elements of `accumulators`, as what they are)
template <typename Body>
auto with_accumulators(const Tensor& accumulators, const Body& body) {
  void* const data = accumulators.mutable_data_ptr();
  return scalar_of(accumulators) == Scalar::float64 ? body(static_cast<double*>(data)) : body(static_cast<float*>(data));
}

std::tuple<Tensor, Tensor, OptionalTensor> penalized_linear_act(Tensor x, Tensor weight, OptionalTensor bias,
                                                                std::string activation, std::string penalty,
                                                                bool save_derivative) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, bias, x.size(1), x);
  const ActivationSpec spec = activation_spec(activation);
  const bool of_magnitudes = is_of_magnitudes(penalty);
  const int64_t rows = x.size(0), cols = weight.size(0);
  const Tensor h = new_matrix(x, rows, cols), sums = new_sums(x, cols);
  OptionalTensor derivative;
  if (save_derivative && stores_derivative(spec.activation)) derivative = new_matrix(x, rows, cols);
  LayerForward layer{spec, matrix_of(weight), vector_of(bias), matrix_of(h), matrix_of(derivative)};
  dense_forward(matrix_of(x), &layer, 1, {vector_of(sums), of_magnitudes});
  if (!of_magnitudes) return {h, sums, derivative};
  const double total =
      with_accumulators(sums, [&](const auto* each) { return std::accumulate(each, each + cols, 0.0); });
  return {h, new_scalar(x, total), derivative};
}

// (cols,) of what the penalty's gradient is at an output of each column, but for the sign.
Tensor slopes_of(const Tensor& grad_activity, bool of_magnitudes, int64_t cols) {
  STD_TORCH_CHECK(of_magnitudes ? grad_activity.dim() == 0 : grad_activity.dim() == 1 && grad_activity.size(0) == cols,
                  "grad_activity must have the shape of the activity");
  const Tensor slopes = new_sums(grad_activity, cols);
  const int64_t stride = of_magnitudes ? 0 : grad_activity.stride(0);
  with_accumulators(slopes, [&](auto* each) {
    const auto* const grad = static_cast<decltype(each)>(grad_activity.data_ptr());
    for (int64_t col = 0; col < cols; ++col) each[col] = grad[col * stride];
  });
  return slopes;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> penalized_linear_act_backward(
    OptionalTensor grad, OptionalTensor grad_activity, Tensor x, Tensor weight, OptionalTensor saved, OptionalTensor h,
    std::string activation, std::string penalty, int64_t needs) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, std::nullopt, x.size(1), x);
  STD_TORCH_CHECK(grad || grad_activity, "one of the gradients must be given");
  const int64_t rows = x.size(0), cols = weight.size(0);
  const ActivationSpec spec = activation_spec(activation);
  if (spec.activation != Activation::identity) {
    STD_TORCH_CHECK(saved, "saved must be given for every activation but identity");
    check_matrix("saved", *saved, rows, cols, x);
  }
  if (grad) check_matrix("grad", *grad, rows, cols, x);
  OutputSlopes added;
  OptionalTensor slopes;
  if (grad_activity) {
    const bool of_magnitudes = is_of_magnitudes(penalty);
    STD_TORCH_CHECK(scalar_of(*grad_activity) == accumulator_of(scalar_of(x)),
                    "grad_activity must have the dtype of the activity");
    slopes = slopes_of(*grad_activity, of_magnitudes, cols);
    added.slopes = vector_of(slopes);
    if (of_magnitudes) {
      STD_TORCH_CHECK(h, "h must be given for l1");
      check_matrix("h", *h, rows, cols, x);
      added.output = matrix_of(h);
    }
  }
  OptionalTensor x_gradient, weight_gradient, bias_gradient;
  if (needs & dense::kNeedX) x_gradient = new_matrix(x, rows, x.size(1));
  if (needs & dense::kNeedWeight) weight_gradient = new_matrix(x, cols, weight.size(1));
  if (needs & dense::kNeedBias) bias_gradient = new_vector(x, cols);
  LayerBackward layer{spec, matrix_of(weight), matrix_of(x), matrix_of(saved), matrix_of(weight_gradient),
                      vector_of(bias_gradient)};
  const Matrix upstream = grad ? matrix_of(grad) : Matrix{nullptr, scalar_of(x), rows, cols, cols, 1};
  dense_backward(upstream, &layer, 1, matrix_of(x_gradient), added);
  return {x_gradient, weight_gradient, bias_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : dense::kPenalizedLinearActSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("penalized_linear_act", TORCH_BOX(&penalized_linear_act));
  m.impl("penalized_linear_act_backward", TORCH_BOX(&penalized_linear_act_backward));
}

}  // namespace aefast::cpu
