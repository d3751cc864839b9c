// The kernels of normal distributions with diagonal covariance.
//
//   reparameterize_kernel           z = mu + exp(logvar / 2) * eps and each row's divergence to N(0, I), in one pass;
//                                   or the divergence alone
//   reparameterize_gradient_kernel  the gradients of mu and logvar, from that of z, of the divergence, or of both
//
// Memory binds them as long as each block of Philox serves its four elements and a normal value takes no library
// function: eps is made where it is used, and never stored. fp16 and bf16 are computed and summed in float, fp64 in
// double.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "launch.h"
#include "philox.h"
#include "vectors.h"

namespace aefast::cuda {

// ---------------------------------------------------------------------------------------------------------
// which thread has which elements

// What a thread computes at a time: whole vectors, and whole blocks of Philox.
template <typename T>
constexpr int kChunk = kVectorLength<T> < 4 ? 4 : kVectorLength<T>;

template <typename T>
struct alignas(16) Chunk {
  T element[kChunk<T>];
};

// A matrix (rows, columns) of any strides. is_flat: its rows lie one behind the other from a 16-byte boundary on.
template <typename T>
struct Operand {
  const T* data;
  int64_t row_stride, column_stride;
  bool is_flat;

  AEFAST_HD void skip_rows(int64_t count) { data += count * row_stride; }
};

// One value a row.
template <typename C>
struct RowValues {
  const C* data;
  int64_t stride;

  AEFAST_HD void skip_rows(int64_t count) { data += count * stride; }
};

// How (rows, columns) is cut up: a function of the shape and the element size alone, never of strides or alignment,
// since it decides the order of the sums.
//
// lanes = 2^lanes_log2 threads side by side have a group of rows, and take its chunks in turn. A group is one row if
// chunks divide it, else kChunk rows, which they always do.
struct RowTiling {
  int64_t rows, columns;
  int group_rows, lanes_log2;
  int64_t blocks;

  AEFAST_HD int lanes() const { return 1 << lanes_log2; }
  AEFAST_HD int groups_per_block() const { return kThreads >> lanes_log2; }
};

// What a thread has of a block: a lane of the group that begins with first_row.
struct Share {
  int64_t first_row;
  int lane;

  AEFAST_HD Share(const RowTiling& tiling, unsigned block, unsigned thread)
      : first_row((static_cast<int64_t>(block) * tiling.groups_per_block() + (thread >> tiling.lanes_log2)) *
                  tiling.group_rows),
        lane(static_cast<int>(thread) & (tiling.lanes() - 1)) {}
};

constexpr int kLineLanes = 8, kChunksPerThread = 4;

template <typename T>
RowTiling row_tiling(int64_t rows, int64_t columns) {
  RowTiling tiling{rows, columns, columns % kChunk<T> == 0 ? 1 : kChunk<T>, 0, 0};
  const int64_t chunks = tiling.group_rows * columns / kChunk<T>;
  // kLineLanes threads side by side read a whole cache line. Beyond that they get several chunks each, which share
  // the expansion of Philox's key and the sums' way across lanes.
  while (tiling.lanes() < kThreads &&
         tiling.lanes() * (tiling.lanes() < kLineLanes ? 1 : kChunksPerThread) < chunks) {
    ++tiling.lanes_log2;
  }
  // At most a fifth of the threads' turns may be without a chunk.
  while (4 * ceil_div(chunks, tiling.lanes()) * tiling.lanes() > 5 * chunks && tiling.lanes_log2 > 0) {
    --tiling.lanes_log2;
  }
  tiling.blocks = ceil_div(ceil_div(rows, tiling.group_rows), tiling.groups_per_block());
  return tiling;
}

// A chunk's first element, by its row in the group, and how many elements the group has from there on.
struct Place {
  int row;
  int64_t column, left;

