// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "optimizer.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

template <bool kDecays, typename T>
void adam_loop(const AdamFactors& factors, T* parameter, const T* gradient, T* mean, T* square, int64_t count) {
  using C = Lanes<T>;
  using elementary::square_root;
  const C sign(factors.gradient), decay(factors.decay), kept(factors.kept), rate(factors.rate), root(factors.root);
  const C mean_decay(factors.mean_decay), mean_weight(factors.mean_weight), epsilon(factors.epsilon);
  const C square_decay(factors.square_decay), square_weight(factors.square_weight);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    const C p = read_lanes(parameter + at, valid...);
    C g = sign * read_lanes(gradient + at, valid...);
    // 0 times an infinite parameter would be no number.
    if constexpr (kDecays) g = g + decay * p;
    const C m = mean_decay * read_lanes(mean + at, valid...) + mean_weight * g;
    const C v = square_decay * read_lanes(square + at, valid...) + square_weight * g * g;
    write_lanes(mean + at, m, valid...);
    write_lanes(square + at, v, valid...);
    write_lanes(parameter + at, kept * p - rate * m / (root * square_root(v) + epsilon), valid...);
  });
}

template <typename T>
void adam_of(const AdamFactors& factors, void* parameter, const void* gradient, void* mean, void* square,
             int64_t count) {
  const auto loop = factors.decay != 0.0 ? adam_loop<true, T> : adam_loop<false, T>;
  loop(factors, static_cast<T*>(parameter), static_cast<const T*>(gradient), static_cast<T*>(mean),
       static_cast<T*>(square), count);
}

void adam(Scalar scalar, const AdamFactors& factors, void* parameter, const void* gradient, void* mean, void* square,
          int64_t count) {
  (scalar == Scalar::float64 ? adam_of<double> : adam_of<float>)(factors, parameter, gradient, mean, square, count);
}

}  // namespace

extern const OptimizerKernels optimizer_kernels;
const OptimizerKernels optimizer_kernels = {adam};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
