// Matrix products that are too short, or have too few rows, for a BLAS: once its call, its packing and its threads
// are paid for, the product itself is the lesser part. With a matrix unit, products of float32 of any size. Compiled
// once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scalar.h"

namespace aefast::cpu {

struct ProductOperand {
  const void* data;
  Scalar scalar;
  int64_t row_stride, col_stride;  // in elements; one of them is 1
};

// By what a product is formed: by vectors; or, of float32, by the matrix unit, as exactly; or from operands in bfloat16
// or rounded to it, summed in float32.
enum class Unit { vectors, matrix, matrix_rounding };

// For so few rows b is read from where it is: to rearrange it takes longer than the product, and to convert it from
// bfloat16 does. With rows of b in float32 that are contiguous, tiles of many rows need no rearranging.
constexpr int64_t kFewRows = 24, kFewRowsOfTiles = 8;

struct ProductKernels {
  // out (rows, cols), rows `out_stride` apart, = a (rows, inner) b (inner, cols), or += with `add`, in float32 or
  // float64, on one thread. Operands are of that type; those of matrix_rounding may be bfloat16, and so may b by vectors
  // beside no more than kFewRows of float32 in row-major order. `workspace` is aligned to 64. Sums are taken over `inner`
  // in an order that depends on nothing but the shape and the strides; by the matrix unit, which sums in float32, on
  // nothing but `inner`.
  void (*product)(Scalar scalar, Unit unit, ProductOperand a, ProductOperand b, void* out, int64_t out_stride,
                  int64_t rows, int64_t inner, int64_t cols, bool add, void* workspace);
  // The workspace that such a product needs.
  size_t (*workspace_bytes)(Scalar scalar, Unit unit, ProductOperand a, int64_t rows, int64_t inner, int64_t cols);
  // Whether there is this unit, and it is faster than vectors and any BLAS of theirs at products of this shape.
  bool (*suits)(Unit unit, int64_t rows, int64_t inner, int64_t cols);
};

const ProductKernels& product_kernels();

}  // namespace aefast::cpu
