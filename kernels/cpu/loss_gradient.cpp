#include <torch/csrc/stable/library.h>

#include "loss_schemas.h"
#include "losses.h"
#include "matrix.h"
#include "parallel.h"

namespace aefast::cpu {
namespace {

double value_at(const Tensor& grad, int64_t index) {
  return scalar_of(grad) == Scalar::float64 ? static_cast<const double*>(grad.const_data_ptr())[index]
                                            : static_cast<const float*>(grad.const_data_ptr())[index];
}

Tensor loss_gradient(Tensor gradient, Tensor grad, double normalizer) {
  check_layout("gradient", gradient, gradient);
  const Scalar scalar = scalar_of(gradient);
  STD_TORCH_CHECK(scalar_of(grad) == accumulator_of(scalar), "grad must have the dtype of the loss");
  const int64_t size = gradient.numel(), samples = grad.dim() == 0 ? 1 : grad.numel();
  const int64_t each = samples > 0 ? size / samples : 0;
  STD_TORCH_CHECK(grad.dim() == 0 || (grad.dim() == 1 && gradient.dim() > 0 && gradient.size(0) == samples &&
                                      (samples <= 1 || size == 0 || gradient.stride(0) == each)),
                  "grad must be a scalar or (B,), B the outermost dimension of the gradient");
  const Tensor out = new_in_layout(gradient, scalar);
  const int64_t stride = grad.dim() == 0 ? 0 : grad.stride(0);
  const void* const in = gradient.const_data_ptr();
  void* const to = out.mutable_data_ptr();
  // Tasks are of elements, whatever samples they belong to.
  for_tasks(size, 1, 1, [&](int64_t first, int64_t count) {
    for (int64_t end = first + count; first < end;) {
      const int64_t sample = first / each, rest = (sample + 1) * each - first, some = rest < end - first ? rest : end - first;
      loss_kernels().scaled(scalar, normalizer * value_at(grad, sample * stride), in, to, first, some);
      first += some;
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : loss::kLossGradientSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("loss_gradient", TORCH_BOX(&loss_gradient)); }

}  // namespace aefast::cpu
