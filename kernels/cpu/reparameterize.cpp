#include <torch/csrc/stable/library.h>

#include <tuple>

#include "random_schemas.h"
#include "sampling.h"

namespace aefast::cpu {
namespace {

std::tuple<Tensor, Tensor> reparameterize(Tensor mu, Tensor logvar, Tensor seed, double low, double high) {
  mu = with_unit_columns(mu);
  logvar = with_unit_columns(logvar);
  const Moments moments = moments_of(mu, logvar, low, high);
  const Tensor z = new_matrix(mu, mu.size(0), mu.size(1)), kl = new_sums(mu, mu.size(0));
  sample(scalar_of(mu), mu.size(0), moments, seed_of(seed), z.mutable_data_ptr(), kl);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_backward(OptionalTensor grad_z, OptionalTensor grad_kl, Tensor mu,
                                                   Tensor logvar, Tensor seed, double low, double high) {
  STD_TORCH_CHECK(grad_z || grad_kl, "one of grad_z and grad_kl must be given");
  mu = with_unit_columns(mu);
  logvar = with_unit_columns(logvar);
  const Moments moments = moments_of(mu, logvar, low, high);
  const int64_t rows = mu.size(0), cols = mu.size(1);
  if (grad_z) {
    check_matrix("grad_z", *grad_z, rows, cols, mu);
    grad_z = with_unit_columns(*grad_z);
  }
  if (grad_kl) check_row_values("grad_kl", *grad_kl, rows, mu);
  const Tensor mu_gradient = new_matrix(mu, rows, cols), logvar_gradient = new_matrix(mu, rows, cols);
  sample_gradient(scalar_of(mu), rows, moments, seed_of(seed),
                  {grad_z ? grad_z->const_data_ptr() : nullptr, grad_z ? grad_z->stride(0) : 0,
                   grad_kl ? grad_kl->const_data_ptr() : nullptr, grad_kl ? grad_kl->stride(0) : 0,
                   mu_gradient.mutable_data_ptr(), logvar_gradient.mutable_data_ptr(), cols});
  return {mu_gradient, logvar_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : random::kReparameterizeSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
}

}  // namespace aefast::cpu
