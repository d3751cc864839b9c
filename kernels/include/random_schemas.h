// The schemas under which the compiled libraries register the launchers of noise and of divergences.
//
// Shapes: mu, logvar, p, q and grad_z (B, D), of any strides; z and the gradients are contiguous, of mu's dtype. A
// divergence, grad_kl and grad of one are (B,), one value a row: the divergences float32, or float64 for float64; what
// comes in of any stride. seed is an int64 scalar on the device of the others, and element row * D + column takes that
// word of its noise. logvar counts as its nearest value in [low, high], and has no gradient outside of it. The
// reparameterize launchers give (z, divergence) and the gradients of (mu, logvar); of grad_z and grad_kl one may be
// absent, which stands for zeros.
// corrupt: x and the result of any shape, contiguous; (N, C, H, W) for a block above 1. `kind`, `first`, `second`,
// `limit` and `block` as in Noise of aefast/ops/corrupt.py.
// gaussian_head: h (M, K), weight (2 D, K), bias (2 D,), giving z (M, D), the divergences (M,) and moments (M, 2 D),
// which are [mu | logvar]. Each of the three incoming gradients may be absent. `needs` has bit 0 set if h's gradient is
// wanted, bit 1 weight's, bit 2 bias's.
#pragma once

#include <array>

namespace aefast::random {

constexpr std::array<const char*, 2> kReparameterizeSchemas = {
    "reparameterize(Tensor mu, Tensor logvar, Tensor seed, float low, float high) -> (Tensor, Tensor)",

    "reparameterize_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed, float low, "
    "float high) -> (Tensor, Tensor)",
};

constexpr std::array<const char*, 2> kKlNormalSchemas = {
    "kl_normal(Tensor mu, Tensor logvar) -> Tensor",

    "kl_normal_backward(Tensor grad, Tensor mu, Tensor logvar) -> (Tensor, Tensor)",
};

constexpr std::array<const char*, 2> kKlDiscreteSchemas = {
    "kl_discrete(Tensor p, Tensor q) -> Tensor",

    "kl_discrete_backward(Tensor grad, Tensor p, Tensor q) -> (Tensor, Tensor)",
};

constexpr std::array<const char*, 1> kCorruptSchemas = {
    "corrupt(Tensor x, Tensor seed, str kind, float first, float second, int limit, int block) -> Tensor",
};

constexpr std::array<const char*, 2> kGaussianHeadSchemas = {
    "gaussian_head(Tensor h, Tensor weight, Tensor? bias, Tensor seed, float low, float high) "
    "-> (Tensor, Tensor, Tensor)",

    "gaussian_head_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_moments, Tensor h, Tensor weight, "
    "Tensor moments, Tensor seed, float low, float high, int needs) -> (Tensor?, Tensor?, Tensor?)",
};

}  // namespace aefast::random
