#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "matrix.h"
#include "optimizer.h"
#include "parallel.h"

namespace aefast::cpu {
namespace {

// Within its scope this thread takes subnormal numbers for 0, and makes none, on x86-64. Where no gradient comes any
// more, as of a dead unit's weights, a mean of gradients shrinks to the smallest of them, which rounding keeps it from
// leaving; and an instruction with one takes Intel's processors some hundred times as long.
class WithoutSubnormals {
 public:
#if defined(__x86_64__)
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | kZeroInputs); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  WithoutSubnormals& operator=(const WithoutSubnormals&) = delete;

 private:
  static constexpr unsigned kZeroInputs = 0x40;
  unsigned before_;
#else
  WithoutSubnormals() {}
#endif
};

struct Parameter {
  Scalar scalar;
  AdamFactors factors;
  char *values, *gradient, *mean, *square, *average;
};

char* data_of(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

bool is_float(const Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.is_cpu() && tensor.scalar_type() == type;
}

// Whether any of what is written is written twice.
bool is_shared(const std::vector<const std::vector<Tensor>*>& written) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(written.size() * written[0]->size());
  for (const auto* tensors : written)
    for (const Tensor& one : *tensors) {
      const auto* const begin = static_cast<const char*>(one.const_data_ptr());
      if (one.numel() > 0) ranges.emplace_back(begin, begin + one.numel() * size_of(scalar_of(one)));
    }
  std::sort(ranges.begin(), ranges.end());
  return std::adjacent_find(ranges.begin(), ranges.end(),
                            [](const auto& one, const auto& next) { return next.first < one.second; }) != ranges.end();
}

// So much larger than the root of a square that is taken for 0 that the quotient does not show it.
constexpr double kLeastEpsilon = 1e-15;

// False, with nothing done, for tensors that are not in float32 or float64, without gaps, laid out alike and apart from
// each other, and for an epsilon that would not hide what is taken for 0.
bool adam(std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> means,
          std::vector<Tensor> squares, std::vector<Tensor> steps, std::vector<Tensor> averages, double lr, double beta1,
          double beta2, double eps, double weight_decay, bool is_decoupled, bool maximize, double scale,
          double average_weight) {
  using torch::headeronly::ScalarType;
  const size_t count = parameters.size();
  STD_TORCH_CHECK(gradients.size() == count && means.size() == count && squares.size() == count &&
                      steps.size() == count && (averages.empty() || averages.size() == count),
                  "parameters, gradients, means, squares, steps and averages must be as many");
  if (!(eps >= kLeastEpsilon)) return false;
  for (size_t index = 0; index < count; ++index) {
    const Tensor& one = parameters[index];
    const ScalarType type = one.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double) return false;
    if (!is_float(steps[index], ScalarType::Float) || steps[index].numel() != 1) return false;
    for (const auto* tensors : {&parameters, &gradients, &means, &squares, &averages})
      if (!tensors->empty() && (!is_float((*tensors)[index], type) || !has_layout((*tensors)[index], one)))
        return false;
  }
  std::vector<const std::vector<Tensor>*> written{&parameters, &means, &squares, &steps, &averages};
  if (scale != 1.0) written.push_back(&gradients);
  if (is_shared(written)) return false;
  std::vector<Parameter> all;
  std::vector<int64_t> sizes;
  all.reserve(count);
  sizes.reserve(count);
  for (size_t index = 0; index < count; ++index) {
    float* const step = static_cast<float*>(steps[index].mutable_data_ptr());
    *step += 1.0f;
    const AdamFactors factors{.scale = scale,
                              .sign = maximize ? -1.0 : 1.0,
                              .decay = is_decoupled ? 0.0 : weight_decay,
                              .mean_decay = beta1,
                              .mean_weight = 1.0 - beta1,
                              .square_decay = beta2,
                              .square_weight = 1.0 - beta2,
                              .kept = is_decoupled ? 1.0 - lr * weight_decay : 1.0,
                              .rate = lr / (1.0 - std::pow(beta1, *step)),
                              .root = 1.0 / std::sqrt(1.0 - std::pow(beta2, *step)),
                              .epsilon = eps,
                              .average_weight = average_weight};
    all.push_back({scalar_of(parameters[index]), factors, data_of(parameters[index]), data_of(gradients[index]),
                   data_of(means[index]), data_of(squares[index]),
                   averages.empty() ? nullptr : data_of(averages[index])});
    sizes.push_back(parameters[index].numel());
  }
  for_pieces(pieces_of(sizes), [&](int64_t, const Piece& piece) {
    const Parameter& one = all[piece.index];
    const int64_t bytes = piece.first * size_of(one.scalar);
    const WithoutSubnormals within;
    optimizer_kernels().adam(one.scalar, one.factors, one.values + bytes, one.gradient + bytes, one.mean + bytes,
                             one.square + bytes, one.average == nullptr ? nullptr : one.average + bytes, piece.count);
  });
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  m.def(
      "adam(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] means, Tensor(d!)[] squares, "
      "Tensor(e!)[] steps, Tensor(f!)[] averages, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool is_decoupled, bool maximize, float scale, float average_weight) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("adam", TORCH_BOX(&adam)); }

}  // namespace aefast::cpu
