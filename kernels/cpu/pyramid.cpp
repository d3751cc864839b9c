// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "pyramid.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

using loss::Kind;

// --- from a level to the next and back ---------------------------------------------------------------------------

// A level's rows, one after another.
template <typename A>
struct Level {
  A* data;
  int64_t rows, columns;

  A* row(int64_t index) const { return data + index * columns; }
  int64_t size() const { return rows * columns; }
};

constexpr int kInRegister = kFloats / kRegisters;
static_assert(kRegisters == 2, "a register's elements are made of the pairs of two");

// Sums of pairs of neighbours.
AEFAST_HD Register sums_of_pairs(Floats x) {
  Mask even, odd;
  for (int lane = 0; lane < kInRegister; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  return __builtin_shuffle(x.lanes[0], x.lanes[1], even) + __builtin_shuffle(x.lanes[0], x.lanes[1], odd);
}

// Pairs of equal neighbours.
AEFAST_HD Floats as_pairs(Register x) {
  Mask first, second;
  for (int lane = 0; lane < kInRegister; ++lane) {
    first[lane] = lane / 2;
    second[lane] = (kInRegister + lane) / 2;
  }
  Floats pairs;
  pairs.lanes[0] = __builtin_shuffle(x, first);
  pairs.lanes[1] = __builtin_shuffle(x, second);
  return pairs;
}

// Row `index` of the coarser level: means of squares of 2 by 2.
template <typename A>
void average_row(const Level<A>& fine, int64_t index, A* __restrict out) {
  const A* const __restrict upper = fine.row(2 * index);
  const A* const __restrict lower = upper + fine.columns;
  const int64_t columns = fine.columns / 2;
  int64_t col = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; col + kInRegister <= columns; col += kInRegister)
      write(out + col, 0.25f * sums_of_pairs(read_floats(upper + 2 * col) + read_floats(lower + 2 * col)));
  for (; col < columns; ++col)
    out[col] = A(0.25) * ((upper[2 * col] + lower[2 * col]) + (upper[2 * col + 1] + lower[2 * col + 1]));
}

// What row `index` of the finer level gets of the gradient of the coarser one; rows and columns left over get none.
template <typename A>
void spread_row(const Level<A>& coarse, int64_t index, int64_t columns, A* __restrict out) {
  if (index / 2 >= coarse.rows) {
    for (int64_t col = 0; col < columns; ++col) out[col] = A(0);
    return;
  }
  const A* const __restrict row = coarse.row(index / 2);
  const int64_t pairs = coarse.columns;
#pragma omp simd
  for (int64_t col = 0; col < pairs; ++col) {
    const A quarter = A(0.25) * row[col];
    out[2 * col] = quarter;
    out[2 * col + 1] = quarter;
  }
  if (columns % 2 == 1) out[columns - 1] = A(0);
}

AEFAST_HD const double* taps_at(const Down& down, int64_t index, int64_t coarse) {
  if (index < 2) return down.first[index];
  return index < coarse - 2 ? down.middle : down.last[index - (coarse - 2)];
}
AEFAST_HD const double* taps_at(const Up& up, int64_t index, int64_t fine) {
  if (index < 4) return up.first[index];
  if (index >= fine - 4) return up.last[index - (fine - 4)];
  return index % 2 == 0 ? up.even : up.odd;
}

