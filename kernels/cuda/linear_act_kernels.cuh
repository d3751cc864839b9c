// The pointwise kernels of the dense layer, between its GEMMs.
//
//   activation_kernel           values = act(values) in place, and act' where the backward needs it stored
//   activation_gradient_kernel  g = grad * act', and partial column sums of g, in one pass
//   column_sum_kernel           bias gradient = the partial sums added in a fixed order
//
// All are bound by memory. fp16 and bf16 are computed and summed in float, fp64 in double.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "launch.h"
#include "vectors.h"

namespace aefast::cuda {

// ---------------------------------------------------------------------------------------------------------
// act in place

// values, derivative (count,), 16-byte aligned; derivative is written if kWithDerivative. A thread has one
// vector, of which the last may be partial.
template <typename T, Activation A, bool kWithDerivative>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(T* __restrict__ values, T* __restrict__ derivative, int64_t count,
                      ActivationParameters<Compute<T>> parameters) {
  using C = Compute<T>;
  constexpr int V = kVectorLength<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (begin >= count) return;
  values += begin;
  const int64_t left = count - begin;

  Vector<T> loaded;
  if (left >= V) {
    loaded = *reinterpret_cast<const Vector<T>*>(values);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) loaded.element[v] = v < left ? values[v] : T(0.0f);
  }

  Vector<T> result;
  [[maybe_unused]] Vector<T> slope;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const C x = static_cast<C>(loaded.element[v]);
    if constexpr (kWithDerivative) {
      C slope_of_x;
      result.element[v] = static_cast<T>(activate_with_derivative<A>(x, slope_of_x));
      slope.element[v] = static_cast<T>(slope_of_x);
    } else {
      result.element[v] = static_cast<T>(activate<A>(x, parameters));
    }
  }

  const auto store = [&](T* place, const Vector<T>& vector) {
    if (left >= V) {
      *reinterpret_cast<Vector<T>*>(place) = vector;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < left) place[v] = vector.element[v];
      }
    }
  };
  store(values, result);
  if constexpr (kWithDerivative) store(derivative + begin, slope);
}

// ---------------------------------------------------------------------------------------------------------
// g = grad * act', and its column sums

// Rows a thread has in flight where it reads vectors, and blocks resident on a multiprocessor: 48 KiB of
// loads in flight, where about 20 KiB keep an H200's memory busy, and up to 80 registers a thread.
constexpr int kRowsInFlight = 2;
constexpr int kResidentBlocks = 3;

// Four full waves on the 132 multiprocessors of an H200. A constant, whatever the device: it decides the
// order of the sums, and so the bits of the bias gradient.
constexpr int64_t kGradientBlocks = 4 * kResidentBlocks * 132;

// A thread has a multiple of this many rows, so that the partial sums are few against the matrix.
constexpr int kRowsPerStep = 4;

// How (rows, cols) is cut up: a function of the shape and the element size alone, never of alignment.
//
// A block covers lanes * V columns (lanes = 2^lanes_log2 threads side by side, V columns each) and
// rows_per_block rows, in steps of row_lanes() * kRowsPerStep rows.
struct GradientTiling {
  int64_t rows, cols;
  int lanes_log2;
  int64_t column_tiles, row_blocks, rows_per_block;

  AEFAST_HD int lanes() const { return 1 << lanes_log2; }
  AEFAST_HD int row_lanes() const { return kThreads >> lanes_log2; }
};

template <typename T>
GradientTiling gradient_tiling(int64_t rows, int64_t cols) {
  GradientTiling tiling{rows, cols, 0, 0, 0, 0};
  while (tiling.lanes() < kWarpSize && tiling.lanes() * kVectorLength<T> < cols) ++tiling.lanes_log2;
  tiling.column_tiles = ceil_div(cols, tiling.lanes() * kVectorLength<T>);
  if (rows == 0 || cols == 0) return tiling;
  const int64_t step = tiling.row_lanes() * kRowsPerStep;
  const int64_t steps = ceil_div(rows, step);
  const int64_t steps_per_block = ceil_div(steps, ceil_div(kGradientBlocks, tiling.column_tiles));
  tiling.rows_per_block = steps_per_block * step;
  tiling.row_blocks = ceil_div(rows, tiling.rows_per_block);
  return tiling;
}

// upstream * act', from what the forward saved.
template <Activation A>
struct GradientOf {
  static constexpr bool kReadsSaved = A != Activation::identity;
  template <typename C>
  AEFAST_HD C operator()(C upstream, C saved, ActivationParameters<C> parameters) const {
    return gradient<A>(upstream, saved, parameters);
  }
};