  AEFAST_HD int64_t index(const RowTiling& tiling) const { return row * tiling.columns + column; }
};

// body(place) for the chunks of this thread. kWhole: groups are single rows.
template <typename T, bool kWhole, typename Body>
__device__ __forceinline__ void for_each_chunk(const RowTiling& tiling, const Share& share, Body&& body) {
  const int64_t step = static_cast<int64_t>(kChunk<T>) << tiling.lanes_log2, rows_left = tiling.rows - share.first_row;
  if (rows_left <= 0) return;
  Place place{0, share.lane * kChunk<T>, 0};
  if constexpr (kWhole) {
#pragma unroll 1
    for (; place.column < tiling.columns; place.column += step) body(place);
  } else {
    place.left = (rows_left < tiling.group_rows ? rows_left : tiling.group_rows) * tiling.columns - place.column;
#pragma unroll 1
    for (; place.left > 0; place.left -= step, place.column += step) {
      while (place.column >= tiling.columns) {
        place.column -= tiling.columns;
        ++place.row;
      }
      body(place);
    }
  }
}

// body(element, row, column) for the elements of a chunk that is not within one row.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_element(const RowTiling& tiling, const Place& place, Body&& body) {
  int row = place.row;
  int64_t column = place.column;
#pragma unroll
  for (int v = 0; v < kChunk<T>; ++v) {
    body(v, row, column);
    if (++column == tiling.columns) {
      column = 0;
      ++row;
    }
  }
}

// `from` begins with the group. kWhole: also that vectors may be read wherever a chunk begins.
template <typename T, bool kWhole>
__device__ __forceinline__ Chunk<T> load(const Operand<T>& from, const RowTiling& tiling, const Place& place) {
  if (kWhole || (from.is_flat && place.left >= kChunk<T>)) {
    return *reinterpret_cast<const Chunk<T>*>(from.data + place.index(tiling));
  }
  Chunk<T> loaded;
  for_each_element<T>(tiling, place, [&](int v, int row, int64_t column) {
    loaded.element[v] = v < place.left ? from.data[row * from.row_stride + column * from.column_stride] : T(0.0f);
  });
  return loaded;
}

