// The k largest elements of each row of a matrix and which they are, the largest first and of equals the one of the
// lower column.
//
// A block has a row, whose elements belong to more groups than k. A bound that k of the groups' maxima reach, k elements
// reach; the few more than k that do are gathered in shared memory and sorted. Where more do than there is room for,
// since many are equal or one group has most of the largest, the bound is raised by bisection, until those above it fit
// or are k at most with some of its equals, of which the first are taken.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "vectors.h"

namespace aefast::cuda {

// Elements that a thread takes at a time.
constexpr int kChunk = 8;
// Blocks on a multiprocessor: up to 40 registers a thread.
constexpr int kResidentSelections = 6;

// How many groups there are, the largest k that they serve, and the elements that there is room for. Of random numbers
// 1.7 k are expected at most.
template <int kGroupsPerThread>
struct Selection {
  static constexpr int kGroups = kGroupsPerThread * kThreads;
  static constexpr int kMost = kGroups / 2;
  static constexpr int kRoom = 2 * kMost < 1024 ? 1024 : 2 * kMost;
};

// Greater for the greater number; -0 is 0, and NaN is greater than all.
constexpr uint32_t kOrderOfNaN = 0xfffffffeu;
constexpr uint32_t kNoOrder = 0xffffffffu;

template <typename T>
__device__ uint32_t order_of(T element) {
  const float value = static_cast<float>(element) + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return kOrderOfNaN;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The number of an order, NaN for an order that no number has.
__device__ inline float number_of(uint32_t order) {
  const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// body(elements, count, column) for all elements of the block's row, of which each thread takes `count` side by side,
// kChunk or, in front of the first that is aligned and behind the last whole chunk, 1.
template <typename T, typename Body>
__device__ void for_each_chunk(const T* __restrict__ row, int columns, const Body& body) {
  constexpr int V = kVectorLength<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vector<T>) / sizeof(T));
  const int head = past == 0 ? 0 : V - past;
  const int chunks = (columns - head) / kChunk;
  for (int chunk = thread; chunk < chunks; chunk += kThreads) {
    const int column = head + chunk * kChunk;
    T elements[kChunk];
#pragma unroll
    for (int first = 0; first < kChunk; first += V) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + column + first);
#pragma unroll
      for (int v = 0; v < V; ++v) elements[first + v] = vector.element[v];
    }
    body(elements, std::integral_constant<int, kChunk>{}, column);
  }
  const int column = thread < head ? thread : chunks * kChunk + thread;
  if (column < columns) {
    const T elements[1] = {row[column]};
    body(elements, std::integral_constant<int, 1>{}, column);
  }
}

// keys (size,), a power of two, into descending order by threads first, first + step, ... with `barrier` among them:
// Batcher's bitonic sort.
template <typename Barrier>
__device__ void sort_descending(uint64_t* keys, int size, int first, int step, const Barrier& barrier) {
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int pair = first; pair < size / 2; pair += step) {
        const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & width) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      barrier();
    }
  }
}

