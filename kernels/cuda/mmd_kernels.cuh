// The kernels of mmd for points of few dimensions.
//
//   mean_kernel    sums of coordinates, of which centre_kernel makes the mean
//   centre_kernel  the points minus their mean, side by side
//   pairs_kernel   sums of kernel values over pairs and, for both points of each pair, of slopes times differences;
//                  squared distances from differences
//   tiles_kernel   the same by the tensor cores, for smooth kernels and dimensions where their products pay
//   gather_kernel  adds up what blocks of pairs leave in memory
//   values_kernel  the kernel of each row with each column
//
// A block of pairs has a tile of rows and a split of the columns. With one set of points for both it meets each pair
// once: it begins at its own tile, of which it takes both orders, and of the pairs behind it both points' gradients. Those
// of its rows it sums in registers, those of a column in registers that go from lane to lane, or in those of the tensor
// cores, and then across its warps. Both leave the block as partial sums, which are added in order: results are repeated
// to the last bit. Shapes alone decide about tiles and splits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernel_function.h"
#include "kernel_terms.h"
#include "launch.h"
#include "vectors.h"

namespace aefast::cuda {

// ---------------------------------------------------------------------------------------------------------
// several pairs of one thread at a time

template <typename A, int kCount>
struct Lanes {
  A of[kCount];

  AEFAST_HD Lanes() {}
  AEFAST_HD explicit Lanes(A value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] = value;
  }
};

template <int kCount>
struct Mask {
  bool of[kCount];
};

