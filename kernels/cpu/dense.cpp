#include "dense.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>

#include "allocation.h"
#include "dispatch.h"
#include "memory.h"
#include "penalty.h"
#include "product.h"

namespace aefast::cpu {

namespace {

constexpr size_t kAlignment = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Uninitialised memory until the end of the scope; a short call's comes from the stack, and all other from torch, whose
// memory profiler sees it then.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (Block* const block : blocks_) give_back(block);
  }

  Matrix matrix(Scalar scalar, int64_t rows, int64_t cols) {
    return {take(static_cast<size_t>(rows * cols * size_of(scalar))), scalar, rows, cols, cols, 1};
  }

 private:
  void* take(size_t bytes) {
    bytes = aligned(bytes);
    if (bytes <= sizeof(local_) - used_) {
      used_ += bytes;
      return local_ + used_ - bytes;
    }
    if (Block* const block = take_block(bytes)) {
      blocks_.push_back(block);
      return data_of(block);
    }
    const int64_t size = static_cast<int64_t>(bytes), stride = 1;
    buffers_.push_back(Tensor(allocated(1, &size, &stride, aoti_torch_dtype_uint8(), cpu_device(), 0)));
    return buffers_.back().mutable_data_ptr();
  }

  alignas(kAlignment) char local_[16 << 10];
  size_t used_ = 0;
  std::vector<Tensor> buffers_;
  std::vector<Block*> blocks_;
};

// Uninitialised memory that is there again at the next call.
class Workspace {
 public:
  void* of(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      buffer_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, aligned(bytes))));
      if (!buffer_) throw std::bad_alloc();
      size_ = bytes;
    }
    return buffer_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> buffer_;
  size_t size_ = 0;
};

// Whether torch's BLAS, at its full rate, is no slower than product_kernels().
std::atomic<bool> has_fast_blas{!has_wider_vectors_than_blas()};

// Up to so many operations the BLAS spends much of its time beside them, and above it is at its full rate.
const double kMostFlopsBesideBlas = is_intel() ? 6e7 : 5e8;

double most_flops_of_own() {
  return has_fast_blas.load(std::memory_order_relaxed) ? kMostFlopsBesideBlas
                                                       : std::numeric_limits<double>::infinity();
}

// With so small a weight it never gains: parts of the batch go through product_kernels(), however many there are.
constexpr int64_t kMostElementsOfOwn = 1 << 15;
// In bfloat16 the BLAS is as fast from where on each of the three matrices is larger.
constexpr int64_t kMostElementsOfBFloat16 = 1 << 16;

// A product of so many operations is worth a second thread.
constexpr double kLeastFlopsOfThread = 1.5e5;

double flops_of(int64_t rows, int64_t inner, int64_t cols) { return 2.0 * rows * inner * cols; }

bool is_large(double flops) { return flops > most_flops_of_own(); }

int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Whether operands in bfloat16 are multiplied as such.
std::atomic<bool> has_bfloat16{has_fast_bfloat16_products()};

// Whether float32 products may be formed from operands rounded to bfloat16.
std::atomic<bool> may_round{false};

// How a product is formed: in one way in all parts that threads take of it, so that none of its bits depends on which
// these are.
struct Plan {
  std::optional<Unit> unit;     // of product_kernels(); none: by the BLAS
  Scalar left, right, product;  // in what the operands are and what it is written in: the BLAS rounds to their type

  bool rounds() const { return product != accumulator_of(product); }
};

// The unit for (rows, inner) times (inner, cols) in float32 or float64.
Unit unit_of(Scalar scalar, int64_t rows, int64_t inner, int64_t cols) {
  if (scalar != Scalar::float32) return Unit::vectors;
  const Unit unit = may_round.load(std::memory_order_relaxed) ? Unit::matrix_rounding : Unit::matrix;
  return product_kernels().suits(unit, rows, inner, cols) ? unit : Unit::vectors;
}

