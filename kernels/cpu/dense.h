// The passes that linear_act and mlp share, over plain row-major or strided matrices.
//
// The matrix products are torch's own (the BLAS it was built with); what is added here is that rows are
// taken in chunks, so that the pointwise pass finds each product still in the cache.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "pointwise.h"

namespace aefast::cpu {

using torch::stable::Tensor;

// A view without ownership; strides in elements.
struct Matrix {
  void* data;
  Scalar scalar;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix row_block(int64_t begin, int64_t count) const {
    return {static_cast<char*>(data) + begin * row_stride * size_of(scalar), scalar, count, cols, row_stride,
            col_stride};
  }
  Matrix transposed() const { return {data, scalar, cols, rows, col_stride, row_stride}; }
};

Matrix matrix_of(const Tensor& tensor);

// New, uninitialised, row-major, of `like`'s dtype.
Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols);
Tensor new_vector(const Tensor& like, int64_t size);

// A contiguous vector's elements, or null.
const void* data_or_null(const std::optional<Tensor>& tensor);

ActivationSpec activation_spec(const std::string& name, double slope, double alpha);

// out = act(x weight^T + bias); `derivative` as PointwiseKernels::bias_activation takes it.
void dense_forward(ActivationSpec spec, Matrix x, Matrix weight, const void* bias, Matrix out, void* derivative);

// g = grad * act' and, unless `bias_gradient` is null, its sums over the rows.
void activation_gradient(ActivationSpec spec, Matrix grad, const void* saved, Matrix g, void* bias_gradient);

// out = (g weight) * act' of the layer below (`spec`, `saved`), and that layer's bias gradient.
void data_gradient(ActivationSpec spec, Matrix g, Matrix weight, const void* saved, Matrix out, void* bias_gradient);

// out = g^T x.
void weight_gradient(Matrix g, Matrix x, Matrix out);

}  // namespace aefast::cpu