// elements (N, columns), values and indices (N, k), all contiguous, N blocks; 1 <= k <= columns and Selection's kMost.
template <typename T, int kGroupsPerThread>
__global__ void __launch_bounds__(kThreads, kResidentSelections)
    largest_kernel(const T* __restrict__ elements, T* __restrict__ values, int64_t* __restrict__ indices, int columns,
                   int k) {
  using Sizes = Selection<kGroupsPerThread>;
  constexpr int kGroups = Sizes::kGroups, kRoom = Sizes::kRoom;
  __shared__ uint32_t maxima[kGroups];
  __shared__ uint64_t keys[kRoom];
  __shared__ uint32_t first_bound;
  __shared__ int total;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t row_index = blockIdx.x;
  const T* const row = elements + row_index * columns;

  // Of groups without a number the maximum is -inf: what they hold is NaN, and in no other's way.
  float most[kGroupsPerThread];
#pragma unroll
  for (int group = 0; group < kGroupsPerThread; ++group) most[group] = -INFINITY;
  for_each_chunk(row, columns, [&](const T* chunk, auto count, int) {
#pragma unroll
    for (int i = 0; i < decltype(count)::value; ++i) {
      most[i % kGroupsPerThread] = fmaxf(most[i % kGroupsPerThread], static_cast<float>(chunk[i]));
    }
  });
#pragma unroll
  for (int group = 0; group < kGroupsPerThread; ++group) maxima[group * kThreads + thread] = order_of(most[group]);
  __syncthreads();

  if (warp == 0) {
    // k maxima or more reach `low`, and fewer `high`. A few more than k make few more elements to sort.
    uint32_t low = 0, high = kNoOrder;
    int reached = kGroups;
    while (reached > k + k / 8 && high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      int count = 0;
#pragma unroll 8
      for (int group = lane; group < kGroups; group += kWarpSize) count += maxima[group] >= middle;
      count = __reduce_add_sync(kAllLanes, count);
      if (count >= k) {
        low = middle;
        reached = count;
      } else {
        high = middle;
      }
    }
    if (lane == 0) first_bound = low;
  }

  const auto reset_total = [&] {
    __syncthreads();
    if (thread == 0) total = 0;
    __syncthreads();
  };
  const auto append = [&](T element, int column) {
    const int place = atomicAdd(&total, 1);
    if (place < kRoom) {
      keys[place] = static_cast<uint64_t>(order_of(element)) << 32 | (kNoOrder - static_cast<uint32_t>(column));
    }
  };
  // Those whose order is `bound` at least go to `keys`; how many there are.
  const auto gather = [&](uint32_t bound) {
    reset_total();
    const float least = number_of(bound);
    for_each_chunk(row, columns, [&](const T* chunk, auto count, int column) {
      bool is_any = false;
#pragma unroll
      for (int i = 0; i < decltype(count)::value; ++i) is_any |= !(static_cast<float>(chunk[i]) < least);
      if (is_any) {
#pragma unroll
        for (int i = 0; i < decltype(count)::value; ++i) {
          if (order_of(chunk[i]) >= bound) append(chunk[i], column + i);
        }
      }
    });
    __syncthreads();
    return total;
  };
  const auto count_above = [&](uint32_t bound) {
    reset_total();
    int mine = 0;
    for_each_chunk(row, columns, [&](const T* chunk, auto count, int) {
#pragma unroll
      for (int i = 0; i < decltype(count)::value; ++i) mine += order_of(chunk[i]) >= bound;
    });
    mine = __reduce_add_sync(kAllLanes, mine);
    if (lane == 0) atomicAdd(&total, mine);
    __syncthreads();
    return total;
  };

  __syncthreads();
  uint32_t low = first_bound;
  int found = gather(low);
  if (found > kRoom) {
    uint32_t high = kNoOrder;
    while (found > kRoom && high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const int reached = count_above(middle);
      if (reached >= k) {
        low = middle;
        found = reached;
      } else {
        high = middle;
      }
    }
    if (found <= kRoom) {
      found = gather(low);
    } else {
      int taken = gather(high);
      if (warp == 0) {
        for (int first = 0; taken < k; first += kWarpSize) {
          const int column = first + lane;
          const bool is_equal = column < columns && order_of(row[column]) == low;
          int place = is_equal;
#pragma unroll
          for (int offset = 1; offset < kWarpSize; offset *= 2) {
            const int before = __shfl_up_sync(kAllLanes, place, offset);
            if (lane >= offset) place += before;
          }
          if (is_equal && taken + place <= k) {
            keys[taken + place - 1] = static_cast<uint64_t>(low) << 32 | (kNoOrder - static_cast<uint32_t>(column));
          }
          taken += __shfl_sync(kAllLanes, place, kWarpSize - 1);
        }
      }
      found = k;
    }
  }

  const auto write = [&](int first, int step) {
    for (int i = first; i < k; i += step) {
      const int column = static_cast<int>(kNoOrder - static_cast<uint32_t>(keys[i]));
      values[row_index * k + i] = row[column];
      indices[row_index * k + i] = column;
    }
  };
  int size = 2;
  while (size < found) size *= 2;
  for (int i = found + thread; i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  // One warp has no others to wait for.
  if (size <= 2 * kWarpSize) {
    if (warp != 0) return;
    sort_descending(keys, size, lane, kWarpSize, [] { __syncwarp(); });
    write(lane, kWarpSize);
  } else {
    sort_descending(keys, size, thread, kThreads, [] { __syncthreads(); });
    write(thread, kThreads);
  }
}

constexpr int kMostLargest = Selection<kChunk>::kMost;
// A column and a block's threads beyond it are counted in 32 bits.
constexpr int64_t kMostColumns = 1 << 30;

// elements (rows, columns), values and indices (rows, k), all contiguous; 1 <= k <= columns and kMostLargest.
template <typename T>
void launch_largest(const T* elements, T* values, int64_t* indices, int64_t rows, int columns, int k,
                    cudaStream_t stream) {
  if (rows == 0) return;
  auto* kernel = k <= Selection<2>::kMost ? &largest_kernel<T, 2> : &largest_kernel<T, kChunk>;
  AEFAST_LAUNCH(kernel, rows, kThreads, stream, elements, values, indices, columns, k);
}

}  // namespace aefast::cuda