// For (rows, inner) times (inner, cols) of `scalar`, one of which or whose product is a weight of so many elements.
// `is_large`: vectors leave it to the BLAS. `is_of_samples`: the rows are samples, few of which, in float32, vectors
// multiply with a weight in bfloat16.
Plan plan_of(Scalar scalar, int64_t rows, int64_t inner, int64_t cols, int64_t weight_elements, bool is_large,
             bool is_of_samples = true) {
  if (scalar == Scalar::bfloat16) {
    const Plan by_vectors{Unit::vectors, Scalar::float32, scalar, Scalar::float32};
    const Plan by_unit{Unit::matrix_rounding, scalar, scalar, Scalar::float32};
    const Plan by_blas{std::nullopt, scalar, scalar, scalar};
    if (is_of_samples && rows <= kFewRows) return by_vectors;
    if (has_bfloat16.load(std::memory_order_relaxed)) {
      const int64_t smallest = std::min({rows * inner, inner * cols, rows * cols});
      if (smallest <= kMostElementsOfBFloat16 && product_kernels().suits(Unit::matrix_rounding, rows, inner, cols))
        return by_unit;
      // A shorter product costs the BLAS more than to convert its operands.
      if (weight_elements > kMostElementsOfBFloat16) return by_blas;
    }
  }
  // Without instructions for a half type torch's product of such matrices is a scalar loop, some 100 times slower than
  // in float32, and with slow ones half as fast.
  const Scalar type = accumulator_of(scalar);
  const Unit unit = unit_of(type, rows, inner, cols);
  if (is_large && unit == Unit::vectors) return {std::nullopt, type, type, type};
  return {unit, type, type, type};
}

// out = a b, or += with `add`, on one thread, by product_kernels().
void multiply_here(Matrix a, Matrix b, Matrix out, Unit unit, bool add = false) {
  // Kept, because a large block that is freed goes back to the system, and comes back page by page.
  static thread_local Workspace workspace;
  const ProductOperand left{a.data, a.scalar, a.row_stride, a.col_stride};
  const ProductOperand right{b.data, b.scalar, b.row_stride, b.col_stride};
  const size_t bytes = product_kernels().workspace_bytes(out.scalar, unit, left, out.rows, a.cols, out.cols);
  product_kernels().product(out.scalar, unit, left, right, out.data, out.row_stride, out.rows, a.cols, out.cols, add,
                            workspace.of(bytes));
}

// The same for a small out of many terms, which are summed in parts, so that a thread reads its own rows of b, one
// after the other. How many parts depends on the shape alone.
void multiply_in_parts(Matrix a, Matrix b, Matrix out, int64_t workers) {
  constexpr int64_t kParts = 8;
  Scratch scratch;
  const Matrix sums = scratch.matrix(out.scalar, kParts, out.rows * out.cols);
  const int64_t terms = (a.cols + kParts - 1) / kParts;
  const Unit unit = unit_of(out.scalar, out.rows, terms, out.cols);
  torch::stable::parallel_for(0, kParts, (kParts + workers - 1) / workers, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = std::min(part * terms, a.cols), count = std::min(terms, a.cols - first);
      const Matrix sum{sums.row_block(part, 1).data, out.scalar, out.rows, out.cols, out.cols, 1};
      multiply_here(a.column_block(first, count), b.row_block(first, count), sum, unit);
    }
  });
  pointwise().sum_rows(out.scalar, sums.data, out.data, kParts, out.rows * out.cols);
}

// out = a b as planned. By product_kernels() on several threads, each has columns of out of its own, or rows where the
// columns are too few.
void multiply(Matrix a, Matrix b, Matrix out, const Plan& plan) {
  if (!plan.unit) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(borrow(out).get(), borrow(a).get(), borrow(b).get()));
    return;
  }
  const Unit unit = *plan.unit;
  // Few rows of many terms: b is all there is to read, and parts of it are whole rows.
  constexpr int64_t kColumns = 32, kLeastRows = 64, kMostRowsOfParts = 4, kLeastTermsOfParts = 256;
  const auto workers_of = [&](int64_t tasks) {
    return std::min({threads(), tasks, static_cast<int64_t>(flops_of(a.rows, a.cols, b.cols) / kLeastFlopsOfThread)});
  };
  if (b.col_stride == 1 && out.rows <= kMostRowsOfParts && a.cols >= kLeastTermsOfParts && out.is_row_major())
    return multiply_in_parts(a, b, out, std::max<int64_t>(1, workers_of(threads())));
  const int64_t tasks = (out.cols + kColumns - 1) / kColumns, workers = workers_of(tasks);
  const int64_t by_rows = workers_of(out.rows / kLeastRows);
  if (by_rows > workers) {
    // Parts differ by one row at most: products of fewer rows than kLeastRows are summed in another order.
    torch::stable::parallel_for(0, by_rows, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * out.rows / by_rows, count = end * out.rows / by_rows - first;
      multiply_here(a.row_block(first, count), b, out.row_block(first, count), unit);
    });
    return;
  }
  if (workers <= 1) return multiply_here(a, b, out, unit);
  const int64_t width = (tasks + workers - 1) / workers * kColumns;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * width, count = std::min(end * width, out.cols) - first;
    if (count > 0) multiply_here(a, b.column_block(first, count), out.column_block(first, count), unit);
  });
}

