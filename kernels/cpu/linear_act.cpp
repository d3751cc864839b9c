#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense.h"
#include "dense_schemas.h"
#include "dispatch.h"
#include "memory.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

std::tuple<Tensor, OptionalTensor> linear_act(Tensor x, Tensor weight, OptionalTensor bias, String activation,
                                              bool save_derivative) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, bias, x.size(1), x);
  const ActivationSpec spec = activation_spec(activation);
  const Tensor out = new_matrix(x, x.size(0), weight.size(0));
  OptionalTensor derivative;
  if (save_derivative && stores_derivative(spec.activation)) derivative = new_matrix(x, x.size(0), weight.size(0));
  LayerForward layer{spec, matrix_of(weight), vector_of(bias), matrix_of(out), matrix_of(derivative)};
  dense_forward(matrix_of(x), &layer, 1);
  return {out, derivative};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> linear_act_backward(
    Tensor grad, Tensor x, Tensor weight, OptionalTensor saved, String activation, int64_t needs) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, std::nullopt, x.size(1), x);
  check_matrix("grad", grad, x.size(0), weight.size(0), x);
  const ActivationSpec spec = activation_spec(activation);
  if (spec.activation != Activation::identity) {
    STD_TORCH_CHECK(saved, "saved must be given for every activation but identity");
    check_matrix("saved", *saved, x.size(0), weight.size(0), x);
  }
  OptionalTensor x_gradient, weight_gradient, bias_gradient;
  if (needs & dense::kNeedX) x_gradient = new_matrix(x, x.size(0), x.size(1));
  if (needs & dense::kNeedWeight) weight_gradient = new_matrix(x, weight.size(0), weight.size(1));
  if (needs & dense::kNeedBias) bias_gradient = new_vector(x, weight.size(0));
  LayerBackward layer{spec, matrix_of(weight), matrix_of(x), matrix_of(saved), matrix_of(weight_gradient),
                      vector_of(bias_gradient)};
  dense_backward(matrix_of(grad), &layer, 1, matrix_of(x_gradient));
  return {x_gradient, weight_gradient, bias_gradient};
}

void choose_instruction_set(String name) {
  STD_TORCH_CHECK(use_instruction_set(name), "this processor has no ", name);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : dense::kLinearActSchemas) m.def(schema);
  m.def("instruction_set() -> str");
  m.def("supported_instruction_sets() -> str[]");
  m.def("use_instruction_set(str name) -> ()");
  m.def("poison_outputs(bool poison) -> ()");
  m.def("keep_memory(int bytes) -> int");
  m.def("use_bfloat16_products(bool use) -> bool");
  m.def("use_large_blas_products(bool use) -> bool");
  m.def("round_products(bool round) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&linear_act));
  m.impl("linear_act_backward", TORCH_BOX(&linear_act_backward));
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("supported_instruction_sets", TORCH_BOX(&supported_instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&choose_instruction_set));
  m.impl("poison_outputs", TORCH_BOX(&poison_outputs));
  m.impl("keep_memory", TORCH_BOX(&keep_memory));
  m.impl("use_bfloat16_products", TORCH_BOX(&use_bfloat16_products));
  m.impl("use_large_blas_products", TORCH_BOX(&use_large_blas_products));
  m.impl("round_products", TORCH_BOX(&round_products));
}

}  // namespace aefast::cpu
