#include "matrix.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "allocation.h"
#include "memory.h"

// Of torch 2.11 and above; null with those before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace aefast::cpu {

namespace {

const int32_t cpu = aoti_torch_device_type_cpu();

}  // namespace

int32_t cpu_device() { return cpu; }

namespace {

using torch::headeronly::ScalarType;

ScalarType torch_type(Scalar scalar) {
  switch (scalar) {
    case Scalar::float32: return ScalarType::Float;
    case Scalar::float64: return ScalarType::Double;
    case Scalar::bfloat16: return ScalarType::BFloat16;
    case Scalar::float16: return ScalarType::Half;
  }
  return ScalarType::Undefined;
}

Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Double: return Scalar::float64;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: STD_TORCH_CHECK(false, "aefast: dtype must be float32, float64, bfloat16 or float16"); return {};
  }
}

std::atomic<bool> poisoned{false};

// Of kept memory if it is large, else of torch's.
Tensor empty(ScalarType type, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  size_t bytes = size_of(scalar_of(type));
  for (int64_t dim = 0; dim < dims; ++dim) bytes *= static_cast<size_t>(sizes[dim]);
  if (Block* const block = torch_from_blob ? take_block(bytes) : nullptr) {
    AtenTensorHandle handle;
    const auto deleter = [](void*, void* context) { give_back(static_cast<Block*>(context)); };
    TORCH_ERROR_CODE_CHECK(torch_from_blob(data_of(block), dims, sizes, strides, 0, static_cast<int32_t>(type),
                                           cpu_device(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, deleter,
                                           block));
    return Tensor(handle);
  }
  return Tensor(allocated(dims, sizes, strides, static_cast<int32_t>(type), cpu_device(), 0));
}

Tensor new_tensor(ScalarType type, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  const Tensor out = empty(type, dims, sizes, strides);
  // All bits set are a NaN in every floating type.
  if (poisoned.load(std::memory_order_relaxed) && out.numel() > 0)
    std::memset(out.mutable_data_ptr(), 0xff, out.numel() * size_of(scalar_of(type)));
  return out;
}

}  // namespace

Scalar scalar_of(const Tensor& tensor) { return scalar_of(tensor.scalar_type()); }

Scalar accumulator_of(Scalar scalar) { return scalar == Scalar::float64 ? Scalar::float64 : Scalar::float32; }

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.data_ptr(), scalar_of(tensor), tensor.size(0),
          tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

Matrix matrix_of(const OptionalTensor& tensor) { return tensor ? matrix_of(*tensor) : Matrix(); }

Matrix vector_of(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {tensor->data_ptr(), scalar_of(*tensor), 1, tensor->size(0), tensor->size(0), tensor->stride(0)};
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(1, cols), 1};
  return new_tensor(like.scalar_type(), 2, sizes, strides);
}

Tensor new_vector(const Tensor& like, int64_t size) {
  const int64_t stride = 1;
  return new_tensor(like.scalar_type(), 1, &size, &stride);
}

Tensor new_like(const Tensor& like) {
  std::vector<int64_t> sizes(like.dim()), strides(like.dim());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    sizes[dim] = like.size(dim);
    strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes[dim]);
  }
  return new_tensor(like.scalar_type(), like.dim(), sizes.data(), strides.data());
}

Tensor new_in_layout(const Tensor& like, Scalar scalar) {
  std::vector<int64_t> sizes(like.dim()), strides(like.dim());
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    sizes[dim] = like.size(dim);
    strides[dim] = like.stride(dim);
  }
  return new_tensor(torch_type(scalar), like.dim(), sizes.data(), strides.data());
}

Tensor new_sums(const Tensor& like, int64_t size) {
  const int64_t stride = 1;
  return new_tensor(torch_type(accumulator_of(scalar_of(like))), 1, &size, &stride);
}

Tensor new_accumulators(const Tensor& like, int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(1, cols), 1};
  return new_tensor(torch_type(accumulator_of(scalar_of(like))), 2, sizes, strides);
}

Tensor new_scalar(const Tensor& like, double value) {
  const Scalar scalar = accumulator_of(scalar_of(like));
  const Tensor out = new_tensor(torch_type(scalar), 0, nullptr, nullptr);
  if (scalar == Scalar::float64)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

Tensor new_indices(int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(1, cols), 1};
  return Tensor(allocated(2, sizes, strides, static_cast<int32_t>(ScalarType::Long), cpu_device(), 0));
}

void poison_outputs(bool poison) { poisoned = poison; }

bool has_layout(const Tensor& tensor, const Tensor& like) {
  if (tensor.dim() != like.dim()) return false;
  const bool is_empty = like.numel() == 0;
  int64_t unseen = 0;
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    if (tensor.size(dim) != like.size(dim)) return false;
    if (like.size(dim) == 1) continue;
    if (!is_empty && tensor.stride(dim) != like.stride(dim)) return false;
    ++unseen;
  }
  if (is_empty) return true;
  // From the innermost dimension on, each strides over all that is within it.
  for (int64_t stride = 1; unseen > 0; --unseen) {
    int64_t dim = 0;
    while (dim < like.dim() && (like.size(dim) == 1 || like.stride(dim) != stride)) ++dim;
    if (dim == like.dim()) return false;
    stride *= like.size(dim);
  }
  return true;
}

void check_layout(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(has_layout(tensor, like), name,
                  " must have the shape and the strides of the other tensors, without gaps or overlaps");
}

Tensor borrow(Matrix matrix) {
  const int64_t sizes[] = {matrix.rows, matrix.cols};
  const int64_t strides[] = {matrix.row_stride, matrix.col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(matrix.data, 2, sizes, strides, 0,
                                                            static_cast<int32_t>(torch_type(matrix.scalar)),
                                                            cpu_device(), 0, &handle));
  return Tensor(handle);
}

}  // namespace aefast::cpu
