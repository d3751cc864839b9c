// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "pairwise.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

using pairwise::Function;
using pairwise::Kind;

// Rows of a tile that are taken at once: with two vectors of columns their distances fill half of the registers.
#if defined(__AVX512F__)
constexpr int64_t kRows = 8;
#else
constexpr int64_t kRows = 4;
#endif
template <typename T>
constexpr int64_t kWidth = kVectorBytes / sizeof(T);

// Kernel values far from 1 are of no account, but subnormal ones would take a hundred times as long as others.
class WithoutSubnormals {
 public:
#if defined(__SSE__)
  WithoutSubnormals() : mode_(_mm_getcsr()) { _mm_setcsr(mode_ | 0x8040); }
  ~WithoutSubnormals() { _mm_setcsr(mode_); }

 private:
  unsigned mode_;
#else
  WithoutSubnormals() {}
#endif
};

// --- points ----------------------------------------------------------------------------------------------------

template <typename T>
void add_coordinates_of(const Points& points, int64_t first, int64_t count, double* sums) {
  const T* const data = static_cast<const T*>(points.data);
  for (int64_t point = first; point < first + count; ++point)
    for (int64_t k = 0; k < points.dimensions; ++k)
      sums[k] += static_cast<double>(load(data[point * points.row_stride + k * points.col_stride]));
}

void add_coordinates(const Points& points, int64_t first, int64_t count, double* sums) {
  with_type(points.scalar, [&](auto tag) {
    add_coordinates_of<typename decltype(tag)::type>(points, first, count, sums);
  });
}

template <typename A, typename T>
void pack_points(bool has_products, const Points& points, const double* centre, int64_t first, int64_t count, A* rows,
                 A* columns) {
  const T* const data = static_cast<const T*>(points.data) + first * points.row_stride;
  const int64_t width = padded(points.dimensions, sizeof(A));
  std::memset(rows, 0, kPoints * width * sizeof(A));
  for (int64_t point = 0; point < count; ++point)
    for (int64_t k = 0; k < points.dimensions; ++k)
      rows[point * width + k] =
          static_cast<A>(static_cast<double>(load(data[point * points.row_stride + k * points.col_stride])) - centre[k]);
  if (!columns) return;
  const A factor = has_products ? A(-2) : A(1);
  for (int64_t k = 0; k < points.dimensions; ++k)
    for (int64_t point = 0; point < kPoints; ++point) columns[k * kPoints + point] = factor * rows[point * width + k];
  for (int64_t point = 0; point < kPoints; ++point) {
    double norm = 0.0;
    for (int64_t k = 0; k < points.dimensions; ++k) {
      const double coordinate = static_cast<double>(rows[point * width + k]);
      norm += coordinate * coordinate;
    }
    columns[points.dimensions * kPoints + point] = static_cast<A>(norm);
  }
}

void pack(bool is_double, bool has_products, const Points& points, const double* centre, int64_t first, int64_t count,
          void* rows, void* columns) {
  with_type(points.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (is_double)
      pack_points<double, T>(has_products, points, centre, first, count, static_cast<double*>(rows),
                             static_cast<double*>(columns));
    else
      pack_points<float, T>(has_products, points, centre, first, count, static_cast<float*>(rows),
                            static_cast<float*>(columns));
  });
}

// --- tiles -----------------------------------------------------------------------------------------------------

template <typename A>
AEFAST_HD Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// Dimensions whose squares are added one after another: their sums are added in turn, so that rounding errors grow with
// the root of the dimensions and not with their number.
constexpr int64_t kTogether = 32;

