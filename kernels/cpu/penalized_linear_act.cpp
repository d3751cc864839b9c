#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "dense.h"
#include "dense_schemas.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

// "l1", or "kl" to a mean activation of `rate`, over so many rows.
class Penalty {
 public:
  Penalty(const std::string& name, double rate, int64_t rows)
      : is_l1_(name == "l1"), rate_(rate), rows_(static_cast<double>(rows)) {
    STD_TORCH_CHECK(is_l1_ || name == "kl", "aefast: unknown penalty ", name);
  }
  bool is_l1() const { return is_l1_; }

  // From the sums of the columns of |h|, or of h for kl.
  template <typename T>
  double value(const T* sums, int64_t cols) const {
    double total = 0.0;
    for (int64_t col = 0; col < cols; ++col) total += is_l1_ ? sums[col] : divergence(sums[col] / rows_);
    return is_l1_ ? total / rows_ : total;
  }

  // Its derivative by the sum of a column.
  double slope(double sum) const {
    if (is_l1_) return 1.0 / rows_;
    const double q = sum / rows_;
    return q >= kEps && q <= 1.0 - kEps ? ((1.0 - rate_) / (1.0 - q) - rate_ / q) / rows_ : 0.0;
  }

 private:
  // As EPS of kernels/penalty.py.
  static constexpr double kEps = 1e-6;

  double divergence(double mean) const {
    const double q = mean < kEps ? kEps : mean > 1.0 - kEps ? 1.0 - kEps : mean;
    return rate_ * std::log(rate_ / q) + (1.0 - rate_) * std::log((1.0 - rate_) / (1.0 - q));
  }

  bool is_l1_;
  double rate_, rows_;
};

// body(pointer to what `accumulators` holds)
template <typename Body>
auto with_accumulators(const Tensor& accumulators, const Body& body) {
  void* const data = accumulators.data_ptr();
  return scalar_of(accumulators) == Scalar::float64 ? body(static_cast<double*>(data)) : body(static_cast<float*>(data));
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> penalized_linear_act(Tensor x, Tensor weight,
                                                                                OptionalTensor bias,
                                                                                String activation, String name,
                                                                                double rate, bool save) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, bias, x.size(1), x);
  const ActivationSpec spec = activation_spec(activation);
  const int64_t rows = x.size(0), cols = weight.size(0);
  const Penalty penalty(name, rate, rows);
  const Tensor h = new_matrix(x, rows, cols), sums = new_sums(x, cols);
  OptionalTensor derivative;
  if (save && stores_derivative(spec.activation)) derivative = new_matrix(x, rows, cols);
  LayerForward layer{spec, matrix_of(weight), vector_of(bias), matrix_of(h), matrix_of(derivative)};
  dense_forward(matrix_of(x), &layer, 1, {vector_of(sums), penalty.is_l1()});
  const double value = with_accumulators(sums, [&](const auto* each) { return penalty.value(each, cols); });
  return {h, new_scalar(x, value), save && !penalty.is_l1() ? OptionalTensor(sums) : std::nullopt, derivative};
}

// (cols,) of what is added to the gradient of each column, but for l1's sign.
Tensor slopes_of(const Penalty& penalty, const Tensor& grad, const OptionalTensor& sums, int64_t cols) {
  const Tensor slopes = new_sums(grad, cols);
  with_accumulators(slopes, [&](auto* each) {
    using Pointer = decltype(each);
    const double factor = *static_cast<Pointer>(grad.data_ptr());
    const auto* const sum = sums ? static_cast<Pointer>(sums->data_ptr()) : nullptr;
    for (int64_t col = 0; col < cols; ++col) each[col] = factor * penalty.slope(sum ? sum[col] : 0.0);
  });
  return slopes;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> penalized_linear_act_backward(
    OptionalTensor grad, OptionalTensor grad_penalty, Tensor x, Tensor weight, OptionalTensor saved, OptionalTensor h,
    OptionalTensor sums, String activation, String name, double rate, int64_t needs) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, std::nullopt, x.size(1), x);
  STD_TORCH_CHECK(grad || grad_penalty, "one of the gradients must be given");
  const int64_t rows = x.size(0), cols = weight.size(0);
  const Penalty penalty(name, rate, rows);
  const ActivationSpec spec = activation_spec(activation);
  if (spec.activation != Activation::identity) {
    STD_TORCH_CHECK(saved, "saved must be given for every activation but identity");
    check_matrix("saved", *saved, rows, cols, x);
  }
  if (grad) check_matrix("grad", *grad, rows, cols, x);
  OutputSlopes added;
  OptionalTensor slopes;
  if (grad_penalty) {
    const auto is_wide = [&](const Tensor& one) { return scalar_of(one) == accumulator_of(scalar_of(x)); };
    STD_TORCH_CHECK(grad_penalty->numel() == 1 && is_wide(*grad_penalty),
                    "grad_penalty must be a scalar of the penalty's dtype");
    if (penalty.is_l1()) {
      STD_TORCH_CHECK(h, "h must be given for l1");
      check_matrix("h", *h, rows, cols, x);
      added.output = matrix_of(h);
    } else {
      STD_TORCH_CHECK(sums && sums->dim() == 1 && sums->size(0) == cols && is_wide(*sums),
                      "sums must be (", cols, ",) of the penalty's dtype for kl");
      if (cols > 1) STD_TORCH_CHECK(sums->stride(0) == 1, "sums must be contiguous");
    }
    slopes = slopes_of(penalty, *grad_penalty, penalty.is_l1() ? std::nullopt : sums, cols);
    added.slopes = vector_of(slopes);
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
