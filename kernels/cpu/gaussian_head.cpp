#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"
#include "random_schemas.h"
#include "sampling.h"

namespace aefast::cpu {
namespace {

// The halves mu and logvar of `moments` (M, 2 D), which has its rows side by side.
Moments halves_of(const Tensor& moments, double low, double high) {
  const int64_t cols = moments.size(1) / 2;
  const auto* const mu = static_cast<const char*>(moments.const_data_ptr());
  return {mu, mu + cols * size_of(scalar_of(moments)), 2 * cols, 2 * cols, cols, low, high};
}

std::tuple<Tensor, Tensor, Tensor> gaussian_head(Tensor h, Tensor weight, OptionalTensor bias, Tensor seed, double low,
                                                 double high) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be a matrix");
  check_layer(weight, bias, h.size(1), h);
  STD_TORCH_CHECK(weight.size(0) % 2 == 0, "weight must have an even number of rows");
  const int64_t rows = h.size(0), cols = weight.size(0) / 2;
  const Tensor moments = new_matrix(h, rows, 2 * cols), z = new_matrix(h, rows, cols), kl = new_sums(h, rows);
  LayerForward layer{{Activation::identity, {}}, matrix_of(weight), vector_of(bias), matrix_of(moments)};
  dense_forward(matrix_of(h), &layer, 1);
  sample(scalar_of(h), rows, halves_of(moments, low, high), seed_of(seed), z.mutable_data_ptr(), kl);
  return {z, kl, moments};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> gaussian_head_backward(
    OptionalTensor grad_z, OptionalTensor grad_kl, OptionalTensor grad_moments, Tensor h, Tensor weight,
    Tensor moments, Tensor seed, double low, double high, int64_t needs) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be a matrix");
  check_layer(weight, std::nullopt, h.size(1), h);
  STD_TORCH_CHECK(grad_z || grad_kl || grad_moments, "one of the gradients must be given");
  const int64_t rows = h.size(0), cols = weight.size(0) / 2;
  check_matrix("moments", moments, rows, 2 * cols, h);
  STD_TORCH_CHECK(moments.is_contiguous(), "moments must be contiguous");
  if (grad_moments) check_matrix("grad_moments", *grad_moments, rows, 2 * cols, h);
  Tensor grad = h;
  if (grad_z || grad_kl) {
    if (grad_z) {
      check_matrix("grad_z", *grad_z, rows, cols, h);
      grad_z = with_unit_columns(*grad_z);
    }
    if (grad_kl) check_row_values("grad_kl", *grad_kl, rows, h);
    grad = new_matrix(h, rows, 2 * cols);
    auto* const mu_gradient = static_cast<char*>(grad.mutable_data_ptr());
    sample_gradient(scalar_of(h), rows, halves_of(moments, low, high), seed_of(seed),
                    {grad_z ? grad_z->const_data_ptr() : nullptr, grad_z ? grad_z->stride(0) : 0,
                     grad_kl ? grad_kl->const_data_ptr() : nullptr, grad_kl ? grad_kl->stride(0) : 0, mu_gradient,
                     mu_gradient + cols * size_of(scalar_of(h)), 2 * cols});
    if (grad_moments) grad = torch::stable::subtract(grad, *grad_moments, -1.0);
  } else {
    grad = *grad_moments;
  }
  OptionalTensor h_gradient, weight_gradient, bias_gradient;
  if (needs & dense::kNeedX) h_gradient = new_matrix(h, rows, h.size(1));
  if (needs & dense::kNeedWeight) weight_gradient = new_matrix(h, weight.size(0), weight.size(1));
  if (needs & dense::kNeedBias) bias_gradient = new_vector(h, weight.size(0));
  LayerBackward layer{{Activation::identity, {}}, matrix_of(weight), matrix_of(h), {}, matrix_of(weight_gradient),
                      vector_of(bias_gradient)};
  dense_backward(matrix_of(grad), &layer, 1, matrix_of(h_gradient));
  return {h_gradient, weight_gradient, bias_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : random::kGaussianHeadSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("gaussian_head", TORCH_BOX(&gaussian_head));
  m.impl("gaussian_head_backward", TORCH_BOX(&gaussian_head_backward));
}

}  // namespace aefast::cpu