// Squared distances of kRows rows, one after another, to kPoints columns: u (kRows, kPoints).
template <typename A>
AEFAST_HD void squared_distances(const A* rows, const A* columns, int64_t dimensions, A* u) {
  const int64_t width = padded(dimensions, sizeof(A));
  for (int64_t col = 0; col < kPoints; col += 2 * kWidth<A>)
    for (int64_t begin = 0; begin < dimensions; begin += kTogether) {
      const int64_t end = begin + kTogether < dimensions ? begin + kTogether : dimensions;
      Vector<A> sums[kRows][2] = {};
      for (int64_t k = begin; k < end; ++k) {
        const auto first = read<Vector<A>>(columns + k * kPoints + col),
                   second = read<Vector<A>>(columns + k * kPoints + col + kWidth<A>);
        for (int64_t row = 0; row < kRows; ++row) {
          const Vector<A> x = broadcast(rows[row * width + k]);
          const Vector<A> a = x - first, b = x - second;
          sums[row][0] += a * a;
          sums[row][1] += b * b;
        }
      }
      for (int64_t row = 0; row < kRows; ++row)
        for (int part = 0; part < 2; ++part) {
          A* const to = u + row * kPoints + col + part * kWidth<A>;
          write(to, begin == 0 ? sums[row][part] : read<Vector<A>>(to) + sums[row][part]);
        }
    }
}

// NaN stays what it is.
template <typename A>
AEFAST_HD Vector<A> at_least_zero(Vector<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_maskz_max_ps(0xffff, Vector<A>{}, x);
#endif
  return x < 0 ? Vector<A>{} : x;
}

// The same from products, `norms` being those of the rows.
template <typename A>
AEFAST_HD void distances_from_products(const A* rows, const A* norms, const A* columns, int64_t dimensions, A* u) {
  const int64_t width = padded(dimensions, sizeof(A));
  for (int64_t col = 0; col < kPoints; col += 2 * kWidth<A>) {
    Vector<A> sums[kRows][2];
    for (int part = 0; part < 2; ++part) {
      const auto norm = read<Vector<A>>(columns + dimensions * kPoints + col + part * kWidth<A>);
      for (int64_t row = 0; row < kRows; ++row) sums[row][part] = broadcast(norms[row]) + norm;
    }
    for (int64_t k = 0; k < dimensions; ++k) {
      const auto first = read<Vector<A>>(columns + k * kPoints + col),
                 second = read<Vector<A>>(columns + k * kPoints + col + kWidth<A>);
      for (int64_t row = 0; row < kRows; ++row) {
        const Vector<A> x = broadcast(rows[row * width + k]);
        sums[row][0] += x * first;
        sums[row][1] += x * second;
      }
    }
    for (int64_t row = 0; row < kRows; ++row)
      for (int part = 0; part < 2; ++part) {
        write(u + row * kPoints + col + part * kWidth<A>, at_least_zero<A>(sums[row][part]));
      }
  }
}

template <typename A>
AEFAST_HD void tile_distances(const Tile& tile, int64_t first, A* u) {
  const A* const rows = static_cast<const A*>(tile.rows_i) + first * padded(tile.dimensions, sizeof(A));
  const A* const columns = static_cast<const A*>(tile.columns_j);
  if (tile.has_products)
    distances_from_products(rows, static_cast<const A*>(tile.norms_i) + first, columns, tile.dimensions, u);
  else
    squared_distances(rows, columns, tile.dimensions, u);
}

// A mixture of rbf that the compiler knows: of five kernels, each is the one before squared kSquarings times, unless it
// takes an exponential again. Those are rates that double, as the default ones do, and bandwidths that do.
constexpr int kKnown = 5;

// One kernel in so many takes an exponential, from the first on.
template <int kSquarings>
constexpr int kPeriod = pairwise::kMostSquarings / kSquarings + 1;
template <int kSquarings>
constexpr int kExponentials = (kKnown + kPeriod<kSquarings> - 1) / kPeriod<kSquarings>;

template <int kSquarings>
constexpr int squarings_of(int k) {
  return k % kPeriod<kSquarings> == 0 ? 0 : kSquarings;
}

template <int kSquarings, typename A>
bool is_known(const Function<A>& function) {
  if (function.count != kKnown) return false;
  for (int k = 0; k < kKnown; ++k)
    if (function.squarings[k] != squarings_of<kSquarings>(k)) return false;
  return true;
}

