#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "loss_schemas.h"
#include "points.h"
#include "pyramid.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

constexpr double kTaps[kDownTaps] = {1.0 / 16.0, 4.0 / 16.0, 6.0 / 16.0, 4.0 / 16.0, 1.0 / 16.0};

// The sample that stands for `index` beside the ends of `size` samples.
int64_t reflected(int64_t index, int64_t size) {
  return index < 0 ? -index : index >= size ? 2 * (size - 1) - index : index;
}

// What sample i of the fine axis counts in sample j of the coarse one: every second sample of the blurred ones.
double reduced(int64_t i, int64_t j, int64_t fine) {
  double weight = 0.0;
  for (int64_t tap = 0; tap < kDownTaps; ++tap)
    if (reflected(2 * j - 2 + tap, fine) == i) weight += kTaps[tap];
  return weight;
}

// What sample j of the coarse axis counts in sample i of the fine one: with zeros between its samples it is blurred, and
// doubled.
double expanded(int64_t i, int64_t j, int64_t fine) {
  double weight = 0.0;
  for (int64_t tap = 0; tap < kDownTaps; ++tap)
    if (reflected(i - 2 + tap, fine) == 2 * j) weight += 2.0 * kTaps[tap];
  return weight;
}

using Weight = double (*)(int64_t i, int64_t j, int64_t fine);

void set_taps(double (&taps)[kDownTaps], Weight weight, int64_t j, int64_t fine) {
  for (int64_t tap = 0; tap < kDownTaps; ++tap) {
    const int64_t i = 2 * j - 2 + tap;
    taps[tap] = i >= 0 && i < fine ? weight(i, j, fine) : 0.0;
  }
}

void set_taps(double (&taps)[kUpTaps], Weight weight, int64_t i, int64_t fine) {
  for (int64_t tap = 0; tap < kUpTaps; ++tap) {
    const int64_t j = i / 2 - 1 + tap;
    taps[tap] = j >= 0 && j < (fine + 1) / 2 ? weight(i, j, fine) : 0.0;
  }
}

// An axis so long that its samples 8 and 9, and the coarse sample 4, are far from the ends.
constexpr int64_t kLong = 32;

Down down_of(Weight weight, int64_t fine) {
  const int64_t coarse = (fine + 1) / 2;
  Down down;
  for (int64_t end = 0; end < 2; ++end) {
    set_taps(down.first[end], weight, end, fine);
    set_taps(down.last[end], weight, coarse - 2 + end, fine);
  }
  set_taps(down.middle, weight, 4, kLong);
  return down;
}

Up up_of(Weight weight, int64_t fine) {
  Up up;
  for (int64_t end = 0; end < 4; ++end) {
    set_taps(up.first[end], weight, end, fine);
    // Of three samples the first is no last one.
    set_taps(up.last[end], weight, std::max<int64_t>(0, fine - 4 + end), fine);
  }
  set_taps(up.even, weight, 8, kLong);
  set_taps(up.odd, weight, 9, kLong);
  return up;
}

// From each level to the next.
std::vector<Axis> axes_of(int64_t size, int64_t levels) {
  std::vector<Axis> axes;
  for (int64_t level = 1; level < levels; ++level) {
    const int64_t coarse = (size + 1) / 2;
    axes.push_back({size, coarse, down_of(reduced, size), down_of(expanded, size), up_of(expanded, size),
                    up_of(reduced, size)});
    size = coarse;
  }
  return axes;
}

PyramidKind kind_of(const std::string& name) {
  const char* const names[] = {"average", "gaussian", "laplacian"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "unknown pyramid ", name);
  return static_cast<PyramidKind>(found - std::begin(names));
}

loss::Spec penalty_of(const std::string& name, double parameter) {
  if (name == "charbonnier") return {loss::Kind::charbonnier, parameter};
  STD_TORCH_CHECK(name == "power", "unknown penalty ", name);
  return {parameter == 1.0 ? loss::Kind::l1 : parameter == 2.0 ? loss::Kind::mse : loss::Kind::lp, parameter};
}

void check_side(PyramidKind kind, int64_t size, int64_t levels) {
  STD_TORCH_CHECK(size >= 1, "input must have sides of at least 1");
  for (int64_t level = 1; level < levels; ++level) {
    STD_TORCH_CHECK(size >= (kind == PyramidKind::average ? 2 : 3), "too many levels for the size of the images");
    size = coarse_size(kind, size);
  }
}