template <typename A, int kCount, typename Body>
AEFAST_HD Lanes<A, kCount> each(const Body& body) {
  Lanes<A, kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.of[i] = body(i);
  return y;
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> operator+(const Lanes<A, kCount>& a, const Lanes<A, kCount>& b) {
  return each<A, kCount>([&](int i) { return a.of[i] + b.of[i]; });
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> operator*(const Lanes<A, kCount>& a, const Lanes<A, kCount>& b) {
  return each<A, kCount>([&](int i) { return a.of[i] * b.of[i]; });
}

template <typename A, int kCount>
AEFAST_HD Mask<kCount> operator<(const Lanes<A, kCount>& a, const Lanes<A, kCount>& b) {
  Mask<kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.of[i] = a.of[i] < b.of[i];
  return y;
}

// The GPU's own functions of float32, to an ulp or two.
namespace quick {

AEFAST_HD float exp2(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::exp2(x);
#endif
}
AEFAST_HD double exp2(double x) { return ::exp2(x); }

AEFAST_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.0f / x;
#endif
}
AEFAST_HD double reciprocal(double x) { return 1.0 / x; }

AEFAST_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.0f / std::sqrt(x);
#endif
}
AEFAST_HD double reciprocal_root(double x) { return 1.0 / ::sqrt(x); }

}  // namespace quick

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> exp2_nonpositive(const Lanes<A, kCount>& x) {
  return each<A, kCount>([&](int i) { return quick::exp2(x.of[i]); });
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> log(const Lanes<A, kCount>& x) {
  return each<A, kCount>([&](int i) { return elementary::log(x.of[i]); });
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> reciprocal(const Lanes<A, kCount>& x) {
  return each<A, kCount>([&](int i) { return quick::reciprocal(x.of[i]); });
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> reciprocal_root(const Lanes<A, kCount>& x) {
  return each<A, kCount>([&](int i) { return quick::reciprocal_root(x.of[i]); });
}

template <typename A, int kCount>
AEFAST_HD Lanes<A, kCount> select(const Mask<kCount>& mask, const Lanes<A, kCount>& a, const Lanes<A, kCount>& b) {
  return each<A, kCount>([&](int i) { return mask.of[i] ? a.of[i] : b.of[i]; });
}

// ---------------------------------------------------------------------------------------------------------
// kernel functions

// pairwise::Kind, and what the default bandwidths make: of rbf five rates of which each is twice the one before, and of
// imq seven. The compiler knows how many they are.
enum class Form { rbf, laplacian, imq, rational_quadratic, energy, octaves, seven };

// Whether it is differentiable in u at 0.
template <Form kForm>
constexpr bool kIsSmooth = kForm != Form::laplacian && kForm != Form::energy;

template <Form kForm>
constexpr pairwise::Kind kKind = kForm == Form::octaves ? pairwise::Kind::rbf
                                 : kForm == Form::seven ? pairwise::Kind::imq
                                                        : static_cast<pairwise::Kind>(kForm);

constexpr int kSeven = 7;
constexpr int kMostRates = 32;

// What pairwise::Function points to, for squared distances in units of 1. Weights are those of derivatives by u, less
// their sign; the rates are ascending.
template <typename A>
struct Mixture {
  int64_t count;
  A rate[kMostRates], weight[kMostRates];
  int32_t squarings[kMostRates];
  A alpha;
};

// The pairs' weights in the sum: of two rows of x, in either order, of two of y, and of one of each.
struct Weights {
  double of_x, of_y, across;
};

// A mixture for squared distances u that `unit` divides.
template <typename A, Form kForm>
struct Evaluator {
  // A block's copy.
  struct Shared {
    A rate[kMostRates], weight[kMostRates];
    int32_t squarings[kMostRates];
  };

  const Mixture<A>& mixture;
  pairwise::Function<A> function;
  A scale, slope_scale;

  // Of all threads of a block, which are to meet at a barrier before they evaluate.
  __device__ __forceinline__ Evaluator(const Mixture<A>& mixture, const A* unit, Shared& shared) : mixture(mixture) {
    scale = unit == nullptr ? A(1) : A(1) / *unit;
    slope_scale = scale;
    if constexpr (kForm == Form::octaves) {
      scale *= mixture.rate[0];
      slope_scale *= mixture.weight[0];
    } else if constexpr (kForm != Form::seven) {
      if constexpr (!kIsSmooth<kForm>) scale = slope_scale = std::sqrt(scale);
      for (int k = threadIdx.x; k < mixture.count; k += blockDim.x) {
        shared.rate[k] = mixture.rate[k] * scale;
        shared.weight[k] = mixture.weight[k];
        shared.squarings[k] = mixture.squarings[k];
      }
      function = {mixture.count, shared.rate, shared.weight, shared.squarings, mixture.alpha};
    }
  }

  // The slope is -κ'(u) / slope_scale.
  template <int kCount>
  __device__ __forceinline__ void operator()(const Lanes<A, kCount>& u, Lanes<A, kCount>& value,
                                             Lanes<A, kCount>& slope) const {
    using C = Lanes<A, kCount>;
    if constexpr (kForm == Form::octaves) {
      // The sums of p^(2^k) and of 2^k p^(2^k), k from 0 to 4.
      const C p = exp2_nonpositive(C(-scale) * u), p2 = p * p, p4 = p2 * p2, p8 = p4 * p4;
      value = p * (p * (p2 * (p4 * (p8 + C(A(1))) + C(A(1))) + C(A(1))) + C(A(1)));
      slope = p * (p * (p2 * (p4 * (C(A(16)) * p8 + C(A(8))) + C(A(4))) + C(A(2))) + C(A(1)));
    } else if constexpr (kForm == Form::seven) {
      const C scaled = C(scale) * u;
      value = slope = C(A(0));
#pragma unroll
      for (int k = 0; k < kSeven; ++k) {
        const C one = reciprocal(C(mixture.rate[k]) * scaled + C(A(1)));
        value = value + one;
        slope = slope + C(mixture.weight[k]) * (one * one);
      }
    } else {
      pairwise::evaluate<kKind<kForm>>(function, u, value, slope);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------
// who meets whom

// Points are stored (width, count): those of x from 0 on, those of y from y_start on, and 0 where there are none. Rows are
// x_rows of x's points from x_first on, in tiles, and y_rows of y's from y_first on. The columns are all points.
struct Meeting {
  int64_t count, x_count, y_start, y_count;
  int64_t x_first, x_rows, y_first, y_rows;
  int64_t tile_rows, x_tiles, tiles;
  int64_t split, x_splits, splits;  // columns of a split, and how many there are
  bool is_symmetric;                // rows are the columns, and each pair is met once

  AEFAST_HD int64_t slots() const { return tiles * tile_rows; }
};

// A tile of rows and a split of the columns.
struct Encounter {
  int64_t first, rows;  // the first row, of the points as stored, and how many there are
  int64_t begin, end;   // columns
  bool is_same, in_x;   // whether rows and columns are of one sample, and the rows of x

  AEFAST_HD Encounter(const Meeting& meeting, int64_t tile, int64_t split) {
    in_x = tile < meeting.x_tiles;
    const int64_t before = (in_x ? tile : tile - meeting.x_tiles) * meeting.tile_rows;
    first = (in_x ? meeting.x_first : meeting.y_start + meeting.y_first) + before;
    rows = (in_x ? meeting.x_rows : meeting.y_rows) - before;
    rows = rows < meeting.tile_rows ? rows : meeting.tile_rows;
    const bool columns_in_x = split < meeting.x_splits;
    is_same = in_x == columns_in_x;
    begin = columns_in_x ? split * meeting.split : meeting.y_start + (split - meeting.x_splits) * meeting.split;
    const int64_t last = columns_in_x ? meeting.x_count : meeting.y_start + meeting.y_count;
    end = begin + meeting.split < last ? begin + meeting.split : last;
    if (meeting.is_symmetric && begin < first) begin = first;
  }

  AEFAST_HD bool is_empty() const { return begin >= end; }

  AEFAST_HD double value_weight(const Meeting& meeting, const Weights& weights) const {
    const double of_same = in_x ? weights.of_x : weights.of_y;
    return is_same ? of_same : meeting.is_symmetric ? weights.across : 0.5 * weights.across;
  }

  // A pair of one sample counts in both orders, and u is a square.
  AEFAST_HD double gradient_weight(const Weights& weights) const {
    const double of_same = in_x ? weights.of_x : weights.of_y;
    return -2.0 * (is_same ? 2.0 * of_same : weights.across);
  }
};

constexpr int kPairThreads = 128;
constexpr int kPairWarps = kPairThreads / kWarpSize;

// Rows of a thread, and columns that a block of pairs has before it at a time.
template <typename A, int kWidth>
constexpr int kThreadRows = sizeof(A) == 8 ? 1 : kWidth <= 8 ? 4 : 2;
template <int kWidth>
constexpr int kStage = kWidth <= 8 ? 128 : 64;
// Blocks of a multiprocessor, which have to share its registers: what a thread has of its rows and columns, and what it
// computes of a few pairs.
template <typename A, int kWidth, bool kGradient>
constexpr int kResidentPairs = kGradient ? (sizeof(A) == 8 || kWidth >= 8 ? 2 : kWidth == 4 ? 3 : 5)
                                         : (sizeof(A) == 8 || kWidth == 8 ? 4 : kWidth == 16 ? 3 : 5);

// The sum of a block's threads, in the first of them. All are to call it.
template <int kBlockWarps>
__device__ __forceinline__ double block_sum(double sum, double (&of_warps)[kBlockWarps]) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kBlockWarps; ++warp) sum += of_warps[warp];
  }
  return sum;
}

// ---------------------------------------------------------------------------------------------------------
// pairs by differences

// One launch of the tiles from first_tile on, a block for each and each split. points (kWidth, count); values
// (blocks,); with kGradient row_sums (splits, kWidth, rows of the launch's tiles), and for a symmetric meeting
// column_sums (tiles of the launch, kWidth, count), of which the columns behind a tile are written.
template <typename A, Form kForm, int kWidth, bool kGradient>
__global__ void __launch_bounds__(kPairThreads, (kResidentPairs<A, kWidth, kGradient>))
    pairs_kernel(const A* __restrict__ points, Meeting meeting, int64_t first_tile, Mixture<A> mixture, Weights weights,
                 const A* __restrict__ unit, double* __restrict__ values, A* __restrict__ row_sums,
                 A* __restrict__ column_sums) {
  constexpr int kRows = kThreadRows<A, kWidth>, kColumns = kStage<kWidth>;
  constexpr int kVector = kWidth < kVectorLength<A> ? kWidth : kVectorLength<A>;
  using C = Lanes<A, kRows>;
  struct alignas(kVector * sizeof(A)) Part {
    A element[kVector];
  };
  __shared__ Part columns[kWidth / kVector][kColumns];
  __shared__ A warp_columns[kGradient ? kPairWarps : 1][kGradient ? kWidth : 1][kColumns];
  __shared__ typename Evaluator<A, kForm>::Shared of_mixture;
  __shared__ double warp_values[kPairWarps];

  const int64_t tile = blockIdx.x / meeting.splits, split = blockIdx.x % meeting.splits;
  const Encounter encounter(meeting, first_tile + tile, split);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  if (encounter.is_empty()) {
    if (thread == 0) values[blockIdx.x] = 0.0;
    return;
  }
  const Evaluator<A, kForm> evaluate(mixture, unit, of_mixture);
  const int64_t tile_end = encounter.first + meeting.tile_rows;
  const A gradient_weight = static_cast<A>(encounter.gradient_weight(weights)) * evaluate.slope_scale;

  A row[kRows][kWidth], gradient[kRows][kWidth];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int number = r * kPairThreads + thread;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      row[r][k] = number < encounter.rows ? points[k * meeting.count + encounter.first + number] : A(0);
      gradient[r][k] = A(0);
    }
  }

  double total = 0.0;
  // Of the columns from `start` on. kMasked: there are places without a row or a column, or pairs of a point with itself.
  const auto meet = [&](int64_t start, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    C sum(A(0));
#pragma unroll 1
    for (int chunk = 0; chunk < kColumns; chunk += kWarpSize) {
      if (kMasked && start + chunk >= encounter.end) break;
      A of_column[kWidth] = {};
#pragma unroll (kMasked ? 1 : 2)
      for (int step = 0; step < kWarpSize; ++step) {
        // No two lanes are at one column, and what is summed for it goes on to the lane that is there next.
        const int column = chunk + (lane + step) % kWarpSize;
        A difference[kRows][kWidth];
        C u, value, slope;
#pragma unroll
        for (int part = 0; part < kWidth / kVector; ++part) {
          const Part other = columns[part][column];
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const int k = part * kVector + v;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              difference[r][k] = row[r][k] - other.element[v];
              u.of[r] = k == 0 ? difference[r][k] * difference[r][k]
                               : difference[r][k] * difference[r][k] + u.of[r];
            }
          }
        }
        evaluate(u, value, slope);
        if constexpr (kMasked) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int number = r * kPairThreads + thread;
            const bool is_pair = number < encounter.rows && start + column < encounter.end &&
                                 encounter.first + number != start + column;
            value.of[r] = is_pair ? value.of[r] : A(0);
            slope.of[r] = is_pair ? slope.of[r] : A(0);
          }
        }
        sum = sum + value;
        if constexpr (kGradient) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              gradient[r][k] += slope.of[r] * difference[r][k];
              of_column[k] -= slope.of[r] * difference[r][k];
            }
            of_column[k] = __shfl_sync(kAllLanes, of_column[k], (lane + 1) % kWarpSize);
          }
        }
      }
      if constexpr (kGradient) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) warp_columns[warp][k][chunk + lane] = of_column[k];
      }
    }
    double of_stage = 0.0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_stage += static_cast<double>(sum.of[r]);
    total += meeting.is_symmetric && encounter.is_same && start >= tile_end ? 2.0 * of_stage : of_stage;
  };

  for (int64_t start = encounter.begin; start < encounter.end; start += kColumns) {
#pragma unroll
    for (int turn = 0; turn < kWidth * kColumns / kPairThreads; ++turn) {
      const int at = turn * kPairThreads + thread, k = at / kColumns, column = at % kColumns;
      columns[k / kVector][column].element[k % kVector] = points[k * meeting.count + start + column];
    }
    __syncthreads();
    const bool is_whole = encounter.rows == meeting.tile_rows && start + kColumns <= encounter.end &&
                          (start >= tile_end || start + kColumns <= encounter.first);
    if (is_whole) {
      meet(start, std::false_type{});
    } else {
      meet(start, std::true_type{});
    }
    __syncthreads();
    if constexpr (kGradient) {
      if (meeting.is_symmetric && start >= tile_end) {
#pragma unroll
        for (int turn = 0; turn < kWidth * kColumns / kPairThreads; ++turn) {
          const int at = turn * kPairThreads + thread, k = at / kColumns, column = at % kColumns;
          A sum = warp_columns[0][k][column];
#pragma unroll
          for (int other = 1; other < kPairWarps; ++other) sum += warp_columns[other][k][column];
          column_sums[(tile * kWidth + k) * meeting.count + start + column] = gradient_weight * sum;
        }
      }
    }
  }

  if constexpr (kGradient) {
    const int64_t slots = gridDim.x / meeting.splits * meeting.tile_rows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        row_sums[(split * kWidth + k) * slots + tile * meeting.tile_rows + r * kPairThreads + thread] =
            gradient_weight * gradient[r][k];
      }
    }
  }
  total = block_sum(total, warp_values);
  if (thread == 0) values[blockIdx.x] = encounter.value_weight(meeting, weights) * total;
}

