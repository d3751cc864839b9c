#include <torch/csrc/stable/library.h>

#include <tuple>

#include "random_schemas.h"
#include "sampling.h"

namespace aefast::cpu {
namespace {

Tensor kl_discrete(Tensor p, Tensor q) {
  STD_TORCH_CHECK(p.dim() == 2, "p must be a matrix");
  const int64_t rows = p.size(0), cols = p.size(1);
  check_matrix("q", q, rows, cols, p);
  p = with_unit_columns(p);
  q = with_unit_columns(q);
  const Tensor kl = new_sums(p, rows);
  for_tasks(rows, cols, 1, [&](int64_t first, int64_t count) {
    random_kernels().divergence(scalar_of(p), p.const_data_ptr(), p.stride(0), q.const_data_ptr(), q.stride(0),
                                kl.mutable_data_ptr(), cols, first, count);
  });
  return kl;
}

std::tuple<Tensor, Tensor> kl_discrete_backward(Tensor grad, Tensor p, Tensor q) {
  STD_TORCH_CHECK(p.dim() == 2, "p must be a matrix");
  const int64_t rows = p.size(0), cols = p.size(1);
  check_matrix("q", q, rows, cols, p);
  check_row_values("grad", grad, rows, p);
  p = with_unit_columns(p);
  q = with_unit_columns(q);
  const Tensor p_gradient = new_matrix(p, rows, cols), q_gradient = new_matrix(p, rows, cols);
  for_tasks(rows, cols, 1, [&](int64_t first, int64_t count) {
    random_kernels().divergence_gradient(scalar_of(p), grad.const_data_ptr(), grad.stride(0), p.const_data_ptr(),
                                         p.stride(0), q.const_data_ptr(), q.stride(0), p_gradient.mutable_data_ptr(),
                                         q_gradient.mutable_data_ptr(), cols, first, count);
  });
  return {p_gradient, q_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : random::kKlDiscreteSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("kl_discrete", TORCH_BOX(&kl_discrete));
  m.impl("kl_discrete_backward", TORCH_BOX(&kl_discrete_backward));
}

}  // namespace aefast::cpu
