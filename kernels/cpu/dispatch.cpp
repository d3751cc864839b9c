#include "dispatch.h"

#include <algorithm>
#include <atomic>

#include "losses.h"
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

namespace {

struct Kernels {
  const LossKernels& loss;
  const PairwiseKernels& pairwise;
  const PenaltyKernels& penalty;
  const PointwiseKernels& pointwise;
  const ProductKernels& product;
  const PyramidKernels& pyramid;
  const RandomKernels& random;
  const SparseKernels& sparse;
  bool supported;
};

// The best first.
const std::vector<Kernels>& instruction_sets() {
  static const std::vector<Kernels> sets = {
#if defined(__x86_64__)
      {avx512::loss_kernels, avx512::pairwise_kernels, avx512::penalty_kernels, avx512::pointwise_kernels,
       avx512::product_kernels, avx512::pyramid_kernels, avx512::random_kernels, avx512::sparse_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {avx2::loss_kernels, avx2::pairwise_kernels, avx2::penalty_kernels, avx2::pointwise_kernels,
       avx2::product_kernels, avx2::pyramid_kernels, avx2::random_kernels, avx2::sparse_kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {baseline::loss_kernels, baseline::pairwise_kernels, baseline::penalty_kernels, baseline::pointwise_kernels,
       baseline::product_kernels, baseline::pyramid_kernels, baseline::random_kernels, baseline::sparse_kernels, true},
  };
  return sets;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{
      &*std::find_if(instruction_sets().begin(), instruction_sets().end(), [](const Kernels& set) { return set.supported; })};
  return kernels;
}

const Kernels& selected() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

const LossKernels& loss_kernels() { return selected().loss; }

const PairwiseKernels& pairwise_kernels() { return selected().pairwise; }

const PenaltyKernels& penalty_kernels() { return selected().penalty; }

const PointwiseKernels& pointwise() { return selected().pointwise; }

const ProductKernels& product_kernels() { return selected().product; }

const PyramidKernels& pyramid_kernels() { return selected().pyramid; }

const RandomKernels& random_kernels() { return selected().random; }

const SparseKernels& sparse_kernels() { return selected().sparse; }

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& set : instruction_sets())
    if (set.supported) names.push_back(set.pointwise.instruction_set);
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels& set : instruction_sets())
    if (set.supported && name == set.pointwise.instruction_set) {
      chosen() = &set;
      return true;
    }
  return false;
}

}  // namespace aefast::cpu
