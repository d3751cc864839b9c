#include <torch/csrc/stable/library.h>

#include <string>

#include "random_schemas.h"
#include "sampling.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

Noise noise_of(const std::string& kind, double first, double second, int64_t limit) {
  const char* const kinds[] = {"gaussian", "salt_and_pepper", "masking", "dropout"};
  const auto found = std::find(std::begin(kinds), std::end(kinds), kind);
  STD_TORCH_CHECK(found != std::end(kinds), "unknown noise ", kind);
  const NoiseKind code = static_cast<NoiseKind>(found - std::begin(kinds));
  STD_TORCH_CHECK(code == NoiseKind::gaussian || (limit >= 1 && limit <= int64_t{1} << 32),
                  "limit must be from 1 to 2^32");
  return {code, first, second, static_cast<uint32_t>(limit - 1), static_cast<uint32_t>(limit / 2)};
}

Tensor corrupt(Tensor x, Tensor seed, String kind, double first, double second, int64_t limit, int64_t block) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const Noise noise = noise_of(kind, first, second, limit);
  const Tensor out = new_like(x);
  const uint64_t number = seed_of(seed);
  const void* const from = x.const_data_ptr();
  void* const to = out.mutable_data_ptr();
  if (block > 1) {
    STD_TORCH_CHECK(x.dim() == 4 && noise.kind == NoiseKind::masking, "a block is for masking of (N, C, H, W)");
    const Images images{x.size(1), x.size(2), x.size(3), block};
    for_tasks(x.size(0), images.channels * images.height * images.width, 1, [&](int64_t begin, int64_t count) {
      random_kernels().mask_squares(scalar_of(x), noise, number, images, from, to, begin, count);
    });
  } else {
    for_tasks(x.numel(), 1, 4, [&](int64_t begin, int64_t count) {
      random_kernels().corrupt(scalar_of(x), noise, number, from, to, begin, count);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : random::kCorruptSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("corrupt", TORCH_BOX(&corrupt)); }

}  // namespace aefast::cpu