// `to` begins with the group, of a contiguous matrix from a 16-byte boundary on.
template <typename T, bool kWhole>
__device__ __forceinline__ void store(T* to, const RowTiling& tiling, const Place& place, const Chunk<T>& values) {
  to += place.index(tiling);
  if (kWhole || place.left >= kChunk<T>) {
    *reinterpret_cast<Chunk<T>*>(to) = values;
  } else {
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) {
      if (v < place.left) to[v] = values.element[v];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// elementwise maths

// For results in fp16 and bf16: the GPU's own functions, in the standard library's place elsewhere. The errors of a
// logarithm, a sine and a cosine, some 2^-21 absolute, and that of a power, 2^-20 relative unless it is very large or
// small, are a hundredth of fp16's rounding and less.
namespace approximate {

AEFAST_HD float exp2(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::exp2(x);
#endif
}

AEFAST_HD float log2(float x) {
#if defined(__CUDA_ARCH__)
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::log2(x);
#endif
}

AEFAST_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::sqrt(x);
#endif
}

AEFAST_HD float sine(float x) {
#if defined(__CUDA_ARCH__)
  return ::__sinf(x);
#else
  return std::sin(x);
#endif
}

AEFAST_HD float cosine(float x) {
#if defined(__CUDA_ARCH__)
  return ::__cosf(x);
#else
  return std::cos(x);
#endif
}

// philox::normal_pair to 4e-6, but to 6e-4 where a radius of that size is lost in its logarithm's error, which is once
// in five million.
AEFAST_HD void normal_pair(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float u = std::fma(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);
  // Of a word beyond 2^32 - 129 u is 1, whose logarithm may come out on either side of 0.
  const float radius = square_root(std::fabs(-1.38629436f * log2(u)));
  const float angle = elementary::signed_float(angle_word) * (6.28318531f * 0x1p-32f);
  first = radius * cosine(angle);
  second = radius * sine(angle);
}

}  // namespace approximate

// N(0, 1) for the elements of the block of this number, and those behind it, as many as a chunk has.
template <typename T>
__device__ __forceinline__ void chunk_normals(uint64_t seed, uint64_t block, Compute<T> (&values)[kChunk<T>]) {
#pragma unroll
  for (int v = 0; v < kChunk<T>; v += 4) {
    const philox::Block<uint32_t> words = philox::block_words(seed, 0, block + v / 4);
    if constexpr (sizeof(T) == 2) {
      approximate::normal_pair(words.word[0], words.word[1], values[v], values[v + 1]);
      approximate::normal_pair(words.word[2], words.word[3], values[v + 2], values[v + 3]);
    } else {
      philox::normals(words, values + v);
    }
  }
}

// exp(logvar / 2).
template <typename T>
AEFAST_HD Compute<T> deviation_of(Compute<T> log_variance) {
  if constexpr (sizeof(T) == 2) {
    return approximate::exp2(0.721347520f * log_variance);
  } else {
    return std::exp(Compute<T>(0.5) * log_variance);
  }
}

// The nearest number to x in [low, high]; NaN stays NaN.
AEFAST_HD float clamped(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
#else
  return x < low ? low : x > high ? high : x;
#endif
}

AEFAST_HD double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// Twice an element's share of the divergence: mu^2 + exp(logvar) - 1 - logvar, in which exp(logvar) - 1 is given.
template <typename C>
AEFAST_HD C divergence_term(C mu, C logvar, C variance_less_1) {
  return std::fma(mu, mu, variance_less_1 - logvar);
}

// ---------------------------------------------------------------------------------------------------------
// the sample and the divergence

// Blocks of the vectorised kernels resident on a multiprocessor: 1024 threads or more, whose loads are 32 KiB and more,
// and up to 48 registers a thread, or 64 where chunks have eight elements.
template <typename T, bool kWhole>
constexpr int kResidentRowBlocks = !kWhole || std::is_same_v<T, double> ? 2 : sizeof(T) == 2 ? 4 : 5;

// mu, logvar (rows, columns), seed one number, z (rows, columns), divergence (rows,); logvar counts as its nearest
// value in [low, high]. Without kSampled z and seed are not touched, and logvar counts as it is. kWhole: chunks divide
// a row, and begin at 16-byte boundaries in mu and logvar.
template <typename T, bool kSampled, bool kWhole>
__global__ void __launch_bounds__(kThreads, (kResidentRowBlocks<T, kWhole>))
    reparameterize_kernel(Operand<T> mu, Operand<T> logvar, const int64_t* __restrict__ seed, T* __restrict__ z,
                          Compute<T>* __restrict__ divergence, Compute<T> low, Compute<T> high, RowTiling tiling) {
  using C = Compute<T>;
  constexpr int kSums = kWhole ? 1 : kChunk<T>;
  __shared__ C warp_sums[kWarps][kSums];

  const Share share(tiling, blockIdx.x, threadIdx.x);
  const int64_t first_index = share.first_row * tiling.columns;
  mu.skip_rows(share.first_row);
  logvar.skip_rows(share.first_row);
  [[maybe_unused]] uint64_t key = 0;
  if constexpr (kSampled) {
    z += first_index;
    key = static_cast<uint64_t>(*seed);
  }

  C sums[kSums] = {};
  for_each_chunk<T, kWhole>(tiling, share, [&](const Place& place) {
    const Chunk<T> means = load<T, kWhole>(mu, tiling, place), logvars = load<T, kWhole>(logvar, tiling, place);
    [[maybe_unused]] C noise[kChunk<T>];
    [[maybe_unused]] Chunk<T> samples;
    if constexpr (kSampled) {
      chunk_normals<T>(key, static_cast<uint64_t>(first_index + place.index(tiling)) / 4, noise);
    }
    C terms[kChunk<T>];
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) {
      const C mean = static_cast<C>(means.element[v]);
      C log_variance = static_cast<C>(logvars.element[v]);
      if constexpr (kSampled) {
        log_variance = clamped(log_variance, low, high);
        const C deviation = deviation_of<T>(log_variance);
        samples.element[v] = static_cast<T>(std::fma(deviation, noise[v], mean));
        terms[v] = divergence_term(mean, log_variance, std::fma(deviation, deviation, C(-1)));
      } else {
        terms[v] = divergence_term(mean, log_variance, std::exp(log_variance) - C(1));
      }
    }
    if constexpr (kSampled) store<T, kWhole>(z, tiling, place, samples);
    if (kWhole || place.column + kChunk<T> <= tiling.columns) {
      C sum = terms[0];
#pragma unroll
      for (int v = 1; v < kChunk<T>; ++v) sum += terms[v];
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] += place.row == s ? sum : C(0);
    } else {
      for_each_element<T>(tiling, place, [&](int v, int row, int64_t) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] += row == s ? terms[v] : C(0);
      });
    }
  });

  // First the lanes of one warp, then the warps of the group.
  const int thread = static_cast<int>(threadIdx.x), lanes = tiling.lanes();
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < lanes) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] += __shfl_xor_sync(kAllLanes, sums[s], offset);
    }
  }
  if (lanes > kWarpSize) {
    if (thread % kWarpSize == 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) warp_sums[thread / kWarpSize][s] = sums[s];
    }
    __syncthreads();
    if (share.lane == 0) {
#pragma unroll 1
      for (int warp = 1; warp < lanes / kWarpSize; ++warp) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] += warp_sums[thread / kWarpSize + warp][s];
      }
    }
  }
  if (share.lane == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const int64_t row = share.first_row + s;
      if (s < tiling.group_rows && row < tiling.rows) divergence[row] = C(0.5) * sums[s];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// the gradients

// grad_z, mu, logvar, mu_gradient, logvar_gradient (rows, columns), grad_divergence (rows,), seed one number. Without
// kSampled there is no grad_z, and seed is not touched; without kDivergence no grad_divergence. Outside of [low, high]
// logvar has no gradient. kWhole as above, for grad_z too.
template <typename T, bool kSampled, bool kDivergence, bool kWhole>
__global__ void __launch_bounds__(kThreads, (kResidentRowBlocks<T, kWhole>))
    reparameterize_gradient_kernel(Operand<T> grad_z, RowValues<Compute<T>> grad_divergence, Operand<T> mu,
                                   Operand<T> logvar, const int64_t* __restrict__ seed, T* __restrict__ mu_gradient,
                                   T* __restrict__ logvar_gradient, Compute<T> low, Compute<T> high,
                                   RowTiling tiling) {
  using C = Compute<T>;
  const Share share(tiling, blockIdx.x, threadIdx.x);
  const int64_t first_index = share.first_row * tiling.columns;
  logvar.skip_rows(share.first_row);
  mu_gradient += first_index;
  logvar_gradient += first_index;
  [[maybe_unused]] uint64_t key = 0;
  if constexpr (kSampled) {
    grad_z.skip_rows(share.first_row);
    key = static_cast<uint64_t>(*seed);
  }
  if constexpr (kDivergence) {
    mu.skip_rows(share.first_row);
    grad_divergence.skip_rows(share.first_row);
  }

  for_each_chunk<T, kWhole>(tiling, share, [&](const Place& place) {
    [[maybe_unused]] Chunk<T> upstream, means;
    if constexpr (kSampled) upstream = load<T, kWhole>(grad_z, tiling, place);
    if constexpr (kDivergence) means = load<T, kWhole>(mu, tiling, place);
    const Chunk<T> logvars = load<T, kWhole>(logvar, tiling, place);
    [[maybe_unused]] C noise[kChunk<T>], weights[kChunk<T>];
    if constexpr (kDivergence && kWhole) {
      const C weight = grad_divergence.data[place.row * grad_divergence.stride];
#pragma unroll
      for (int v = 0; v < kChunk<T>; ++v) weights[v] = weight;
    } else if constexpr (kDivergence) {
      for_each_element<T>(tiling, place, [&](int v, int row, int64_t) {
        weights[v] = v < place.left ? grad_divergence.data[row * grad_divergence.stride] : C(0);
      });
    }
    if constexpr (kSampled) {
      chunk_normals<T>(key, static_cast<uint64_t>(first_index + place.index(tiling)) / 4, noise);
    }
    Chunk<T> of_mu, of_logvar;
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) {
      const C given = static_cast<C>(logvars.element[v]), log_variance = clamped(given, low, high);
      C mu_slope = 0, twice_logvar_slope = 0;
      if constexpr (kSampled) {
        const C deviation = deviation_of<T>(log_variance);
        mu_slope = static_cast<C>(upstream.element[v]);
        twice_logvar_slope = mu_slope * noise[v] * deviation;
        if constexpr (kDivergence) {
          mu_slope = std::fma(weights[v], static_cast<C>(means.element[v]), mu_slope);
          twice_logvar_slope =
              std::fma(weights[v], std::fma(deviation, deviation, C(-1)), twice_logvar_slope);
        }
      } else {
        mu_slope = weights[v] * static_cast<C>(means.element[v]);
        twice_logvar_slope = weights[v] * (std::exp(log_variance) - C(1));
      }
      of_mu.element[v] = static_cast<T>(mu_slope);
      of_logvar.element[v] = static_cast<T>(given < low || given > high ? C(0) : C(0.5) * twice_logvar_slope);
    }
    store<T, kWhole>(mu_gradient, tiling, place, of_mu);
    store<T, kWhole>(logvar_gradient, tiling, place, of_logvar);
  });
}

