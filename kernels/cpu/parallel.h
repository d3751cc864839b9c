// How work is shared by the threads that torch has.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

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

// `count` elements of the index-th of several arrays, from `first` on.
struct Piece {
  size_t index;
  int64_t first, count;
};

// The tasks that arrays of so many elements make, which do not depend on the threads that share them.
inline std::vector<Piece> pieces_of(const std::vector<int64_t>& sizes) {
  std::vector<Piece> pieces;
  for (size_t index = 0; index < sizes.size(); ++index)
    for (int64_t first = 0; first < sizes[index]; first += kElementsOfTask)
      pieces.push_back({index, first, std::min(kElementsOfTask, sizes[index] - first)});
  return pieces;
}

// body(task, piece) for each.
template <typename Body>
void for_pieces(const std::vector<Piece>& pieces, const Body& body) {
  int64_t elements = 0;
  for (const Piece& one : pieces) elements += one.count;
  const auto of_task = [&](int64_t task) { body(task, pieces[task]); };
  const int64_t tasks = static_cast<int64_t>(pieces.size());
  if (elements <= kElementsOfTask)
    for (int64_t task = 0; task < tasks; ++task) of_task(task);
  else
    for_each(tasks, of_task);
}

}  // namespace aefast::cpu
