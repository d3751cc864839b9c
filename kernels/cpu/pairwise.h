// Sums of a kernel function over pairs of points, and their gradients, tile by tile; compiled once per instruction set
// and chosen at run time.
#pragma once

#include <cstdint>

#include "kernel_function.h"
#include "scalar.h"

namespace aefast::cpu {

// Points of a block, the side of a tile.
constexpr int64_t kPoints = 128;

// Coordinates are kept in float or double. Points of a block lie in rows of `padded` elements, those beyond the
// dimensions being 0, and once more in columns, one dimension after another and then their squared norms; there
// coordinates are times -2 where distances are found from products. Points beyond a block's end are 0.
constexpr int64_t padded(int64_t dimensions, int64_t element_size) {
  const int64_t whole = 64 / element_size;
  return (dimensions + whole - 1) / whole * whole;
}

// Points of a tensor: (count, dimensions) elements of `scalar`, strides in elements.
struct Points {
  const void* data;
  Scalar scalar;
  int64_t count, dimensions;
  int64_t row_stride, col_stride;
};

// A block of points i against one of points j. Gradients are of rows, as points are kept.
struct Tile {
  const void* rows_i;
  const void* norms_i;
  const void* rows_j;
  const void* columns_j;
  void* gradient_i;  // or null
  void* gradient_j;  // or null
  void* scratch;     // room for as much as gradient_j has, if that is wanted
  int64_t count_i, count_j, dimensions;
  int64_t excluded;  // point i and point i + excluded make no pair; kPoints for none
  // Distances from products take half of the instructions, and lose the digits of those of close points, for which a
  // kernel that is smooth in them has no use unless the points are far from the centre. `sums_differences` is for
  // gradients, where kernels of distances sum them always.
  bool has_products, sums_differences;
};

// Functions are those of the coordinates' type, float where `is_double` is false.
struct PairwiseKernels {
  // Adds the coordinates of points [first, first + count) to sums, one a dimension.
  void (*add_coordinates)(const Points& points, int64_t first, int64_t count, double* sums);

  // The block of points [first, first + count), less `centre`, as rows and, if they are wanted, as columns.
  void (*pack)(bool is_double, bool has_products, const Points& points, const double* centre, int64_t first,
               int64_t count, void* rows, void* columns);

  // Σ k over the tile's pairs. Of gradients that are wanted, adds those of weights Σ k whose slope `function` has.
  double (*sum)(bool is_double, pairwise::Kind kind, const void* function, const Tile& tile);

  // k of each of the tile's pairs, to rows of `out` that are `stride` elements apart.
  void (*values)(bool is_double, pairwise::Kind kind, const void* function, const Tile& tile, void* out, int64_t stride);

  // For each of the tile's points i the least squared distance to its points j, if that is less than `least` has, and
  // its number among all, that of the first being `first_j`. NaN is less than any number.
  void (*nearest)(bool is_double, const Tile& tile, int64_t first_j, void* least, int64_t* index);
};

const PairwiseKernels& pairwise_kernels();

}  // namespace aefast::cpu
