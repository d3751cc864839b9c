#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "dense.h"
#include "dense_schemas.h"
#include "loss_schemas.h"
#include "losses.h"
#include "matrix.h"
#include "parallel.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

// out, row-major, = in.
void convert(Matrix in, Matrix out) {
  for_tasks(in.rows, in.cols, 1, [&](int64_t first, int64_t count) {
    pointwise().convert(in.scalar, out.scalar, in.row_block(first, count).data, in.row_stride, in.col_stride,
                        out.row_block(first, count).data, count, in.cols);
  });
}

template <typename T>
void add_to(Matrix sum, Matrix part) {
  for_tasks(part.rows * part.cols, 1, 1, [&](int64_t first, int64_t count) {
    Accumulator<T>* const sums = static_cast<Accumulator<T>*>(sum.data) + first;
    const T* const values = static_cast<const T*>(part.data) + first;
    for (int64_t at = 0; at < count; ++at) sums[at] += load(values[at]);
  });
}

// sum, in accumulators, += part, both row-major.
void add_to(Matrix sum, Matrix part) {
  switch (part.scalar) {
    case Scalar::float32: return add_to<float>(sum, part);
    case Scalar::float64: return add_to<double>(sum, part);
    case Scalar::bfloat16: return add_to<BFloat16>(sum, part);
    case Scalar::float16: return add_to<Float16>(sum, part);
  }
}

// An operand's gradient, from those of parts: of which each has rows of its own, or all a share in the sum, which is kept
// in the accumulator. A vector counts as a matrix of one column.
class Gradient {
 public:
  // `whole` has the operand's shape, or no elements if the gradient is not wanted.
  Gradient(bool is_wanted, bool is_shared, bool is_in_parts, const Tensor& whole)
      : whole_(whole),
        matrix_(whole.dim() == 1 ? vector_of(whole).transposed() : matrix_of(whole)),
        is_shared_(is_shared) {
    if (!is_wanted) matrix_.data = nullptr;
    if (!is_wanted || !is_shared || !is_in_parts) return;
    part_ = new_matrix(whole, matrix_.rows, matrix_.cols);
    if (accumulator_of(matrix_.scalar) != matrix_.scalar) sum_ = new_accumulators(whole, matrix_.rows, matrix_.cols);
  }

  // Where the gradient of a part goes, that of rows `first` to first + count - 1.
  Matrix of_part(int64_t first, int64_t count) const {
    if (!is_shared_) return matrix_.row_block(first, count);
    return part_ && (is_begun_ || sum_) ? matrix_of(part_) : matrix_;
  }

  void take() {
    if (!part_) return;
    if (is_begun_)
      add_to(sum_ ? matrix_of(sum_) : matrix_, matrix_of(part_));
    else if (sum_)
      convert(matrix_of(part_), matrix_of(sum_));
    is_begun_ = true;
  }

  // After all parts.
  Tensor whole() const {
    if (sum_) convert(matrix_of(sum_), matrix_);
    return whole_;
  }

 private:
  Tensor whole_;
  Matrix matrix_;
  OptionalTensor part_, sum_;
  bool is_shared_, is_begun_ = false;
};