// out = start + a b by the BLAS; start is of out's size, or one row for all of its rows.
void multiply_add(Matrix a, Matrix b, Matrix start, Matrix out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(borrow(out).get(), borrow(start).get(), borrow(a).get(),
                                                  borrow(b).get(), 1.0, 1.0));
}

// product = x weight^T, and the bias in it where it is rounded; returns the bias that is left to add.
Matrix multiply_layer(Matrix x, Matrix weight, Matrix bias, Matrix product, const Plan& plan) {
  if (bias.data && plan.rounds()) {
    multiply_add(x, weight.transposed(), bias, product);
    return {};
  }
  multiply(x, weight.transposed(), product, plan);
  return bias;
}

// Bias gradients are summed over blocks of rows, and then over the blocks in order: the result depends on the
// shape alone, not on threads or parts. A block is long enough to be worth a call, and short enough for threads to
// share a small batch.
int64_t reduction_rows(int64_t rows, int64_t widest) {
  constexpr int64_t kElements = 4096;
  if (rows < 256) return 16;
  int64_t block = 64;
  while (2 * block * widest <= kElements && 16 * block <= rows) block *= 2;
  return block;
}

int64_t blocks_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// body(row_begin, row_count) over blocks of `block` rows, in parallel unless the caller is already.
template <typename Body>
void for_row_blocks(int64_t rows, int64_t cols, int64_t block, const Body& body) {
  constexpr int64_t kElementsPerTask = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, block * cols));
  torch::stable::parallel_for(0, blocks_of(rows, block), grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      body(index * block, std::min(block, rows - index * block));
  });
}

// A row-major copy in `scalar`.
Matrix copied(Matrix in, Scalar scalar, Scratch& scratch) {
  const Matrix out = scratch.matrix(scalar, in.rows, in.cols);
  for_row_blocks(in.rows, in.cols, 64, [&](int64_t begin, int64_t count) {
    const Matrix from = in.row_block(begin, count);
    pointwise().convert(in.scalar, scalar, from.data, from.row_stride, from.col_stride,
                        out.row_block(begin, count).data, count, in.cols);
  });
  return out;
}

// An operand of a product, in `scalar` and with a stride of 1, which the BLAS alone does without.
Matrix converted(Matrix in, Scalar scalar, Scratch& scratch) {
  const bool fits = in.row_stride == 1 || in.col_stride == 1;
  return in.scalar == scalar && fits ? in : copied(in, scalar, scratch);
}

Matrix row_major(Matrix in, Scratch& scratch) {
  return !in.data || in.is_row_major() ? in : copied(in, in.scalar, scratch);
}

Matrix unit_stride(Matrix in, Scratch& scratch) {
  return !in.data || in.col_stride == 1 ? in : copied(in, in.scalar, scratch);
}

// The layers that rows go through one after the other. All are added before the first is planned.
struct Work {
  Scalar scalar;  // of the rows
  int64_t rows;
  int64_t widest = 1;
  double flops = 0.0;      // the most of a layer, all rows together; of a small weight as many as are left to vectors
  bool is_packed = false;  // whether a large weight goes through the matrix unit
  bool has_blas = false;   // whether a layer is multiplied by the BLAS
  bool converts = false;   // whether one is multiplied in another type

  void add(Matrix weight) {
    const double its = flops_of(rows, weight.rows, weight.cols);
    widest = std::max({widest, weight.rows, weight.cols});
    flops = std::max(flops, weight.rows * weight.cols <= kMostElementsOfOwn ? std::min(its, most_flops_of_own()) : its);
  }

  // For the rows of so many terms times (inner, cols), of a weight of so many elements.
  Plan plan(int64_t inner, int64_t cols, int64_t weight_elements) {
    const Plan plan = plan_of(scalar, rows, inner, cols, weight_elements, is_large(flops));
    is_packed |= weight_elements > kMostElementsOfOwn && plan.unit && *plan.unit != Unit::vectors;
    has_blas |= !plan.unit;
    converts |= plan.right != scalar;
    return plan;
  }
};

// How rows are divided: so many parts of so many rows each, the last of what is left.
struct Division {
  int64_t parts, rows;
};

// Products of few rows are summed in another order. A last part that has so few, beside others that have more, joins the
// one before, so that no bit depends on how many threads there are.
int64_t parts_of(int64_t rows, int64_t part_rows) {
  constexpr int64_t kLeastRowsOfLast = 32;
  const int64_t parts = blocks_of(rows, part_rows);
  return parts > 1 && rows - (parts - 1) * part_rows < kLeastRowsOfLast ? parts - 1 : parts;
}

