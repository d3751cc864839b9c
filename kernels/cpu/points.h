// Tensors as points, in blocks of which tiles are made.
#pragma once

#include <cstdint>
#include <memory>

#include "matrix.h"
#include "memory.h"
#include "pairwise.h"
#include "parallel.h"

namespace aefast::cpu {

inline int64_t blocks_of(int64_t points) { return (points + kPoints - 1) / kPoints; }

inline Points points_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), scalar_of(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// Uninitialised memory that begins with a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : block_(take_block(static_cast<size_t>(bytes))) {
    if (block_) {
      data_ = static_cast<char*>(data_of(block_));
    } else {
      own_.reset(new char[bytes + 64]);
      data_ = own_.get() + (64 - reinterpret_cast<uintptr_t>(own_.get()) % 64) % 64;
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (block_) give_back(block_);
  }

  char* get() const { return data_; }

 private:
  Block* block_;
  std::unique_ptr<char[]> own_;
  char* data_;
};

}  // namespace aefast::cpu
