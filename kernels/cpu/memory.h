// Memory for large tensors, kept for the next ones.
//
// The C library gives large blocks back to the system when they are freed, and gets them again page by page, each page
// an interrupt that takes as long as it takes to write it several times. In a training step the gradients alone are
// freed and allocated anew each time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aefast::cpu {

struct Block;

// A block of at least so many bytes, aligned to 64; null where none is kept or so few are asked for, which the C library
// keeps itself.
Block* take_block(size_t bytes);
void* data_of(const Block* block);
// From any thread, and while the program ends.
void give_back(Block* block);

// How many bytes may lie idle, at first those of AEFAST_CPU_CACHE_MB; returns what held before. What is above it is
// freed.
int64_t keep_memory(int64_t bytes);

}  // namespace aefast::cpu