// Channels that lie side by side are read together, as many as a cache line has, half precision apart.
constexpr int64_t kTogether = 16;
// An average pyramid is made of so many elements at a time: with the levels and the gradient they stay in the first-level
// cache. Up to so many, which stay in the second one, rows remain whole.
constexpr int64_t kElementsOfTile = 2048, kMostOfTile = 8192;

Tiling tiling_of(const Residuals& residuals, const Pyramid& pyramid) {
  const int64_t channels = residuals.is_channels_last ? std::min(residuals.channels, kTogether) : 1;
  int64_t rows = residuals.height, columns = residuals.width;
  if (pyramid.kind == PyramidKind::average) {
    // Squares that make one element of the coarsest level, and what is left at the ends, are independent.
    const int64_t square = int64_t{1} << (pyramid.levels - 1);
    const auto fitting = [&](int64_t elements) { return std::max<int64_t>(1, elements / square) * square; };
    columns = std::min(columns, fitting(kMostOfTile / square));
    rows = std::min(rows, fitting(kElementsOfTile / columns));
  }
  const auto tiles = [](int64_t size, int64_t of_tile) { return (size + of_tile - 1) / of_tile; };
  return {channels, rows, columns, tiles(residuals.channels, channels), tiles(residuals.height, rows),
          tiles(residuals.width, columns)};
}

// Whether elements of the images lie one after another, those of one pixel first.
bool has_channels_last(const Tensor& images) {
  return images.size(1) > 1 && images.size(2) * images.size(3) > 1 && images.stride(1) == 1;
}

void check_images(const Tensor& images) {
  STD_TORCH_CHECK(images.dim() == 4, "input must be (B, C, H, W)");
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t pixel = has_channels_last(images) ? channels : 1, plane = has_channels_last(images) ? 1 : height * width;
  const int64_t strides[] = {channels * height * width, plane, width * pixel, pixel};
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(images.numel() == 0 || images.size(dim) == 1 || images.stride(dim) == strides[dim],
                    "input must be contiguous, or have its channels last");
}

std::tuple<Tensor, Tensor> pyramid_loss(Tensor input, Tensor target, String pyramid_name, String penalty,
                                        double parameter, std::vector<double> factors, bool needs_gradient) {
  check_images(input);
  STD_TORCH_CHECK(target.scalar_type() == input.scalar_type(), "target must have the dtype of input");
  check_layout("target", target, input);
  const Scalar scalar = scalar_of(input);
  const int64_t batch = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t levels = static_cast<int64_t>(factors.size());
  STD_TORCH_CHECK(levels >= 1, "there must be a factor for each level");
  const PyramidKind kind = kind_of(pyramid_name);
  check_side(kind, height, levels);
  check_side(kind, width, levels);
  std::vector<Axis> rows, columns;
  if (kind != PyramidKind::average) {
    rows = axes_of(height, levels);
    columns = axes_of(width, levels);
  }
  const Tensor sums = new_sums(input, batch);
  const Tensor gradient = needs_gradient ? new_in_layout(input, scalar) : new_vector(input, 0);

  const Pyramid pyramid{kind, penalty_of(penalty, parameter), factors.data(), levels, rows.data(), columns.data()};
  const Residuals residuals{input.const_data_ptr(), target.const_data_ptr(),
                            needs_gradient ? gradient.mutable_data_ptr() : nullptr,
                            batch, channels, height, width, has_channels_last(input)};
  const Tiling tiling = tiling_of(residuals, pyramid);
  const int64_t tiles = batch * tiling.of_image();
  std::vector<double> found(tiles);
  const int64_t bytes =
      Workspace(kind, levels, tiling).size(tiling) * size_of(accumulator_of(scalar));
  for_tasks(tiles, tiling.channels * tiling.rows * tiling.columns, 1, [&](int64_t first, int64_t count) {
    const Buffer workspace(bytes);
    pyramid_kernels().add(scalar, pyramid, residuals, tiling, workspace.get(), found.data(), first, count);
  });
  for (int64_t image = 0; image < batch; ++image) {
    double sum = 0.0;
    for (int64_t tile = 0; tile < tiling.of_image(); ++tile) sum += found[image * tiling.of_image() + tile];
    if (scalar == Scalar::float64)
      static_cast<double*>(sums.mutable_data_ptr())[image] = sum;
    else
      static_cast<float*>(sums.mutable_data_ptr())[image] = static_cast<float>(sum);
  }
  return {sums, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : loss::kPyramidLossSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) { m.impl("pyramid_loss", TORCH_BOX(&pyramid_loss)); }

}  // namespace aefast::cpu