// Row `index` of the coarser level, by taps along columns and then along the row. `between` has the fine row's size.
template <typename A>
void down_row(const Level<A>& fine, const Axis& rows, const Down& row_taps, const Axis& columns, const Down& taps,
              int64_t index, A* __restrict between, A* __restrict out) {
  const double* const vertical = taps_at(row_taps, index, rows.coarse);
  const A v0(vertical[0]), v1(vertical[1]), v2(vertical[2]), v3(vertical[3]), v4(vertical[4]);
  // In the place of rows that do not exist, whose taps are 0, stands the one in the middle.
  const auto row = [&](int64_t tap) __attribute__((always_inline)) {
    const int64_t at = 2 * index - 2 + tap;
    return fine.row(at >= 0 && at < fine.rows ? at : 2 * index);
  };
  const A *const r0 = row(0), *const r1 = row(1), *const r2 = row(2), *const r3 = row(3), *const r4 = row(4);
#pragma omp simd
  for (int64_t col = 0; col < fine.columns; ++col)
    between[col] = (v0 * r0[col] + v4 * r4[col]) + (v1 * r1[col] + v3 * r3[col]) + v2 * r2[col];

  const int64_t width = columns.coarse;
  const auto at_end = [&](int64_t col) __attribute__((always_inline)) {
    const double* const weights = taps_at(taps, col, width);
    A sum(0);
    for (int64_t tap = 0; tap < kDownTaps; ++tap) {
      const int64_t at = 2 * col - 2 + tap;
      if (at >= 0 && at < fine.columns) sum += A(weights[tap]) * between[at];
    }
    out[col] = sum;
  };
  const A outer(taps.middle[0]), inner(taps.middle[1]), middle(taps.middle[2]);
  const int64_t left = width < 2 ? width : 2, right = width - 2 > left ? width - 2 : left;
  for (int64_t col = 0; col < left; ++col) at_end(col);
#pragma omp simd
  for (int64_t col = left; col < right; ++col)
    out[col] = outer * (between[2 * col - 2] + between[2 * col + 2]) +
               inner * (between[2 * col - 1] + between[2 * col + 1]) + middle * between[2 * col];
  for (int64_t col = right; col < width; ++col) at_end(col);
}

// Row `index` of the finer level likewise; `between` has the coarse row's size.
template <typename A>
void up_row(const Level<A>& coarse, const Axis& rows, const Up& row_taps, const Axis& columns, const Up& taps,
            int64_t index, A* __restrict between, A* __restrict out) {
  const double* const vertical = taps_at(row_taps, index, rows.fine);
  const int64_t centre = index / 2;
  const A v0(vertical[0]), v1(vertical[1]), v2(vertical[2]);
  const A* const r0 = coarse.row(centre > 0 ? centre - 1 : centre);
  const A* const r1 = coarse.row(centre);
  const A* const r2 = coarse.row(centre + 1 < coarse.rows ? centre + 1 : centre);
  const int64_t width = coarse.columns;
  if (index % 2 == 1) {
#pragma omp simd
    for (int64_t col = 0; col < width; ++col) between[col] = v1 * r1[col] + v2 * r2[col];
  } else {
#pragma omp simd
    for (int64_t col = 0; col < width; ++col) between[col] = (v0 * r0[col] + v2 * r2[col]) + v1 * r1[col];
  }
  const auto at_end = [&](int64_t col) __attribute__((always_inline)) {
    const double* const weights = taps_at(taps, col, columns.fine);
    A sum(0);
    for (int64_t tap = 0; tap < kUpTaps; ++tap) {
      const int64_t at = col / 2 - 1 + tap;
      if (at >= 0 && at < width) sum += A(weights[tap]) * between[at];
    }
    out[col] = sum;
  };
  const int64_t fine = columns.fine, left = fine < 4 ? fine : 4;
  // Pairs of an even column and the odd one behind it, none of which is one of the last four.
  const int64_t pairs = fine / 2 - 2 > 2 ? fine / 2 - 2 : 2;
  const A outer(taps.even[0]), middle(taps.even[1]), odd(taps.odd[1]);
  for (int64_t col = 0; col < left; ++col) at_end(col);
#pragma omp simd
  for (int64_t col = 2; col < pairs; ++col) {
    out[2 * col] = outer * (between[col - 1] + between[col + 1]) + middle * between[col];
    out[2 * col + 1] = odd * (between[col] + between[col + 1]);
  }
  for (int64_t col = 2 * pairs < left ? left : 2 * pairs; col < fine; ++col) at_end(col);
}

// --- residuals and their penalties -------------------------------------------------------------------------------

// input - target.
template <typename T>
AEFAST_HD void subtract(const T* input, const T* target, int64_t count, Accumulator<T>* out) {
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    write_lanes(out + at, Lanes<T>(read_lanes(input + at, valid...) - read_lanes(target + at, valid...)), valid...);
  });
}

AEFAST_HD double sum_of(double value, int64_t) { return value; }
AEFAST_HD double sum_of(Floats values, int64_t count) {
  float lanes[kFloats];
  write_floats(lanes, values);
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < count; ++lane) sum += static_cast<double>(lanes[lane]);
  return sum;
}

