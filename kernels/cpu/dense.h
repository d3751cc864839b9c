// A stack of dense layers, forward and backward, over plain row-major or strided matrices.
//
// Matrix products are those of product.h or torch's own (the BLAS that it was built with), whichever is the faster; what is
// added here is that each thread takes its own rows through all layers, so that the pointwise passes find each product
// still in the cache and the threads meet once a stack instead of twice a layer.
#pragma once

#include <functional>

#include "dense_arguments.h"
#include "matrix.h"
#include "pointwise.h"

namespace aefast::cpu {

// Whether operands of products stay in bfloat16, for the BLAS or product_kernels(); returns what held before. For tests:
// at first they do if the processor is faster at such products than at float32's.
bool use_bfloat16_products(bool use);
bool has_bfloat16_products();

// Whether large products of float32 and float64 are left to the BLAS; returns what held before. For tests: at first they
// are unless the kernels' vectors are the wider ones.
bool use_large_blas_products(bool use);

// Whether products of float32 may be formed from operands rounded to bfloat16, and summed in float32, where that is
// faster; returns what held before.
bool round_products(bool round);

// act(input weight^T + bias), and where it is stored act'.
struct LayerForward {
  ActivationSpec spec;
  Matrix weight;          // (N, K)
  Matrix bias;            // (1, N), or absent
  Matrix out;             // (M, N) row-major; absent where no caller wants it
  Matrix derivative = {};  // (M, N) row-major, or absent
};

// The sums of a matrix's columns, or of their magnitudes.
struct OutputSums {
  Matrix out;  // (1, N) of accumulators, or absent
  bool of_magnitudes = false;
};

// x (M, K) through `count` layers, the last of which has its `out`; `sums` are those of it. The layers are overwritten.
void dense_forward(Matrix x, LayerForward* layers, size_t count, const OutputSums& sums = {});

// A block of x weight^T, and the bias of its columns if that is not in it yet, which it is only where the product's
// rounding must not come before.
struct ProductBlock {
  int64_t first_row, first_col;
  Matrix product;  // row-major, in x's type or the one that this is summed in
  Matrix bias;     // (1, product.cols) with elements side by side, or absent
};

// body(block) for x (M, K) times weight (N, K), while each block is in the cache: a row's blocks one after the other.
// What a thread holds of the product does not grow with M or N.
void for_products(Matrix x, Matrix weight, Matrix bias, const std::function<void(const ProductBlock&)>& body);

struct LayerBackward {
  ActivationSpec spec;
  Matrix weight;                // (N, K)
  Matrix input;                 // (M, K)
  Matrix saved;                 // (M, N): the derivative where it is stored, else the output
  Matrix weight_gradient = {};  // (N, K) row-major, or absent
  Matrix bias_gradient = {};    // (1, N), or absent
};

// What is added to the gradient that comes in: the slopes of each column, times the output's sign where that is given.
struct OutputSlopes {
  Matrix slopes;       // (1, N) of accumulators, or absent
  Matrix output = {};  // (M, N), or absent
};

// Gradients of all that is present, among it x_gradient (M, K), the first layer's input's. grad (M, N_last); with
// slopes to be added to it, it may be without data, which stands for zeros. The layers are overwritten.
void dense_backward(Matrix grad, LayerBackward* layers, size_t count, Matrix x_gradient,
                    const OutputSlopes& added = {});

}  // namespace aefast::cpu