// That of any activation but identity, chosen at run time.
struct GradientOfAny {
  static constexpr bool kReadsSaved = true;
  Activation activation;
  template <typename C>
  AEFAST_HD C operator()(C upstream, C saved, ActivationParameters<C> parameters) const {
    switch (activation) {
      case Activation::relu:
        return gradient<Activation::relu>(upstream, saved, parameters);
      case Activation::leaky_relu:
        return gradient<Activation::leaky_relu>(upstream, saved, parameters);
      case Activation::elu:
        return gradient<Activation::elu>(upstream, saved, parameters);
      case Activation::selu:
        return gradient<Activation::selu>(upstream, saved, parameters);
      case Activation::tanh:
        return gradient<Activation::tanh>(upstream, saved, parameters);
      case Activation::sigmoid:
        return gradient<Activation::sigmoid>(upstream, saved, parameters);
      case Activation::softplus:
        return gradient<Activation::softplus>(upstream, saved, parameters);
      default:
        return upstream * saved;
    }
  }
};

// grad, saved, g (rows, cols), partials (row_blocks, cols). g or partials may be null. kVectorised: all three
// are 16-byte aligned and V divides cols. Otherwise the same threads add the same rows in the same order,
// with accesses of one element, spread so that neighbouring threads touch neighbouring columns.
template <typename T, typename Gradient, bool kVectorised>
__global__ void __launch_bounds__(kThreads, kVectorised ? kResidentBlocks : kResidentBlocks - 1)
    activation_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ saved, T* __restrict__ g,
                               Compute<T>* __restrict__ partials, GradientTiling tiling,
                               Gradient gradient_of, ActivationParameters<Compute<T>> parameters) {
  using C = Compute<T>;
  constexpr int V = kVectorLength<T>;
  __shared__ C warp_sums[kWarps][kWarpSize * V];

  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = tiling.lanes();
  const int row_lanes = tiling.row_lanes();
  const int lane = thread & (lanes - 1);
  const int row_lane = thread >> tiling.lanes_log2;
  const unsigned column_tiles = static_cast<unsigned>(tiling.column_tiles);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % column_tiles) * (lanes * V);
  const int64_t row_block = blockIdx.x / column_tiles;

  // Column v of this thread, relative to first_column.
  const auto column = [&](int v) { return kVectorised ? lane * V + v : v * lanes + lane; };
  const auto is_inside = [&](int v) { return first_column + column(v) < tiling.cols; };

  const auto load = [&](const T* row) {
    Vector<T> loaded;
    if constexpr (kVectorised) {
      loaded = *reinterpret_cast<const Vector<T>*>(row + column(0));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) loaded.element[v] = is_inside(v) ? row[column(v)] : T(0.0f);
    }
    return loaded;
  };
  const auto store = [&](T* row, const Vector<T>& values) {
    if constexpr (kVectorised) {
      *reinterpret_cast<Vector<T>*>(row + column(0)) = values;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (is_inside(v)) row[column(v)] = values.element[v];
      }
    }
  };

  const int64_t row_begin = row_block * tiling.rows_per_block;
  int64_t row_end = row_begin + tiling.rows_per_block;
  if (row_end > tiling.rows) row_end = tiling.rows;
  if (!is_inside(0)) row_end = row_begin;

  C total[V] = {};

  // `row_count` rows of this thread, all of them loaded before the first is used.
  const int64_t pitch = row_lanes * tiling.cols;  // elements between two rows of this thread
  const auto add_rows = [&](auto row_count, int64_t offset) {
    constexpr int kRows = decltype(row_count)::value;
    Vector<T> grads[kRows];
    [[maybe_unused]] Vector<T> saves[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      grads[u] = load(grad + offset + u * pitch);
      if constexpr (Gradient::kReadsSaved) saves[u] = load(saved + offset + u * pitch);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      Vector<T> products;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        C product = static_cast<C>(grads[u].element[v]);
        if constexpr (Gradient::kReadsSaved) {
          product = gradient_of(product, static_cast<C>(saves[u].element[v]), parameters);
        }
        total[v] += product;
        products.element[v] = static_cast<T>(product);
      }
      if (g != nullptr) store(g + offset + u * pitch, products);
    }
  };

  // One row of single elements is many loads already.
  constexpr int kInFlight = kVectorised ? kRowsInFlight : 1;
  int64_t row = row_begin + row_lane;
  int64_t offset = row * tiling.cols + first_column;
#pragma unroll 1
  for (; row + (kInFlight - 1) * row_lanes < row_end; row += kInFlight * row_lanes, offset += kInFlight * pitch) {
    add_rows(std::integral_constant<int, kInFlight>{}, offset);
  }
#pragma unroll 1
  for (; row < row_end; row += row_lanes, offset += pitch) add_rows(std::integral_constant<int, 1>{}, offset);
  if (partials == nullptr) return;

  // First the row lanes of one warp, then the warps.
#pragma unroll
  for (int v = 0; v < V; ++v) {
    for (int offset = kWarpSize / 2; offset >= lanes; offset /= 2) {
      total[v] += __shfl_xor_sync(kAllLanes, total[v], offset);
    }
  }
  if (thread % kWarpSize < lanes) {
#pragma unroll
    for (int v = 0; v < V; ++v) warp_sums[thread / kWarpSize][column(v)] = total[v];
  }
  __syncthreads();
  if (thread < lanes * V && first_column + thread < tiling.cols) {
    C sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][thread];
    partials[row_block * tiling.cols + first_column + thread] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------
