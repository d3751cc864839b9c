// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "losses.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

using loss::Kind;

// Elements ahead of which memory is asked for: where a loss takes many instructions a processor does not look far enough.
constexpr int64_t kAhead = 1024;

// Asks for what is kAhead behind the vector at *from, to read it, or to write it.
template <typename T>
AEFAST_HD void prefetch(const T* from) {
  for (int64_t byte = 0; byte < kLanes<T> * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from + kAhead) + byte, 0);
}
template <typename T>
AEFAST_HD void prefetch(T* to) {
  for (int64_t byte = 0; byte < kLanes<T> * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<char*>(to + kAhead) + byte, 1);
}

// Elements whose losses are summed in their accumulator, lane by lane, before they are summed in double.
constexpr int64_t kPiece = 1024;

template <typename C>
AEFAST_HD double sum_of_lanes(C values) {
  if constexpr (std::is_same_v<C, double>) {
    return values;
  } else {
    float lanes[kFloats];
    write_floats(lanes, values);
    double sum = 0.0;
    for (int lane = 0; lane < kFloats; ++lane) sum += lanes[lane];
    return sum;
  }
}

// The first `valid` lanes, and 0.
template <typename C>
AEFAST_HD C leading_lanes(C values) {
  return values;
}
AEFAST_HD Floats leading_lanes(Floats values, int64_t valid) {
  float lanes[kFloats];
  write_floats(lanes, values);
  for (int64_t lane = valid; lane < kFloats; ++lane) lanes[lane] = 0.0f;
  return read_floats(lanes);
}
AEFAST_HD double leading_lanes(double value, int64_t) { return value; }

// The least and the greatest of what a loss wants from 0 to 1.
template <Kind K, typename C>
struct Range {
  C low{0.0}, high{1.0};

  AEFAST_HD void include([[maybe_unused]] C input, [[maybe_unused]] C target) {
    if constexpr (!is_penalty(K)) add(target);
    if constexpr (K == Kind::bce) add(input);
  }
  AEFAST_HD void add(C x) {
    low = at_most(low, x);
    high = at_least(high, x);
  }
  AEFAST_HD bool is_outside() const {
    if constexpr (is_penalty(K)) return false;
    // What is outside makes the sum of distances positive.
    return sum_of_lanes(at_most(C(0.0), low)) < 0.0 || sum_of_lanes(at_least(C(0.0), high - C(1.0))) > 0.0;
  }
};

template <typename T, Kind K, bool kHasGradient>
LossSum sum_loop(const LossOperands& operands, double scale, void* gradient_out, int64_t first, int64_t count) {
  using C = Lanes<T>;
  const T* const inputs = static_cast<const T*>(operands.input) + first;
  const T* const targets = static_cast<const T*>(operands.target) + first;
  [[maybe_unused]] T* const gradient = static_cast<T*>(gradient_out) + (kHasGradient ? first : 0);
  const C parameter(operands.spec.parameter);
  [[maybe_unused]] const C factor(scale);
  Range<K, C> range;
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    C total(0.0);
    for_lanes<T>(count - begin < kPiece ? count - begin : kPiece,
                 [&](int64_t col, auto... valid) __attribute__((always_inline)) {
                   const int64_t at = begin + col;
                   prefetch(inputs + at);
                   prefetch(targets + at);
                   if constexpr (kHasGradient) prefetch(gradient + at);
                   const C input = read_lanes(inputs + at, valid...), target = read_lanes(targets + at, valid...);
                   C slope;
                   total = total + leading_lanes(loss::evaluate<K>(input, target, parameter, slope), valid...);
                   range.include(input, target);
                   if constexpr (kHasGradient) write_lanes(gradient + at, factor * slope, valid...);
                 });
    sum += sum_of_lanes(total);
  }
  return {sum, range.is_outside()};
}