// The sum over output, row-major, and target, whose rows may lie apart; with `gradient` scale * its derivative by output.
LossSum compare(const loss::Spec& spec, Matrix output, Matrix target, double scale, void* gradient) {
  const int64_t cols = output.cols, gap = target.row_stride - cols;
  std::vector<LossSum> sums(output.rows);
  for_tasks(output.rows, cols, 1, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      const char* const targets = static_cast<const char*>(target.data) + row * gap * size_of(target.scalar);
      const LossOperands operands{output.scalar, spec, output.data, targets};
      sums[row] = loss_kernels().sum(operands, scale, gradient, row * cols, cols);
    }
  });
  return sum_of(sums.data(), output.rows);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_reconstruction_loss(
    Tensor h, Tensor weight, OptionalTensor bias, Tensor target, String activation, String kind,
    double parameter, double normalizer, double scale, int64_t needs, bool checked, int64_t part_size) {
  STD_TORCH_CHECK(h.dim() == 2, "h must be a matrix");
  check_layer(weight, bias, h.size(1), h);
  const int64_t rows = h.size(0), features = weight.size(0);
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == rows && target.size(1) == features, "target must be (", rows,
                  ", ", features, ")");
  const Scalar scalar = scalar_of(h), wide = scalar_of(target);
  STD_TORCH_CHECK(wide == scalar || wide == accumulator_of(scalar), "target must have the dtype of h or its accumulator");
  STD_TORCH_CHECK(bias || !(needs & dense::kNeedBias), "the gradient of a bias needs a bias");
  const ActivationSpec layer_spec = activation_spec(activation);
  const loss::Spec loss_spec = spec_of(kind.c_str(), parameter);

  // Parts are of the rows, or where there are more of them of the features, so that the gradients that parts have in
  // common are the smaller. They depend on the shape alone, and so do all sums.
  const bool by_rows = rows >= features;
  constexpr int64_t kUnit = 64;
  const int64_t whole = by_rows ? rows : features, other = by_rows ? features : rows;
  const int64_t length = std::min(std::max(kUnit, part_size / std::max<int64_t>(1, other) / kUnit * kUnit), whole);
  const bool is_in_parts = whole > length;
  const auto gradient_of = [&](int64_t need, bool is_shared, const Tensor& like) {
    return Gradient(needs & need, is_shared, is_in_parts, needs & need ? new_like(like) : new_vector(h, 0));
  };
  Gradient of_h = gradient_of(dense::kNeedX, !by_rows, h), of_weight = gradient_of(dense::kNeedWeight, by_rows, weight);
  Gradient of_bias = gradient_of(dense::kNeedBias, by_rows, bias ? *bias : h);

  // Memory of a part, for all of them: what is given back comes back from the system page by page.
  const bool keeps_derivative = needs && stores_derivative(layer_spec.activation);
  const bool keeps_output = needs && !keeps_derivative && layer_spec.activation != Activation::identity;
  const int64_t part_rows = by_rows ? length : rows, part_features = by_rows ? features : length;
  const auto memory_if = [&](bool is_needed, const Tensor& like) {
    return is_needed ? OptionalTensor(new_matrix(like, part_rows, part_features)) : OptionalTensor();
  };
  const OptionalTensor outputs = memory_if(true, h), derivatives = memory_if(keeps_derivative, h);
  const OptionalTensor wide_outputs = memory_if(wide != scalar, target);
  const OptionalTensor upstreams = memory_if(needs && (keeps_output || wide != scalar), h);
  const bool is_copied = target.stride(1) != 1 && features > 1;
  const OptionalTensor targets = memory_if(is_copied, target);

  double total = 0.0;
  for (int64_t first = 0; first < whole; first += length) {
    const int64_t count = std::min(length, whole - first);
    const int64_t some_rows = by_rows ? count : rows, some_features = by_rows ? features : count;
    const auto in = [&](const OptionalTensor& memory) {
      const Matrix part = matrix_of(memory);
      return Matrix{part.data, part.scalar, some_rows, some_features, some_features, 1};
    };
    const auto rows_of = [&](Matrix matrix) { return by_rows ? matrix.row_block(first, count) : matrix; };
    const auto features_of = [&](Matrix matrix) { return by_rows ? matrix : matrix.row_block(first, count); };
    const Matrix some_h = rows_of(matrix_of(h)), some_weight = features_of(matrix_of(weight));
    const Matrix some_bias = features_of(vector_of(bias).transposed()).transposed();

    const Matrix output = in(outputs), derivative = in(derivatives);
    LayerForward forward{layer_spec, some_weight, some_bias, output, derivative};
    dense_forward(some_h, &forward, 1);

    Matrix compared = output;
    if (wide_outputs) convert(output, compared = in(wide_outputs));
    Matrix some_target = features_of(rows_of(matrix_of(target)).transposed()).transposed();
    if (is_copied) {
      const Matrix from = some_target;
      convert(from, some_target = in(targets));
    }
    // The gradient takes the place of what it is made of, unless the layer's backward reads that.
    Matrix upstream = keeps_output && !wide_outputs ? in(upstreams) : compared;
    const LossSum sum = compare(loss_spec, compared, some_target, scale, needs ? upstream.data : nullptr);
    check_range(sum, checked);
    total += sum.value;
    if (!needs) continue;
    if (wide_outputs) {
      const Matrix from = upstream;
      convert(from, upstream = in(upstreams));
    }
    LayerBackward backward{layer_spec, some_weight, some_h, keeps_derivative ? derivative : keeps_output ? output : Matrix(),
                           of_weight.of_part(first, count), of_bias.of_part(first, count).transposed()};
    dense_backward(upstream, &backward, 1, of_h.of_part(first, count));
    for (Gradient* gradient : {&of_h, &of_weight, &of_bias}) gradient->take();
  }
  return {new_scalar(h, normalizer * total), of_h.whole(), of_weight.whole(), of_bias.whole()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : loss::kLinearReconstructionLossSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("linear_reconstruction_loss", TORCH_BOX(&linear_reconstruction_loss));
}

}  // namespace aefast::cpu
