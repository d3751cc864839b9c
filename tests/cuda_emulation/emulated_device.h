// kernels/cuda/device.h for the emulation: the operators run whole on CPU tensors, with ATen's CPU GEMMs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cuda_emulation.h"

#define AEFAST_LIBRARY aefast_cuda_emulation
#define AEFAST_DISPATCH_KEY CPU

namespace aefast {

using torch::stable::Tensor;

struct Device {
  struct Scope {
    explicit Scope(const Tensor&) {}
  };

  static cudaStream_t stream(const Tensor&) { return nullptr; }

  static void check_launch() {}

  static void addmm(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
  }

  static void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
};

}  // namespace aefast