// Parts are a multiple of the threads, so that all finish together, and of whole blocks. A part's matrices should
// stay in the cache until the pointwise pass, and yet be long enough for the full rate of a product. With fewer
// rows than keep all threads busy there is one part, and threads share its columns.
Division divide(const Work& work, int64_t block) {
  constexpr int64_t kLeastRowsOfThread = 64, kRows = 256, kLeastRowsOfBlas = 512, kMostRowsOfBlas = 2048;
  constexpr int64_t kElementsOfBlas = 1 << 20, kRowsOfMatrixUnit = 512;
  int64_t least = kLeastRowsOfThread, most = kRows;
  if (work.is_packed) {
    // A weight is packed once for each part; where threads share columns, the rows are for each thread.
    least = std::clamp(work.widest, kLeastRowsOfThread, kRowsOfMatrixUnit);
    most = kRowsOfMatrixUnit;
  } else if (work.has_blas) {
    // In half precision the BLAS rearranges a weight at each call.
    least = kLeastRowsOfBlas;
    most = work.converts ? kLeastRowsOfBlas
                         : std::clamp(kElementsOfBlas / work.widest, kLeastRowsOfBlas, kMostRowsOfBlas);
  }
  if (work.rows < least * threads() || work.flops < kLeastFlopsOfThread * static_cast<double>(threads()))
    return {1, work.rows};
  const int64_t least_parts = (work.rows + most - 1) / most;
  const int64_t parts = (least_parts + threads() - 1) / threads() * threads();
  const int64_t part_rows = blocks_of((work.rows + parts - 1) / parts, block) * block;
  return {parts_of(work.rows, part_rows), part_rows};
}

// body(row_begin, row_count) over the parts, in parallel if there are several.
template <typename Body>
void for_row_parts(int64_t rows, const Division& division, const Body& body) {
  if (division.parts == 1) return body(int64_t{0}, rows);
  torch::stable::parallel_for(0, division.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * division.rows;
      body(first, part + 1 < division.parts ? division.rows : rows - first);
    }
  });
}

// Sums over all rows of a matrix, of which each block of rows has one row of partial sums.
class ColumnSums {
 public:
  ColumnSums() = default;
  ColumnSums(Matrix out, int64_t rows, int64_t block, Scratch& scratch)
      : out_(out), blocks_(blocks_of(rows, block)), block_(block) {
    if (wanted()) partials_ = scratch.matrix(accumulator_of(out.scalar), blocks_, out.cols);
  }
  bool wanted() const { return out_.data != nullptr; }
  int64_t block() const { return block_; }
  void* partial(int64_t row) const { return partials_.row_block(row / block_, 1).data; }
  void finish() const {
    if (wanted()) pointwise().sum_rows(out_.scalar, partials_.data, out_.data, blocks_, out_.cols);
  }

 private:
  Matrix out_, partials_;
  int64_t blocks_ = 0, block_ = 1;
};

// upstream with what is added to it: in g where g can hold it, which is about to be written anyway.
Matrix with_slopes(Matrix upstream, const OutputSlopes& added, Matrix g) {
  static thread_local Workspace workspace;
  const Scalar wide = accumulator_of(upstream.scalar);
  const int64_t rows = upstream.rows, cols = upstream.cols;
  void* const memory =
      g.data && g.scalar == wide ? g.data : workspace.of(static_cast<size_t>(rows * cols * size_of(wide)));
  penalty_kernels().add_slopes(upstream.scalar, upstream.data, upstream.row_stride, added.slopes.data,
                               added.output.data, memory, rows, cols);
  return {memory, wide, rows, cols, cols, 1};
}

// g = upstream * act' and the partial column sums of g, on rows of which `begin` is the first of a whole. An
// absent g is not stored.
void activation_gradient(const ActivationSpec& spec, Matrix upstream, Matrix saved, Matrix g, const ColumnSums& sums,
                         int64_t begin, const OutputSlopes& added = {}) {
  for_row_blocks(upstream.rows, upstream.cols, sums.block(), [&](int64_t row, int64_t count) {
    Matrix from = upstream.row_block(row, count);
    if (added.slopes.data)
      from = with_slopes(from, {added.slopes, added.output.row_block(row, count)}, g.row_block(row, count));
    pointwise().activation_gradient(spec, from.scalar, g.scalar, from.data, from.row_stride,
                                    saved.row_block(row, count).data, g.row_block(row, count).data,
                                    sums.partial(begin + row), count, from.cols);
  });
}

// below = (g weight) * act' of the layer below, and its column sums.
void data_gradient(const ActivationSpec& spec, Matrix g, Matrix weight, Matrix saved, Matrix below,
                   const ColumnSums& sums, int64_t begin, const Plan& plan) {
  if (below.rows == 0 || below.cols == 0) return;
  Scratch scratch;
  const Matrix product = plan.product == below.scalar ? below : scratch.matrix(plan.product, below.rows, below.cols);
  multiply(converted(g, plan.left, scratch), weight, product, plan);
  if (spec.activation != Activation::identity || sums.wanted() || plan.product != below.scalar)
    activation_gradient(spec, product, saved, below, sums, begin);
}

