#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernel_terms.h"
#include "pairwise_arguments.h"
#include "pairwise_schemas.h"
#include "points.h"
#include "string_argument.h"

namespace aefast::cpu {
namespace {

using pairwise::Function;
using pairwise::Kind;

// Players of a team in a tournament of many. Blocks of two such teams fit into half a megabyte.
constexpr int64_t kMostOfTeam = 8;

// The sum of body(i, j) over all pairs i <= j of `players`, in an order that threads do not change. No two calls at a time
// have a player in common, and the calls that have one come in a fixed order.
//
// Players make up teams. On day 0 a team plays against itself. Then the last team stays where it is while the others move
// on in a circle, day by day, and each meets whom it is opposite, nobody if their number is odd. A match takes as many
// rounds as a team has players, and a player has a game in each.
template <typename Body>
double tournament(int64_t players, const Body& body) {
  int64_t size = 1;
  while (size < kMostOfTeam && players >= 2 * kMostOfTeam * size) size *= 2;
  const int64_t teams = (players + size - 1) / size, last = teams - 1 + teams % 2, matches_of_day = (last + 1) / 2;
  const int64_t of_match = size * size, of_day_0 = teams * of_match, of_day = matches_of_day * of_match;
  const int64_t games = of_day_0 + last * of_day;
  std::vector<double> results(games);
  std::vector<std::atomic<int32_t>> played((last + 1) * size);
  for (auto& rounds : played) rounds.store(0, std::memory_order_relaxed);

  // Who meets at a table when the one numbered `stays` has stayed there while the others moved on `turns` times.
  const auto opponents = [](int64_t stays, int64_t turns, int64_t table) {
    const int64_t one = table == 0 ? stays : (turns + table) % stays, other = (turns + stays - table) % stays;
    return std::pair(std::min(one, other), std::max(one, other));
  };
  const auto play = [&](int64_t day, int64_t match, int64_t round, int64_t table) {
    int64_t i, j;
    if (day > 0) {
      const auto [one, other] = opponents(last, day - 1, match);
      i = one * size + table;
      j = other * size + (table + round) % size;
    } else if (round == 0) {
      i = j = match * size + table;
    } else if (table < size / 2) {
      const auto [one, other] = opponents(size - 1, round - 1, table);
      i = match * size + one;
      j = match * size + other;
    } else {
      return;
    }
    const int32_t before = static_cast<int32_t>(day * size + round);
    for (const int64_t player : {i, j})
      while (player < players && played[player].load(std::memory_order_acquire) < before) std::this_thread::yield();
    const int64_t first = day == 0 ? 0 : of_day_0 + (day - 1) * of_day;
    // A game that fails is over too: others may wait for its players.
    const auto end = [&] {
      for (const int64_t player : {i, j}) played[player].store(before + 1, std::memory_order_release);
    };
    try {
      if (j < players) results[first + (match * size + round) * size + table] = body(i, j);
    } catch (...) {
      end();
      throw;
    }
    end();
  };

  const int64_t threads =
      std::min<int64_t>(static_cast<int64_t>(torch::stable::get_num_threads()), (players + 1) / 2);
  // A thread that plays a whole match finds two teams in its cache over and over. Where there are too few matches for all
  // threads they share them, round by round.
  const bool is_match_by_match = 2 * threads <= matches_of_day;
  const int64_t at_once = is_match_by_match ? of_match : 1;
  std::atomic<int64_t> next{0};
  // Games are begun in an order in which those that are waited for are under way.
  const auto work = [&] {
    for (int64_t game = at_once * next++; game < games; game = at_once * next++) {
      const int64_t day = game < of_day_0 ? 0 : 1 + (game - of_day_0) / of_day;
      const int64_t at = day == 0 ? game : (game - of_day_0) % of_day, matches = day == 0 ? teams : matches_of_day;
      if (is_match_by_match) {
        for (int64_t one = 0; one < of_match; ++one) play(day, at / of_match, one / size, one % size);
      } else {
        const int64_t table = at % (matches * size);
        play(day, table / size, at / (matches * size), table % size);
      }
    }
  };
  if (threads <= 1)
    work();
  else
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) work();
    });
  double total = 0.0;
  for (const double result : results) total += result;
  return total;
}

// --- points ----------------------------------------------------------------------------------------------------