template <int kSquarings, typename C, typename A>
AEFAST_HD C known_exponential(const Function<A>& function, int number, C u) {
  return exp2_nonpositive(C(-function.rate[number * kPeriod<kSquarings>]) * u);
}

// pairwise::evaluate() of a known mixture whose exponentials are in `power`; no loop is left. Meanwhile it makes those of
// the vectors of squared distances at `u`, whose chains of instructions wait for none of these.
template <int kSquarings, int kNumbers, int kCount, typename C, typename A>
AEFAST_HD void evaluate_known(const Function<A>& function, C (&power)[kNumbers][kCount], C (&value)[kCount],
                              C (&slope)[kCount], const A* u, C (&next)[kNumbers][kCount]) {
  constexpr int kJobs = kNumbers * kCount, kPlaces = kKnown * kCount;
#pragma GCC unroll 8
  for (int k = 0; k < kKnown; ++k) {
    const C weight(function.weight[k]);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      C& one = power[k / kPeriod<kSquarings>][i];
      for (int step = 0; step < squarings_of<kSquarings>(k); ++step) one = one * one;
      value[i] = k == 0 ? one : value[i] + one;
      slope[i] = k == 0 ? weight * one : slope[i] + weight * one;
      // Spread evenly over the places that this one is of.
      const int place = k * kCount + i, job = place * kJobs / kPlaces, number = job / kCount, other = job % kCount;
      if (job < (place + 1) * kJobs / kPlaces)
        next[number][other] = known_exponential<kSquarings>(function, number, read_lanes(u + other * kLanes<A>));
    }
  }
}

// Vectors of squared distances that are evaluated at a time. An exponential's chain of instructions is long, and several
// of them, as far as registers go, keep the units busy; the other kernels do that by themselves.
template <Kind kKind>
constexpr int kAtOnce = kKind != Kind::rbf ? 1 : kVectorBytes == 64 ? 4 : 2;
constexpr int kKnownAtOnce = 2;

// Values at squared distances u (kRows, kPoints), of which each vector is given to take(at, value); slopes take the place
// of the distances. kSquarings is that of a known mixture, or 0.
template <Kind kKind, int kSquarings, typename A, typename Take>
AEFAST_HD void evaluate_rows(const Function<A>& function, A* u, const Take& take) {
  using C = Lanes<A>;
  constexpr int64_t kAll = kRows * kPoints;
  if constexpr (kSquarings > 0) {
    constexpr int kNumbers = kExponentials<kSquarings>, kCount = kKnownAtOnce;
    C power[kNumbers][kCount], next[kNumbers][kCount], value[kCount], slope[kCount];
    for (int number = 0; number < kNumbers; ++number)
      for (int i = 0; i < kCount; ++i)
        power[number][i] = known_exponential<kSquarings>(function, number, read_lanes(u + i * kLanes<A>));
    for (int64_t at = 0; at < kAll; at += kCount * kLanes<A>) {
      // After the last come the first again, for nothing.
      const int64_t after = at + kCount * kLanes<A> < kAll ? at + kCount * kLanes<A> : 0;
      evaluate_known<kSquarings>(function, power, value, slope, u + after, next);
      for (int i = 0; i < kCount; ++i) {
        take(at + i * kLanes<A>, value[i]);
        write_lanes(u + at + i * kLanes<A>, slope[i]);
        for (int number = 0; number < kNumbers; ++number) power[number][i] = next[number][i];
      }
    }
  } else {
    constexpr int kCount = kAtOnce<kKind>;
    for (int64_t at = 0; at < kAll; at += kCount * kLanes<A>) {
      C distance[kCount], value[kCount], slope[kCount];
      for (int i = 0; i < kCount; ++i) distance[i] = read_lanes(u + at + i * kLanes<A>);
      pairwise::evaluate<kKind>(function, distance, value, slope);
      for (int i = 0; i < kCount; ++i) {
        take(at + i * kLanes<A>, value[i]);
        write_lanes(u + at + i * kLanes<A>, slope[i]);
      }
    }
  }
}

