// The largest elements of rows on CUDA: the operator around the kernel of selection_kernels.cuh.
#include "device.h"
#include "selection_kernels.cuh"
#include "sparse_schemas.h"
#include "tensors.h"

namespace {

using aefast::Device;
using aefast::with_element_type;
using aefast::cuda::kMostColumns;
using aefast::cuda::kMostLargest;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void largest(const Tensor& elements, const Tensor& values, const Tensor& indices) {
  STD_TORCH_CHECK(elements.dim() == 2 && values.dim() == 2, "elements and values must be matrices");
  const int64_t rows = elements.size(0), columns = elements.size(1), k = values.size(1);
  aefast::check_matrix("values", values, rows, k, elements);
  STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == rows && indices.size(1) == k &&
                      indices.scalar_type() == ScalarType::Long,
                  "indices must be (", rows, ", ", k, ") of int64");
  STD_TORCH_CHECK(elements.is_contiguous() && values.is_contiguous() && indices.is_contiguous(),
                  "elements, values and indices must be contiguous");
  STD_TORCH_CHECK(columns <= kMostColumns, "elements must have at most ", kMostColumns, " columns, got ", columns);
  STD_TORCH_CHECK(1 <= k && k <= columns && k <= kMostLargest, "k must be from 1 to ", kMostLargest,
                  " and the columns, got ", k, " of ", columns);
  const Device::Scope scope(elements);
  with_element_type(elements, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, "elements must be float32, float16 or bfloat16");
    } else {
      aefast::cuda::launch_largest(static_cast<const T*>(elements.data_ptr()), static_cast<T*>(values.data_ptr()),
                                   static_cast<int64_t*>(indices.data_ptr()), rows, static_cast<int>(columns),
                                   static_cast<int>(k), Device::stream(elements));
    }
  });
  Device::check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(AEFAST_LIBRARY, m) { m.def(aefast::sparse::kLargestSchema); }

STABLE_TORCH_LIBRARY_IMPL(AEFAST_LIBRARY, AEFAST_DISPATCH_KEY, m) { m.impl("largest", TORCH_BOX(&largest)); }
