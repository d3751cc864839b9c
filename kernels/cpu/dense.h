// A stack of dense layers, forward and backward, over plain row-major or strided matrices.
//
// The matrix products are torch's own (the BLAS it was built with); what is added here is that each thread
// takes its own rows through all layers, so that the pointwise passes find each product still in the cache
// and the threads meet once a stack instead of twice a layer.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "pointwise.h"

namespace aefast::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A view without ownership; strides in elements. No data: the matrix is absent.
struct Matrix {
  void* data = nullptr;
  Scalar scalar = Scalar::float32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  // Of an absent matrix, an absent one.
  Matrix row_block(int64_t begin, int64_t count) const {
    char* const first = data ? static_cast<char*>(data) + begin * row_stride * size_of(scalar) : nullptr;
    return {first, scalar, count, cols, row_stride, col_stride};
  }
  Matrix column_block(int64_t begin, int64_t count) const { return transposed().row_block(begin, count).transposed(); }
  Matrix transposed() const { return {data, scalar, cols, rows, col_stride, row_stride}; }
  bool is_row_major() const { return col_stride == 1 && row_stride == cols; }
};

// An absent tensor is an absent matrix; a vector is one row.
Matrix matrix_of(const Tensor& tensor);
Matrix matrix_of(const OptionalTensor& tensor);
Matrix vector_of(const OptionalTensor& tensor);

// New, uninitialised, row-major, of `like`'s dtype; full of NaN after poison_outputs(true).
Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols);
Tensor new_vector(const Tensor& like, int64_t size);
void poison_outputs(bool poison);

// Whether bfloat16 products are left to the BLAS as they are; returns what held before. For tests: at first they are if
// the processor has instructions for them.
bool use_bfloat16_products(bool use);

ActivationSpec activation_spec(const std::string& specification);

// That `tensor` is a (rows, cols) matrix of `like`'s dtype.
void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t cols, const Tensor& like);
void check_layer(const Tensor& weight, const OptionalTensor& bias, int64_t inputs, const Tensor& like);

// act(input weight^T + bias), and where it is stored act'.
struct LayerForward {
  ActivationSpec spec;
  Matrix weight;          // (N, K)
  Matrix bias;            // (1, N), or absent
  Matrix out;             // (M, N) row-major; absent where no caller wants it
  Matrix derivative = {};  // (M, N) row-major, or absent
};

// x (M, K) through `count` layers, the last of which has its `out`. The layers are overwritten.
void dense_forward(Matrix x, LayerForward* layers, size_t count);

struct LayerBackward {
  ActivationSpec spec;
  Matrix weight;                // (N, K)
  Matrix input;                 // (M, K)
  Matrix saved;                 // (M, N): the derivative where it is stored, else the output
  Matrix weight_gradient = {};  // (N, K) row-major, or absent
  Matrix bias_gradient = {};    // (1, N), or absent
};

// Gradients of all that is present, among it x_gradient (M, K), the first layer's input's. grad (M, N_last). The
// layers are overwritten.
void dense_backward(Matrix grad, LayerBackward* layers, size_t count, Matrix x_gradient);

}  // namespace aefast::cpu
