#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>

#include "losses.h"
#include "optimizer.h"
#include "pairwise.h"
#include "penalty.h"
#include "pointwise.h"
#include "product.h"
#include "pyramid.h"
#include "random.h"
#include "sparse.h"

namespace aefast::cpu {

#define AEFAST_DECLARE(instruction_set)            \
  namespace instruction_set {                      \
  extern const LossKernels loss_kernels;           \
  extern const OptimizerKernels optimizer_kernels; \
  extern const PairwiseKernels pairwise_kernels;   \
  extern const PenaltyKernels penalty_kernels;     \
  extern const PointwiseKernels pointwise_kernels; \
  extern const ProductKernels product_kernels;     \
  extern const PyramidKernels pyramid_kernels;     \
  extern const RandomKernels random_kernels;       \
  extern const SparseKernels sparse_kernels;       \
  }
AEFAST_DECLARE(baseline)
#if defined(__x86_64__)
AEFAST_DECLARE(avx2)
AEFAST_DECLARE(avx512)
#endif
#if defined(AEFAST_VECTOR_BFLOAT16)
namespace avx512bf16 {
extern const ProductKernels product_kernels;
}
#endif
#if defined(AEFAST_MATRIX_UNIT)
namespace amx {
extern const ProductKernels product_kernels;
}
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_vector_bfloat16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Of Intel's, Cooper Lake alone was made for them.
bool has_fast_vector_bfloat16() {
  return has_vector_bfloat16() && (!is_intel() || __builtin_cpu_is("cooperlake"));
}
#endif

struct Kernels {
  const char* name;
  const LossKernels& loss;
  const OptimizerKernels& optimizer;
  const PairwiseKernels& pairwise;
  const PenaltyKernels& penalty;
  const PointwiseKernels& pointwise;
  const ProductKernels& product;
  const PyramidKernels& pyramid;
  const RandomKernels& random;
  const SparseKernels& sparse;
  bool supported;
};

// The best first, and last one that does not pay.
const std::vector<Kernels>& instruction_sets() {
#define AEFAST_KERNELS(name, set, product_set, supported)                                                          \
  {name, set::loss_kernels, set::optimizer_kernels, set::pairwise_kernels, set::penalty_kernels,                   \
   set::pointwise_kernels, product_set::product_kernels, set::pyramid_kernels, set::random_kernels,                \
   set::sparse_kernels, supported}
  static const std::vector<Kernels> sets = {
#if defined(AEFAST_MATRIX_UNIT)
      AEFAST_KERNELS("amx", avx512, amx, has_avx512() && has_matrix_unit()),
#endif
#if defined(AEFAST_VECTOR_BFLOAT16)
      AEFAST_KERNELS("avx512bf16", avx512, avx512bf16, has_fast_vector_bfloat16()),
#endif
#if defined(__x86_64__)
      AEFAST_KERNELS("avx512", avx512, avx512, has_avx512()),
      AEFAST_KERNELS("avx2", avx2, avx2, has_avx2()),
#endif
      AEFAST_KERNELS("baseline", baseline, baseline, true),
#if defined(AEFAST_VECTOR_BFLOAT16)
      AEFAST_KERNELS("avx512bf16", avx512, avx512bf16, has_vector_bfloat16() && !has_fast_vector_bfloat16()),
#endif
  };
#undef AEFAST_KERNELS
  return sets;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{
      &*std::find_if(instruction_sets().begin(), instruction_sets().end(), [](const Kernels& set) { return set.supported; })};
  return kernels;
}

// When the library is loaded: a process that is forked while another thread makes the first call would wait for its end.
[[maybe_unused]] const Kernels* const best = chosen();

const Kernels& selected() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

const LossKernels& loss_kernels() { return selected().loss; }

const OptimizerKernels& optimizer_kernels() { return selected().optimizer; }

const PairwiseKernels& pairwise_kernels() { return selected().pairwise; }

const PenaltyKernels& penalty_kernels() { return selected().penalty; }

const PointwiseKernels& pointwise() { return selected().pointwise; }

const ProductKernels& product_kernels() { return selected().product; }

const PyramidKernels& pyramid_kernels() { return selected().pyramid; }

const RandomKernels& random_kernels() { return selected().random; }

const SparseKernels& sparse_kernels() { return selected().sparse; }

std::string instruction_set() { return selected().name; }

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& set : instruction_sets())
    if (set.supported) names.push_back(set.name);
  return names;
}

bool has_amx_bfloat16() {
#if defined(__x86_64__)
  constexpr unsigned kSaves = 1u << 27, kTiles = 1u << 24, kBFloat16 = 1u << 22, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBFloat16)) return false;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kTileState) == kTileState;
#else
  return false;
#endif
}

bool has_fast_bfloat16_products() {
#if defined(__x86_64__)
  return has_amx_bfloat16() || has_fast_vector_bfloat16();
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_wider_vectors_than_blas() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") && has_avx512();
#else
  return false;
#endif
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels& set : instruction_sets())
    if (set.supported && name == set.name) {
      chosen() = &set;
      return true;
    }
  return false;
}

}  // namespace aefast::cpu