// out = a b of many terms.
void multiply_long(Matrix a, Matrix b, Matrix out, const Plan& plan) {
  if (!plan.unit) return multiply(a, b, out, plan);
  const int64_t workers =
      std::min(threads(), static_cast<int64_t>(flops_of(a.rows, a.cols, b.cols) / kLeastFlopsOfThread));
  // The parts' sums should stay in the cache, and be written less often than the operands are read.
  constexpr int64_t kMostElementsOfParts = 1 << 16, kLeastTermsOfParts = 1024, kElementsOfTerm = 16;
  if (out.rows * out.cols <= std::min(kMostElementsOfParts, kElementsOfTerm * a.cols) &&
      a.cols >= kLeastTermsOfParts && a.scalar == out.scalar)
    return multiply_in_parts(a, b, out, std::max<int64_t>(1, workers));
  // Threads share rows of out where there are enough: a thread that writes whole pages keeps them in its own cache.
  constexpr int64_t kLeastRows = 32;
  if (workers <= 1 || out.rows < kLeastRows * workers) return multiply(a, b, out, plan);
  const int64_t part = blocks_of((out.rows + workers - 1) / workers, kLeastRows) * kLeastRows;
  for_row_parts(out.rows, {parts_of(out.rows, part), part}, [&](int64_t begin, int64_t count) {
    multiply(a.row_block(begin, count), b, out.row_block(begin, count), plan);
  });
}

// `in` in the type of out.
void convert_rows(Matrix in, Matrix out) {
  for_row_blocks(out.rows, out.cols, 64, [&](int64_t begin, int64_t count) {
    const Matrix from = in.row_block(begin, count);
    pointwise().convert(in.scalar, out.scalar, from.data, from.row_stride, 1, out.row_block(begin, count).data, count,
                        out.cols);
  });
}

// out = a b, rounded to out's type: so many rows at a time that stay in the second-level cache. How many depends on the
// shape alone.
void multiply_rounded(Matrix a, Matrix b, Matrix out, const Plan& plan) {
  constexpr int64_t kLeastRows = 64, kElements = 1 << 17;
  const int64_t rows = std::max(kLeastRows, kElements / out.cols / kLeastRows * kLeastRows);
  for_row_parts(out.rows, {parts_of(out.rows, rows), rows}, [&](int64_t begin, int64_t count) {
    Scratch scratch;
    const Matrix product = scratch.matrix(plan.product, count, out.cols);
    multiply(a.row_block(begin, count), b, product, plan);
    convert_rows(product, out.row_block(begin, count));
  });
}

// out = g^T x, over all rows at once.
void weight_gradient(Matrix g, Matrix x, Matrix out) {
  if (out.rows == 0 || out.cols == 0) return;
  const auto plan_for = [&](Scalar scalar, int64_t terms) {
    return plan_of(scalar, out.rows, terms, out.cols, out.rows * out.cols,
                   is_large(flops_of(out.rows, terms, out.cols)), false);
  };
  const Plan whole = plan_for(out.scalar, g.rows);
  const bool converts = whole.right != out.scalar;
  // So many rows are converted at a time that stay in the cache.
  constexpr int64_t kLeastRows = 512, kElements = 1 << 18;
  const int64_t rows = std::max<int64_t>(1, g.rows);
  const int64_t most = converts ? std::max(kLeastRows, kElements / (out.rows + out.cols)) : rows;
  // What is larger would pass through memory twice before it is rounded.
  constexpr int64_t kMostElementsOfCache = 1 << 16;
  Scratch memory;
  if (converts && rows <= most && out.rows * out.cols > kMostElementsOfCache) {
    const Matrix a = converted(g, whole.left, memory).transposed();
    return multiply_rounded(a, converted(x, whole.right, memory), out, whole);
  }
  const Plan plan = rows <= most ? whole : plan_for(whole.right, most);
  const Matrix sum = plan.product == out.scalar ? out : memory.matrix(plan.product, out.rows, out.cols);
  for (int64_t begin = 0; begin < rows; begin += most) {
    Scratch scratch;
    const int64_t count = std::min(most, g.rows - begin);
    const Matrix a = converted(g.row_block(begin, count), plan.left, scratch).transposed();
    const Matrix b = converted(x.row_block(begin, count), plan.right, scratch);
    if (begin == 0)
      multiply_long(a, b, sum, plan);
    else
      multiply_add(a, b, sum, sum);
  }
  if (plan.product != out.scalar) convert_rows(sum, out);
}

