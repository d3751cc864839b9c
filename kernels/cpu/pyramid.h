// Losses over the levels of pyramids of residuals, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "loss.h"
#include "scalar.h"

namespace aefast::cpu {

enum class PyramidKind { average, gaussian, laplacian };

constexpr int64_t kDownTaps = 5, kUpTaps = 3;

// How a level's samples along one axis make those of the next level, and the next level's these. Sample j of the coarse
// one is made of 2 j - 2, ..., 2 j + 2 of the fine one, and sample i of the fine one of i / 2 - 1, ..., i / 2 + 1 of the
// coarse one; weights of samples that do not exist are 0. Those beside the ends are told one by one.
struct Down {
  double first[2][kDownTaps], last[2][kDownTaps], middle[kDownTaps];
};
struct Up {
  double first[4][kUpTaps], last[4][kUpTaps], even[kUpTaps], odd[kUpTaps];
};
struct Axis {
  int64_t fine, coarse;
  Down reduce, adjoint_of_expand;
  Up expand, adjoint_of_reduce;
};

struct Pyramid {
  PyramidKind kind;
  loss::Spec penalty;
  const double* factors;  // one a level
  int64_t levels;
  // From each level to the next, unless the pyramid is an average one.
  const Axis* rows;
  const Axis* columns;
};

// (B, C, H, W), all contiguous or all with their channels side by side.
struct Residuals {
  const void* input;
  const void* target;
  void* gradient;  // or null
  int64_t batch, channels, height, width;
  bool is_channels_last;
};

// What is worked on at a time: at most so many channels, rows and columns of an image. Tiles are counted along the rows,
// then over the rows, over the channels and over the images. No pyramid of a tile needs anything of another tile.
struct Tiling {
  int64_t channels, rows, columns;
  int64_t groups, down, across;  // tiles of an image in each direction

  AEFAST_HD int64_t of_image() const { return groups * down * across; }
};

// Elements of levels of at most that many rows and columns, without the first of them; each begins with a cache line.
AEFAST_HD int64_t aligned(int64_t elements) { return (elements + 15) / 16 * 16; }
AEFAST_HD int64_t coarse_size(PyramidKind kind, int64_t size) {
  return kind == PyramidKind::average ? size / 2 : (size + 1) / 2;
}

// A pyramid has fewer, since each level has at most half of the side of the one before, or half of it and one.
constexpr int64_t kMostLevels = 64;

// Rows are finished so many elements at a time, which stay in the first-level cache.
constexpr int64_t kFinished = 1024;

// Accumulators that a tile is worked on in: its residuals, a channel after the other, the further levels of one, rows
// of a level on the way to another, a row between its vertical and its horizontal taps, and a row of all channels.
struct Workspace {
  int64_t plane, levels, finished, row, interleaved;

  AEFAST_HD Workspace(PyramidKind kind, int64_t level_count, const Tiling& tiling)
      : plane(aligned(tiling.rows * tiling.columns)),
        levels(0),
        finished(aligned(tiling.columns > kFinished ? tiling.columns : kFinished)),
        row(aligned(tiling.columns)),
        interleaved(aligned(tiling.columns * tiling.channels)) {
    int64_t rows = tiling.rows, columns = tiling.columns;
    for (int64_t level = 1; level < level_count; ++level) {
      rows = coarse_size(kind, rows);
      columns = coarse_size(kind, columns);
      levels += aligned(rows * columns);
    }
  }
  AEFAST_HD int64_t size(const Tiling& tiling) const {
    return tiling.channels * plane + levels + finished + row + interleaved;
  }
};

struct PyramidKernels {
  // The sums of tiles `first` to first + count - 1, each over all levels, and what they are of the gradient. The
  // workspace begins with a cache line.
  void (*add)(Scalar scalar, const Pyramid& pyramid, const Residuals& residuals, const Tiling& tiling, void* workspace,
              double* sums, int64_t first, int64_t count);
};

const PyramidKernels& pyramid_kernels();

}  // namespace aefast::cpu