// ---------------------------------------------------------------------------------------------------------
// pairs by the tensor cores

// A number as the sum of two of TF32, which has 11 digits: the first is the nearest.
struct TwoParts {
  float high, low;

  AEFAST_HD explicit TwoParts(float x)
      : high(elementary::float_of((elementary::bits_of(x) + 0x1000u) & 0xffffe000u)), low(x - high) {}
};

// sum += a b of a warp, in TF32: a (16, 8), b (8, 8), sum (16, 8). With lane 4 g + t, a has rows g, g + 8, g, g + 8 and
// columns t, t, t + 4, t + 4, b rows t, t + 4 and column g, and sum rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1 in
// turn.
__device__ __forceinline__ void add_product(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#elif !defined(__CUDACC__)
  emulation::machine.add_product(sum, a, b);
#endif
}

// A factor of a product in two parts; the product of the low ones is left out.
template <int kCount>
struct Factor {
  float high[kCount], low[kCount];

  __device__ __forceinline__ void set(int at, float x) {
    const TwoParts parts(x);
    high[at] = parts.high;
    low[at] = parts.low;
  }
};

__device__ __forceinline__ void add_product(float (&sum)[4], const Factor<4>& a, const Factor<2>& b) {
  add_product(sum, a.low, b.high);
  add_product(sum, a.high, b.low);
  add_product(sum, a.high, b.high);
}

