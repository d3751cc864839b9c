// The schemas under which the compiled libraries register the launchers on pairs of points.
//
// Shapes: x (N, D) and y (M, D), of any strides; unit a scalar of their accumulator, by which squared distances are
// divided; `kernel`, `rates` and `alpha` as in Kernel of aefast/ops/_pairwise.py, `weights` and `needs` as
// aefast/ops/mmd.py has them. The results are the weighted sum, a scalar, and the gradients of x and y, contiguous, all
// of the accumulator's type; a gradient that is not wanted has no rows.
// mmd_rows: x are rows first_x, ... of all_x, and y rows first_y, ... of all_y; the sum is x's and y's part of that of
// all, in which a pair of two parts counts for either with a half, without the constant; the gradients are those of
// the whole sum.
// kernel_values: the kernel of each row of x with each row of y, (N, M), in the accumulator.
// nearest: x (clouds, N, D) and y (clouds, M, D), of any strides, M at least 1; the squared distance of each point of x
// to the nearest point of y, in the accumulator, and its number, int64: the lowest of equals, and the first whose
// distance is NaN, if any is. Both are (clouds, N).
#pragma once

#include <array>

namespace aefast::pairwise {

constexpr std::array<const char*, 3> kMmdSchemas = {
    "mmd(Tensor x, Tensor y, Tensor? unit, str kernel, float[] rates, float alpha, float[] weights, int needs) "
    "-> (Tensor, Tensor, Tensor)",

    "mmd_rows(Tensor x, Tensor y, Tensor all_x, Tensor all_y, int first_x, int first_y, Tensor? unit, str kernel, "
    "float[] rates, float alpha, float[] weights, int needs) -> (Tensor, Tensor, Tensor)",

    "kernel_values(Tensor x, Tensor y, Tensor? unit, str kernel, float[] rates, float alpha) -> Tensor",
};

constexpr std::array<const char*, 1> kNearestSchemas = {
    "nearest(Tensor x, Tensor y) -> (Tensor, Tensor)",
};

}  // namespace aefast::pairwise