// The sum of the penalties of `count` residuals. With kStore `factor` times their derivatives, and the addend where
// there is one, go to `out`, which may be the residuals.
template <Kind K, bool kStore, bool kAdd, typename A, typename T>
double penalise(const A* residuals, [[maybe_unused]] const A* addend, int64_t count, A parameter_value,
                [[maybe_unused]] A factor_value, [[maybe_unused]] T* out) {
  using C = Lanes<T>;
  const C parameter(parameter_value), factor(factor_value);
  C total(0);
  double rest = 0.0;
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    C slope;
    const C value = loss::penalty<K>(C(read_lanes(residuals + at, valid...)), parameter, slope);
    // Lanes beyond the valid ones have penalties, too.
    if constexpr (sizeof...(valid) == 0)
      total = total + value;
    else
      rest = sum_of(value, valid...);
    if constexpr (kStore) {
      slope = slope * factor;
      if constexpr (kAdd) slope = slope + read_lanes(addend + at, valid...);
      write_lanes(out + at, slope, valid...);
    }
  });
  return sum_of(total, kLanes<T>) + rest;
}

// The same for two rows, whose squares of 2 by 2 get a quarter of an element of `coarse` each, and whose penalties are
// added to `total`. `columns` is a multiple of kFloats.
template <Kind K, typename T>
void penalise_squares(const float* residuals, const float* coarse, int64_t columns, float parameter_value,
                      float factor_value, T* out, Floats& total) {
  const Floats parameter(parameter_value), factor(factor_value);
  for (int64_t col = 0; col < columns; col += kFloats) {
    const Floats quarter = as_pairs(0.25f * read<Register>(coarse + col / 2));
    for (int64_t at = col; at < 2 * columns; at += columns) {
      Floats slope;
      total = total + loss::penalty<K>(read_floats(residuals + at), parameter, slope);
      write_lanes(out + at, slope * factor + quarter);
    }
  }
}

// base + factor * values.
template <typename A, typename T>
void combine(const A* base, const A* values, A factor_value, int64_t count, T* out) {
  const Lanes<T> factor(factor_value);
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    write_lanes(out + at, Lanes<T>(read_lanes(base + at, valid...) + factor * read_lanes(values + at, valid...)),
                valid...);
  });
}

template <typename T>
void convert(const Accumulator<T>* values, int64_t count, T* out) {
  for_lanes<T>(count, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    write_lanes(out + at, read_lanes(values + at, valid...), valid...);
  });
}

// --- a channel of a tile -----------------------------------------------------------------------------------------

// What a level gets of the coarser one: its expansion, or its part of the gradient.
enum class Rise { expand, adjoint };

// Memory to ask for while the levels of a tile are worked on, when none is read or written: that of the next tile's
// operands, and that of this one's gradient. Each is as long as the finest level, or null.
struct Ahead {
  const char *input = nullptr, *target = nullptr;
  char* gradient = nullptr;
  int64_t element_size = 1;

  AEFAST_HD void to_read(int64_t first, int64_t count) const {
    if (!input) return;
    for (int64_t byte = first * element_size; byte < (first + count) * element_size; byte += 64) {
      __builtin_prefetch(input + byte, 0);
      __builtin_prefetch(target + byte, 0);
    }
  }
  AEFAST_HD void to_write(int64_t first, int64_t count) const {
    if (!gradient) return;
    for (int64_t byte = first * element_size; byte < (first + count) * element_size; byte += 64)
      __builtin_prefetch(gradient + byte, 1);
  }
};

template <typename A>
struct Channel {
  const Pyramid& pyramid;
  A *finished, *between;
  Ahead ahead;
  Level<A> levels[kMostLevels];

  // `plane` has the residuals of the finest level, and `coarse` room for the others.
  Channel(const Pyramid& pyramid, int64_t rows, int64_t columns, A* plane, A* coarse, A* finished, A* between,
          const Ahead& ahead)
      : pyramid(pyramid), finished(finished), between(between), ahead(ahead) {
    levels[0] = {plane, rows, columns};
    for (int64_t level = 1; level < pyramid.levels; ++level) {
      rows = coarse_size(pyramid.kind, rows);
      columns = coarse_size(pyramid.kind, columns);
      levels[level] = {coarse, rows, columns};
      coarse += aligned(rows * columns);
    }
  }

