#include "pointwise.h"

namespace aefast::cpu {

#define AEFAST_DECLARE(instruction_set)              \
  namespace instruction_set {                        \
  extern const PointwiseKernels pointwise_kernels;   \
  }
AEFAST_DECLARE(baseline)
#if defined(__x86_64__)
AEFAST_DECLARE(avx2)
AEFAST_DECLARE(avx512)
#endif

namespace {

const PointwiseKernels& select() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::pointwise_kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::pointwise_kernels;
#endif
  return baseline::pointwise_kernels;
}

}  // namespace

const PointwiseKernels& pointwise() {
  static const PointwiseKernels& chosen = select();
  return chosen;
}

}  // namespace aefast::cpu