// One layer over the rows of x, of which `begin` is the first of a whole, and the partial column sums of its output.
void layer_forward(const LayerForward& layer, const Plan& plan, Matrix x, Matrix out, Matrix derivative,
                   const ColumnSums& sums, bool of_magnitudes, int64_t begin) {
  if (out.rows == 0 || out.cols == 0) return;
  Scratch scratch;
  const Matrix pre = plan.product == out.scalar ? out : scratch.matrix(plan.product, out.rows, out.cols);
  const void* const bias =
      multiply_layer(converted(x, plan.left, scratch), layer.weight, layer.bias, pre, plan).data;
  const bool is_done = layer.spec.activation == Activation::identity && !bias && plan.product == out.scalar;
  if (is_done && !sums.wanted()) return;
  // A block that is read once more is to stay in the first-level cache.
  const int64_t block = std::max<int64_t>(1, (sums.wanted() ? 1 << 12 : 1 << 14) / out.cols);
  const auto activate = [&](int64_t row, int64_t rows) {
    pointwise().bias_activation(layer.spec, plan.product, out.scalar, pre.row_block(row, rows).data, bias,
                                out.row_block(row, rows).data, derivative.row_block(row, rows).data, rows, out.cols);
  };
  if (!sums.wanted()) return for_row_blocks(out.rows, out.cols, block, activate);
  for_row_blocks(out.rows, out.cols, sums.block(), [&](int64_t first, int64_t count) {
    // Each block is summed where it has just been written, in the cache.
    for (int64_t row = 0; row < count; row += block) {
      const int64_t rows = std::min(block, count - row);
      if (!is_done) activate(first + row, rows);
      penalty_kernels().column_sums(out.scalar, of_magnitudes, out.row_block(first + row, rows).data,
                                    sums.partial(begin + first), rows, out.cols, row > 0);
    }
  });
}

// What a backward does for some rows: gradients at the pre-activations, from the last layer down to `lowest`, and
// the partial sums of their columns.
struct BackwardPass {
  Matrix grad;
  const LayerBackward* layers;
  size_t lowest, top;
  Matrix x_gradient;
  std::vector<ColumnSums> sums;  // one a layer
  std::vector<Plan> plans;       // of the gradients of the layers' inputs
  ColumnSums none;
  OutputSlopes added;

  // Whether the layer's gradient is the one that comes in.
  bool is_identity(size_t index) const {
    return layers[index].spec.activation == Activation::identity && !(index == top && added.slopes.data);
  }

  // memory(index) is where the layer's gradient goes, in these rows; not asked for an identity at the top, whose
  // gradient is `grad`. Absent memory: it is not kept. Then body(index, gradient) is called.
  template <typename Memory, typename Body>
  void run(int64_t begin, int64_t rows, const Memory& memory, const Body& body) const {
    const auto part = [&](Matrix matrix) { return matrix.row_block(begin, rows); };
    Matrix g = part(grad);
    Scratch copy;
    if (!is_identity(top)) {
      const Matrix upstream = unit_stride(g, copy);
      g = memory(top);
      activation_gradient(layers[top].spec, upstream, part(layers[top].saved), g, sums[top], begin,
                          {added.slopes, part(added.output)});
    } else if (sums[top].wanted()) {
      activation_gradient(layers[top].spec, unit_stride(g, copy), {}, {nullptr, grad.scalar}, sums[top], begin);
    }
    body(top, g);
    for (size_t index = top; index > lowest; --index) {
      const LayerBackward& below = layers[index - 1];
      const Matrix above = g;
      g = memory(index - 1);
      data_gradient(below.spec, above, layers[index].weight, part(below.saved), g, sums[index - 1], begin,
                    plans[index]);
      body(index - 1, g);
    }
    if (x_gradient.data)
      data_gradient({Activation::identity, {}}, g, layers[0].weight, {}, part(x_gradient), none, begin, plans[0]);
  }
};

// Groups of rows that sum up small weight gradients of their own, so that no layer's gradient leaves the cache. How
// many there are depends on the shapes alone.
int64_t groups_of(const BackwardPass& pass) {
  // A sum stays in the second-level cache beside the rows, and is there long enough.
  constexpr int64_t kLeastRows = 512, kMostGroups = 32, kMostBytes = 200 << 10, kBytesOfRow = 64;
  const int64_t rows = pass.grad.rows;
  if (pass.grad.scalar != accumulator_of(pass.grad.scalar) || rows < 2 * kLeastRows) return 0;
  for (size_t index = pass.lowest; index <= pass.top; ++index) {
    const LayerBackward& layer = pass.layers[index];
    if (!layer.weight_gradient.data) continue;
    const int64_t bytes = layer.weight.rows * layer.weight.cols * size_of(layer.weight.scalar);
    if (bytes > std::min(kMostBytes, kBytesOfRow * rows)) return 0;
    if (layer.input.col_stride != 1 || (index == pass.top && pass.is_identity(index) && pass.grad.col_stride != 1))
      return 0;
  }
  return std::min(rows / kLeastRows, kMostGroups);
}