  // The sum over all levels; with kStore the gradient goes to `out`, which may be the finest level.
  template <Kind K, bool kStore, typename T>
  double run(T* out) {
    const int64_t last = pyramid.levels - 1;
    for (int64_t level = 0; level < last; ++level)
      for (int64_t row = 0; row < levels[level + 1].rows; ++row) {
        if (level == 0) ahead.to_write(2 * row * levels[0].columns, 2 * levels[0].columns);
        go_down<false>(level, row, levels[level + 1].row(row));
      }
    const bool has_bands = pyramid.kind == PyramidKind::laplacian;
    if (has_bands)
      for (int64_t level = 0; level < last; ++level)
        for_rows(level, [&](int64_t first, int64_t rows) __attribute__((always_inline)) {
          rise(Rise::expand, level, first, rows);
          combine(levels[level].row(first), finished, A(-1), rows * levels[level].columns, levels[level].row(first));
        });
    double sum = 0.0;
    if (!kStore || !has_bands) {
      for (int64_t level = last; level > 0; --level)
        sum += level < last ? finish<K, kStore, kStore>(level, levels[level].data)
                            : finish<K, kStore, false>(level, levels[level].data);
      return sum + (last > 0 ? finish<K, kStore, kStore>(0, out) : finish<K, kStore, false>(0, out));
    }
    if (last == 0) return finish<K, kStore, false>(0, out);
    for (int64_t level = last; level >= 0; --level) sum += finish<K, true, false>(level, levels[level].data);
    // A band was made of its own level and of the coarser one; so were both of the finer levels.
    for (int64_t level = last; level > 0; --level)
      for (int64_t row = 0; row < levels[level].rows; ++row) {
        go_down<true>(level - 1, row, finished);
        combine(levels[level].row(row), finished, A(-1), levels[level].columns, levels[level].row(row));
      }
    for (int64_t level = last - 1; level > 0; --level) add_coarse(level, levels[level].data);
    add_coarse(0, out);
    return sum;
  }

 private:
  // body(first, count) for the rows of a level, as many at a time as `finished` has room for. What is left of an image
  // behind its last square has no coarser levels.
  template <typename Body>
  AEFAST_HD void for_rows(int64_t level, const Body& body) const {
    const int64_t rows = levels[level].rows, columns = levels[level].columns;
    if (columns == 0) return;
    const int64_t step = columns < kFinished ? kFinished / columns : 1;
    for (int64_t first = 0; first < rows; first += step) body(first, rows - first < step ? rows - first : step);
  }

  // Row `row` of what `level` makes of the next one: by the pyramid's own step, or by the adjoint of expand's.
  template <bool kAdjointOfExpand>
  void go_down(int64_t level, int64_t row, A* out) const {
    if (pyramid.kind == PyramidKind::average) return average_row(levels[level], row, out);
    const Axis &rows = pyramid.rows[level], &columns = pyramid.columns[level];
    constexpr Down Axis::*taps = kAdjointOfExpand ? &Axis::adjoint_of_expand : &Axis::reduce;
    down_row(levels[level], rows, rows.*taps, columns, columns.*taps, row, between, out);
  }

  // Puts into `finished` rows of `level` that are made of the next one.
  void rise(Rise kind, int64_t level, int64_t first, int64_t count) const {
    const int64_t width = levels[level].columns;
    for (int64_t row = 0; row < count; ++row) {
      A* const out = finished + row * width;
      if (pyramid.kind == PyramidKind::average) {
        spread_row(levels[level + 1], first + row, width, out);
        continue;
      }
      const Axis &rows = pyramid.rows[level], &columns = pyramid.columns[level];
      const auto taps = kind == Rise::expand ? &Axis::expand : &Axis::adjoint_of_reduce;
      up_row(levels[level + 1], rows, rows.*taps, columns, columns.*taps, first + row, between, out);
    }
  }

