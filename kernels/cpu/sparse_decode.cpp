#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <tuple>

#include "dense.h"
#include "dense_schemas.h"
#include "latents.h"
#include "parallel.h"
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
  if (is_dense(code, scalar_of(weight)) && is_finite(matrix_of(weight))) {
    const Tensor dense = dense_code(code, weight);
    LayerForward layer{{Activation::identity, {}}, matrix_of(weight).transposed(), vector_of(bias), matrix_of(out)};
    dense_forward(matrix_of(dense), &layer, 1);
    return out;
  }
  Tensor copy;
  decode(rows_of(weight, copy), code, bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr());
  return out;
}

// out (N, k) = <direction of the latent, row of grad>, of dense products.
template <typename T>
void dense_dots(const Tensor& grad, const Tensor& weight, const Code& code, T* out) {
  using A = Accumulator<T>;
  std::atomic<bool> has_wrong{false};
  for_products(matrix_of(grad), matrix_of(weight), {}, [&](const ProductBlock& block) {
    const Matrix& product = block.product;
    const bool is_wide = product.scalar != scalar_of(weight);
    for_tasks(product.rows, code.per_row, 1, [&](int64_t begin, int64_t count) {
      for (int64_t row = begin; row < begin + count; ++row) {
        const void* const data = product.row_block(row, 1).data;
        const int64_t first = (block.first_row + row) * code.per_row;
        for (int64_t place = first; place < first + code.per_row; ++place) {
          const int64_t col = code.indices[place] - block.first_col;
          if (0 <= col && col < product.cols)
            out[place] = is_wide ? store<T>(static_cast<const A*>(data)[col]) : static_cast<const T*>(data)[col];
          else if (code.indices[place] < 0)
            out[place] = store<T>(A(0));
          else if (code.indices[place] >= code.latents)
            has_wrong = true;
        }
      }
    });
  });
  STD_TORCH_CHECK(!has_wrong, "indices must be less than ", code.latents);
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
  if (needs & dense::kNeedX) values_gradient = new_matrix(weight, code.rows, code.per_row);
  if (needs & dense::kNeedWeight) weight_gradient = new_matrix(weight, weight.size(0), weight.size(1));
  LatentGradients gradients;
  if (is_dense(code, scalar_of(weight))) {
    if (values_gradient) {
      void* const out = values_gradient->mutable_data_ptr();
      switch (scalar_of(weight)) {
        case Scalar::float32: dense_dots(grad, weight, code, static_cast<float*>(out)); break;
        case Scalar::float64: dense_dots(grad, weight, code, static_cast<double*>(out)); break;
        case Scalar::bfloat16: dense_dots(grad, weight, code, static_cast<BFloat16*>(out)); break;
        case Scalar::float16: dense_dots(grad, weight, code, static_cast<Float16*>(out)); break;
      }
    }
    if (weight_gradient) {
      const Tensor dense = dense_code(code, weight);
      LayerBackward layer{{Activation::identity, {}}, matrix_of(weight), matrix_of(grad), {}, matrix_of(weight_gradient)};
      dense_backward(matrix_of(dense), &layer, 1, {});
      if (!is_finite(matrix_of(weight_gradient))) gradients.weight = matrix_of(weight_gradient);
    }
  } else {
    if (values_gradient) gradients.dots = values_gradient->mutable_data_ptr();
    gradients.weight = matrix_of(weight_gradient);
  }
  if (gradients.dots || gradients.weight.data) {
    Tensor copy, weight_copy;
    if (gradients.dots) gradients.directions = rows_of(weight, weight_copy);
    latent_gradients(rows_of(grad, copy), code, gradients);
  }
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
