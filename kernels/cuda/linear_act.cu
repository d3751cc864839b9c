// linear_act and mlp on CUDA: ATen's GEMMs, and between them the kernels of linear_act_kernels.cuh.
#include "device.h"
#include "linear_act_kernels.cuh"
#include "operators.h"
#include "tensors.h"

namespace {

using aefast::Device;
using aefast::ActivationSpec;
using aefast::with_element_type;
using torch::stable::Tensor;

template <typename T>
T* data(const Tensor* tensor) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor->data_ptr());
}

struct Backend : Device {
  static void activate(const Tensor& values, const Tensor* derivative, const ActivationSpec& spec) {
    with_element_type(values, [&](auto zero) {
      using T = decltype(zero);
      aefast::cuda::launch_activation<T>(spec.activation, spec.parameters, data<T>(&values), data<T>(derivative),
                                         values.numel(), stream(values));
    });
    check_launch();
  }

  static void activation_gradient(const Tensor& grad, const Tensor* saved, const Tensor* g, const Tensor* bias_grad,
                                  const ActivationSpec& spec) {
    with_element_type(grad, [&](auto zero) {
      using T = decltype(zero);
      using C = aefast::cuda::Compute<T>;
      const auto tiling = aefast::cuda::gradient_tiling<T>(grad.size(0), grad.size(1));
      const auto current_stream = stream(grad);
      std::optional<Tensor> partials;
      if (bias_grad != nullptr) {
        partials = aefast::empty(grad, aefast::accumulator_type(grad), {tiling.row_blocks, tiling.cols});
      }
      C* const partial_sums = partials ? static_cast<C*>(partials->data_ptr()) : nullptr;
      aefast::cuda::launch_activation_gradient<T>(spec.activation, spec.parameters, data<T>(&grad), data<T>(saved),
                                                  data<T>(g), partial_sums, tiling, current_stream);
      check_launch();
      if (bias_grad != nullptr) {
        aefast::cuda::launch_column_sum<T>(partial_sums, data<T>(bias_grad), tiling.row_blocks, tiling.cols,
                                           current_stream);
        check_launch();
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(AEFAST_LIBRARY, m) {
  for (const char* schema : aefast::dense::kLinearActSchemas) m.def(schema);
  for (const char* schema : aefast::dense::kMlpSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(AEFAST_LIBRARY, AEFAST_DISPATCH_KEY, m) { aefast::dense::implement<Backend>(m); }