void backward_in_groups(const BackwardPass& pass, int64_t groups, int64_t block, int64_t widest) {
  constexpr int64_t kRowsOfPart = 256;
  const int64_t rows = pass.grad.rows, part_rows = blocks_of(kRowsOfPart, block) * block;
  const int64_t group_rows = blocks_of((rows + groups - 1) / groups, block) * block;
  const Scalar scalar = pass.grad.scalar;
  groups = blocks_of(rows, group_rows);
  Scratch scratch;
  std::vector<Matrix> sums(pass.top + 1);  // of each layer, one row a group
  for (size_t index = pass.lowest; index <= pass.top; ++index) {
    const Matrix out = pass.layers[index].weight_gradient;
    if (out.data) sums[index] = scratch.matrix(scalar, groups, out.rows * out.cols);
  }
  torch::stable::parallel_for(0, groups, 1, [&](int64_t first_group, int64_t last_group) {
    Scratch local;
    const Matrix buffers[] = {local.matrix(scalar, part_rows, widest), local.matrix(scalar, part_rows, widest)};
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t group_begin = group * group_rows, group_end = std::min(rows, group_begin + group_rows);
      for (int64_t begin = group_begin; begin < group_end; begin += part_rows) {
        const int64_t count = std::min(part_rows, group_end - begin);
        const auto memory = [&](size_t index) {
          const int64_t features = pass.layers[index].weight.rows;
          return Matrix{buffers[index % 2].data, scalar, count, features, features, 1};
        };
        pass.run(begin, count, memory, [&](size_t index, Matrix g) {
          const LayerBackward& layer = pass.layers[index];
          if (!layer.weight_gradient.data) return;
          const Matrix& out = layer.weight_gradient;
          const Matrix sum{sums[index].row_block(group, 1).data, scalar, out.rows, out.cols, out.cols, 1};
          multiply_here(g.transposed(), layer.input.row_block(begin, count), sum,
                        unit_of(scalar, out.rows, part_rows, out.cols), begin > group_begin);
        });
      }
    }
  });
  for (size_t index = pass.lowest; index <= pass.top; ++index) {
    const Matrix out = pass.layers[index].weight_gradient;
    if (out.data && out.rows * out.cols > 0)
      pointwise().sum_rows(scalar, sums[index].data, out.data, groups, out.rows * out.cols);
  }
}

}  // namespace

bool has_bfloat16_products() { return has_bfloat16.load(std::memory_order_relaxed); }

bool use_bfloat16_products(bool use) { return has_bfloat16.exchange(use); }

bool use_large_blas_products(bool use) { return has_fast_blas.exchange(use); }

bool round_products(bool round) { return may_round.exchange(round); }

void dense_forward(Matrix x, LayerForward* layers, size_t count, const OutputSums& sums) {
  Scratch scratch;
  Work work{x.scalar, x.rows};
  for (size_t index = 0; index < count; ++index) work.add(layers[index].weight);
  std::vector<Plan> plans(count);
  for (size_t index = 0; index < count; ++index) {
    LayerForward& layer = layers[index];
    const int64_t inner = layer.weight.cols, cols = layer.weight.rows;
    plans[index] = work.plan(inner, cols, inner * cols);
    layer.weight = converted(layer.weight, plans[index].right, scratch);
    layer.bias = unit_stride(layer.bias, scratch);
  }
  const int64_t block = sums.out.data ? reduction_rows(x.rows, work.widest) : 1;
  const ColumnSums none, of_output(sums.out, x.rows, block, scratch);
  const Division division = divide(work, block);
  for_row_parts(x.rows, division, [&](int64_t begin, int64_t rows) {
    Matrix input = x.row_block(begin, rows);
    // Outputs that nobody wants take turns in two buffers.
    Scratch hidden;
    Matrix buffers[2];
    for (size_t index = 0; index < count; ++index) {
      const LayerForward& layer = layers[index];
      Matrix out = layer.out.row_block(begin, rows);
      if (!out.data) {
        Matrix& buffer = buffers[index % 2];
        if (!buffer.data) buffer = hidden.matrix(x.scalar, rows, work.widest);
        out = {buffer.data, x.scalar, rows, layer.weight.rows, layer.weight.rows, 1};
      }
      layer_forward(layer, plans[index], input, out, layer.derivative.row_block(begin, rows),
                    index == count - 1 ? of_output : none, sums.of_magnitudes, begin);
      input = out;
    }
  });
  of_output.finish();
}