  // The sum of a level; with kStore its gradient, and with kAdd what the coarser levels add to it, go to `out`.
  template <Kind K, bool kStore, bool kAdd, typename T>
  double finish(int64_t level, T* out) const {
    const Level<A>& from = levels[level];
    const A parameter(pyramid.penalty.parameter), factor(pyramid.factors[level]);
    double sum = 0.0;
    if constexpr (kAdd && std::is_same_v<A, float>)
      if (pyramid.kind == PyramidKind::average && from.columns % kFloats == 0) {
        const int64_t columns = from.columns;
        Floats total(0);
        for (int64_t row = 0; row + 2 <= from.rows; row += 2) {
          if (level == 0) ahead.to_read(row * columns, 2 * columns);
          penalise_squares<K>(from.row(row), levels[level + 1].row(row / 2), columns, parameter, factor,
                              out + row * columns, total);
        }
        sum = sum_of(total, kFloats);
        if (from.rows % 2 == 1) {
          const int64_t last = (from.rows - 1) * columns;
          if (level == 0) ahead.to_read(last, columns);
          sum += penalise<K, true, false>(from.data + last, finished, columns, parameter, factor, out + last);
        }
        return pyramid.factors[level] * sum;
      }
    for_rows(level, [&](int64_t first, int64_t rows) __attribute__((always_inline)) {
      if (level == 0) ahead.to_read(first * from.columns, rows * from.columns);
      if constexpr (kAdd) rise(Rise::adjoint, level, first, rows);
      sum += penalise<K, kStore, kAdd>(from.row(first), finished, rows * from.columns, parameter, factor,
                                       out + first * from.columns);
    });
    return pyramid.factors[level] * sum;
  }

  template <typename T>
  void add_coarse(int64_t level, T* out) const {
    const Level<A>& from = levels[level];
    for_rows(level, [&](int64_t first, int64_t rows) __attribute__((always_inline)) {
      rise(Rise::adjoint, level, first, rows);
      combine(from.row(first), finished, A(1), rows * from.columns, out + first * from.columns);
    });
  }
};

// --- tiles -------------------------------------------------------------------------------------------------------

// Where a tile lies in the tensors, in elements.
struct Place {
  int64_t at;  // of its first channel's first row
  int64_t channels, rows, columns;
};

AEFAST_HD Place place_of(const Residuals& residuals, const Tiling& tiling, int64_t tile) {
  const auto least = [](int64_t a, int64_t b) __attribute__((always_inline)) { return a < b ? a : b; };
  const int64_t column = tile % tiling.across * tiling.columns, row = tile / tiling.across % tiling.down * tiling.rows;
  const int64_t channel = tile / (tiling.across * tiling.down) % tiling.groups * tiling.channels;
  const int64_t image = tile / tiling.of_image(), width = residuals.width, height = residuals.height;
  const int64_t of_image = image * residuals.channels * height * width;
  const int64_t at = residuals.is_channels_last ? (row * width + column) * residuals.channels + channel
                                                : (channel * height + row) * width + column;
  return {of_image + at, least(tiling.channels, residuals.channels - channel), least(tiling.rows, height - row),
          least(tiling.columns, width - column)};
}

// The channels of `columns` pixels, one after another, from where they lie side by side; and back.
template <typename A>
void separate(const A* __restrict pixels, int64_t channels, int64_t columns, int64_t plane, A* __restrict out) {
  for (int64_t channel = 0; channel < channels; ++channel)
#pragma omp simd
    for (int64_t col = 0; col < columns; ++col) out[channel * plane + col] = pixels[col * channels + channel];
}
template <typename A>
void interleave(const A* __restrict planes, int64_t channels, int64_t columns, int64_t plane, A* __restrict out) {
  for (int64_t channel = 0; channel < channels; ++channel)
#pragma omp simd
    for (int64_t col = 0; col < columns; ++col) out[col * channels + channel] = planes[channel * plane + col];
}

template <typename T>
class Tiles {
 public:
  using A = Accumulator<T>;

  Tiles(const Pyramid& pyramid, const Residuals& residuals, const Tiling& tiling, void* workspace)
      : pyramid_(pyramid), residuals_(residuals), tiling_(tiling), sizes_(pyramid.kind, pyramid.levels, tiling) {
    planes_ = static_cast<A*>(workspace);
    levels_ = planes_ + tiling.channels * sizes_.plane;
    finished_ = levels_ + sizes_.levels;
    row_ = finished_ + sizes_.finished;
    interleaved_ = row_ + sizes_.row;
  }

