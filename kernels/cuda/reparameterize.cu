// reparameterize and kl_normal on CUDA: the operators around the kernels of reparameterize_kernels.cuh.
#include <limits>

#include "device.h"
#include "random_schemas.h"
#include "reparameterize_kernels.cuh"
#include "tensors.h"

namespace {

using aefast::accumulator_type;
using aefast::check_seed;
using aefast::Device;
using aefast::cuda::Compute;
using aefast::cuda::Operand;
using aefast::cuda::RowTiling;
using aefast::cuda::RowValues;
using aefast::empty;
using aefast::OptionalTensor;
using aefast::with_element_type;
using torch::stable::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_parameters(const Tensor& mu, const Tensor& logvar) {
  STD_TORCH_CHECK(mu.dim() == 2, "mu must be a matrix");
  aefast::check_matrix("logvar", logvar, mu.size(0), mu.size(1), mu);
}

const int64_t* seed_of(const Tensor& seed) { return static_cast<const int64_t*>(seed.data_ptr()); }

template <typename T>
Operand<T> operand_of(const Tensor& matrix, const RowTiling& tiling) {
  return aefast::cuda::operand(static_cast<const T*>(matrix.data_ptr()), matrix.stride(0), matrix.stride(1), tiling);
}

// z is null, and seed with it, for the divergence alone.
Tensor divergence_of(const Tensor& mu, const Tensor& logvar, const Tensor* seed, const Tensor* z, double low,
                     double high) {
  Tensor divergence = empty(mu, accumulator_type(mu), {mu.size(0)});
  with_element_type(mu, [&](auto zero) {
    using T = decltype(zero);
    const RowTiling tiling = aefast::cuda::row_tiling<T>(mu.size(0), mu.size(1));
    aefast::cuda::launch_reparameterize<T>(
        operand_of<T>(mu, tiling), operand_of<T>(logvar, tiling), seed == nullptr ? nullptr : seed_of(*seed),
        z == nullptr ? nullptr : static_cast<T*>(z->data_ptr()), static_cast<Compute<T>*>(divergence.data_ptr()), low,
        high, tiling, Device::stream(mu));
  });
  Device::check_launch();
  return divergence;
}

// Of grad_z and grad_kl one may be null, and seed with the former.
std::tuple<Tensor, Tensor> gradients_of(const Tensor* grad_z, const Tensor* grad_kl, const Tensor& mu,
                                        const Tensor& logvar, const Tensor* seed, double low, double high) {
  if (grad_kl != nullptr) {
    STD_TORCH_CHECK(grad_kl->dim() == 1 && grad_kl->size(0) == mu.size(0) &&
                        grad_kl->scalar_type() == accumulator_type(mu),
                    "the divergence's gradient must be (", mu.size(0), ",) of the divergence's dtype");
  }
  std::tuple<Tensor, Tensor> gradients{empty(mu, {mu.size(0), mu.size(1)}), empty(mu, {mu.size(0), mu.size(1)})};
  with_element_type(mu, [&](auto zero) {
    using T = decltype(zero);
    const RowTiling tiling = aefast::cuda::row_tiling<T>(mu.size(0), mu.size(1));
    Operand<T> upstream{};
    RowValues<Compute<T>> of_divergence{};
    if (grad_z != nullptr) upstream = operand_of<T>(*grad_z, tiling);
    if (grad_kl != nullptr) {
      of_divergence = {static_cast<const Compute<T>*>(grad_kl->data_ptr()), grad_kl->stride(0)};
    }
    aefast::cuda::launch_reparameterize_gradient<T>(
        upstream, of_divergence, operand_of<T>(mu, tiling), operand_of<T>(logvar, tiling),
        seed == nullptr ? nullptr : seed_of(*seed), static_cast<T*>(std::get<0>(gradients).data_ptr()),
        static_cast<T*>(std::get<1>(gradients).data_ptr()), low, high, tiling, Device::stream(mu));
  });
  Device::check_launch();
  return gradients;
}

std::tuple<Tensor, Tensor> reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& seed, double low,
                                          double high) {
  check_parameters(mu, logvar);
  check_seed(seed);
  const Device::Scope scope(mu);
  Tensor z = empty(mu, {mu.size(0), mu.size(1)});
  Tensor divergence = divergence_of(mu, logvar, &seed, &z, low, high);
  return {z, divergence};
}

std::tuple<Tensor, Tensor> reparameterize_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                                   const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                   double low, double high) {
  check_parameters(mu, logvar);
  check_seed(seed);
  STD_TORCH_CHECK(grad_z || grad_kl, "of grad_z and grad_kl at least one must be given");
  if (grad_z) aefast::check_matrix("grad_z", *grad_z, mu.size(0), mu.size(1), mu);
  const Device::Scope scope(mu);
  return gradients_of(grad_z ? &*grad_z : nullptr, grad_kl ? &*grad_kl : nullptr, mu, logvar, &seed, low, high);
}

Tensor kl_normal(const Tensor& mu, const Tensor& logvar) {
  check_parameters(mu, logvar);
  const Device::Scope scope(mu);
  return divergence_of(mu, logvar, nullptr, nullptr, -kInfinity, kInfinity);
}

std::tuple<Tensor, Tensor> kl_normal_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar) {
  check_parameters(mu, logvar);
  const Device::Scope scope(mu);
  return gradients_of(nullptr, &grad, mu, logvar, nullptr, -kInfinity, kInfinity);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(AEFAST_LIBRARY, m) {
  for (const char* schema : aefast::random::kReparameterizeSchemas) m.def(schema);
  for (const char* schema : aefast::random::kKlNormalSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(AEFAST_LIBRARY, AEFAST_DISPATCH_KEY, m) {
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
  m.impl("kl_normal", TORCH_BOX(&kl_normal));
  m.impl("kl_normal_backward", TORCH_BOX(&kl_normal_backward));
}