// The sums of all points' coordinates.
std::vector<double> sums_of(const Points& x, const Points& y) {
  const int64_t of_x = blocks_of(x.count), blocks = of_x + blocks_of(y.count), dimensions = x.dimensions;
  std::vector<double> parts(blocks * dimensions), sums(dimensions);
  for_each(blocks, [&](int64_t block) {
    const Points& points = block < of_x ? x : y;
    const int64_t first = (block < of_x ? block : block - of_x) * kPoints;
    pairwise_kernels().add_coordinates(points, first, std::min(kPoints, points.count - first),
                                       parts.data() + block * dimensions);
  });
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < dimensions; ++k) sums[k] += parts[block * dimensions + k];
  return sums;
}

bool are_finite(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); });
}

// What is subtracted from all points. It is the mean of both samples where products are summed, which of points far from
// 0 would lose their digits; differences of the points as they are lose none.
std::vector<double> centre_of(const Points& x, const Points& y, Kind kind) {
  if (pairwise::sums_differences(kind)) return std::vector<double>(x.dimensions);
  std::vector<double> mean = sums_of(x, y);
  for (double& one : mean) one /= static_cast<double>(std::max<int64_t>(1, x.count + y.count));
  return mean;
}

// Dimensions from which distances are found from products.
constexpr int64_t kLeastOfProducts = 16;

// Distances from products, and gradients Σ w x - y Σ w, err by some 10⁻⁷ of the points' squared norms, whatever the
// distances are, and a kernel by as much as that times its slope. Where this product is larger at the norm of some point,
// differences are summed.
constexpr double kMostOfProducts = 32.0;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Two samples in blocks, none of which has points of both.
class Blocks {
 public:
  // `steepness` is the largest slope of the kernel by the squared distance.
  Blocks(const Points& x, const Points& y, const std::vector<double>& centre, Kind kind, double steepness)
      : Blocks(x, y, centre,
               x.scalar != Scalar::float64 && x.dimensions >= kLeastOfProducts && !pairwise::sums_differences(kind),
               pairwise::sums_differences(kind)) {
    const double norm = is_double_ ? largest_norm<double>() : largest_norm<float>();
    // Norms of large numbers overflow.
    is_finite_ = std::isfinite(norm) || are_finite(sums_of(x, y));
    // A norm that is not finite is too large.
    if (is_double_ || sums_differences_ || norm * steepness <= kMostOfProducts) return;
    sums_differences_ = true;
    has_products_ = false;
    pack(x, y, origin());
  }

  // As others are, which have the same centre.
  Blocks(const Points& x, const Points& y, const std::vector<double>& centre, const Blocks& others)
      : Blocks(x, y, others.sums_differences_ ? others.origin() : centre, others.has_products_,
               others.sums_differences_) {}

  // With distances from differences of the points as they are: each depends on its two points alone.
  Blocks(const Points& x, const Points& y)
      : Blocks(x, y, std::vector<double>(x.dimensions), false, true) {}

  int64_t count() const { return of_x_ + blocks_of(counts_[1]); }
  int64_t dimensions() const { return dimensions_; }
  bool is_double() const { return is_double_; }
  int64_t element_size() const { return is_double_ ? 8 : 4; }
  int64_t row_bytes() const { return row_bytes_; }

  // Which of the samples a block is of, and where in it its points are.
  int sample(int64_t block) const { return block < of_x_ ? 0 : 1; }
  int64_t first(int64_t block) const { return (sample(block) ? block - of_x_ : block) * kPoints; }
  int64_t points(int64_t block) const { return std::min(kPoints, counts_[sample(block)] - first(block)); }

  char* rows(int64_t block) const { return rows_.get() + block * row_bytes_; }
  char* columns(int64_t block) const { return columns_.get() + block * column_bytes_; }
  char* norms(int64_t block) const { return columns(block) + kPoints * dimensions_ * element_size(); }
  // How distances and gradients are found.
  bool has_products() const { return has_products_; }
  bool sums_differences() const { return sums_differences_; }
  // Whether all points are finite. Kernels of infinite distances are 0.
  bool is_finite() const { return is_finite_; }

