// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "optimizer.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

template <bool kDecays, typename T>
void adam_loop(const AdamFactors& factors, T* parameter, T* gradient, T* mean, T* square, T* average, int64_t count) {
  using C = Lanes<T>;
  using elementary::square_root;
  const C scale(factors.scale), sign(factors.sign), decay(factors.decay);
  const C kept(factors.kept), rate(factors.rate), root(factors.root), average_weight(factors.average_weight);
  const C mean_decay(factors.mean_decay), mean_weight(factors.mean_weight), epsilon(factors.epsilon);
  const C square_decay(factors.square_decay), square_weight(factors.square_weight);
  const bool is_scaled = factors.scale != 1.0;
  // From the nearer end: a weight of 1 gives the parameter itself.
  const bool is_near = factors.average_weight >= 0.5;
  const C rest(1.0 - factors.average_weight);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    C p = read_lanes(parameter + at, valid...);
    C g = read_lanes(gradient + at, valid...);
    if (is_scaled) write_lanes(gradient + at, g = scale * g, valid...);
    g = sign * g;
    // 0 times an infinite parameter would be no number.
    if constexpr (kDecays) g = g + decay * p;
    const C m = mean_decay * read_lanes(mean + at, valid...) + mean_weight * g;
    const C v = square_decay * read_lanes(square + at, valid...) + square_weight * g * g;
    write_lanes(mean + at, m, valid...);
    write_lanes(square + at, v, valid...);
    p = kept * p - rate * m / (root * square_root(v) + epsilon);
    write_lanes(parameter + at, p, valid...);
    if (average == nullptr) return;
    const C a = read_lanes(average + at, valid...);
    write_lanes(average + at, is_near ? p - rest * (p - a) : a + average_weight * (p - a), valid...);
  });
}

template <typename T>
void adam_of(const AdamFactors& factors, void* parameter, void* gradient, void* mean, void* square, void* average,
             int64_t count) {
  const auto loop = factors.decay != 0.0 ? adam_loop<true, T> : adam_loop<false, T>;
  loop(factors, static_cast<T*>(parameter), static_cast<T*>(gradient), static_cast<T*>(mean), static_cast<T*>(square),
       static_cast<T*>(average), count);
}

void adam(Scalar scalar, const AdamFactors& factors, void* parameter, void* gradient, void* mean, void* square,
          void* average, int64_t count) {
  const auto of_type = scalar == Scalar::float64 ? adam_of<double> : adam_of<float>;
  of_type(factors, parameter, gradient, mean, square, average, count);
}

// In double, so that no square of a float is too large or too small.
template <typename T>
double sum_of_squares_of(const T* values, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t at = 0; at < count; ++at) sum += static_cast<double>(values[at]) * static_cast<double>(values[at]);
  return sum;
}

double sum_of_squares(Scalar scalar, const void* values, int64_t count) {
  return scalar == Scalar::float64 ? sum_of_squares_of(static_cast<const double*>(values), count)
                                   : sum_of_squares_of(static_cast<const float*>(values), count);
}

}  // namespace

extern const OptimizerKernels optimizer_kernels;
const OptimizerKernels optimizer_kernels = {adam, sum_of_squares};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