// The nearest number to x that is not negative; NaN stays NaN.
AEFAST_HD float not_negative(float x) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

constexpr int kTileWidth = 16;  // dimensions
constexpr int kWarpRows = 32;
constexpr int kTileRows = kWarps * kWarpRows;
constexpr int kTileColumns = 32;
constexpr int kOfEight = 8;  // columns of one product
// Rows of arrays in shared memory are so long that what a warp reads and writes of four of them lies in different banks.
constexpr int kPitch = kTileColumns + 8;

// As pairs_kernel, with kTileWidth dimensions, whose squared lengths are behind the points: (kTileWidth + 1, count). A
// warp has kWarpRows rows. Its products' results lie in the lanes as the first factor of the next product wants them; for
// the columns' sums they go through shared memory to be its second.
template <Form kForm, bool kGradient>
__global__ void __launch_bounds__(kThreads, (kGradient ? 1 : 2))
    tiles_kernel(const float* __restrict__ points, Meeting meeting, int64_t first_tile, Mixture<float> mixture,
                 Weights weights, const float* __restrict__ unit, double* __restrict__ values,
                 float* __restrict__ row_sums, float* __restrict__ column_sums) {
  constexpr int kGroups = kTileColumns / kOfEight, kHalves = kWarpRows / 16, kPairs = 4 * kHalves;
  constexpr int kScratch = kGradient ? kWarps : 1;
  using C = Lanes<float, kPairs>;
  struct alignas(16) Four {
    float element[4];
  };
  struct alignas(8) Two {
    float element[2];
  };
  // Columns by fours of dimensions, as factors of the distances; by dimensions, as factors of the rows' gradients.
  __shared__ Four high_of[4][kTileColumns + 2], low_of[4][kTileColumns + 2];
  alignas(8) __shared__ float high_by[kTileWidth][kPitch], low_by[kTileWidth][kPitch];
  alignas(8) __shared__ float squares[kTileColumns];
  alignas(8) __shared__ float slopes[kScratch][kWarpRows][kOfEight];
  alignas(8) __shared__ float warp_columns[kScratch][kTileWidth][kPitch];
  alignas(8) __shared__ float warp_slopes[kScratch][8][kPitch];
  __shared__ typename Evaluator<float, kForm>::Shared of_mixture;
  __shared__ double warp_values[kWarps];

  const int64_t tile = blockIdx.x / meeting.splits, split = blockIdx.x % meeting.splits, count = meeting.count;
  const Encounter encounter(meeting, first_tile + tile, split);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  if (encounter.is_empty()) {
    if (thread == 0) values[blockIdx.x] = 0.0;
    return;
  }
  const Evaluator<float, kForm> evaluate(mixture, unit, of_mixture);
  const int64_t tile_end = encounter.first + kTileRows;
  const auto coordinate = [&](int row, int k) {
    return warp * kWarpRows + row < encounter.rows ? points[k * count + encounter.first + warp * kWarpRows + row] : 0.0f;
  };

  // The rows as first factors of the distances, and, transposed, of the columns' sums.
  Factor<4> row[kHalves][2], row_by[kWarpRows / 8];
  float row_squares[kHalves][2], row_slopes[kHalves][2] = {}, gradient[kHalves][2][4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        row[half][step].set(i, coordinate(half * 16 + g + i % 2 * 8, 4 * t + 2 * step + i / 2));
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) row_squares[half][part] = coordinate(half * 16 + part * 8 + g, kTileWidth);
  }
  if constexpr (kGradient) {
#pragma unroll
    for (int eight = 0; eight < kWarpRows / 8; ++eight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row_by[eight].set(i, coordinate(eight * 8 + t + i / 2 * 4, g + i % 2 * 8));
    }
  }

  double total = 0.0;
  C sum;
  float of_stage[kHalves][2][4];
  const auto meet = [&](int64_t start, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      const int column = group * kOfEight + 2 * t;  // and the next
      Factor<2> other[2];
      {
        const Four high = high_of[t][group * kOfEight + g], low = low_of[t][group * kOfEight + g];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          other[k / 2].high[k % 2] = high.element[k];
          other[k / 2].low[k % 2] = low.element[k];
        }
      }
      const Two of_columns = *reinterpret_cast<const Two*>(&squares[column]);
      C u, value, slope;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float inner[4] = {};
