// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "pointwise.h"

#include <type_traits>

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

// Narrow rows are taken several at a time, as one row of at most so many elements: few vectors are partial then.
constexpr int64_t kNarrow = 512;

template <typename In, typename Out, Activation A>
void bias_activation_loop(ActivationParameters<double> parameters, const In* pre, const Out* bias, Out* out,
                          Out* derivative, int64_t rows, int64_t cols) {
  using C = Lanes<Out>;
  const ActivationParameters<C> p{C(parameters.slope), C(parameters.alpha)};
  const int64_t size = rows * cols;
  // Without a bias the rows are one long row, and the bias of each vector is 0.
  int64_t step = bias ? cols : size;
  const Out zeros[kLanes<Out>] = {};
  Out repeated[kNarrow];
  if (bias && rows > 1 && cols > 0 && 2 * cols <= kNarrow) {
    const int64_t count = rows < kNarrow / cols ? rows : kNarrow / cols;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t col = 0; col < cols; ++col) repeated[row * cols + col] = bias[col];
    bias = repeated;
    step = count * cols;
  }
  for (int64_t begin = 0; begin < size; begin += step) {
    const int64_t count = size - begin < step ? size - begin : step;
    const In* pre_row = pre + begin;
    Out* out_row = out + begin;
    [[maybe_unused]] Out* derivative_row = derivative ? derivative + begin : nullptr;
    const auto pass = [&](auto with_derivative) {
      for_lanes<Out>(count, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
        const C x = C(read_lanes(pre_row + col, valid...)) + C(read_lanes(bias ? bias + col : zeros, valid...));
        if constexpr (decltype(with_derivative)::value) {
          C slope;
          write_lanes(out_row + col, activate_with_derivative<A>(x, slope), valid...);
          write_lanes(derivative_row + col, slope, valid...);
        } else {
          write_lanes(out_row + col, activate<A>(x, p), valid...);
        }
      });
    };
    if constexpr (stores_derivative(A)) {
      if (derivative) {
        pass(std::true_type());
        continue;
      }
    }
    pass(std::false_type());
  }
}

// Columns are taken in strips whose running sums stay in the first-level cache.
constexpr int64_t kStrip = 1024;

// g and column_sums may be null. What is there is asked at each vector, since copies of this function take long to compile;
// it is out of line for the same reason.
template <Activation A, typename Grad, typename G>
__attribute__((noinline)) void activation_gradient_strips(ActivationParameters<double> parameters, const Grad* grad,
                                                          int64_t grad_row_stride, const G* saved, G* g,
                                                          Accumulator<G>* column_sums, int64_t rows, int64_t cols) {
  using C = Lanes<G>;
  const ActivationParameters<C> p{C(parameters.slope), C(parameters.alpha)};
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t width = cols - begin < kStrip ? cols - begin : kStrip;
    Accumulator<G> sums[kStrip];
    for (int64_t col = 0; col < width; ++col) sums[col] = Accumulator<G>(0);
    const auto product = [&](int64_t row, int64_t col, auto... valid) __attribute__((always_inline)) {
      const int64_t column = begin + col;
      C value = read_lanes(grad + row * grad_row_stride + column, valid...);
      if constexpr (A != Activation::identity)
        value = gradient<A>(value, C(read_lanes(saved + row * cols + column, valid...)), p);
      if (g) write_lanes(g + row * cols + column, value, valid...);
      return value;
    };
    const auto add = [&](C value, int64_t col, auto... valid) __attribute__((always_inline)) {
      if (column_sums)
        write_lanes(sums + col, C(read_lanes(sums + col, valid...)) + value, valid...);
    };
    // Two rows are added before they go to the running sums. With more, rows that lie a multiple of 4 KiB apart
    // evict each other from the first-level cache.
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
      for_lanes<G>(width, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
        const C first = product(row, col, valid...), second = product(row + 1, col, valid...);
        add(first + second, col, valid...);
      });
    for (; row < rows; ++row)
      for_lanes<G>(width, [&](int64_t col, auto... valid) __attribute__((always_inline)) {
        add(product(row, col, valid...), col, valid...);
      });
    if (column_sums)
      for (int64_t col = 0; col < width; ++col) column_sums[begin + col] = sums[col];
  }
}

template <Activation A, typename Grad, typename G>
void activation_gradient_loop(ActivationParameters<double> parameters, const Grad* grad, int64_t grad_row_stride,
                              const G* saved, G* g, Accumulator<G>* column_sums, int64_t rows, int64_t cols) {
  // Narrow rows are summed 2^n at a time as one, whose parts are added afterwards.
  int64_t together = 1;
  if (grad_row_stride == cols && cols > 0)
    while (2 * together <= rows && 2 * together * cols <= kNarrow) together *= 2;
  if (together == 1)
    return activation_gradient_strips<A>(parameters, grad, grad_row_stride, saved, g, column_sums, rows, cols);
  const int64_t whole = rows / together * together, size = together * cols;
  Accumulator<G> sums[kNarrow], rest[kNarrow];
  activation_gradient_strips<A>(parameters, grad, size, saved, g, column_sums ? sums : nullptr, rows / together, size);
  const int64_t rest_size = (rows - whole) * cols;
  if (rest_size > 0)
    activation_gradient_strips<A>(parameters, grad + whole * cols, rest_size, saved ? saved + whole * cols : nullptr,
                                  g ? g + whole * cols : nullptr, column_sums ? rest : nullptr, 1, rest_size);
  if (column_sums) {
#pragma omp simd
    for (int64_t index = 0; index < rest_size; ++index) sums[index] += rest[index];
    for (int64_t half = size / 2; half >= cols; half /= 2)
#pragma omp simd
      for (int64_t index = 0; index < half; ++index) sums[index] += sums[half + index];
    for (int64_t col = 0; col < cols; ++col) column_sums[col] = sums[col];
  }
}

