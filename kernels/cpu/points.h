// Tensors as points, in blocks of which tiles are made.
#pragma once

#include <cstdint>
#include <memory>

#include "matrix.h"
#include "pairwise.h"
#include "parallel.h"

namespace aefast::cpu {

inline int64_t blocks_of(int64_t points) { return (points + kPoints - 1) / kPoints; }

inline Points points_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), scalar_of(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// Memory that begins with a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(new char[bytes + 64]) {}
  char* get() const { return data_.get() + (64 - reinterpret_cast<uintptr_t>(data_.get()) % 64) % 64; }

 private:
  std::unique_ptr<char[]> data_;
};

}  // namespace aefast::cpu
