// What the operators need of a device: to make it current, its stream, its GEMMs, and its launch errors.
//
// The GEMMs are ATen's own, called below the dispatcher, so they follow torch.backends (TF32, reduced
// precision reductions, the preferred BLAS library) and use the user's cuBLAS.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#define AEFAST_LIBRARY aefast_cuda
#define AEFAST_DISPATCH_KEY CUDA

namespace aefast {

using torch::stable::Tensor;

struct Device {
  struct Scope {
    explicit Scope(const Tensor& on) : guard(on.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static cudaStream_t stream(const Tensor& on) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  static void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

  // out = bias + a @ b; bias (N,) is broadcast over the rows, and added in cuBLASLt's epilogue where ATen can.
  static void addmm(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
  }

  static void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  }
};

}  // namespace aefast

#else
#include "emulated_device.h"
#endif