template <typename A>
AEFAST_HD double sum_of_lanes(Lanes<A> sum) {
  A lanes[kLanes<A>];
  write_lanes(lanes, sum);
  double total = 0.0;
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) total += static_cast<double>(lanes[lane]);
  return total;
}

// Sums values at squared distances u (kRows, kPoints); slopes take their place.
template <Kind kKind, int kSquarings, typename A>
AEFAST_HD double sum_rows(const Function<A>& function, A* u) {
  Lanes<A> sum(A(0));
  evaluate_rows<kKind, kSquarings>(function, u, [&](int64_t, Lanes<A> value) { sum = sum + value; });
  return sum_of_lanes<A>(sum);
}

// The same of the tile's rows from `first` on where some of these are no pairs of it: values and slopes there are 0.
template <Kind kKind, int kSquarings, typename A>
AEFAST_HD double sum_pairs(const Function<A>& function, const Tile& tile, int64_t first, A* u) {
  alignas(64) A values[kRows * kPoints];
  evaluate_rows<kKind, kSquarings>(function, u, [&](int64_t at, Lanes<A> value) { write_lanes(values + at, value); });
  for (int64_t row = 0; row < kRows; ++row) {
    const auto clear = [&](int64_t col) { u[row * kPoints + col] = values[row * kPoints + col] = 0; };
    for (int64_t col = first + row < tile.count_i ? tile.count_j : 0; col < kPoints; ++col) clear(col);
    const int64_t excluded = first + row + tile.excluded;
    if (excluded >= 0 && excluded < kPoints) clear(excluded);
  }
  Lanes<A> sum(A(0));
  for (int64_t at = 0; at < kRows * kPoints; at += kLanes<A>) sum = sum + read_lanes(values + at);
  return sum_of_lanes<A>(sum);
}

// The sum of a vector's elements, by halves.
template <typename A, int kBytes = kVectorBytes>
AEFAST_HD A sum_of(Vector<A, kBytes> x) {
  if constexpr (kBytes == sizeof(A)) {
    return x[0];
  } else {
    A elements[kBytes / sizeof(A)];
    write(elements, x);
    using Half = Vector<A, kBytes / 2>;
    return sum_of<A, kBytes / 2>(read<Half>(elements) + read<Half>(elements + kBytes / 2 / sizeof(A)));
  }
}

// gradient[row] += Σ_j w[row][j] (x[row] - y[j]), for kRows rows, of kVectors vectors from k on; `sums` are Σ_j w[row][j].
template <bool kDifferences, typename A, int kVectors>
AEFAST_HD void add_row_gradients(const A* w, const A* x, const A* y, int64_t count, int64_t width, int64_t k,
                                 const A* sums, A* gradient) {
  Vector<A> products[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    Vector<A> point[kVectors];
    for (int part = 0; part < kVectors; ++part) point[part] = read<Vector<A>>(y + j * width + k + part * kWidth<A>);
    for (int64_t row = 0; row < kRows; ++row)
      for (int part = 0; part < kVectors; ++part) {
        const Vector<A> weight = broadcast(w[row * kPoints + j]);
        if constexpr (kDifferences)
          products[row][part] += weight * (read<Vector<A>>(x + row * width + k + part * kWidth<A>) - point[part]);
        else
          products[row][part] += weight * point[part];
      }
  }
  for (int64_t row = 0; row < kRows; ++row)
    for (int part = 0; part < kVectors; ++part) {
      const int64_t at = row * width + k + part * kWidth<A>;
      Vector<A> sum = products[row][part];
      if constexpr (!kDifferences) sum = broadcast(sums[row]) * read<Vector<A>>(x + at) - sum;
      write(gradient + at, read<Vector<A>>(gradient + at) + sum);
    }
}

