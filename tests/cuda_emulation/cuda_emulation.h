// Runs CUDA C++ kernels on the CPU, for tests.
//
// A source that launches through AEFAST_LAUNCH (kernels/cuda/launch.h) compiles against this header as plain
// C++. Every CUDA thread is a fiber of its own. A fiber runs until it reaches a barrier; then another warp,
// drawn at random, goes on, its lanes in random order too. Blocks run one after another in random order. A
// kernel that lacks a barrier therefore reads what was not written yet, differently for each seed. A barrier
// that only some threads reach raises std::runtime_error.
//
// Covered: threadIdx, blockIdx, blockDim, gridDim in one dimension, __shared__, atomicAdd, __syncthreads, __syncwarp
// and __shfl_*_sync of full warps (or of all the threads of a partial last one), sums and a matrix product of full warps.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy for all blocks, since blocks do not run at the same time; thread-local so that it can be found.
#define __shared__ static thread_local

using cudaStream_t = void*;

namespace aefast::emulation {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Shared memory is NaN when a block starts. The shared variables are a library's only thread-local ones, that
// is, its whole thread-local segment.
inline thread_local char thread_local_anchor;

inline void poison_shared_memory() {
  const auto poison = [](dl_phdr_info* module, size_t, void* anchor) {
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      if (module->dlpi_phdr[i].p_type != PT_TLS || module->dlpi_tls_data == nullptr) continue;
      char* const begin = static_cast<char*>(module->dlpi_tls_data);
      const size_t bytes = module->dlpi_phdr[i].p_memsz;
      if (anchor < begin || anchor >= begin + bytes) continue;
      std::memset(begin, 0xff, bytes);
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(poison, &thread_local_anchor) == 0) throw std::runtime_error("shared memory not found");
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { runnable, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  // Shuffles alternate between two slots: a lane that is ahead never overwrites what others still read.
  unsigned shuffles, products;
};

struct Warp {
  uint64_t slots[2][kWarpSize];
  float factors[2][kWarpSize][6];
};

class Machine {
 public:
  Index thread, block, block_size, grid_size;

  void seed(uint64_t value) { random_.seed(value); }

  void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    if (blocks == 0 || threads == 0 || threads > 1024) throw std::runtime_error("invalid launch configuration");
    kernel_ = &kernel;
    block_size.x = threads;
    grid_size.x = blocks;
    grid_size.y = grid_size.z = block_size.y = block_size.z = 1;
    while (fibers_.size() < threads) {
      fibers_.emplace_back();
      fibers_.back().stack.reset(new char[kStackBytes]);
    }
    warps_.resize((threads + kWarpSize - 1) / kWarpSize);
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    shuffle(order);
    for (unsigned index : order) {
      block.x = index;
      poison_shared_memory();
      run_block();
    }
  }

  // A fiber waits here for all threads of its block.
  void block_barrier() { wait(State::at_block_barrier); }

  // A fiber waits here for all threads of its warp.
  void warp_barrier(unsigned mask) {
    if (mask != full_mask(thread.x / kWarpSize)) throw std::runtime_error("only full warps are emulated");
    wait(State::at_warp_barrier);
  }

  // The value that lane `source` passes to the same call.
  template <typename T>
  T exchange(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp& warp = warps_[thread.x / kWarpSize];
    const unsigned slot = fibers_[thread.x].shuffles++ % 2;
    std::memcpy(&warp.slots[slot][thread.x % kWarpSize], &value, sizeof(T));
    warp_barrier(mask);
    T received;
    std::memcpy(&received, &warp.slots[slot][source % kWarpSize], sizeof(T));
    return received;
  }

  // mma.sync.m16n8k8 of TF32 numbers, whose last 13 bits are not read.
  void add_product(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
    const unsigned lane = thread.x % kWarpSize;
    auto& factors = warps_[thread.x / kWarpSize].factors[fibers_[thread.x].products++ % 2];
    for (int i = 0; i < 6; ++i) {
      uint32_t bits;
      std::memcpy(&bits, i < 4 ? &a[i] : &b[i - 4], sizeof(bits));
      bits &= 0xffffe000u;
      std::memcpy(&factors[lane][i], &bits, sizeof(bits));
    }
    warp_barrier(0xffffffffu);
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned k = 0; k < 8; ++k) {
        sum[i] += factors[lane / 4 * 4 + k % 4][i / 2 + k / 4 * 2] * factors[(lane % 4 * 2 + i % 2) * 4 + k % 4][4 + k / 4];
      }
    }
  }

 private:
  static void enter(unsigned high, unsigned low) {
    Machine* machine = reinterpret_cast<Machine*>(static_cast<uintptr_t>(high) << 32 | low);
    try {
      (*machine->kernel_)();
    } catch (...) {
      machine->error_ = std::current_exception();  // may not cross into another stack
    }
    machine->wait(State::done);
  }

  void run_block() {
    error_ = nullptr;
    for (unsigned t = 0; t < block_size.x; ++t) {
      Fiber& fiber = fibers_[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      fiber.state = State::runnable;
      fiber.shuffles = fiber.products = 0;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Machine::enter), 2, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self));
    }
    while (!all_are(State::done, 0, block_size.x)) {
      std::vector<unsigned> ready;
      for (unsigned warp = 0; warp < warps_.size(); ++warp) {
        release(State::at_warp_barrier, warp * kWarpSize, end_of(warp));
        if (any_is(State::runnable, warp * kWarpSize, end_of(warp))) ready.push_back(warp);
      }
      if (ready.empty()) {
        release(State::at_block_barrier, 0, block_size.x);
        if (!any_is(State::runnable, 0, block_size.x)) {
          throw std::runtime_error("deadlock: some threads of a block or warp never reach the others' barrier");
        }
        continue;
      }
      run_warp(ready[random_() % ready.size()]);
    }
  }

  // Every runnable lane, in random order, up to its next barrier.
  void run_warp(unsigned warp) {
    std::vector<unsigned> lanes(end_of(warp) - warp * kWarpSize);
    std::iota(lanes.begin(), lanes.end(), warp * kWarpSize);
    shuffle(lanes);
    for (unsigned t : lanes) {
      if (fibers_[t].state != State::runnable) continue;
      thread.x = t;
      swapcontext(&scheduler_, &fibers_[t].context);
      if (error_) std::rethrow_exception(error_);
    }
  }

  void wait(State state) {
    Fiber& fiber = fibers_[thread.x];
    const unsigned self = thread.x;
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler_);
    thread.x = self;
  }

  // Opens a barrier that all threads of the range that are still alive have reached.
  void release(State barrier, unsigned begin, unsigned end) {
    for (unsigned t = begin; t < end; ++t) {
      if (fibers_[t].state != barrier && fibers_[t].state != State::done) return;
    }
    for (unsigned t = begin; t < end; ++t) {
      if (fibers_[t].state == barrier) fibers_[t].state = State::runnable;
    }
  }

  bool all_are(State state, unsigned begin, unsigned end) const {
    for (unsigned t = begin; t < end; ++t) {
      if (fibers_[t].state != state) return false;
    }
    return true;
  }

  bool any_is(State state, unsigned begin, unsigned end) const {
    for (unsigned t = begin; t < end; ++t) {
      if (fibers_[t].state == state) return true;
    }
    return false;
  }

  unsigned end_of(unsigned warp) const { return std::min(block_size.x, (warp + 1) * kWarpSize); }

  unsigned full_mask(unsigned warp) const {
    const unsigned lanes = end_of(warp) - warp * kWarpSize;
    return lanes == kWarpSize ? 0xffffffffu : (1u << lanes) - 1;
  }

  // std::shuffle draws differently in different standard libraries.
  void shuffle(std::vector<unsigned>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_() % i]);
  }

  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  std::exception_ptr error_;
};

inline Machine machine;

inline void launch(int64_t blocks, int64_t threads, const std::function<void()>& kernel) {
  if (blocks > INT32_MAX) throw std::runtime_error("invalid launch configuration");
  machine.run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), kernel);
}

}  // namespace aefast::emulation

#define threadIdx (aefast::emulation::machine.thread)
#define blockIdx (aefast::emulation::machine.block)
#define blockDim (aefast::emulation::machine.block_size)
#define gridDim (aefast::emulation::machine.grid_size)

inline void __syncthreads() { aefast::emulation::machine.block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { aefast::emulation::machine.warp_barrier(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return aefast::emulation::machine.exchange(mask, value, static_cast<unsigned>(source));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
}

// Past the warp's ends a lane receives its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32, source = lane + delta;
  return __shfl_sync(mask, value, static_cast<int>(source < 32 ? source : lane));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane >= delta ? lane - delta : lane));
}

inline int __reduce_add_sync(unsigned mask, int value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(mask, value, lanes);
  return value;
}
// Fibers change at barriers alone, so that nothing comes between.
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