template <typename In, typename Out>
void convert_loop(const In* in, int64_t row_stride, int64_t col_stride, Out* out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const In* in_row = in + row * row_stride;
    Out* out_row = out + row * cols;
    if (col_stride == 1) {
#pragma omp simd
      for (int64_t col = 0; col < cols; ++col) out_row[col] = store<Out>(static_cast<Accumulator<Out>>(load(in_row[col])));
    } else {
      for (int64_t col = 0; col < cols; ++col)
        out_row[col] = store<Out>(static_cast<Accumulator<Out>>(load(in_row[col * col_stride])));
    }
  }
}

template <typename Out>
void sum_rows_loop(const Accumulator<Out>* partials, Out* out, int64_t rows, int64_t cols) {
  using C = Accumulator<Out>;
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t width = cols - begin < kStrip ? cols - begin : kStrip;
    double sums[kStrip];
    for (int64_t col = 0; col < width; ++col) sums[col] = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
      const C* partial = partials + row * cols + begin;
#pragma omp simd
      for (int64_t col = 0; col < width; ++col) sums[col] += partial[col];
    }
    for (int64_t col = 0; col < width; ++col) out[begin + col] = store<Out>(static_cast<C>(sums[col]));
  }
}

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

template <typename Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::identity: return body(ActivationTag<Activation::identity>());
    case Activation::relu: return body(ActivationTag<Activation::relu>());
    case Activation::leaky_relu: return body(ActivationTag<Activation::leaky_relu>());
    case Activation::elu: return body(ActivationTag<Activation::elu>());
    case Activation::selu: return body(ActivationTag<Activation::selu>());
    case Activation::silu: return body(ActivationTag<Activation::silu>());
    case Activation::gelu: return body(ActivationTag<Activation::gelu>());
    case Activation::gelu_tanh: return body(ActivationTag<Activation::gelu_tanh>());
    case Activation::tanh: return body(ActivationTag<Activation::tanh>());
    case Activation::sigmoid: return body(ActivationTag<Activation::sigmoid>());
    case Activation::softplus: return body(ActivationTag<Activation::softplus>());
  }
}

void bias_activation(ActivationSpec spec, Scalar pre_type, Scalar out_type, const void* pre, const void* bias,
                     void* out, void* derivative, int64_t rows, int64_t cols) {
  with_type(out_type, [&](auto out_tag) {
    using Out = typename decltype(out_tag)::type;
    with_activation(spec.activation, [&](auto activation) {
      constexpr Activation A = decltype(activation)::value;
      const auto run = [&](auto pre_tag) {
        using In = typename decltype(pre_tag)::type;
        bias_activation_loop<In, Out, A>(spec.parameters, static_cast<const In*>(pre), static_cast<const Out*>(bias),
                                         static_cast<Out*>(out), static_cast<Out*>(derivative), rows, cols);
      };
      if (pre_type == out_type)
        run(TypeTag<Out>());
      else
        run(TypeTag<Accumulator<Out>>());
    });
  });
}

void activation_gradient(ActivationSpec spec, Scalar grad_type, Scalar g_type, const void* grad,
                         int64_t grad_row_stride, const void* saved, void* g, void* column_sums, int64_t rows,
                         int64_t cols) {
  with_type(g_type, [&](auto g_tag) {
    using G = typename decltype(g_tag)::type;
    using Wide = Accumulator<G>;
    // All stored derivatives are used alike.
    constexpr Activation kStored = Activation::silu;
    with_activation(stores_derivative(spec.activation) ? kStored : spec.activation, [&](auto activation) {
      constexpr Activation A = decltype(activation)::value;
      if constexpr (stores_derivative(A) && A != kStored) return;
      const auto run = [&](auto grad_tag) {
        using Grad = typename decltype(grad_tag)::type;
        activation_gradient_loop<A>(spec.parameters, static_cast<const Grad*>(grad), grad_row_stride,
                                    static_cast<const G*>(saved), static_cast<G*>(g), static_cast<Wide*>(column_sums),
                                    rows, cols);
      };
      if (grad_type == g_type)
        run(TypeTag<G>());
      else
        run(TypeTag<Wide>());
    });
  });
}

void convert(Scalar in_type, Scalar out_type, const void* in, int64_t row_stride, int64_t col_stride, void* out,
             int64_t rows, int64_t cols) {
  with_type(in_type, [&](auto in_tag) {
    using In = typename decltype(in_tag)::type;
    with_type(out_type, [&](auto out_tag) {
      using Out = typename decltype(out_tag)::type;
      convert_loop<In, Out>(static_cast<const In*>(in), row_stride, col_stride, static_cast<Out*>(out), rows, cols);
    });
  });
}

void sum_rows(Scalar out_type, const void* partials, void* out, int64_t rows, int64_t cols) {
  with_type(out_type, [&](auto out_tag) {
    using Out = typename decltype(out_tag)::type;
    sum_rows_loop<Out>(static_cast<const Accumulator<Out>*>(partials), static_cast<Out*>(out), rows, cols);
  });
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {bias_activation, activation_gradient, convert, sum_rows};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
