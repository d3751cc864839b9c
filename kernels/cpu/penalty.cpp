// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "penalty.h"

#include <type_traits>

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

using elementary::magnitude;
using elementary::select;

// Narrow rows are taken several at a time, as one row of at most so many elements: few vectors are partial then.
constexpr int64_t kNarrow = 512;

template <bool kMagnitudes, typename T>
void add_rows(const T* h, Accumulator<T>* sums, int64_t rows, int64_t cols) {
  using C = Lanes<T>;
  const auto term = [&](int64_t row, int64_t col, auto... valid) __attribute__((always_inline)) {
    const C value = read_lanes(h + row * cols + col, valid...);
    return kMagnitudes ? magnitude(value) : value;
  };
  const auto add = [&](C value, int64_t col, auto... valid) __attribute__((always_inline)) {
    write_lanes(sums + col, C(read_lanes(sums + col, valid...)) + value, valid...);
  };
  // Four rows are added before they go to the sums.
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    for_lanes<T>(cols, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
      const C first = term(row, col, valid...) + term(row + 1, col, valid...);
      add(first + (term(row + 2, col, valid...) + term(row + 3, col, valid...)), col, valid...);
    });
  for (; row < rows; ++row)
    for_lanes<T>(cols, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
      add(term(row, col, valid...), col, valid...);
    });
}

template <bool kMagnitudes, typename T>
void column_sums_loop(const T* h, Accumulator<T>* sums, int64_t rows, int64_t cols, bool add) {
  if (!add)
    for (int64_t col = 0; col < cols; ++col) sums[col] = Accumulator<T>(0);
  // Narrow rows are summed 2^n at a time as one, whose parts are added afterwards.
  int64_t together = 1;
  while (2 * together <= rows && 2 * together * cols <= kNarrow) together *= 2;
  if (together == 1) return add_rows<kMagnitudes>(h, sums, rows, cols);
  const int64_t whole = rows / together * together, size = together * cols;
  Accumulator<T> parts[kNarrow] = {};
  add_rows<kMagnitudes>(h, parts, rows / together, size);
  add_rows<kMagnitudes>(h + whole * cols, parts, 1, (rows - whole) * cols);
  for (int64_t half = size / 2; half >= cols; half /= 2)
#pragma omp simd
    for (int64_t index = 0; index < half; ++index) parts[index] += parts[half + index];
  for (int64_t col = 0; col < cols; ++col) sums[col] += parts[col];
}

template <typename T, bool kUpstream, bool kSigned>
void add_slopes_loop(const T* upstream, int64_t upstream_stride, const Accumulator<T>* slopes, const T* h,
                     Accumulator<T>* out, int64_t rows, int64_t cols) {
  using C = Lanes<T>;
  Accumulator<T> repeated[kNarrow];
  if (rows > 1 && cols > 0 && 2 * cols <= kNarrow && (!kUpstream || upstream_stride == cols)) {
    const int64_t together = rows < kNarrow / cols ? rows : kNarrow / cols, whole = rows / together * together;
    for (int64_t row = 0; row < together; ++row)
      for (int64_t col = 0; col < cols; ++col) repeated[row * cols + col] = slopes[col];
    const auto part = [](auto* from, int64_t begin) { return from ? from + begin : from; };
    add_slopes_loop<T, kUpstream, kSigned>(upstream, together * cols, repeated, h, out, rows / together, together * cols);
    return add_slopes_loop<T, kUpstream, kSigned>(part(upstream, whole * cols), (rows - whole) * cols, repeated,
                                                  part(h, whole * cols), out + whole * cols, 1, (rows - whole) * cols);
  }
  for (int64_t row = 0; row < rows; ++row)
    for_lanes<T>(cols, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
      C value = read_lanes(slopes + col, valid...);
      if constexpr (kSigned) {
        const C output = read_lanes(h + row * cols + col, valid...);
        // The product is 0 where h is, and NaN where it is.
        value = select(output > C(0.0), value, select(output < C(0.0), -value, value * output));
      }
      if constexpr (kUpstream) value = value + read_lanes(upstream + row * upstream_stride + col, valid...);
      write_lanes(out + row * cols + col, value, valid...);
    });
}

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

template <typename T>
void jump_loop(const JumpOperands& operands, T* h, Accumulator<T>* l0, int64_t first, int64_t count) {
  using C = Lanes<T>;
  const auto* const threshold = static_cast<const Accumulator<T>*>(operands.threshold);
  for (int64_t row = first; row < first + count; ++row) {
    const T* const from = static_cast<const T*>(operands.x) + row * operands.x_stride;
    T* const to = h + row * operands.cols;
    C active(0.0);
    for_lanes<T>(operands.cols, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
      const C x = read_lanes(from + col, valid...), limit = read_lanes(threshold + col, valid...);
      // What is beyond the valid lanes is 0, like its threshold. One that is no number makes none of what it decides.
      const auto is_off = x <= limit, is_number = limit <= limit;
      write_lanes(to + col, select(is_off, C(0.0), select(is_number, x, limit)), valid...);
      active = active + select(is_off, C(0.0), select(is_number, C(1.0), limit));
    });
    l0[row] = static_cast<Accumulator<T>>(sum_of_lanes(active));
  }
}

