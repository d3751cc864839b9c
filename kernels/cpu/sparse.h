// Sums of rows that indices choose, and the largest elements of a row, compiled once per instruction set and chosen at
// run time.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace aefast::cpu {

// Rows of `cols` elements of `scalar`, each row's side by side, and rows `stride` elements apart.
struct Rows {
  Scalar scalar;
  const void* data;
  int64_t stride, cols;
};

// One latent's entries, by their places in a row-major matrix of `per_row` columns, and what is made of them. All
// elements are of the scalar of the rows that are summed; `workspace` has latent_workspace(cols) accumulators.
struct Latent {
  const int64_t* places;
  int64_t count, ahead;  // and so many places follow these, which memory may be asked for
  int64_t per_row;
  const void* coefficients;  // one a place
  const void* direction;     // (cols,), for dots
  void* gradient;            // (cols,) = Σ coefficient row, or null
  void* dots;                // one a place, = <direction, row>, or null
  void* workspace;
};

constexpr int64_t latent_workspace(int64_t cols) { return 3 * (cols + 16); }

struct SparseKernels {
  // out (cols,) = bias + Σ_j coefficients[j] rows[indices[j]], bias null for 0; a negative index is skipped. `next`, if
  // it is not null, are as many indices of what is called next, whose memory is asked for.
  void (*weighted_sum)(const Rows& rows, const void* coefficients, const int64_t* indices, const int64_t* next,
                       int64_t count, const void* bias, void* out);

  // Place p belongs to row p / per_row of `rows`.
  void (*latent)(const Rows& rows, const Latent& latent);

  // out, of accumulators, = product + bias, rounded to `scalar`, of whose type bias is; bias null for 0.
  void (*pre_activations)(Scalar product_scalar, Scalar scalar, const void* product, const void* bias, int64_t count,
                          void* out);

  // out[g] = the largest of the elements whose number modulo `groups`, a multiple of 16, is g; NaN is left out. Elements
  // are float, or double.
  void (*group_maxima)(bool is_double, const void* elements, int64_t count, int64_t groups, void* out);

  // The numbers of the elements that are not at most `threshold`, in order, and how many they are: NaN is one of them,
  // and for a threshold of NaN all are.
  int64_t (*above)(bool is_double, const void* elements, int64_t count, double threshold, int32_t* out);
};

const SparseKernels& sparse_kernels();

}  // namespace aefast::cpu
