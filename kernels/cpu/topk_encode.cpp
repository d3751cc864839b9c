#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "dense.h"
#include "dense_schemas.h"
#include "latents.h"
#include "parallel.h"
#include "sparse_schemas.h"

namespace aefast::cpu {
namespace {

// A number and its index as one unsigned integer, which is the greater the larger the number is, NaN being the largest,
// and of equal numbers the lower the index.
template <typename A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Bits = uint32_t;
  using type = uint64_t;
};
template <>
struct KeyOf<double> {
  using Bits = uint64_t;
  using type = unsigned __int128;
};

template <typename A>
typename KeyOf<A>::type key_of(A value, int64_t index) {
  using Bits = typename KeyOf<A>::Bits;
  constexpr int kBits = 8 * sizeof(Bits);
  constexpr Bits kSign = Bits(1) << (kBits - 1);
  value += A(0);  // -0 is 0
  Bits bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = value != value ? ~Bits(0) : bits & kSign ? ~bits : bits | kSign;
  return static_cast<typename KeyOf<A>::type>(bits) << kBits | static_cast<Bits>(~static_cast<Bits>(index));
}

template <typename A>
A value_of(typename KeyOf<A>::type key) {
  using Bits = typename KeyOf<A>::Bits;
  constexpr int kBits = 8 * sizeof(Bits);
  constexpr Bits kSign = Bits(1) << (kBits - 1);
  Bits bits = static_cast<Bits>(key >> kBits);
  bits = bits & kSign ? bits & ~kSign : ~bits;
  A value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename A>
int64_t index_of(typename KeyOf<A>::type key) {
  return static_cast<int64_t>(static_cast<typename KeyOf<A>::Bits>(~static_cast<typename KeyOf<A>::Bits>(key)));
}

// What is chosen of a row so far: values and indices (k,), of which the columns seen have been, k of them at most. Once
// there are k the last is the least.
template <typename T>
struct Chosen {
  T* values;
  int64_t* indices;
  int64_t k;
};

// What choosing from a row works in.
template <typename A>
struct Workspace {
  std::vector<A> row, maxima;
  std::vector<int32_t> places;
  std::vector<typename KeyOf<A>::type> keys;
};

// A number such that at least k of the elements are not at most it; NaN, which all numbers are not, where none is known.
template <typename A>
double bound_of(const A* row, int64_t count, int64_t k, std::vector<A>& maxima) {
  // The k-th largest of twice as many maxima has 1.4 k elements or so beside it.
  const int64_t groups = (2 * k + 15) / 16 * 16;
  if (count < 2 * groups) return std::numeric_limits<double>::quiet_NaN();
  maxima.resize(groups);
  sparse_kernels().group_maxima(std::is_same_v<A, double>, row, count, groups, maxima.data());
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<A>());
  const A least = maxima[k - 1], infinity = std::numeric_limits<A>::infinity();
  return least == -infinity ? std::numeric_limits<double>::quiet_NaN()
                            : static_cast<double>(std::nextafter(least, -infinity));
}

// Goes on with the columns [first, first + product.cols) of a row.
template <typename T>
void choose(const Chosen<T>& chosen, Scalar product_scalar, const void* product, const void* bias, int64_t first,
            int64_t count, bool is_last, Workspace<Accumulator<T>>& workspace) {
  using A = Accumulator<T>;
  constexpr bool kIsDouble = std::is_same_v<A, double>;
  constexpr Scalar kScalar = std::is_same_v<T, float>      ? Scalar::float32
                             : std::is_same_v<T, double>   ? Scalar::float64
                             : std::is_same_v<T, BFloat16> ? Scalar::bfloat16
                                                           : Scalar::float16;
  const int64_t k = chosen.k, kept = std::min(k, first);
  A* const row = workspace.row.data();
  sparse_kernels().pre_activations(product_scalar, kScalar, product, bias, count, row);
  double threshold = std::numeric_limits<double>::quiet_NaN();
  if (kept == k) {
    threshold = static_cast<double>(load(chosen.values[k - 1]));
    // With k times NaN only a NaN counts as no less, and it comes later.
    if (threshold != threshold) threshold = std::numeric_limits<double>::infinity();
  } else if (first == 0) {
    threshold = bound_of(row, count, k, workspace.maxima);
  }
  const int64_t found = sparse_kernels().above(kIsDouble, row, count, threshold, workspace.places.data());
  if (found == 0 && !is_last) return;
  auto& keys = workspace.keys;
  keys.clear();
  for (int64_t at = 0; at < kept; ++at) keys.push_back(key_of<A>(load(chosen.values[at]), chosen.indices[at]));
  for (int64_t at = 0; at < found; ++at) {
    const int32_t place = workspace.places[at];
    keys.push_back(key_of<A>(row[place], first + place));
  }
  const int64_t size = std::min(k, static_cast<int64_t>(keys.size()));
  if (size == k) std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  if (is_last) std::sort(keys.begin(), keys.begin() + size, std::greater<>());
  for (int64_t at = 0; at < size; ++at) {
    chosen.values[at] = store<T>(value_of<A>(keys[at]));
    chosen.indices[at] = index_of<A>(keys[at]);
  }
}

template <typename T>
void choose_all(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t k, T* values,
                int64_t* indices) {
  const int64_t latents = weight.size(0);
  for_products(matrix_of(x), matrix_of(weight), vector_of(bias), [&](const ProductBlock& block) {
    const Matrix& product = block.product;
    for_tasks(product.rows, product.cols, 4, [&](int64_t begin, int64_t count) {
      static thread_local Workspace<Accumulator<T>> workspace;
      workspace.row.resize(product.cols);
      workspace.places.resize(product.cols);
      for (int64_t row = begin; row < begin + count; ++row) {
        const int64_t at = (block.first_row + row) * k;
        choose<T>({values + at, indices + at, k}, product.scalar, product.row_block(row, 1).data, block.bias.data,
                  block.first_col, product.cols, block.first_col + product.cols == latents, workspace);
      }
    });
  });
}

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor weight, OptionalTensor bias, int64_t k) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, bias, x.size(1), x);
  STD_TORCH_CHECK(1 <= k && k <= weight.size(0), "k must be from 1 to ", weight.size(0));
  STD_TORCH_CHECK(weight.size(0) <= std::numeric_limits<int32_t>::max(), "weight must have fewer than 2^31 rows");
  const Tensor values = new_matrix(x, x.size(0), k), indices = new_indices(x.size(0), k);
  void* const out = values.mutable_data_ptr();
  int64_t* const at = static_cast<int64_t*>(indices.mutable_data_ptr());
  switch (scalar_of(x)) {
    case Scalar::float32: choose_all(x, weight, bias, k, static_cast<float*>(out), at); break;
    case Scalar::float64: choose_all(x, weight, bias, k, static_cast<double*>(out), at); break;
    case Scalar::bfloat16: choose_all(x, weight, bias, k, static_cast<BFloat16*>(out), at); break;
    case Scalar::float16: choose_all(x, weight, bias, k, static_cast<Float16*>(out), at); break;
  }
  return {values, indices};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> topk_encode_backward(Tensor grad, Tensor indices, Tensor x,
                                                                                Tensor weight, int64_t needs) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  check_layer(weight, std::nullopt, x.size(1), x);
  indices = row_major_indices(indices);
  STD_TORCH_CHECK(indices.size(0) == x.size(0), "indices must have the rows of x");
  grad = torch::stable::contiguous(grad);
  const Code code = code_of(grad, indices, weight.size(0), x);
  OptionalTensor x_gradient, weight_gradient, bias_gradient;
  if (needs & dense::kNeedX) x_gradient = new_matrix(x, x.size(0), x.size(1));
  if (needs & dense::kNeedWeight) weight_gradient = new_matrix(x, weight.size(0), weight.size(1));
  if (needs & dense::kNeedBias) bias_gradient = new_vector(x, weight.size(0));
  if (is_dense(code, scalar_of(x))) {
    const Tensor dense = dense_code(code, x);
    LayerBackward layer{{Activation::identity, {}}, matrix_of(weight), matrix_of(x), {}, matrix_of(weight_gradient),
                        vector_of(bias_gradient)};
    dense_backward(matrix_of(dense), &layer, 1, matrix_of(x_gradient));
    return {x_gradient, weight_gradient, bias_gradient};
  }
  Tensor copy;
  if (x_gradient) decode(rows_of(weight, copy), code, nullptr, x_gradient->mutable_data_ptr());
  if (weight_gradient || bias_gradient) {
    LatentGradients gradients;
    gradients.weight = matrix_of(weight_gradient);
    gradients.bias = vector_of(bias_gradient);
    latent_gradients(rows_of(x, copy), code, gradients);
  }
  return {x_gradient, weight_gradient, bias_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : sparse::kTopkEncodeSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("topk_encode_backward", TORCH_BOX(&topk_encode_backward));
}

}  // namespace aefast::cpu
