// A stack of dense layers, forward and backward, over plain row-major or strided matrices.
//
// The matrix products are torch's own (the BLAS it was built with); what is added here is that each thread
// takes its own rows through all layers, so that the pointwise passes find each product still in the cache
// and the threads meet once a stack instead of twice a layer.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"
#include "pointwise.h"

namespace aefast::cpu {

// Whether bfloat16 products are left to the BLAS as they are; returns what held before. For tests: at first they are if
// the processor has instructions for them.
bool use_bfloat16_products(bool use);

ActivationSpec activation_spec(const std::string& specification);

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