#pragma unroll
        for (int step = 0; step < 2; ++step) add_product(inner, row[half][step], other[step]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u.of[4 * half + i] = not_negative(row_squares[half][i / 2] + of_columns.element[i % 2] - 2.0f * inner[i]);
        }
      }
      evaluate(u, value, slope);
      if constexpr (kMasked) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int number = warp * kWarpRows + pair / 2 * 8 + g;
          const int64_t at = start + column + pair % 2;
          const bool is_pair = number < encounter.rows && at < encounter.end && encounter.first + number != at;
          value.of[pair] = is_pair ? value.of[pair] : 0.0f;
          slope.of[pair] = is_pair ? slope.of[pair] : 0.0f;
        }
      }
      sum = sum + value;
      if constexpr (kGradient) {
        Two of_column{};
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          row_slopes[pair / 4][pair / 2 % 2] += slope.of[pair];
          of_column.element[pair % 2] += slope.of[pair];
        }
        *reinterpret_cast<Two*>(&warp_slopes[warp][g][column]) = of_column;
        Factor<2> by_dimension[2];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const Two high = *reinterpret_cast<const Two*>(&high_by[part * 8 + g][column]);
          const Two low = *reinterpret_cast<const Two*>(&low_by[part * 8 + g][column]);
          by_dimension[part] = {{high.element[0], high.element[1]}, {low.element[0], low.element[1]}};
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          // The columns of a product's first factor and the rows of its second in the order 0 2 4 6 1 3 5 7.
          Factor<4> weight;
#pragma unroll
          for (int i = 0; i < 4; ++i) weight.set(i, slope.of[4 * half + i % 2 * 2 + i / 2]);
#pragma unroll
          for (int part = 0; part < 2; ++part) add_product(of_stage[half][part], weight, by_dimension[part]);
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; pair += 2) {
          *reinterpret_cast<Two*>(&slopes[warp][pair / 2 * 8 + g][2 * t]) = {slope.of[pair], slope.of[pair + 1]};
        }
        __syncwarp();
        float of_rows[4] = {};
#pragma unroll
        for (int eight = 0; eight < kWarpRows / 8; ++eight) {
          Factor<2> weight;
#pragma unroll
          for (int i = 0; i < 2; ++i) weight.set(i, slopes[warp][eight * 8 + t + i * 4][g]);
          add_product(of_rows, row_by[eight], weight);
        }
        *reinterpret_cast<Two*>(&warp_columns[warp][g][column]) = {of_rows[0], of_rows[1]};
        *reinterpret_cast<Two*>(&warp_columns[warp][g + 8][column]) = {of_rows[2], of_rows[3]};
        __syncwarp();  // before slopes are written again, and their sums read
      }
    }
  };

  // A thread brings four coordinates of a column, or its squared length, while the columns before it are met.
  const int four = thread / kTileColumns, brought = thread % kTileColumns;
  Four next;
  const auto bring = [&](int64_t start) {
    if (four < 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) next.element[k] = points[(four * 4 + k) * count + start + brought];
    } else if (four == 4) {
      next.element[0] = points[kTileWidth * count + start + brought];
    }
  };
  bring(encounter.begin);
  const float gradient_weight = static_cast<float>(encounter.gradient_weight(weights)) * evaluate.slope_scale;
  for (int64_t start = encounter.begin; start < encounter.end; start += kTileColumns) {
    if (four < 4) {
      Four high, low;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const TwoParts parts(next.element[k]);
        high.element[k] = high_by[four * 4 + k][brought] = parts.high;
        low.element[k] = low_by[four * 4 + k][brought] = parts.low;
      }
      high_of[four][brought] = high;
      low_of[four][brought] = low;
    } else if (four == 4) {
      squares[brought] = next.element[0];
    }
    __syncthreads();
    if (start + kTileColumns < encounter.end) bring(start + kTileColumns);
    sum = C(0.0f);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of_stage[half][part][i] = 0.0f;
      }
    }
    const bool is_behind = start >= tile_end;
    const bool is_whole = encounter.rows == kTileRows && start + kTileColumns <= encounter.end &&
                          (is_behind || start + kTileColumns <= encounter.first);
    if (is_whole) {
      meet(start, std::false_type{});
    } else {
      meet(start, std::true_type{});
    }
    float of_pairs = sum.of[0];
#pragma unroll
    for (int pair = 1; pair < kPairs; ++pair) of_pairs += sum.of[pair];
    total += static_cast<double>(meeting.is_symmetric && encounter.is_same && is_behind ? 2.0f * of_pairs : of_pairs);
    if constexpr (kGradient) {
      // The tensor cores cut off what does not fit a sum: theirs are short.
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
          for (int i = 0; i < 4; ++i) gradient[half][part][i] += of_stage[half][part][i];
        }
      }
      float of_column = warp_slopes[warp][0][lane];
#pragma unroll
      for (int other = 1; other < 8; ++other) of_column += warp_slopes[warp][other][lane];
      warp_slopes[warp][0][lane] = of_column;
    }
    __syncthreads();
    if constexpr (kGradient) {
      if (meeting.is_symmetric && is_behind) {
        float slope_sum = warp_slopes[0][0][brought];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) slope_sum += warp_slopes[other][0][brought];
#pragma unroll
        for (int turn = 0; turn < kTileWidth * kTileColumns / kThreads; ++turn) {
          const int k = turn * (kThreads / kTileColumns) + thread / kTileColumns;
          float of_rows = warp_columns[0][k][brought];
#pragma unroll
          for (int other = 1; other < kWarps; ++other) of_rows += warp_columns[other][k][brought];
          const float of_column = (high_by[k][brought] + low_by[k][brought]) * slope_sum - of_rows;
          column_sums[(tile * kTileWidth + k) * count + start + brought] = gradient_weight * of_column;
        }
      }
      __syncthreads();
    }
  }

  if constexpr (kGradient) {
    const int64_t slots = gridDim.x / meeting.splits * kTileRows;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float& slope_sum = row_slopes[half][part];
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) slope_sum += __shfl_xor_sync(kAllLanes, slope_sum, offset);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int number = half * 16 + part * 8 + g, k = i / 2 * 8 + 2 * t + i % 2;
          row_sums[(split * kTileWidth + k) * slots + tile * kTileRows + warp * kWarpRows + number] =
              gradient_weight *
              (coordinate(number, k) * slope_sum - gradient[half][i / 2][2 * part + i % 2]);
        }
      }
    }
  }
  total = block_sum(total, warp_values);
  if (thread == 0) values[blockIdx.x] = encounter.value_weight(meeting, weights) * total;
}