template <bool kDifferences, typename A>
AEFAST_HD void add_row_gradients(const A* w, const A* x, const A* y, int64_t count, int64_t width, A* gradient) {
  A sums[kRows] = {};
  if constexpr (!kDifferences)
    for (int64_t row = 0; row < kRows; ++row) {
      Vector<A> sum = {};
      for (int64_t col = 0; col < kPoints; col += kWidth<A>) sum += read<Vector<A>>(w + row * kPoints + col);
      sums[row] = sum_of<A>(sum);
    }
  int64_t k = 0;
  for (; k + 2 * kWidth<A> <= width; k += 2 * kWidth<A>)
    add_row_gradients<kDifferences, A, 2>(w, x, y, count, width, k, sums, gradient);
  for (; k < width; k += kWidth<A>)
    add_row_gradients<kDifferences, A, 1>(w, x, y, count, width, k, sums, gradient);
}

// products[j] += Σ_row w[row][j] x[row], or Σ_row w[row][j] (x[row] - y[j]), of kVectors vectors from k on.
template <bool kDifferences, typename A, int kVectors>
AEFAST_HD void add_column_products(const A* w, const A* x, const A* y, int64_t count, int64_t width, int64_t k,
                                   A* products) {
  Vector<A> points[kRows][kVectors];
  for (int64_t row = 0; row < kRows; ++row)
    for (int part = 0; part < kVectors; ++part)
      points[row][part] = read<Vector<A>>(x + row * width + k + part * kWidth<A>);
  for (int64_t j = 0; j < count; ++j) {
    A* const at = products + j * width + k;
    Vector<A> sums[kVectors] = {}, point[kVectors] = {};
    if constexpr (kDifferences)
      for (int part = 0; part < kVectors; ++part) point[part] = read<Vector<A>>(y + j * width + k + part * kWidth<A>);
    for (int64_t row = 0; row < kRows; ++row) {
      const Vector<A> weight = broadcast(w[row * kPoints + j]);
      for (int part = 0; part < kVectors; ++part) {
        if constexpr (kDifferences)
          sums[part] += weight * (points[row][part] - point[part]);
        else
          sums[part] += weight * points[row][part];
      }
    }
    for (int part = 0; part < kVectors; ++part) {
      A* const to = at + part * kWidth<A>;
      write(to, read<Vector<A>>(to) + sums[part]);
    }
  }
}

// All of them, and sums[j] += Σ_row w[row][j] for those that are of no differences.
template <bool kDifferences, typename A>
AEFAST_HD void add_column_products(const A* w, const A* x, const A* y, int64_t count, int64_t width, A* products,
                                   A* sums) {
  if constexpr (!kDifferences)
    for (int64_t col = 0; col < kPoints; col += kWidth<A>) {
      auto sum = read<Vector<A>>(sums + col);
      for (int64_t row = 0; row < kRows; ++row) sum += read<Vector<A>>(w + row * kPoints + col);
      write(sums + col, sum);
    }
  int64_t k = 0;
  for (; k + 2 * kWidth<A> <= width; k += 2 * kWidth<A>)
    add_column_products<kDifferences, A, 2>(w, x, y, count, width, k, products);
  for (; k < width; k += kWidth<A>) add_column_products<kDifferences, A, 1>(w, x, y, count, width, k, products);
}

