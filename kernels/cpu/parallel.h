// How work is shared by the threads that torch has.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace aefast::cpu {

// body(task) for each.
template <typename Body>
void for_each(int64_t tasks, const Body& body) {
  if (tasks <= 1) {
    if (tasks == 1) body(0);
    return;
  }
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, tasks, (tasks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

// A task has at least so many elements: some 10 microseconds of work, which handing it to a thread is worth.
constexpr int64_t kElementsOfTask = 1 << 13;

// Rows of so many elements that make a task, a multiple of `unit`.
inline int64_t rows_of_task(int64_t elements, int64_t unit) {
  return std::max<int64_t>(1, kElementsOfTask / std::max<int64_t>(1, elements) / unit) * unit;
}

// body(first, count) over `size` rows of so many elements, a multiple of `unit` rows at a time. Tasks do not depend on
// the threads that share them.
template <typename Body>
void for_tasks(int64_t size, int64_t elements, int64_t unit, const Body& body) {
  const int64_t rows = rows_of_task(elements, unit);
  const int64_t tasks = (size + rows - 1) / rows;
  for_each(tasks, [&](int64_t task) { body(task * rows, std::min(rows, size - task * rows)); });
}

}  // namespace aefast::cpu