// ---------------------------------------------------------------------------------------------------------
// launchers

template <typename T>
Operand<T> operand(const T* data, int64_t row_stride, int64_t column_stride, const RowTiling& tiling) {
  const bool is_flat = is_vector_aligned(data) && (column_stride == 1 || tiling.columns <= 1) &&
                       (row_stride == tiling.columns || tiling.rows <= 1);
  return {data, row_stride, column_stride, is_flat};
}

// Whether all chunks of the operands are vectors within one row; null operands are no hindrance.
template <typename T>
bool is_whole(const RowTiling& tiling, std::initializer_list<Operand<T>> operands) {
  bool whole = tiling.columns % kChunk<T> == 0;
  for (const Operand<T>& one : operands) {
    whole = whole && is_vector_aligned(one.data) && (one.column_stride == 1 || one.data == nullptr) &&
            one.row_stride % kVectorLength<T> == 0;
  }
  return whole;
}

// mu, logvar of operand(..., tiling) with tiling = row_tiling<T>(rows, columns); seed on the device; z (rows, columns)
// contiguous and 16-byte aligned; divergence (rows,). z and seed are null for the divergence alone.
template <typename T>
void launch_reparameterize(const Operand<T>& mu, const Operand<T>& logvar, const int64_t* seed, T* z,
                           Compute<T>* divergence, double low, double high, const RowTiling& tiling,
                           cudaStream_t stream) {
  if (tiling.rows == 0) return;
  const unsigned blocks = static_cast<unsigned>(tiling.blocks);
  const auto least = static_cast<Compute<T>>(low), most = static_cast<Compute<T>>(high);
  const bool whole = is_whole<T>(tiling, {mu, logvar});
  const auto launch = [&](auto* kernel) {
    AEFAST_LAUNCH(kernel, blocks, kThreads, stream, mu, logvar, seed, z, divergence, least, most, tiling);
  };
  if (z != nullptr) {
    launch(whole ? &reparameterize_kernel<T, true, true> : &reparameterize_kernel<T, true, false>);
  } else {
    launch(whole ? &reparameterize_kernel<T, false, true> : &reparameterize_kernel<T, false, false>);
  }
}