// ---------------------------------------------------------------------------------------------------------
// before the pairs and after them

// A matrix (rows, columns) of any strides.
template <typename T>
struct Points {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  AEFAST_HD Compute<T> at(int64_t row, int64_t column) const {
    return static_cast<Compute<T>>(data[row * row_stride + column * column_stride]);
  }
};

constexpr int64_t kMostMeanBlocks = 64;
constexpr int kMostDimensions = 16;

// partial_sums (blocks, kMostDimensions): what each block's share of the rows of x and y has, D <= kMostDimensions.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(Points<T> x, Points<T> y, double* __restrict__ partial_sums) {
  constexpr int kGroups = kThreads / kMostDimensions;
  __shared__ double of_groups[kGroups][kMostDimensions];
  const int k = threadIdx.x % kMostDimensions, group = threadIdx.x / kMostDimensions;
  double sum = 0.0;
  if (k < x.columns) {
    for (int64_t row = blockIdx.x * int64_t{kGroups} + group; row < x.rows + y.rows; row += gridDim.x * int64_t{kGroups}) {
      sum += static_cast<double>(row < x.rows ? x.at(row, k) : y.at(row - x.rows, k));
    }
  }
  of_groups[group][k] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < kGroups; ++other) sum += of_groups[other][k];
  partial_sums[blockIdx.x * int64_t{kMostDimensions} + k] = sum;
}

// points (width + 1, count) as a Meeting has them, of x and y minus their mean, and their squared lengths.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    centre_kernel(Points<T> x, Points<T> y, const double* __restrict__ partial_sums, int64_t partials, int width,
                  int64_t y_start, int64_t count, Compute<T>* __restrict__ points) {
  __shared__ double mean[kMostDimensions];
  if (threadIdx.x < kMostDimensions) {
    double sum = 0.0;
    for (int64_t part = 0; part < partials; ++part) sum += partial_sums[part * kMostDimensions + threadIdx.x];
    mean[threadIdx.x] = sum / static_cast<double>(x.rows + y.rows);
  }
  __syncthreads();
  const int64_t place = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (place >= count) return;
  const bool in_y = place >= y_start;
  const int64_t row = in_y ? place - y_start : place, rows = in_y ? y.rows : x.rows;
  Compute<T> squares = 0;
  for (int k = 0; k < width; ++k) {
    Compute<T> coordinate = 0;
    if (k < x.columns && row < rows) {
      coordinate = static_cast<Compute<T>>(static_cast<double>(in_y ? y.at(row, k) : x.at(row, k)) - mean[k]);
    }
    points[k * count + place] = coordinate;
    squares += coordinate * coordinate;
  }
  points[width * count + place] = squares;
}

// Block 0 makes of value_count values, and a constant, the value, if it is not null. The others add the sums of a launch
// of pairs of `tiles` tiles from first_tile on to the gradients (rows, dimensions), of which either may be null; with
// is_first they begin with it. There is a thread for each of all slots and dimensions.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const double* __restrict__ values, int64_t value_count, double constant, A* __restrict__ value,
                  const A* __restrict__ row_sums, const A* __restrict__ column_sums, Meeting meeting, int64_t first_tile,
                  int64_t tiles, int dimensions, int width, bool is_first, A* __restrict__ x_gradient,
                  A* __restrict__ y_gradient) {
  __shared__ double warp_values[kWarps];
  if (blockIdx.x == 0) {
    if (value == nullptr) return;
    double sum = 0.0;
    for (int64_t at = threadIdx.x; at < value_count; at += kThreads) sum += values[at];
    sum = block_sum(sum, warp_values);
    if (threadIdx.x == 0) *value = static_cast<A>(sum + constant);
    return;
  }
  const int64_t at = (blockIdx.x - 1) * int64_t{kThreads} + threadIdx.x;
  if (at >= meeting.slots() * dimensions) return;
  const int64_t k = at / meeting.slots(), slot = at % meeting.slots(), tile = slot / meeting.tile_rows;
  const bool in_x = tile < meeting.x_tiles;
  const int64_t row = in_x ? slot : slot - meeting.x_tiles * meeting.tile_rows;
  A* const gradient = in_x ? x_gradient : y_gradient;
  if (gradient == nullptr || row >= (in_x ? meeting.x_rows : meeting.y_rows)) return;
  A sum = is_first ? A(0) : gradient[row * dimensions + k];
  if (meeting.is_symmetric) {
    const int64_t before = tile < first_tile + tiles ? tile : first_tile + tiles;
    for (int64_t other = first_tile; other < before; ++other) {
      sum += column_sums[((other - first_tile) * width + k) * meeting.count + slot];
    }
  }
  if (tile >= first_tile && tile < first_tile + tiles) {
    for (int64_t split = 0; split < meeting.splits; ++split) {
      if (Encounter(meeting, tile, split).is_empty()) continue;
      sum += row_sums[(split * width + k) * (tiles * meeting.tile_rows) + slot - first_tile * meeting.tile_rows];
    }
  }
  gradient[row * dimensions + k] = sum;
}

// values (x.rows, y.rows) of the kernel, for points of any dimensions; with is_first, else added to what is there.
template <typename T, Form kForm>
__global__ void __launch_bounds__(kThreads, 4)
    values_kernel(Points<T> x, Points<T> y, Mixture<Compute<T>> mixture, const Compute<T>* __restrict__ unit, bool is_first,
                  Compute<T>* __restrict__ values) {
  using A = Compute<T>;
  __shared__ typename Evaluator<A, kForm>::Shared of_mixture;
  const Evaluator<A, kForm> evaluate(mixture, unit, of_mixture);
  __syncthreads();
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (at >= x.rows * y.rows) return;
  Lanes<A, 1> u(A(0)), value, slope;
  for (int64_t k = 0; k < x.columns; ++k) {
    const A difference = x.at(at / y.rows, k) - y.at(at % y.rows, k);
    u.of[0] += difference * difference;
  }
  evaluate(u, value, slope);
  values[at] = is_first ? value.of[0] : values[at] + value.of[0];
}

