// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "optimizer.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

template <typename T>
void adam_loop(const AdamFactors& factors, T* parameter, const T* gradient, T* mean, T* square, int64_t count) {
  using C = Lanes<T>;
  using elementary::square_root;
  const C sign(factors.gradient), decay(factors.decay), kept(factors.kept), rate(factors.rate), root(factors.root);
  const C mean_decay(factors.mean_decay), mean_weight(factors.mean_weight), epsilon(factors.epsilon);
  const C square_decay(factors.square_decay), square_weight(factors.square_weight);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    const C p = read_lanes(parameter + at, valid...);
    const C g = sign * read_lanes(gradient + at, valid...) + decay * p;
    const C m = mean_decay * read_lanes(mean + at, valid...) + mean_weight * g;
    const C v = square_decay * read_lanes(square + at, valid...) + square_weight * g * g;
    write_lanes(mean + at, m, valid...);
    write_lanes(square + at, v, valid...);
    write_lanes(parameter + at, kept * p - rate * m / (root * square_root(v) + epsilon), valid...);
  });
}

void adam(Scalar scalar, const AdamFactors& factors, void* parameter, const void* gradient, void* mean, void* square,
          int64_t count) {
  if (scalar == Scalar::float64)
    adam_loop(factors, static_cast<double*>(parameter), static_cast<const double*>(gradient),
              static_cast<double*>(mean), static_cast<double*>(square), count);
  else
    adam_loop(factors, static_cast<float*>(parameter), static_cast<const float*>(gradient), static_cast<float*>(mean),
              static_cast<float*>(square), count);
}

}  // namespace

extern const OptimizerKernels optimizer_kernels;
const OptimizerKernels optimizer_kernels = {adam};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
