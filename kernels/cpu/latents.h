// Sums over a sparse code in the order of its latents: each is one task's, its terms in the order of the code, so that
// no two threads add to one sum and the result does not depend on them.
#pragma once

#include "matrix.h"
#include "sparse.h"

namespace aefast::cpu {

// values or their gradient, and indices, both (N, k) with elements side by side, of a code of `latents` latents.
struct Code {
  const void* values;
  const int64_t* indices;
  int64_t rows, per_row, latents;
};

// The code of two tensors whose elements lie side by side, of which `values` has the dtype of `like`.
Code code_of(const Tensor& values, const Tensor& indices, int64_t latents, const Tensor& like);
Tensor row_major_indices(const Tensor& indices);

// What is absent is not wanted.
struct LatentGradients {
  Matrix weight;         // (F, D) row-major: for each latent Σ value row
  Matrix bias;           // (1, F): Σ value
  void* dots = nullptr;  // (N, k): <direction of the latent, row>
  Rows directions = {};  // (F, D), for dots
};

// Of the rows (N, D) of which each entry of the code has one.
void latent_gradients(const Rows& rows, const Code& code, const LatentGradients& gradients);

// Whether dense products, of a matrix that has a column for each latent, are faster than sums of rows, as they are where
// a row has so many entries.
bool is_dense(const Code& code, Scalar scalar);

// Whether all elements are finite. Where some are not, sums of rows and dense products differ: in
// these a latent that a row has not is multiplied by 0.
bool is_finite(const Matrix& matrix);

// The code as such a matrix (N, F), of the dtype of `like`: an index that a row has twice counts twice.
Tensor dense_code(const Code& code, const Tensor& like);

// out (N, D) row-major = bias + Σ_j values[n, j] directions[indices[n, j]], bias (D,) or null.
void decode(const Rows& directions, const Code& code, const void* bias, void* out);

// The rows of a tensor; those of a copy, which `copy` keeps, where a row's elements do not lie side by side.
Rows rows_of(const Tensor& tensor, Tensor& copy);

}  // namespace aefast::cpu
