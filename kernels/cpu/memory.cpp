#include "memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "allocation.h"
#include "matrix.h"

namespace aefast::cpu {

// Its memory is torch's, whose memory profiler sees it come and go.
struct Block {
  Tensor memory;
  size_t bytes;
  uint64_t freed;  // when, in blocks taken until then
};

namespace {

// Smaller blocks the C library takes from pages that it has.
constexpr size_t kLeastBytes = 256 << 10;
// A block is used for tensors of down to so much less.
constexpr size_t kMostWaste = 4;  // of its size a fourth
// What has not been used for so many blocks taken belongs to work that is over.
constexpr uint64_t kMostAge = 512;
constexpr size_t kDefaultBytes = size_t{512} << 20;

// Nobody waits for it: who finds it taken does without. So a process that was forked while it was taken still runs.
class Pool {
 public:
  Block* take(size_t bytes) {
    std::vector<Block*> old;
    Block* found = nullptr;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock) return nullptr;
      ++taken_;
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it) {
        const size_t size = (*it)->bytes;
        // Of equal ones the last that was freed, which the caches may still hold.
        if (size >= bytes && size - bytes <= size / kMostWaste && (best == idle_.end() || size <= (*best)->bytes)) best = it;
      }
      if (best != idle_.end()) {
        found = *best;
        idle_bytes_ -= found->bytes;
        idle_.erase(best);
      }
      while (!idle_.empty() && taken_ - idle_.front()->freed > kMostAge) old.push_back(pop());
    }
    for (Block* const block : old) delete block;
    return found;
  }

  void put(Block* block) {
    std::vector<Block*> old{block};
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && block->bytes <= limit_) {
        old.clear();
        block->freed = taken_;
        idle_.push_back(block);
        idle_bytes_ += block->bytes;
        while (idle_bytes_ > limit_) old.push_back(pop());
      }
    }
    for (Block* const one : old) delete one;
  }

  size_t limit(size_t bytes) {
    std::vector<Block*> old;
    size_t before;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      before = limit_;
      limit_ = bytes;
      while (idle_bytes_ > limit_) old.push_back(pop());
    }
    for (Block* const block : old) delete block;
    return before;
  }

  bool keeps() const { return limit_ > 0; }

 private:
  // The one that has been idle longest.
  Block* pop() {
    Block* const first = idle_.front();
    idle_.erase(idle_.begin());
    idle_bytes_ -= first->bytes;
    return first;
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;  // in the order in which they were freed
  size_t idle_bytes_ = 0;
  std::atomic<size_t> limit_{kDefaultBytes};
  uint64_t taken_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

// When the library is loaded: a process that is forked while another thread makes the first call would wait for its end.
[[maybe_unused]] Pool* const made = &pool();

}  // namespace

Block* take_block(size_t bytes) {
  if (bytes < kLeastBytes || !pool().keeps()) return nullptr;
  if (Block* const kept = pool().take(bytes)) return kept;
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  return new Block{Tensor(allocated(1, &size, &stride, aoti_torch_dtype_uint8(), cpu_device(), 0)), bytes, 0};
}

void* data_of(const Block* block) { return block->memory.mutable_data_ptr(); }

void give_back(Block* block) { pool().put(block); }

int64_t keep_memory(int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "bytes must be 0 or more, got ", bytes);
  return static_cast<int64_t>(pool().limit(static_cast<size_t>(bytes)));
}

}  // namespace aefast::cpu