// the second stage of the column sums

// A block adds kSumColumns columns: neighbouring threads read the 8 floats of one memory sector, and the 32
// row lanes keep the chain of dependent additions short.
constexpr int kSumColumns = 8;
constexpr int kSumRowLanes = kThreads / kSumColumns;

// partials (row_blocks, cols), sums (cols,).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(const Compute<T>* __restrict__ partials, T* __restrict__ sums, int64_t row_blocks, int64_t cols) {
  using C = Compute<T>;
  __shared__ C warp_sums[kWarps][kSumColumns];

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + thread % kSumColumns;
  C total = 0;
  if (column < cols) {
#pragma unroll 4
    for (int64_t row = thread / kSumColumns; row < row_blocks; row += kSumRowLanes) {
      total += partials[row * cols + column];
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset >= kSumColumns; offset /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, offset);
  }
  if (thread % kWarpSize < kSumColumns) warp_sums[thread / kWarpSize][thread % kWarpSize] = total;
  __syncthreads();
  if (thread < kSumColumns && column < cols) {
    C sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][thread];
    sums[column] = static_cast<T>(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// body(std::integral_constant<Activation, A>) for the activation at hand.
template <typename Body>
void with_activation(Activation activation, Body&& body) {
  switch (activation) {
#define AEFAST_CASE(name) \
  case Activation::name:  \
    return body(std::integral_constant<Activation, Activation::name>{})
    AEFAST_CASE(identity);
    AEFAST_CASE(relu);
    AEFAST_CASE(leaky_relu);
    AEFAST_CASE(elu);
    AEFAST_CASE(selu);
    AEFAST_CASE(silu);
    AEFAST_CASE(gelu);
    AEFAST_CASE(gelu_tanh);
    AEFAST_CASE(tanh);
    AEFAST_CASE(sigmoid);
    AEFAST_CASE(softplus);
#undef AEFAST_CASE
  }
}

template <typename C>
ActivationParameters<C> parameters_as(const ActivationParameters<double>& parameters) {
  return {static_cast<C>(parameters.slope), static_cast<C>(parameters.alpha)};
}

// values, derivative (count,), both 16-byte aligned; derivative may be null.
template <typename T>
void launch_activation(Activation activation, const ActivationParameters<double>& parameters, T* values, T* derivative,
                       int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  const int64_t per_block = kThreads * kVectorLength<T>;
  const unsigned blocks = static_cast<unsigned>(ceil_div(count, per_block));
  const auto converted = parameters_as<Compute<T>>(parameters);
  with_activation(activation, [&](auto constant) {
    constexpr Activation A = decltype(constant)::value;
    if constexpr (A != Activation::identity) {
      auto* kernel = &activation_kernel<T, A, false>;
      if constexpr (stores_derivative(A)) {
        if (derivative != nullptr) kernel = &activation_kernel<T, A, true>;
      }
      AEFAST_LAUNCH(kernel, blocks, kThreads, stream, values, derivative, count, converted);
    }
  });
}

// grad, saved, g (rows, cols), partials (tiling.row_blocks, cols), with tiling = gradient_tiling<T>(rows, cols).
// saved is null for identity alone; g or partials may be null.
template <typename T>
void launch_activation_gradient(Activation activation, const ActivationParameters<double>& parameters, const T* grad,
                                const T* saved, T* g, Compute<T>* partials, const GradientTiling& tiling,
                                cudaStream_t stream) {
  if (tiling.row_blocks == 0) return;
  const unsigned blocks = static_cast<unsigned>(tiling.row_blocks * tiling.column_tiles);
  const auto converted = parameters_as<Compute<T>>(parameters);
  const bool is_vectorised = tiling.cols % kVectorLength<T> == 0 && is_vector_aligned(grad) &&
                             is_vector_aligned(saved) && is_vector_aligned(g);
  const auto launch = [&](auto gradient_of, auto vectorised) {
    auto* kernel = &activation_gradient_kernel<T, decltype(gradient_of), decltype(vectorised)::value>;
    AEFAST_LAUNCH(kernel, blocks, kThreads, stream, grad, saved, g, partials, tiling, gradient_of, converted);
  };
  if (!is_vectorised) {
    if (activation == Activation::identity) return launch(GradientOf<Activation::identity>{}, std::false_type{});
    return launch(GradientOfAny{activation}, std::false_type{});
  }
  with_activation(activation, [&](auto constant) { launch(GradientOf<decltype(constant)::value>{}, std::true_type{}); });
}

// partials (row_blocks, cols), sums (cols,); no row blocks give zeros.
template <typename T>
void launch_column_sum(const Compute<T>* partials, T* sums, int64_t row_blocks, int64_t cols, cudaStream_t stream) {
  if (cols == 0) return;
  const unsigned blocks = static_cast<unsigned>(ceil_div(cols, kSumColumns));
  auto* kernel = &column_sum_kernel<T>;
  AEFAST_LAUNCH(kernel, blocks, kThreads, stream, partials, sums, row_blocks, cols);
}

}  // namespace aefast::cuda
