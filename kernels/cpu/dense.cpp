#include "dense.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

namespace aefast::cpu {

namespace {

using torch::headeronly::ScalarType;

ScalarType torch_type(Scalar scalar) {
  switch (scalar) {
    case Scalar::float32: return ScalarType::Float;
    case Scalar::float64: return ScalarType::Double;
    case Scalar::bfloat16: return ScalarType::BFloat16;
    case Scalar::float16: return ScalarType::Half;
  }
  return ScalarType::Undefined;
}

Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Double: return Scalar::float64;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: STD_TORCH_CHECK(false, "aefast: dtype must be float32, float64, bfloat16 or float16"); return {};
  }
}

// A tensor over memory that somebody else owns. Being no view of an autograd tensor, it can be an
// output of torch's kernels on any thread.
Tensor borrow(Matrix matrix) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const int64_t sizes[] = {matrix.rows, matrix.cols};
  const int64_t strides[] = {matrix.row_stride, matrix.col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(matrix.data, 2, sizes, strides, 0,
                                                            static_cast<int32_t>(torch_type(matrix.scalar)), cpu, 0,
                                                            &handle));
  return Tensor(handle);
}

void multiply(Matrix a, Matrix b, Matrix out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(borrow(out).get(), borrow(a).get(), borrow(b).get()));
}

void multiply_add(Matrix a, Matrix b, Matrix out) {
  const Tensor sum = borrow(out);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), borrow(a).get(), borrow(b).get(), 1.0, 1.0));
}

// The element type in which products are formed. Where the processor has no matrix instructions for a
// half type, torch's product of such matrices is a scalar loop, some 100 times slower than in float32.
Scalar product_type(Scalar scalar) {
#if defined(__x86_64__)
  static const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");
#else
  static const bool has_bfloat16 = false;
#endif
  if (scalar == Scalar::bfloat16 && !has_bfloat16) return Scalar::float32;
  if (scalar == Scalar::float16) return Scalar::float32;
  return scalar;
}

Scalar accumulator_type(Scalar scalar) { return scalar == Scalar::float64 ? Scalar::float64 : Scalar::float32; }

class Scratch {
 public:
  Matrix matrix(Scalar scalar, int64_t rows, int64_t cols) {
    buffers_.emplace_back(new char[static_cast<size_t>(rows * cols * size_of(scalar))]);
    return {buffers_.back().get(), scalar, rows, cols, cols, 1};
  }

 private:
  std::vector<std::unique_ptr<char[]>> buffers_;
};

// Bias gradients are summed over blocks of this many rows, and then over the blocks in order: the
// result depends on the shape alone, not on threads or chunks.
constexpr int64_t kReductionRows = 64;

int64_t block_count(int64_t rows) { return (rows + kReductionRows - 1) / kReductionRows; }

// body(first_block, row_begin, row_count) over blocks of kReductionRows rows, in parallel.
template <typename Body>
void for_row_blocks(int64_t rows, int64_t cols, const Body& body) {
  constexpr int64_t kElementsPerTask = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, kReductionRows * cols));
  torch::stable::parallel_for(0, block_count(rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kReductionRows;
      body(block, row, std::min(kReductionRows, rows - row));
    }
  });
}

// A row-major copy in `scalar`.
Matrix copied(Matrix in, Scalar scalar, Scratch& scratch) {
  const Matrix out = scratch.matrix(scalar, in.rows, in.cols);
  for_row_blocks(in.rows, in.cols, [&](int64_t, int64_t begin, int64_t count) {
    const Matrix from = in.row_block(begin, count);
    pointwise().convert(in.scalar, scalar, from.data, from.row_stride, from.col_stride,
                        out.row_block(begin, count).data, count, in.cols);
  });
  return out;
}

Matrix converted(Matrix in, Scalar scalar, Scratch& scratch) {
  return in.scalar == scalar ? in : copied(in, scalar, scratch);
}

Matrix unit_stride(Matrix in, Scratch& scratch) { return in.col_stride == 1 ? in : copied(in, in.scalar, scratch); }

// Rows a chunk: enough that a product of one chunk runs at full rate, and few enough that its result is
// still in the second- or third-level cache when the pointwise pass comes.
constexpr int64_t kChunkRows = 8 * kReductionRows;

// body(row_begin, row_count) over chunks. Many chunks run in parallel, each with products of its own on
// one thread; few run in turn, each product on all threads.
template <typename Body>
void for_row_chunks(int64_t rows, const Body& body) {
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      body(index * kChunkRows, std::min(kChunkRows, rows - index * kChunkRows));
  };
  if (chunks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads()))
    torch::stable::parallel_for(0, chunks, 1, run);
  else
    run(0, chunks);
}

char* offset(const void* data, int64_t elements, Scalar scalar) {
  return data ? static_cast<char*>(const_cast<void*>(data)) + elements * size_of(scalar) : nullptr;
}

