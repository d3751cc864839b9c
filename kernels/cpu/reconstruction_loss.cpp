#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "loss_schemas.h"
#include "losses.h"
#include "matrix.h"
#include "parallel.h"
#include "string_argument.h"

namespace aefast::cpu {

loss::Spec spec_of(const char* kind, double parameter) {
  const auto found = std::find(std::begin(loss::kKindNames), std::end(loss::kKindNames), std::string(kind));
  STD_TORCH_CHECK(found != std::end(loss::kKindNames), "unknown loss ", kind);
  return {static_cast<loss::Kind>(found - std::begin(loss::kKindNames)), parameter};
}

void check_range(const LossSum& sum, bool checked) {
  STD_TORCH_CHECK(!checked || !sum.is_outside, "probabilities must be from 0 to 1");
}

LossSum sum_of(const LossSum* parts, int64_t count) {
  LossSum total{0.0, false};
  for (int64_t index = 0; index < count; ++index) {
    total.value += parts[index].value;
    total.is_outside |= parts[index].is_outside;
  }
  return total;
}

namespace {

LossOperands operands_of(const Tensor& input, const Tensor& target, const std::string& kind, double parameter) {
  check_layout("target", target, input);
  STD_TORCH_CHECK(target.scalar_type() == input.scalar_type(), "target must have the dtype of input");
  return {scalar_of(input), spec_of(kind.c_str(), parameter), input.const_data_ptr(), target.const_data_ptr()};
}

// run(first, count) over the elements, in tasks that do not depend on the threads; the sum of what it finds, in order.
template <typename Run>
LossSum sum_of_tasks(int64_t size, const Run& run) {
  std::vector<LossSum> parts((size + kElementsOfTask - 1) / kElementsOfTask);
  for_tasks(size, 1, 1, [&](int64_t first, int64_t count) { parts[first / kElementsOfTask] = run(first, count); });
  return sum_of(parts.data(), static_cast<int64_t>(parts.size()));
}

std::tuple<Tensor, Tensor> reconstruction_loss(Tensor input, Tensor target, String kind, double parameter,
                                               double normalizer, bool root, double scale, bool with_gradient,
                                               bool checked) {
  const LossOperands operands = operands_of(input, target, kind, parameter);
  const Tensor gradient = with_gradient ? new_in_layout(input, operands.scalar) : new_vector(input, 0);
  void* const to = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  const LossSum sum = sum_of_tasks(input.numel(), [&](int64_t first, int64_t count) {
    return loss_kernels().sum(operands, scale, to, first, count);
  });
  check_range(sum, checked);
  const double value = normalizer * sum.value;
  return {new_scalar(input, root ? std::sqrt(value) : value), gradient};
}

Tensor reconstruction_loss_elements(Tensor input, Tensor target, String kind, double parameter, bool checked) {
  const LossOperands operands = operands_of(input, target, kind, parameter);
  const Tensor out = new_in_layout(input, accumulator_of(operands.scalar));
  void* const to = out.mutable_data_ptr();
  const LossSum sum = sum_of_tasks(input.numel(), [&](int64_t first, int64_t count) {
    return loss_kernels().elements(operands, to, first, count);
  });
  check_range(sum, checked);
  return out;
}

Tensor reconstruction_loss_backward(Tensor grad, Tensor input, Tensor target, String kind, double parameter,
                                    double normalizer) {
  const LossOperands operands = operands_of(input, target, kind, parameter);
  STD_TORCH_CHECK(scalar_of(grad) == accumulator_of(operands.scalar), "grad must have the dtype of the loss");
  const Tensor gradient = new_in_layout(input, operands.scalar);
  void* const to = gradient.mutable_data_ptr();
  const void* grads = grad.const_data_ptr();
  if (grad.dim() == 0 && input.dim() > 0) {
    normalizer *= operands.scalar == Scalar::float64 ? *static_cast<const double*>(grads) : *static_cast<const float*>(grads);
    grads = nullptr;
  } else {
    check_layout("grad", grad, input);
  }
  for_tasks(input.numel(), 1, 1, [&](int64_t first, int64_t count) {
    loss_kernels().elements_gradient(operands, normalizer, grads, to, first, count);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : loss::kReconstructionLossSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("reconstruction_loss", TORCH_BOX(&reconstruction_loss));
  m.impl("reconstruction_loss_elements", TORCH_BOX(&reconstruction_loss_elements));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&reconstruction_loss_backward));
}

}  // namespace aefast::cpu
