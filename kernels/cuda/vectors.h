// What kernels share: the units of threads, and the vectors that they read and write memory in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace aefast::cuda {

// What elements of T are computed and summed in.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The widest access of one thread is 16 bytes.
template <typename T>
constexpr int kVectorLength = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T element[kVectorLength<T>];
};

template <typename T>
bool is_vector_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T>) == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace aefast::cuda