// Partial sums of a bias gradient, a row for each block of kReductionRows rows.
class BiasGradient {
 public:
  BiasGradient(void* out, Scalar scalar, int64_t rows, int64_t cols)
      : out_(out), scalar_(scalar), blocks_(block_count(rows)), cols_(cols) {
    if (out) partials_ = scratch_.matrix(accumulator_type(scalar), blocks_, cols).data;
  }
  void* partial(int64_t block) const { return offset(partials_, block * cols_, accumulator_type(scalar_)); }
  void finish() const {
    if (out_) pointwise().sum_rows(scalar_, partials_, out_, blocks_, cols_);
  }

 private:
  Scratch scratch_;
  void* out_;
  Scalar scalar_;
  int64_t blocks_, cols_;
  void* partials_ = nullptr;
};

}  // namespace

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.data_ptr(), scalar_of(tensor.scalar_type()), tensor.size(0),
          tensor.size(1),    tensor.stride(0),                tensor.stride(1)};
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows, cols}, std::nullopt);
}

Tensor new_vector(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, std::nullopt); }

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

ActivationSpec activation_spec(const std::string& name, double slope, double alpha) {
  Activation activation;
  STD_TORCH_CHECK(activation_named(name, activation), "aefast: unknown activation ", name);
  return {activation, {slope, alpha}};
}

void dense_forward(ActivationSpec spec, Matrix x, Matrix weight, const void* bias, Matrix out, void* derivative) {
  if (out.rows == 0 || out.cols == 0) return;
  const Scalar type = product_type(x.scalar);
  Scratch weights;
  const Matrix w = converted(weight, type, weights).transposed();
  for_row_chunks(out.rows, [&](int64_t begin, int64_t count) {
    Scratch scratch;
    const Matrix target = out.row_block(begin, count);
    const Matrix pre = type == out.scalar ? target : scratch.matrix(type, count, out.cols);
    multiply(converted(x.row_block(begin, count), type, scratch), w, pre);
    if (spec.activation == Activation::identity && !bias && type == out.scalar) return;
    for_row_blocks(count, out.cols, [&](int64_t, int64_t row, int64_t rows) {
      pointwise().bias_activation(spec, type, out.scalar, pre.row_block(row, rows).data, bias,
                                  target.row_block(row, rows).data,
                                  offset(derivative, (begin + row) * out.cols, out.scalar), rows, out.cols);
    });
  });
}

void activation_gradient(ActivationSpec spec, Matrix grad, const void* saved, Matrix g, void* bias_gradient) {
  const BiasGradient sums(bias_gradient, grad.scalar, g.rows, g.cols);
  for_row_blocks(g.rows, g.cols, [&](int64_t block, int64_t begin, int64_t count) {
    Scratch scratch;
    const Matrix upstream = unit_stride(grad.row_block(begin, count), scratch);
    pointwise().activation_gradient(spec, grad.scalar, grad.scalar, g.scalar, upstream.data, upstream.row_stride,
                                    offset(saved, begin * g.cols, grad.scalar), g.row_block(begin, count).data,
                                    sums.partial(block), count, g.cols);
  });
  sums.finish();
}

void data_gradient(ActivationSpec spec, Matrix g, Matrix weight, const void* saved, Matrix out, void* bias_gradient) {
  const BiasGradient sums(bias_gradient, out.scalar, out.rows, out.cols);
  if (out.rows == 0 || out.cols == 0) return sums.finish();
  const Scalar type = product_type(g.scalar);
  const bool pointwise_pass = spec.activation != Activation::identity || bias_gradient || type != out.scalar;
  Scratch weights;
  const Matrix w = converted(weight, type, weights);
  for_row_chunks(out.rows, [&](int64_t begin, int64_t count) {
    Scratch scratch;
    const Matrix target = out.row_block(begin, count);
    const Matrix product = type == out.scalar ? target : scratch.matrix(type, count, out.cols);
    multiply(converted(g.row_block(begin, count), type, scratch), w, product);
    if (!pointwise_pass) return;
    const int64_t first_block = begin / kReductionRows;
    for_row_blocks(count, out.cols, [&](int64_t block, int64_t row, int64_t rows) {
      pointwise().activation_gradient(spec, type, out.scalar, out.scalar, product.row_block(row, rows).data, out.cols,
                                      offset(saved, (begin + row) * out.cols, out.scalar),
                                      target.row_block(row, rows).data, sums.partial(first_block + block), rows,
                                      out.cols);
    });
  });
  sums.finish();
}

void weight_gradient(Matrix g, Matrix x, Matrix out) {
  if (out.rows == 0 || out.cols == 0) return;
  const Scalar type = product_type(out.scalar);
  if (type == out.scalar) return multiply(g.transposed(), x, out);
  Scratch result;
  const Matrix sum = result.matrix(type, out.rows, out.cols);
  for (int64_t begin = 0; begin < g.rows || begin == 0; begin += kChunkRows) {
    Scratch scratch;
    const int64_t count = std::min(kChunkRows, g.rows - begin);
    const Matrix g_block = converted(g.row_block(begin, count), type, scratch).transposed();
    const Matrix x_block = converted(x.row_block(begin, count), type, scratch);
    if (begin == 0)
      multiply(g_block, x_block, sum);
    else
      multiply_add(g_block, x_block, sum);
  }
  pointwise().convert(type, out.scalar, sum.data, sum.cols, 1, out.data, out.rows, out.cols);
}

}  // namespace aefast::cpu
