// The noise itself, by which tests know what the other operators draw.
#include <torch/csrc/stable/library.h>

#include "sampling.h"

namespace aefast::cpu {
namespace {

// out (n,) takes normal values, if it is float32, or else, being int32, words, of elements first to first + n - 1.
void noise_(Tensor out, Tensor seed, int64_t first) {
  STD_TORCH_CHECK(out.is_contiguous() && first >= 0, "out must be contiguous, and first not negative");
  if (out.scalar_type() == torch::headeronly::ScalarType::Int)
    random_kernels().words(seed_of(seed), first, out.numel(), static_cast<uint32_t*>(out.mutable_data_ptr()));
  else if (out.scalar_type() == torch::headeronly::ScalarType::Float)
    random_kernels().normals(seed_of(seed), first, out.numel(), static_cast<float*>(out.mutable_data_ptr()));
  else
    STD_TORCH_CHECK(false, "out must be float32 or int32");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) { m.def("noise_(Tensor(a!) out, Tensor seed, int first) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("noise_", TORCH_BOX(&noise_)); }

}  // namespace aefast::cpu