template <typename T, bool kGradH, bool kX, bool kSums>
void jump_gradient_loop(const JumpOperands& operands, const JumpGradient& gradient, int64_t first, int64_t count,
                        int64_t begin, int64_t width) {
  using C = Lanes<T>;
  using W = Accumulator<T>;
  const W* const threshold = static_cast<const W*>(operands.threshold) + begin;
  const C half(0.5 * gradient.bandwidth);
  W* const sums = static_cast<W*>(gradient.threshold_sums) + (kSums ? begin : 0);
  if constexpr (kSums)
    for (int64_t col = 0; col < width; ++col) sums[col] = W(0);
  for (int64_t row = first; row < first + count; ++row) {
    const T* const from = static_cast<const T*>(operands.x) + row * operands.x_stride + begin;
    const T* const grad_h = static_cast<const T*>(gradient.grad_h) + (kGradH ? row * gradient.grad_h_stride + begin : 0);
    T* const to = static_cast<T*>(gradient.x) + (kX ? row * operands.cols + begin : 0);
    const C grad_l0(gradient.grad_l0 ? static_cast<const W*>(gradient.grad_l0)[row * gradient.grad_l0_stride] : W(0));
    for_lanes<T>(width, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
      const C x = read_lanes(from + col, valid...), limit = read_lanes(threshold + col, valid...);
      C upstream(0.0);
      if constexpr (kGradH) upstream = read_lanes(grad_h + col, valid...);
      if constexpr (kX) write_lanes(to + col, select(x <= limit, C(0.0), upstream), valid...);
      if constexpr (kSums) {
        const C slope = select(magnitude(x - limit) < half, limit * upstream + grad_l0, C(0.0));
        const C of_number = select(limit <= limit, slope, limit);
        write_lanes(sums + col, C(read_lanes(sums + col, valid...)) + of_number, valid...);
      }
    });
  }
  if constexpr (kSums) {
    const W factor = W(-1.0 / gradient.bandwidth);
    for (int64_t col = 0; col < width; ++col) sums[col] *= factor;
  }
}

// body(std::true_type() or std::false_type()).
template <typename Body>
void with_flag(bool flag, const Body& body) {
  flag ? body(std::true_type()) : body(std::false_type());
}

void column_sums(Scalar scalar, bool of_magnitudes, const void* h, void* sums, int64_t rows, int64_t cols, bool add) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_flag(of_magnitudes, [&](auto magnitudes) {
      column_sums_loop<decltype(magnitudes)::value>(static_cast<const T*>(h), static_cast<Accumulator<T>*>(sums), rows,
                                                    cols, add);
    });
  });
}

void add_slopes(Scalar scalar, const void* upstream, int64_t upstream_stride, const void* slopes, const void* h,
                void* out, int64_t rows, int64_t cols) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Accumulator<T>;
    with_flag(upstream != nullptr, [&](auto has_upstream) {
      with_flag(h != nullptr, [&](auto has_sign) {
        add_slopes_loop<T, decltype(has_upstream)::value, decltype(has_sign)::value>(
            static_cast<const T*>(upstream), upstream_stride, static_cast<const W*>(slopes), static_cast<const T*>(h),
            static_cast<W*>(out), rows, cols);
      });
    });
  });
}

void jump(const JumpOperands& operands, void* h, void* l0, int64_t first, int64_t count) {
  with_type(operands.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    jump_loop(operands, static_cast<T*>(h), static_cast<Accumulator<T>*>(l0), first, count);
  });
}

void jump_gradient(const JumpOperands& operands, const JumpGradient& gradient, int64_t first, int64_t count,
                   int64_t begin, int64_t width) {
  with_type(operands.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_flag(gradient.grad_h != nullptr, [&](auto has_grad) {
      with_flag(gradient.x != nullptr, [&](auto has_x) {
        with_flag(gradient.threshold_sums != nullptr, [&](auto has_sums) {
          jump_gradient_loop<T, decltype(has_grad)::value, decltype(has_x)::value, decltype(has_sums)::value>(
              operands, gradient, first, count, begin, width);
        });
      });
    });
  });
}

}  // namespace

extern const PenaltyKernels penalty_kernels;
const PenaltyKernels penalty_kernels = {column_sums, add_slopes, jump, jump_gradient};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