 private:
  Blocks(const Points& x, const Points& y, const std::vector<double>& centre, bool has_products, bool sums_differences)
      : of_x_(blocks_of(x.count)),
        counts_{x.count, y.count},
        dimensions_(x.dimensions),
        is_double_(x.scalar == Scalar::float64),
        row_bytes_(kPoints * padded(dimensions_, element_size()) * element_size()),
        column_bytes_(kPoints * (dimensions_ + 1) * element_size()),
        has_products_(has_products),
        sums_differences_(sums_differences),
        rows_(size_of_all(row_bytes_)),
        columns_(size_of_all(column_bytes_)) {
    pack(x, y, centre);
  }

  // What is subtracted where differences are summed, to which the points as they are lose no digits.
  std::vector<double> origin() const { return std::vector<double>(dimensions_); }

  int64_t size_of_all(int64_t bytes) const { return count() * bytes; }

  void pack(const Points& x, const Points& y, const std::vector<double>& centre) {
    for_each(count(), [&](int64_t block) {
      pairwise_kernels().pack(is_double_, has_products_, sample(block) ? y : x, centre.data(), first(block),
                              points(block), rows(block), columns(block));
    });
  }

  // NaN if there is one.
  template <typename A>
  double largest_norm() const {
    A largest = 0;
    for (int64_t block = 0; block < count(); ++block) {
      const A* const norms = reinterpret_cast<const A*>(this->norms(block));
      for (int64_t point = 0; point < points(block); ++point)
        if (!(norms[point] <= largest)) largest = norms[point];
    }
    return largest;
  }

  int64_t of_x_;
  std::array<int64_t, 2> counts_;
  int64_t dimensions_;
  bool is_double_;
  int64_t row_bytes_, column_bytes_;
  bool has_products_, sums_differences_, is_finite_ = true;
  Buffer rows_, columns_;
};

// Gradients of the points of a Blocks whose samples want one, in rows as the points are.
class Gradients {
 public:
  Gradients(const Blocks& blocks, int64_t needs)
      : blocks_(blocks), needs_(needs), rows_(needs ? blocks.count() * blocks.row_bytes() : 0) {
    if (needs) for_each(blocks.count(), [&](int64_t block) { std::memset(at(block), 0, blocks.row_bytes()); });
  }

  bool is_wanted(int64_t block) const { return needs_ >> blocks_.sample(block) & 1; }
  void* of(int64_t block) const { return is_wanted(block) ? at(block) : nullptr; }

  // Those of x and of y, of no rows if they are not wanted.
  std::tuple<Tensor, Tensor> tensors(const Tensor& x, const Tensor& y) const {
    const std::array<Tensor, 2> out = {of_sample(x, 0), of_sample(y, 1)};
    const int64_t size = blocks_.element_size(), dimensions = blocks_.dimensions();
    for_each(blocks_.count(), [&](int64_t block) {
      if (!is_wanted(block)) return;
      char* const to = static_cast<char*>(out[blocks_.sample(block)].mutable_data_ptr()) +
                       blocks_.first(block) * dimensions * size;
      for (int64_t point = 0; point < blocks_.points(block); ++point)
        std::memcpy(to + point * dimensions * size, at(block) + point * padded(dimensions, size) * size,
                    dimensions * size);
    });
    return {out[0], out[1]};
  }

 private:
  char* at(int64_t block) const { return rows_.get() + block * blocks_.row_bytes(); }
  Tensor of_sample(const Tensor& like, int sample) const {
    return new_accumulators(like, needs_ >> sample & 1 ? like.size(0) : 0, like.size(1));
  }

  const Blocks& blocks_;
  int64_t needs_;
  Buffer rows_;
};

// --- kernel functions --------------------------------------------------------------------------------------------

// A kernel function, with slopes for gradients of `factor` times its sum.
template <typename A>
class KernelFunction {
 public:
  KernelFunction(Kind kind, const std::vector<double>& rates, double alpha, double unit, double factor) {
    const pairwise::Terms terms = pairwise::terms_of<A>(kind, rates, alpha, rates.size());
    for (const double given : terms.rates) {
      const double rate = given / (pairwise::is_of_root(kind) ? std::sqrt(unit) : unit);
      rate_.push_back(static_cast<A>(rate * terms.rate_factor));
      weight_.push_back(static_cast<A>(-2.0 * factor * terms.slope_factor * rate));
    }
    squarings_ = terms.squarings;
    function_ = {static_cast<int64_t>(rate_.size()), rate_.data(), weight_.data(), squarings_.data(),
                 static_cast<A>(alpha)};
  }
  KernelFunction(const KernelFunction&) = delete;