template <typename T, Kind K>
LossSum elements_loop(const LossOperands& operands, void* out, int64_t first, int64_t count) {
  using C = Lanes<T>;
  const T* const inputs = static_cast<const T*>(operands.input) + first;
  const T* const targets = static_cast<const T*>(operands.target) + first;
  Accumulator<T>* const values = static_cast<Accumulator<T>*>(out) + first;
  const C parameter(operands.spec.parameter);
  Range<K, C> range;
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    const C input = read_lanes(inputs + at, valid...), target = read_lanes(targets + at, valid...);
    C slope;
    write_lanes(values + at, loss::evaluate<K>(input, target, parameter, slope), valid...);
    range.include(input, target);
  });
  return {0.0, range.is_outside()};
}

template <typename T, Kind K, bool kHasGrad>
void elements_gradient_loop(const LossOperands& operands, double scale, const void* grad, void* gradient_out,
                            int64_t first, int64_t count) {
  using C = Lanes<T>;
  const T* const inputs = static_cast<const T*>(operands.input) + first;
  const T* const targets = static_cast<const T*>(operands.target) + first;
  [[maybe_unused]] const Accumulator<T>* const grads =
      static_cast<const Accumulator<T>*>(grad) + (kHasGrad ? first : 0);
  T* const gradient = static_cast<T*>(gradient_out) + first;
  const C parameter(operands.spec.parameter), factor(scale);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    C slope;
    loss::evaluate<K>(C(read_lanes(inputs + at, valid...)), C(read_lanes(targets + at, valid...)), parameter, slope);
    C upstream = factor;
    if constexpr (kHasGrad) upstream = upstream * C(read_lanes(grads + at, valid...));
    write_lanes(gradient + at, upstream * slope, valid...);
  });
}

template <typename T>
void scaled_loop(double factor, const T* in, T* out, int64_t count) {
  using C = Lanes<T>;
  const C scale(factor);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    write_lanes(out + at, scale * C(read_lanes(in + at, valid...)), valid...);
  });
}

template <Kind K>
struct KindTag {
  static constexpr Kind value = K;
};

template <typename Body>
auto with_kind(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::mse: return body(KindTag<Kind::mse>());
    case Kind::l1: return body(KindTag<Kind::l1>());
    case Kind::huber: return body(KindTag<Kind::huber>());
    case Kind::lp: return body(KindTag<Kind::lp>());
    case Kind::charbonnier: return body(KindTag<Kind::charbonnier>());
    case Kind::bce: return body(KindTag<Kind::bce>());
    case Kind::bce_with_logits: break;
  }
  return body(KindTag<Kind::bce_with_logits>());
}

LossSum sum(const LossOperands& operands, double scale, void* gradient, int64_t first, int64_t count) {
  LossSum found{};
  with_type(operands.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    found = with_kind(operands.spec.kind, [&](auto kind) {
      constexpr Kind K = decltype(kind)::value;
      const auto run = gradient ? &sum_loop<T, K, true> : &sum_loop<T, K, false>;
      return run(operands, scale, gradient, first, count);
    });
  });
  return found;
}

LossSum elements(const LossOperands& operands, void* out, int64_t first, int64_t count) {
  LossSum found{};
  with_type(operands.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    found = with_kind(operands.spec.kind, [&](auto kind) {
      return elements_loop<T, decltype(kind)::value>(operands, out, first, count);
    });
  });
  return found;
}

void elements_gradient(const LossOperands& operands, double factor, const void* grad, void* gradient, int64_t first,
                       int64_t count) {
  with_type(operands.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_kind(operands.spec.kind, [&](auto kind) {
      constexpr Kind K = decltype(kind)::value;
      const auto run = grad ? &elements_gradient_loop<T, K, true> : &elements_gradient_loop<T, K, false>;
      run(operands, factor, grad, gradient, first, count);
    });
  });
}

void scaled(Scalar scalar, double factor, const void* in, void* out, int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    scaled_loop(factor, static_cast<const T*>(in) + first, static_cast<T*>(out) + first, count);
  });
}

}  // namespace

extern const LossKernels loss_kernels;
const LossKernels loss_kernels = {sum, elements, elements_gradient, scaled};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