// Both, where a point is one vector and no differences are summed: each weight is read once for the two. Bit for bit
// what they are one by one.
template <typename A>
AEFAST_HD void add_both_products(const A* w, const A* x, const A* y, int64_t count, A* gradient, A* products,
                                 A* column_sums) {
  constexpr int64_t width = kWidth<A>;
  Vector<A> points[kRows], of_rows[kRows] = {}, sums[kRows] = {};
  for (int64_t row = 0; row < kRows; ++row) points[row] = read<Vector<A>>(x + row * width);
  for (int64_t col = 0; col < count; col += width) {
    // Additions beside the multiplications, which are what takes its time.
    auto column = read<Vector<A>>(column_sums + col);
    for (int64_t row = 0; row < kRows; ++row) {
      const auto weights = read<Vector<A>>(w + row * kPoints + col);
      sums[row] += weights;
      column += weights;
    }
    write(column_sums + col, column);
    for (int64_t j = col; j < col + width && j < count; ++j) {
      const auto point = read<Vector<A>>(y + j * width);
      Vector<A> sum = {};
      for (int64_t row = 0; row < kRows; ++row) {
        const Vector<A> weight = broadcast(w[row * kPoints + j]);
        of_rows[row] += weight * point;
        sum += weight * points[row];
      }
      write(products + j * width, read<Vector<A>>(products + j * width) + sum);
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    A* const to = gradient + row * width;
    write(to, read<Vector<A>>(to) + (broadcast(sum_of<A>(sums[row])) * points[row] - of_rows[row]));
  }
}

template <Kind kKind, int kSquarings, typename A>
double sum_tile(const Function<A>& function, const Tile& tile) {
  const bool sums_differences = pairwise::sums_differences(kKind) || tile.sums_differences;
  const WithoutSubnormals mode;
  const int64_t width = padded(tile.dimensions, sizeof(A));
  const A* const x = static_cast<const A*>(tile.rows_i);
  const A* const y = static_cast<const A*>(tile.rows_j);
  A* const x_gradient = static_cast<A*>(tile.gradient_i);
  A* const y_gradient = static_cast<A*>(tile.gradient_j);
  A* const products = static_cast<A*>(tile.scratch);
  alignas(64) A w[kRows * kPoints], column_sums[kPoints] = {};
  // Summed apart from other tiles', which would grow the sum that each term is rounded with.
  if (y_gradient) std::memset(products, 0, tile.count_j * width * sizeof(A));
  double total = 0.0;
  for (int64_t first = 0; first < tile.count_i; first += kRows) {
    const A* const rows = x + first * width;
    tile_distances(tile, first, w);
    const bool is_whole = tile.count_j == kPoints && first + kRows <= tile.count_i &&
                          (first + tile.excluded + kRows <= 0 || first + tile.excluded >= kPoints);
    total += is_whole ? sum_rows<kKind, kSquarings>(function, w) : sum_pairs<kKind, kSquarings>(function, tile, first, w);
    if constexpr (!pairwise::sums_differences(kKind))
      if (!sums_differences) {
        if (x_gradient && y_gradient && width == kWidth<A>) {
          add_both_products(w, rows, y, tile.count_j, x_gradient + first * width, products, column_sums);
          continue;
        }
        if (x_gradient) add_row_gradients<false>(w, rows, y, tile.count_j, width, x_gradient + first * width);
        if (y_gradient) add_column_products<false>(w, rows, y, tile.count_j, width, products, column_sums);
        continue;
      }
    if (x_gradient) add_row_gradients<true>(w, rows, y, tile.count_j, width, x_gradient + first * width);
    if (y_gradient) add_column_products<true>(w, rows, y, tile.count_j, width, products, column_sums);
  }
  if (y_gradient)
    for (int64_t j = 0; j < tile.count_j; ++j)
      for (int64_t k = 0; k < width; k += kWidth<A>) {
        const int64_t at = j * width + k;
        Vector<A> sum = -read<Vector<A>>(products + at);
        if (!sums_differences) sum += broadcast(column_sums[j]) * read<Vector<A>>(y + at);
        write(y_gradient + at, read<Vector<A>>(y_gradient + at) + sum);
      }
  return total;
}

template <Kind kKind, typename A>
void tile_values(const Function<A>& function, const Tile& tile, A* out, int64_t stride) {
  const WithoutSubnormals mode;
  alignas(64) A u[kRows * kPoints], values[kRows * kPoints];
  for (int64_t first = 0; first < tile.count_i; first += kRows) {
    tile_distances(tile, first, u);
    evaluate_rows<kKind, 0>(function, u, [&](int64_t at, Lanes<A> value) { write_lanes(values + at, value); });
    for (int64_t row = first; row < tile.count_i && row < first + kRows; ++row)
      std::memcpy(out + row * stride, values + (row - first) * kPoints, tile.count_j * sizeof(A));
  }
}

// body(kind) with `kind` as a constant.
template <typename Body>
auto with_kind(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::laplacian: return body(std::integral_constant<Kind, Kind::laplacian>());
    case Kind::imq: return body(std::integral_constant<Kind, Kind::imq>());
    case Kind::rational_quadratic: return body(std::integral_constant<Kind, Kind::rational_quadratic>());
    case Kind::energy: return body(std::integral_constant<Kind, Kind::energy>());
    default: return body(std::integral_constant<Kind, Kind::rbf>());
  }
}

