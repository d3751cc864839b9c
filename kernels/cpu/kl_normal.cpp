#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "random_schemas.h"
#include "sampling.h"

namespace aefast::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor kl_normal(Tensor mu, Tensor logvar) {
  mu = with_unit_columns(mu);
  logvar = with_unit_columns(logvar);
  const Moments moments = moments_of(mu, logvar, -kInfinity, kInfinity);
  const Tensor kl = new_sums(mu, mu.size(0));
  sample(scalar_of(mu), mu.size(0), moments, 0, nullptr, kl);
  return kl;
}

std::tuple<Tensor, Tensor> kl_normal_backward(Tensor grad, Tensor mu, Tensor logvar) {
  mu = with_unit_columns(mu);
  logvar = with_unit_columns(logvar);
  const Moments moments = moments_of(mu, logvar, -kInfinity, kInfinity);
  const int64_t rows = mu.size(0), cols = mu.size(1);
  check_row_values("grad", grad, rows, mu);
  const Tensor mu_gradient = new_matrix(mu, rows, cols), logvar_gradient = new_matrix(mu, rows, cols);
  sample_gradient(scalar_of(mu), rows, moments, 0,
                  {nullptr, 0, grad.const_data_ptr(), grad.stride(0), mu_gradient.mutable_data_ptr(),
                   logvar_gradient.mutable_data_ptr(), cols});
  return {mu_gradient, logvar_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : random::kKlNormalSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("kl_normal", TORCH_BOX(&kl_normal));
  m.impl("kl_normal_backward", TORCH_BOX(&kl_normal_backward));
}

}  // namespace aefast::cpu