// ---------------------------------------------------------------------------------------------------------
// launchers

// Blocks of pairs that a launch is to have, if the most splits allow it, and the bytes of the columns' sums of a launch.
constexpr int64_t kPairBlocks = 2048, kMostSplits = 128, kColumnBytes = int64_t{1} << 27;

// body(Form) with the form as a constant.
template <typename Body>
void with_form(Form form, const Body& body) {
  switch (form) {
    case Form::rbf:
      return body(std::integral_constant<Form, Form::rbf>());
    case Form::laplacian:
      return body(std::integral_constant<Form, Form::laplacian>());
    case Form::imq:
      return body(std::integral_constant<Form, Form::imq>());
    case Form::rational_quadratic:
      return body(std::integral_constant<Form, Form::rational_quadratic>());
    case Form::energy:
      return body(std::integral_constant<Form, Form::energy>());
    case Form::octaves:
      return body(std::integral_constant<Form, Form::octaves>());
    case Form::seven:
      return body(std::integral_constant<Form, Form::seven>());
  }
}

// A sum of kernels of one kind, in mixtures of so many as a launch takes.
template <typename A>
struct KernelSum {
  Form form;
  std::vector<Mixture<A>> mixtures;
};

template <typename A>
KernelSum<A> kernel_sum(pairwise::Kind kind, const std::vector<double>& rates, double alpha) {
  const pairwise::Terms terms = pairwise::terms_of<A>(kind, rates, alpha, kMostRates);
  KernelSum<A> sum{static_cast<Form>(kind), {}};
  for (size_t k = 0; k < terms.rates.size(); ++k) {
    const int place = static_cast<int>(k % kMostRates);
    if (place == 0) sum.mixtures.emplace_back();
    Mixture<A>& mixture = sum.mixtures.back();
    mixture.count = place + 1;
    mixture.rate[place] = static_cast<A>(terms.rates[k] * terms.rate_factor);
    mixture.weight[place] = static_cast<A>(terms.slope_factor * terms.rates[k]);
    mixture.squarings[place] = terms.squarings[k];
    mixture.alpha = static_cast<A>(alpha);
  }
  // Of five kernels each but the first is the square of the one before.
  if (terms.squarings == std::vector<int32_t>{0, 1, 1, 1, 1}) sum.form = Form::octaves;
  if (sizeof(A) == sizeof(float) && kind == pairwise::Kind::imq && terms.rates.size() == kSeven) sum.form = Form::seven;
  return sum;
}

// The rows of a sum over pairs among all points: x_count of x's from x_first on, and y_count of y's from y_first on.
struct Rows {
  int64_t x_first, x_count, y_first, y_count;
};

// Without `rows` all points are rows, and each pair is met once. The columns are not cut into splits yet.
template <typename T>
Meeting meeting_of(const Points<T>& x, const Points<T>& y, const Rows* rows, int64_t tile_rows) {
  Meeting meeting{};
  meeting.is_symmetric = rows == nullptr;
  const Rows all{0, x.rows, 0, y.rows};
  const Rows& own = rows == nullptr ? all : *rows;
  meeting.x_count = x.rows;
  meeting.y_count = y.rows;
  meeting.y_start = ceil_div(x.rows, tile_rows) * tile_rows;
  meeting.count = meeting.y_start + ceil_div(y.rows, tile_rows) * tile_rows;
  meeting.x_first = own.x_first;
  meeting.x_rows = own.x_count;
  meeting.y_first = own.y_first;
  meeting.y_rows = own.y_count;
  meeting.tile_rows = tile_rows;
  meeting.x_tiles = ceil_div(own.x_count, tile_rows);
  meeting.tiles = meeting.x_tiles + ceil_div(own.y_count, tile_rows);
  return meeting;
}

// Into splits of whole stages, as many as give a launch of so many tiles its blocks.
inline void cut_columns(Meeting& meeting, int64_t tiles_of_launch, int64_t stage) {
  const int64_t splits = std::min(kMostSplits, ceil_div(kPairBlocks, std::max<int64_t>(1, tiles_of_launch)));
  const int64_t columns = meeting.x_count + meeting.y_count;
  meeting.split = std::max<int64_t>(1, ceil_div(ceil_div(columns, splits), stage)) * stage;
  meeting.x_splits = ceil_div(meeting.x_count, meeting.split);
  meeting.splits = meeting.x_splits + ceil_div(meeting.y_count, meeting.split);
}

// What a launch of pairs is made of.
template <typename A>
struct PairsKernel {
  void (*kernel)(const A*, Meeting, int64_t, Mixture<A>, Weights, const A*, double*, A*, A*);
  int64_t rows, columns;  // of a tile, and those it has before it at a time
  int width, threads;
};

template <typename A, Form kForm, int kWidth, typename Body>
void with_pairs_of(bool has_gradient, const Body& body) {
  body(PairsKernel<A>{has_gradient ? &pairs_kernel<A, kForm, kWidth, true> : &pairs_kernel<A, kForm, kWidth, false>,
                      kPairThreads * kThreadRows<A, kWidth>, kStage<kWidth>, kWidth, kPairThreads});
}

// body(PairsKernel) for points of so many dimensions.
template <typename A, typename Body>
void with_pairs(Form form, int dimensions, bool has_gradient, const Body& body) {
  with_form(form, [&](auto known) {
    constexpr Form kForm = decltype(known)::value;
    if constexpr (sizeof(A) == 4) {
      if (dimensions <= 2) return with_pairs_of<A, kForm, 2>(has_gradient, body);
      if (dimensions <= 4) return with_pairs_of<A, kForm, 4>(has_gradient, body);
      if (dimensions <= 8) return with_pairs_of<A, kForm, 8>(has_gradient, body);
    }
    if constexpr (sizeof(A) == 4 && kIsSmooth<kForm>) {
      body(PairsKernel<A>{has_gradient ? &tiles_kernel<kForm, true> : &tiles_kernel<kForm, false>, kTileRows,
                          kTileColumns, kTileWidth, kThreads});
    } else if constexpr (kForm != Form::octaves && kForm != Form::seven) {
      with_pairs_of<A, kForm, 16>(has_gradient, body);
    }
  });
}

