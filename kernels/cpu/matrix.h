// Tensors as matrices: views of them, and new ones.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "scalar.h"

namespace aefast::cpu {

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
// Of `like`'s shape, row-major.
Tensor new_like(const Tensor& like);
// Of its strides too.
Tensor new_in_layout(const Tensor& like, Scalar scalar);
// In the type that elements of `like` are summed in.
Tensor new_sums(const Tensor& like, int64_t size);
Tensor new_accumulators(const Tensor& like, int64_t rows, int64_t cols);
Tensor new_scalar(const Tensor& like, double value);
// Of int64; not poisoned.
Tensor new_indices(int64_t rows, int64_t cols);
void poison_outputs(bool poison);

// What torch calls the CPU.
int32_t cpu_device();

Scalar scalar_of(const Tensor& tensor);
Scalar accumulator_of(Scalar scalar);

// Whether the elements of `like` fill a piece of memory, in whatever order of its dimensions, and those of `tensor`, of
// its shape, lie in the same order; and that it is so.
bool has_layout(const Tensor& tensor, const Tensor& like);
void check_layout(const char* name, const Tensor& tensor, const Tensor& like);

// A tensor over memory that somebody else owns. Being no view of an autograd tensor, it can be an output of torch's
// kernels on any thread.
Tensor borrow(Matrix matrix);

}  // namespace aefast::cpu
