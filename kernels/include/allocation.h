// Tensors of torch's allocator, and what it says where it has no memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Of torch 2.13 and above; null with those before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace aefast {

// An uninitialised tensor. The macros that check torch's calls say before torch 2.13 which call has failed, and not why.
inline AtenTensorHandle allocated(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                  int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle) == AOTI_TORCH_SUCCESS) {
    return handle;
  }
  if (torch_exception_get_what_without_backtrace) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
  std::string shape;
  for (int64_t dim = 0; dim < dims; ++dim) shape += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
  // Code that goes on with a smaller batch knows these words.
  const char* const reason = device_type == aoti_torch_device_type_cuda() ? "CUDA out of memory." : "out of memory.";
  throw std::runtime_error(reason + (" Tried to allocate a tensor of shape (" + shape) +
                           "); PyTorch has written its own message to standard error");
}

}  // namespace aefast