// The weighted sum over the pairs of two different points and a constant, in `value`. x_gradient and y_gradient are of
// the rows and contiguous; either may be null. unit is a number on the device, or null for 1. allocate(bytes) gives memory
// of the device for the time of the call. D <= kMostDimensions.
template <typename T, typename Allocate>
void launch_mmd(const Points<T>& x, const Points<T>& y, const Rows* rows, const KernelSum<Compute<T>>& kernel,
                const Compute<T>* unit,
                const Weights& weights, double constant, Compute<T>* value, Compute<T>* x_gradient,
                Compute<T>* y_gradient, const Allocate& allocate, cudaStream_t stream) {
  using A = Compute<T>;
  const int dimensions = static_cast<int>(x.columns);
  const bool has_gradient = x_gradient != nullptr || y_gradient != nullptr;
  with_pairs<A>(kernel.form, dimensions, has_gradient, [&](const auto& pairs) {
    Meeting meeting = meeting_of(x, y, rows, pairs.rows);
    const int64_t of_tile = pairs.width * meeting.count * static_cast<int64_t>(sizeof(A));
    const int64_t most = has_gradient && meeting.is_symmetric ? std::max<int64_t>(4, kColumnBytes / std::max<int64_t>(1, of_tile))
                                                              : meeting.tiles;
    const int64_t tiles_of_launch = std::min(meeting.tiles, most);
    cut_columns(meeting, tiles_of_launch, pairs.columns);
    const auto array = [&](auto zero, int64_t count) {
      return static_cast<decltype(zero)*>(allocate(count * static_cast<int64_t>(sizeof(zero))));
    };
    const int64_t mixtures = meeting.tiles > 0 ? static_cast<int64_t>(kernel.mixtures.size()) : 0;
    const int64_t value_count = mixtures * meeting.tiles * meeting.splits;
    double* const values = array(0.0, value_count);
    A *points = nullptr, *row_sums = nullptr, *column_sums = nullptr;
    if (mixtures > 0) {
      const int64_t means = std::min(kMostMeanBlocks, ceil_div(x.rows + y.rows, kThreads));
      double* const partial_sums = array(0.0, means * kMostDimensions);
      points = array(A(0), (pairs.width + 1) * meeting.count);
      AEFAST_LAUNCH(&mean_kernel<T>, static_cast<unsigned>(means), kThreads, stream, x, y, partial_sums);
      AEFAST_LAUNCH(&centre_kernel<T>, static_cast<unsigned>(ceil_div(meeting.count, kThreads)), kThreads, stream, x, y,
                    partial_sums, means, pairs.width, meeting.y_start, meeting.count, points);
      if (has_gradient) {
        row_sums = array(A(0), meeting.splits * pairs.width * tiles_of_launch * meeting.tile_rows);
        if (meeting.is_symmetric) column_sums = array(A(0), tiles_of_launch * pairs.width * meeting.count);
      }
    }
    const auto gather = [&](int64_t first_tile, int64_t tiles, bool is_first, bool is_last) {
      const int64_t sums = has_gradient && tiles > 0 ? meeting.slots() * dimensions : 0;
      A* const to = is_last ? value : nullptr;
      AEFAST_LAUNCH(&gather_kernel<A>, static_cast<unsigned>(1 + ceil_div(sums, kThreads)), kThreads, stream, values,
                    value_count, constant, to, row_sums, column_sums, meeting, first_tile, tiles, dimensions, pairs.width,
                    is_first, x_gradient, y_gradient);
    };
    double* of_launch = values;
    for (int64_t at = 0; at < mixtures; ++at) {
      for (int64_t first_tile = 0; first_tile < meeting.tiles; first_tile += tiles_of_launch) {
        const int64_t tiles = std::min(tiles_of_launch, meeting.tiles - first_tile), blocks = tiles * meeting.splits;
        const Mixture<A>& mixture = kernel.mixtures[at];
        AEFAST_LAUNCH(pairs.kernel, static_cast<unsigned>(blocks), pairs.threads, stream, points, meeting, first_tile,
                      mixture, weights, unit, of_launch, row_sums, column_sums);
        of_launch += blocks;
        const bool is_last = at + 1 == mixtures && first_tile + tiles == meeting.tiles;
        if (has_gradient || is_last) gather(first_tile, tiles, at == 0 && first_tile == 0, is_last);
      }
    }
    if (mixtures == 0) gather(0, 0, true, true);
  });
}

// values (x.rows, y.rows), contiguous, of points of any dimensions.
template <typename T>
void launch_kernel_values(const Points<T>& x, const Points<T>& y, const KernelSum<Compute<T>>& kernel, const Compute<T>* unit,
                          Compute<T>* values, cudaStream_t stream) {
  if (x.rows * y.rows == 0) return;
  const unsigned blocks = static_cast<unsigned>(ceil_div(x.rows * y.rows, kThreads));
  // Memory binds it: it needs no code of its own for the default rates.
  with_form(kernel.form == Form::octaves ? Form::rbf : kernel.form == Form::seven ? Form::imq : kernel.form, [&](auto form) {
    for (size_t at = 0; at < kernel.mixtures.size(); ++at) {
      const auto mixture = kernel.mixtures[at];
      const bool is_first = at == 0;
      AEFAST_LAUNCH((&values_kernel<T, decltype(form)::value>), blocks, kThreads, stream, x, y, mixture, unit, is_first,
                    values);
    }
  });
}

}  // namespace aefast::cuda
