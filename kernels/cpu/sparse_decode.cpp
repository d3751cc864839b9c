#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"
#include "latents.h"
#include "sparse_schemas.h"

namespace aefast::cpu {
namespace {

Tensor sparse_decode(Tensor values, Tensor indices, Tensor weight, OptionalTensor bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  const int64_t cols = weight.size(1);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == cols && bias->scalar_type() == weight.scalar_type(),
                    "bias must be (", cols, ",) of the dtype of weight");
    bias = torch::stable::contiguous(*bias);
  }
  indices = row_major_indices(indices);
  values = torch::stable::contiguous(values);
  const Code code = code_of(values, indices, weight.size(0), weight);
  const Tensor out = new_matrix(weight, code.rows, cols);
  Tensor copy;
  decode(rows_of(weight, copy), code, bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr());
  return out;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> sparse_decode_backward(Tensor grad, Tensor values,
                                                                                  Tensor indices, Tensor weight,
                                                                                  int64_t needs) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  indices = row_major_indices(indices);
  values = torch::stable::contiguous(values);
  const Code code = code_of(values, indices, weight.size(0), weight);
  check_matrix("grad", grad, code.rows, weight.size(1), weight);
  OptionalTensor values_gradient, weight_gradient, bias_gradient;
  LatentGradients gradients;
  Tensor copy, weight_copy;
  if (needs & dense::kNeedX) {
    values_gradient = new_matrix(weight, code.rows, code.per_row);
    gradients.dots = values_gradient->mutable_data_ptr();
    gradients.directions = rows_of(weight, weight_copy);
  }
  if (needs & dense::kNeedWeight) {
    weight_gradient = new_matrix(weight, weight.size(0), weight.size(1));
    gradients.weight = matrix_of(*weight_gradient);
  }
  if (values_gradient || weight_gradient) latent_gradients(rows_of(grad, copy), code, gradients);
  if (needs & dense::kNeedBias) {
    bias_gradient = new_vector(weight, weight.size(1));
    LayerBackward layer{{Activation::identity, {}}, {nullptr, scalar_of(weight), weight.size(1), 1, 1, 1}, {}, {}, {},
                        vector_of(bias_gradient)};
    dense_backward(matrix_of(grad), &layer, 1, {});
  }
  return {values_gradient, weight_gradient, bias_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : sparse::kSparseDecodeSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_backward", TORCH_BOX(&sparse_decode_backward));
}

}  // namespace aefast::cpu