  const void* get() const { return &function_; }

 private:
  std::vector<A> rate_, weight_;
  std::vector<int32_t> squarings_;
  Function<A> function_;
};

// The largest slope by the squared distance, of kernels that have one there.
double steepness_of(Kind kind, const std::vector<double>& rates, double alpha, double unit) {
  const double largest = rates.empty() ? 0.0 : *std::max_element(rates.begin(), rates.end());
  return largest / unit * (kind == Kind::rational_quadratic ? alpha : 1.0);
}

template <typename A>
double unit_of(const OptionalTensor& unit) {
  return unit ? static_cast<double>(*static_cast<const A*>(unit->const_data_ptr())) : 1.0;
}

// The three sums of an MMD and what they count for: pairs of two points of x, of two of y, and of one of each.
template <typename A>
class Weighted {
 public:
  Weighted(const std::string& name, const std::vector<double>& rates, double alpha, const OptionalTensor& unit,
           const std::vector<double>& weights)
      : kind_(pairwise::kind_of(name, alpha)),
        steepness_(steepness_of(kind_, rates, alpha, unit_of<A>(unit))),
        weights_(weights),
        functions_{make(rates, alpha, unit, 2.0 * weights[0]),
                                                            make(rates, alpha, unit, 2.0 * weights[1]),
                                                            make(rates, alpha, unit, weights[2])} {}

  Kind kind() const { return kind_; }
  double steepness() const { return steepness_; }
  double weight(int sample_i, int sample_j) const { return weights_[index(sample_i, sample_j)]; }

  double sum(int sample_i, int sample_j, const Tile& tile) const {
    return pairwise_kernels().sum(std::is_same_v<A, double>, kind_, functions_[index(sample_i, sample_j)]->get(), tile);
  }

 private:
  static int index(int sample_i, int sample_j) { return sample_i == sample_j ? sample_i : 2; }

  std::unique_ptr<KernelFunction<A>> make(const std::vector<double>& rates, double alpha, const OptionalTensor& unit,
                                          double factor) {
    return std::make_unique<KernelFunction<A>>(kind_, rates, alpha, unit_of<A>(unit), factor);
  }

  Kind kind_;
  double steepness_;
  std::vector<double> weights_;
  std::array<std::unique_ptr<KernelFunction<A>>, 3> functions_;
};

