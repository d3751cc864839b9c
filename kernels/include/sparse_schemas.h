// The schemas under which the compiled libraries register the launchers of sparse autoencoders.
//
// Shapes: x (N, D), weight (F, D), row f of which is latent f's; values and indices (N, k), indices int64. A negative
// index is padding: it adds nothing, and its value's gradient is 0. `needs` is as in dense_schemas.h, and a gradient
// that is not wanted is absent.
// sparse_decode: bias (D,) + Σ_j values[n, j] weight[indices[n, j]], (N, D), of which grad is the gradient; `needs` has
// bit 0 set if that of values is wanted.
// topk_encode: the k largest of x weight^T + bias, bias (F,), of each row, the largest first and of equals the one of
// the lower index; NaN counts as the largest of all. Their values and indices; grad (N, k) is the gradient of the values.
// largest: the same of a matrix (N, F) that is there, written to values and indices (N, k).
#pragma once

#include <array>

namespace aefast::sparse {

constexpr std::array<const char*, 2> kSparseDecodeSchemas = {
    "sparse_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",

    "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor weight, int needs) "
    "-> (Tensor?, Tensor?, Tensor?)",
};

constexpr std::array<const char*, 2> kTopkEncodeSchemas = {
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)",

    "topk_encode_backward(Tensor grad, Tensor indices, Tensor x, Tensor weight, int needs) "
    "-> (Tensor?, Tensor?, Tensor?)",
};

constexpr const char* kLargestSchema = "largest(Tensor elements, Tensor(a!) values, Tensor(b!) indices) -> ()";

}  // namespace aefast::sparse