double sum(bool is_double, Kind kind, const void* function, const Tile& tile) {
  return with_kind(kind, [&](auto known) {
    constexpr Kind kKind = decltype(known)::value;
    if (is_double) return sum_tile<kKind, 0>(*static_cast<const Function<double>*>(function), tile);
    const auto& of_floats = *static_cast<const Function<float>*>(function);
    if constexpr (kKind == Kind::rbf) {
      if (is_known<1>(of_floats)) return sum_tile<kKind, 1>(of_floats, tile);
      if (is_known<2>(of_floats)) return sum_tile<kKind, 2>(of_floats, tile);
    }
    return sum_tile<kKind, 0>(of_floats, tile);
  });
}

void values(bool is_double, Kind kind, const void* function, const Tile& tile, void* out, int64_t stride) {
  with_kind(kind, [&](auto known) {
    constexpr Kind kKind = decltype(known)::value;
    if (is_double)
      tile_values<kKind>(*static_cast<const Function<double>*>(function), tile, static_cast<double*>(out), stride);
    else
      tile_values<kKind>(*static_cast<const Function<float>*>(function), tile, static_cast<float*>(out), stride);
  });
}

// --- nearest points --------------------------------------------------------------------------------------------

template <typename A>
void nearest_of(const Tile& tile, int64_t first_j, A* least, int64_t* index) {
  const A infinity = std::numeric_limits<A>::infinity();
  alignas(64) A u[kRows * kPoints];
  for (int64_t first = 0; first < tile.count_i; first += kRows) {
    tile_distances(tile, first, u);
    for (int64_t row = first; row < tile.count_i && row < first + kRows; ++row) {
      A* const distances = u + (row - first) * kPoints;
      for (int64_t j = tile.count_j; j < kPoints; ++j) distances[j] = infinity;
      Vector<A> smallest = read<Vector<A>>(distances), sum = {};
      for (int64_t col = 0; col < kPoints; col += kWidth<A>) {
        const auto one = read<Vector<A>>(distances + col);
        smallest = one < smallest ? one : smallest;
        // Of numbers that are not negative, the sum is NaN if one of them is.
        sum += col + kWidth<A> <= tile.count_j ? one : Vector<A>{};
      }
      A best = infinity, total = 0;
      for (int64_t lane = 0; lane < kWidth<A>; ++lane) {
        best = smallest[lane] < best ? smallest[lane] : best;
        total += sum[lane];
      }
      for (int64_t j = tile.count_j / kWidth<A> * kWidth<A>; j < tile.count_j; ++j) total += distances[j];
      const bool has_nan = total != total;
      // The first block of all has what there is to compare with, be it infinite.
      if (least[row] != least[row] || !(has_nan || best < least[row] || index[row] < 0)) continue;
      int64_t at = 0;
      while (has_nan ? distances[at] == distances[at] : distances[at] != best) ++at;
      least[row] = distances[at];
      index[row] = first_j + at;
    }
  }
}

void nearest(bool is_double, const Tile& tile, int64_t first_j, void* least, int64_t* index) {
  if (is_double)
    nearest_of(tile, first_j, static_cast<double*>(least), index);
  else
    nearest_of(tile, first_j, static_cast<float*>(least), index);
}

}  // namespace

extern const PairwiseKernels pairwise_kernels;
const PairwiseKernels pairwise_kernels = {add_coordinates, pack, sum, values, nearest};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