// grad_z, mu, logvar of operand(..., tiling), grad_divergence (rows,), seed on the device; the gradients
// (rows, columns) contiguous and 16-byte aligned. Of grad_z and grad_divergence one may be null.
template <typename T>
void launch_reparameterize_gradient(const Operand<T>& grad_z, const RowValues<Compute<T>>& grad_divergence,
                                    const Operand<T>& mu, const Operand<T>& logvar, const int64_t* seed,
                                    T* mu_gradient, T* logvar_gradient, double low, double high,
                                    const RowTiling& tiling, cudaStream_t stream) {
  if (tiling.rows == 0 || tiling.columns == 0) return;
  const unsigned blocks = static_cast<unsigned>(tiling.blocks);
  const auto least = static_cast<Compute<T>>(low), most = static_cast<Compute<T>>(high);
  const bool whole = is_whole<T>(tiling, {grad_z, mu, logvar});
  const auto launch = [&](auto sampled, auto with_divergence) {
    constexpr bool kSampled = decltype(sampled)::value, kDivergence = decltype(with_divergence)::value;
    auto* kernel = whole ? &reparameterize_gradient_kernel<T, kSampled, kDivergence, true>
                         : &reparameterize_gradient_kernel<T, kSampled, kDivergence, false>;
    AEFAST_LAUNCH(kernel, blocks, kThreads, stream, grad_z, grad_divergence, mu, logvar, seed, mu_gradient,
                  logvar_gradient, least, most, tiling);
  };
  if (grad_divergence.data == nullptr) {
    launch(std::true_type{}, std::false_type{});
  } else if (grad_z.data == nullptr) {
    launch(std::false_type{}, std::true_type{});
  } else {
    launch(std::true_type{}, std::true_type{});
  }
}

}  // namespace aefast::cuda