  template <Kind K, bool kStore>
  double run(int64_t tile) const {
    const Place place = place_of(residuals_, tiling_, tile);
    read(place);
    // Rows that lie one after another are written at once.
    const bool is_whole = kStore && !residuals_.is_channels_last && place.columns == residuals_.width;
    Ahead ahead;
    if (!residuals_.is_channels_last && place.columns == residuals_.width) {
      const int64_t size = sizeof(T), next = (place.at + place.rows * place.columns) * size;
      ahead = {static_cast<const char*>(residuals_.input) + next, static_cast<const char*>(residuals_.target) + next,
               kStore ? static_cast<char*>(residuals_.gradient) + place.at * size : nullptr, size};
    }
    double sum = 0.0;
    for (int64_t index = 0; index < place.channels; ++index) {
      A* const plane = planes_ + index * sizes_.plane;
      Channel<A> channel(pyramid_, place.rows, place.columns, plane, levels_, finished_, row_, ahead);
      sum += is_whole ? channel.template run<K, kStore>(static_cast<T*>(residuals_.gradient) + place.at)
                      : channel.template run<K, kStore>(plane);
    }
    if (kStore && !is_whole) write(place);
    return sum;
  }

 private:
  void read(const Place& place) const {
    const T* const input = static_cast<const T*>(residuals_.input) + place.at;
    const T* const target = static_cast<const T*>(residuals_.target) + place.at;
    const int64_t width = residuals_.width, channels = residuals_.channels;
    if (!residuals_.is_channels_last) {
      const bool is_whole = place.columns == width;
      const int64_t rows = is_whole ? 1 : place.rows, columns = is_whole ? place.rows * width : place.columns;
      for (int64_t row = 0; row < rows; ++row)
        subtract(input + row * width, target + row * width, columns, planes_ + row * columns);
      return;
    }
    for (int64_t row = 0; row < place.rows; ++row) {
      const int64_t at = row * width * channels;
      if (place.channels == channels)
        subtract(input + at, target + at, place.columns * channels, interleaved_);
      else
        for (int64_t col = 0; col < place.columns; ++col)
          subtract(input + at + col * channels, target + at + col * channels, place.channels,
                   interleaved_ + col * place.channels);
      separate(interleaved_, place.channels, place.columns, sizes_.plane, planes_ + row * place.columns);
    }
  }

  void write(const Place& place) const {
    T* const gradient = static_cast<T*>(residuals_.gradient) + place.at;
    const int64_t width = residuals_.width, channels = residuals_.channels;
    for (int64_t row = 0; row < place.rows; ++row) {
      const A* const planes = planes_ + row * place.columns;
      if (!residuals_.is_channels_last) {
        convert(planes, place.columns, gradient + row * width);
        continue;
      }
      interleave(planes, place.channels, place.columns, sizes_.plane, interleaved_);
      T* const out = gradient + row * width * channels;
      if (place.channels == channels)
        convert(interleaved_, place.columns * channels, out);
      else
        for (int64_t col = 0; col < place.columns; ++col)
          convert(interleaved_ + col * place.channels, place.channels, out + col * channels);
    }
  }

  const Pyramid& pyramid_;
  const Residuals& residuals_;
  const Tiling& tiling_;
  const Workspace sizes_;
  A *planes_, *levels_, *finished_, *row_, *interleaved_;
};

template <Kind K>
struct KindTag {
  static constexpr Kind value = K;
};

template <typename Body>
void with_penalty(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::l1: return body(KindTag<Kind::l1>());
    case Kind::mse: return body(KindTag<Kind::mse>());
    case Kind::lp: return body(KindTag<Kind::lp>());
    default: return body(KindTag<Kind::charbonnier>());
  }
}

void add(Scalar scalar, const Pyramid& pyramid, const Residuals& residuals, const Tiling& tiling, void* workspace,
         double* sums, int64_t first, int64_t count) {
  with_type(scalar, [&](auto type_tag) {
    const Tiles<typename decltype(type_tag)::type> tiles(pyramid, residuals, tiling, workspace);
    with_penalty(pyramid.penalty.kind, [&](auto kind_tag) {
      constexpr Kind K = decltype(kind_tag)::value;
      for (int64_t tile = first; tile < first + count; ++tile)
        sums[tile] = residuals.gradient ? tiles.template run<K, true>(tile) : tiles.template run<K, false>(tile);
    });
  });
}

}  // namespace

extern const PyramidKernels pyramid_kernels;
const PyramidKernels pyramid_kernels = {add};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
