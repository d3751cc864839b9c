// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "pointwise.h"

#define AEFAST_STRING_(x) #x
#define AEFAST_STRING(x) AEFAST_STRING_(x)

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

template <typename In, typename Out, Activation A>
void bias_activation_loop(ActivationParameters<double> parameters, const In* pre, const Out* bias, Out* out,
                          Out* derivative, int64_t rows, int64_t cols) {
  using C = Accumulator<Out>;
  const ActivationParameters<C> p{static_cast<C>(parameters.slope), static_cast<C>(parameters.alpha)};
  // Without a bias the rows are one long row.
  const int64_t outer = bias ? rows : 1;
  const int64_t inner = bias ? cols : rows * cols;
  for (int64_t row = 0; row < outer; ++row) {
    const In* pre_row = pre + row * inner;
    Out* out_row = out + row * inner;
    if constexpr (stores_derivative(A)) {
      if (derivative) {
        Out* derivative_row = derivative + row * inner;
        if (bias) {
#pragma omp simd
          for (int64_t col = 0; col < inner; ++col) {
            C slope;
            out_row[col] = store<Out>(activate_with_derivative<A>(load(pre_row[col]) + load(bias[col]), slope));
            derivative_row[col] = store<Out>(slope);
          }
        } else {
#pragma omp simd
          for (int64_t col = 0; col < inner; ++col) {
            C slope;
            out_row[col] = store<Out>(activate_with_derivative<A>(static_cast<C>(load(pre_row[col])), slope));
            derivative_row[col] = store<Out>(slope);
          }
        }
        continue;
      }
    }
    if (bias) {
#pragma omp simd
      for (int64_t col = 0; col < inner; ++col)
        out_row[col] = store<Out>(activate<A>(load(pre_row[col]) + load(bias[col]), p));
    } else {
#pragma omp simd
      for (int64_t col = 0; col < inner; ++col)
        out_row[col] = store<Out>(activate<A>(static_cast<C>(load(pre_row[col])), p));
    }
  }
}

// Columns are taken in strips whose running sums stay in the first-level cache.
constexpr int64_t kStrip = 1024;

template <typename Grad, typename Saved, typename G, Activation A>
void activation_gradient_loop(ActivationParameters<double> parameters, const Grad* grad, int64_t grad_row_stride,
                              const Saved* saved, G* g, Accumulator<Saved>* column_sums,
                              int64_t rows, int64_t cols) {
  using C = Accumulator<Saved>;
  const ActivationParameters<C> p{static_cast<C>(parameters.slope), static_cast<C>(parameters.alpha)};
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t width = cols - begin < kStrip ? cols - begin : kStrip;
    C sums[kStrip];
    for (int64_t col = 0; col < width; ++col) sums[col] = C(0);
    const auto product = [&](int64_t row, int64_t col) {
      const int64_t column = begin + col;
      C value = static_cast<C>(load(grad[row * grad_row_stride + column]));
      if constexpr (A != Activation::identity) value = gradient<A>(value, load(saved[row * cols + column]), p);
      g[row * cols + column] = store<G>(value);
      return value;
    };
    // Four rows are added before they go to the running sums: a quarter of the traffic on the sums, and of
    // their rounding errors.
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
#pragma omp simd
      for (int64_t col = 0; col < width; ++col)
        sums[col] += (product(row, col) + product(row + 1, col)) + (product(row + 2, col) + product(row + 3, col));
    }
    for (; row < rows; ++row) {
#pragma omp simd
      for (int64_t col = 0; col < width; ++col) sums[col] += product(row, col);
    }
    if (column_sums)
      for (int64_t col = 0; col < width; ++col) column_sums[begin + col] = sums[col];
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

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Body>
void with_type(Scalar scalar, const Body& body) {
  switch (scalar) {
    case Scalar::float32: return body(TypeTag<float>());
    case Scalar::float64: return body(TypeTag<double>());
    case Scalar::bfloat16: return body(TypeTag<BFloat16>());
    case Scalar::float16: return body(TypeTag<Float16>());
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

void activation_gradient(ActivationSpec spec, Scalar grad_type, Scalar saved_type, Scalar g_type, const void* grad,
                         int64_t grad_row_stride, const void* saved, void* g, void* column_sums, int64_t rows,
                         int64_t cols) {
  with_type(saved_type, [&](auto saved_tag) {
    using Saved = typename decltype(saved_tag)::type;
    using Wide = Accumulator<Saved>;
    with_activation(spec.activation, [&](auto activation) {
      constexpr Activation A = decltype(activation)::value;
      const auto run = [&](auto grad_tag, auto g_tag) {
        using Grad = typename decltype(grad_tag)::type;
        using G = typename decltype(g_tag)::type;
        activation_gradient_loop<Grad, Saved, G, A>(spec.parameters, static_cast<const Grad*>(grad), grad_row_stride,
                                                    static_cast<const Saved*>(saved), static_cast<G*>(g),
                                                    static_cast<Wide*>(column_sums), rows, cols);
      };
      const bool narrow_grad = grad_type == saved_type;
      const bool narrow_g = g_type == saved_type;
      if (narrow_grad && narrow_g)
        run(TypeTag<Saved>(), TypeTag<Saved>());
      else if (narrow_grad)
        run(TypeTag<Saved>(), TypeTag<Wide>());
      else if (narrow_g)
        run(TypeTag<Wide>(), TypeTag<Saved>());
      else
        run(TypeTag<Wide>(), TypeTag<Wide>());
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
const PointwiseKernels pointwise_kernels = {bias_activation, activation_gradient, convert, sum_rows,
                                            AEFAST_STRING(AEFAST_INSTRUCTION_SET)};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