Tile tile_of(const Blocks& of_i, int64_t i, void* gradient_i, const Blocks& of_j, int64_t j, void* gradient_j,
             int64_t excluded) {
  return {of_i.rows(i), of_i.norms(i), of_j.rows(j), of_j.columns(j), gradient_i, gradient_j, nullptr, of_i.points(i),
          of_j.points(j), of_i.dimensions(), excluded, of_i.has_products(), of_i.sums_differences()};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor> sum_of_all(const Tensor& x, const Tensor& y, const Weighted<A>& weighted,
                                              double constant, int64_t needs) {
  const Points of_x = points_of(x), of_y = points_of(y);
  const Blocks blocks(of_x, of_y, centre_of(of_x, of_y, weighted.kind()), weighted.kind(), weighted.steepness());
  const Gradients gradients(blocks, needs);
  const double total = (blocks.is_finite() ? constant : kNaN) + tournament(blocks.count(), [&](int64_t i, int64_t j) {
    const int sample_i = blocks.sample(i), sample_j = blocks.sample(j);
    const bool is_same = sample_i == sample_j;
    // In a tile of a block with itself each pair is met in both orders, in a tile of two in one.
    Tile tile = tile_of(blocks, i, gradients.of(i), blocks, j, i == j ? nullptr : gradients.of(j), i == j ? 0 : kPoints);
    const Buffer scratch(tile.gradient_j ? blocks.row_bytes() : 0);
    tile.scratch = scratch.get();
    return (is_same && i != j ? 2.0 : 1.0) * weighted.weight(sample_i, sample_j) *
           weighted.sum(sample_i, sample_j, tile);
  });
  const auto [x_gradient, y_gradient] = gradients.tensors(x, y);
  return {new_scalar(x, total), x_gradient, y_gradient};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor> sum_of_rows(const Tensor& x, const Tensor& y, const Tensor& all_x,
                                               const Tensor& all_y, std::array<int64_t, 2> firsts,
                                               const Weighted<A>& weighted, int64_t needs) {
  const Points of_x = points_of(all_x), of_y = points_of(all_y);
  const std::vector<double> centre = centre_of(of_x, of_y, weighted.kind());
  const Blocks columns(of_x, of_y, centre, weighted.kind(), weighted.steepness());
  const Blocks rows(points_of(x), points_of(y), centre, columns);
  const Gradients gradients(rows, needs);
  std::vector<double> parts(rows.count());
  for_each(rows.count(), [&](int64_t i) {
    const int sample_i = rows.sample(i);
    for (int64_t j = 0; j < columns.count(); ++j) {
      const int sample_j = columns.sample(j);
      const bool is_same = sample_i == sample_j;
      const int64_t excluded = is_same ? firsts[sample_i] + rows.first(i) - columns.first(j) : kPoints;
      const Tile tile = tile_of(rows, i, gradients.of(i), columns, j, nullptr, excluded);
      parts[i] += (is_same ? 1.0 : 0.5) * weighted.weight(sample_i, sample_j) * weighted.sum(sample_i, sample_j, tile);
    }
  });
  double total = columns.is_finite() ? 0.0 : kNaN;
  for (const double part : parts) total += part;
  const auto [x_gradient, y_gradient] = gradients.tensors(x, y);
  return {new_scalar(x, total), x_gradient, y_gradient};
}

std::tuple<Tensor, Tensor, Tensor> mmd(Tensor x, Tensor y, OptionalTensor unit, String kernel,
                                       std::vector<double> rates, double alpha, std::vector<double> weights,
                                       int64_t needs) {
  pairwise::check_points(x, y);
  pairwise::check_unit(unit, x);
  pairwise::check_weights(weights);
  const auto run = [&](auto zero) {
    const Weighted<decltype(zero)> weighted(kernel, rates, alpha, unit, weights);
    return sum_of_all(x, y, weighted, weights[3], needs);
  };
  return scalar_of(x) == Scalar::float64 ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor, Tensor> mmd_rows(Tensor x, Tensor y, Tensor all_x, Tensor all_y, int64_t first_x,
                                            int64_t first_y, OptionalTensor unit, String kernel,
                                            std::vector<double> rates, double alpha, std::vector<double> weights,
                                            int64_t needs) {
  for (const Tensor& points : {y, all_x, all_y}) pairwise::check_points(x, points);
  pairwise::check_unit(unit, x);
  pairwise::check_weights(weights);
  const auto run = [&](auto zero) {
    const Weighted<decltype(zero)> weighted(kernel, rates, alpha, unit, weights);
    return sum_of_rows(x, y, all_x, all_y, {first_x, first_y}, weighted, needs);
  };
  return scalar_of(x) == Scalar::float64 ? run(0.0) : run(0.0f);
}

Tensor kernel_values(Tensor x, Tensor y, OptionalTensor unit, String kernel, std::vector<double> rates, double alpha) {
  pairwise::check_points(x, y);
  pairwise::check_unit(unit, x);
  const Tensor out = new_accumulators(x, x.size(0), y.size(0));
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const Kind kind = pairwise::kind_of(kernel, alpha);
    const KernelFunction<A> function(kind, rates, alpha, unit_of<A>(unit), 0.0);
    const Points of_x = points_of(x), of_y = points_of(y);
    const Blocks blocks(of_x, of_y);
    const int64_t rows = blocks_of(x.size(0)), columns = blocks_of(y.size(0));
    for_each(rows * columns, [&](int64_t task) {
      const int64_t i = task / columns, j = rows + task % columns;
      A* const to = static_cast<A*>(out.mutable_data_ptr()) + blocks.first(i) * y.size(0) + blocks.first(j);
      pairwise_kernels().values(std::is_same_v<A, double>, kind, function.get(),
                                tile_of(blocks, i, nullptr, blocks, j, nullptr, kPoints), to, y.size(0));
    });
  };
  scalar_of(x) == Scalar::float64 ? run(0.0) : run(0.0f);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aefast_cpu, m) {
  for (const char* schema : pairwise::kMmdSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(aefast_cpu, CPU, m) {
  m.impl("mmd", TORCH_BOX(&mmd));
  m.impl("mmd_rows", TORCH_BOX(&mmd_rows));
  m.impl("kernel_values", TORCH_BOX(&kernel_values));
}

}  // namespace aefast::cpu