void for_products(Matrix x, Matrix weight, Matrix bias, const std::function<void(const ProductBlock&)>& body) {
  constexpr int64_t kColumns = 2048;
  Scratch scratch;
  const int64_t widest = std::min(kColumns, weight.rows);
  Work work{x.scalar, x.rows};
  work.add(weight);
  work.widest = std::max(widest, weight.cols);
  const Plan plan = work.plan(weight.cols, widest, weight.rows * weight.cols);
  weight = converted(weight, plan.right, scratch);
  bias = unit_stride(bias, scratch);
  for_row_parts(x.rows, divide(work, 1), [&](int64_t begin, int64_t rows) {
    if (rows == 0) return;
    Scratch memory;
    const Matrix input = converted(x.row_block(begin, rows), plan.left, memory);
    const Matrix block = memory.matrix(plan.product, rows, widest);
    for (int64_t first = 0; first < weight.rows; first += kColumns) {
      const int64_t count = std::min(kColumns, weight.rows - first);
      const Matrix product{block.data, plan.product, rows, count, count, 1};
      const Matrix its_bias = multiply_layer(input, weight.row_block(first, count), bias.column_block(first, count),
                                             product, plan);
      body({begin, first, product, its_bias});
    }
  });
}

void dense_backward(Matrix grad, LayerBackward* layers, size_t count, Matrix x_gradient, const OutputSlopes& added) {
  const size_t top = count - 1;
  const int64_t rows = grad.rows;
  Work work{grad.scalar, rows};
  for (size_t index = 0; index < count; ++index)
    work.widest = std::max({work.widest, layers[index].weight.rows, layers[index].weight.cols});
  const int64_t block = reduction_rows(rows, work.widest);
  // Below this layer no gradient is wanted.
  size_t lowest = 0;
  if (!x_gradient.data)
    while (lowest < count && !layers[lowest].weight_gradient.data && !layers[lowest].bias_gradient.data) ++lowest;
  if (lowest == count) return;
  const size_t lowest_input = x_gradient.data ? 0 : lowest + 1;
  for (size_t index = lowest_input; index < count; ++index) work.add(layers[index].weight);

  Scratch scratch;
  BackwardPass pass{grad, layers, lowest, top, x_gradient, std::vector<ColumnSums>(count), std::vector<Plan>(count),
                    {},   {added.slopes, row_major(added.output, scratch)}};
  pass.none = ColumnSums({}, rows, block, scratch);
  for (size_t index = lowest; index < count; ++index) {
    LayerBackward& layer = layers[index];
    pass.sums[index] = ColumnSums(layer.bias_gradient, rows, block, scratch);
    layer.saved =
        layer.spec.activation == Activation::identity ? Matrix() : row_major(layer.saved, scratch);
    if (index < lowest_input) continue;
    const int64_t inner = layer.weight.rows, cols = layer.weight.cols;
    pass.plans[index] = work.plan(inner, cols, inner * cols);
    layer.weight = converted(layer.weight, pass.plans[index].right, scratch);
  }

  const int64_t groups = is_large(work.flops) ? 0 : groups_of(pass);
  if (groups > 0) {
    backward_in_groups(pass, groups, block, work.widest);
  } else {
    // The gradient at the top is kept only if somebody reads it; an identity's is `grad`.
    std::vector<Matrix> gradients(count);
    for (size_t index = lowest; index < count; ++index) {
      const bool is_read = index < top || x_gradient.data || lowest < top || layers[index].weight_gradient.data;
      if (is_read && !(index == top && pass.is_identity(index)))
        gradients[index] = scratch.matrix(grad.scalar, rows, layers[index].weight.rows);
      gradients[index].scalar = grad.scalar;
    }
    for_row_parts(rows, divide(work, block), [&](int64_t begin, int64_t part_rows) {
      pass.run(
          begin, part_rows, [&](size_t index) { return gradients[index].row_block(begin, part_rows); },
          [](size_t, Matrix) {});
    });
    for (size_t index = lowest; index < count; ++index)
      if (layers[index].weight_gradient.data) {
        const Matrix g = index == top && pass.is_identity(index) ? grad : gradients[index];
        weight_gradient(g, layers[index].input, layers[index].weight_gradient);
      }
  }
  for (size_t index = lowest; index < count; ++index) pass.sums[index].finish();
}

}  // namespace aefast::cpu
