// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "product.h"

#include <type_traits>

#include "vector.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

// A tile's rows. With two vectors a row its sums, and what they are made from, fill 15 of 16 registers.
constexpr int kTileRows = 6;
// Terms that are added up in registers before they are added to memory, which keeps rounding errors from growing with
// the number of terms; so many rows of b's columns fit beside a tile of a into the first-level cache.
constexpr int64_t kTerms = kVectorBytes == 64 ? 192 : 256;
constexpr int64_t kLeastTermsToPack = 8;
// Rows of a whose terms stay in the second-level cache while all of b's columns pass.
constexpr int64_t kBlockRows = 256;

// out (kRows, kVectors * lanes) = or += a b over `inner` terms; b's rows are contiguous.
template <int kRows, int kVectors, typename V, typename T>
AEFAST_HD void tile(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* out, int64_t out_row,
                    int64_t inner, bool add) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kVectors] = {};
  for (int64_t term = 0; term < inner; ++term) {
    V right[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) right[vector] = read<V>(b + term * b_row + vector * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const T left = a[row * a_row + term * a_col];
      for (int vector = 0; vector < kVectors; ++vector) sums[row][vector] += left * right[vector];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector) {
      T* to = out + row * out_row + vector * kLanes;
      write(to, add ? read<V>(to) + sums[row][vector] : sums[row][vector]);
    }
}

// body(row, std::integral_constant<int, n>) for runs of n rows.
template <typename Body>
AEFAST_HD void for_tile_rows(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body(row, std::integral_constant<int, kTileRows>());
  if (row + 4 <= rows) {
    body(row, std::integral_constant<int, 4>());
    row += 4;
  }
  if (row + 2 <= rows) {
    body(row, std::integral_constant<int, 2>());
    row += 2;
  }
  if (row < rows) body(row, std::integral_constant<int, 1>());
}

// --- few rows of out -----------------------------------------------------------------------------------------

// b's rows are contiguous; kRows is small.
template <int kRows, typename T>
AEFAST_HD void few_rows(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* out, int64_t out_row,
                        int64_t inner, int64_t cols) {
  using V = Vector<T>;
  // As many sums for few rows as for many hide the latency of one.
  constexpr int kLanes = sizeof(V) / sizeof(T), kWide = 12 / kRows, kHalf = 4;
  int64_t col = 0;
  for (; col + kWide * kLanes <= cols; col += kWide * kLanes)
    tile<kRows, kWide, V>(a, a_row, a_col, b + col, b_row, out + col, out_row, inner, false);
  for (; col + kHalf * kLanes <= cols; col += kHalf * kLanes)
    tile<kRows, kHalf, V>(a, a_row, a_col, b + col, b_row, out + col, out_row, inner, false);
  for (; col + kLanes <= cols; col += kLanes)
    tile<kRows, 1, V>(a, a_row, a_col, b + col, b_row, out + col, out_row, inner, false);
  for (; col < cols; ++col) tile<kRows, 1, T>(a, a_row, a_col, b + col, b_row, out + col, out_row, inner, false);
}

// The lanes of kLanes vectors as a square matrix, transposed: blocks off the diagonal change places, at each size.
template <typename T, typename V, int kSize = 1>
AEFAST_HD void transpose(V* rows) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  if constexpr (kSize < kLanes) {
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    typedef Index Indices __attribute__((vector_size(sizeof(V))));
    Indices low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & kSize ? kLanes + lane - kSize : lane;
      high[lane] = lane & kSize ? kLanes + lane : lane + kSize;
    }
    for (int row = 0; row < kLanes; ++row)
      if (!(row & kSize)) {
        const V upper = rows[row], lower = rows[row + kSize];
        rows[row] = __builtin_shuffle(upper, lower, low);
        rows[row + kSize] = __builtin_shuffle(upper, lower, high);
      }
    transpose<T, V, 2 * kSize>(rows);
  }
}

// out (kRows, kCols) of dot products of contiguous rows of a and b^T; kRows * kCols is a vector's lanes.
template <int kRows, int kCols, typename T>
AEFAST_HD void dots(const T* a, int64_t a_row, const T* b, int64_t b_col, T* out, int64_t out_row, int64_t inner) {
  using V = Vector<T, kRows * kCols * sizeof(T)>;
  constexpr int kLanes = kRows * kCols;
  V sums[kLanes] = {};
  int64_t term = 0;
  for (; term + kLanes <= inner; term += kLanes) {
    V left[kRows];
    for (int row = 0; row < kRows; ++row) left[row] = read<V>(a + row * a_row + term);
    for (int col = 0; col < kCols; ++col) {
      const V right = read<V>(b + col * b_col + term);
      for (int row = 0; row < kRows; ++row) sums[row * kCols + col] += left[row] * right;
    }
  }
  transpose<T>(sums);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  T found[kLanes];
  write(found, sums[0]);
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kCols; ++col) {
      T sum = found[row * kCols + col];
      for (int64_t rest = term; rest < inner; ++rest) sum += a[row * a_row + rest] * b[col * b_col + rest];
      out[row * out_row + col] = sum;
    }
}

template <int kRows, typename T>
AEFAST_HD void row_of_dots(const T* a, int64_t a_row, const T* b, int64_t b_col, T* out, int64_t out_row,
                           int64_t inner, int64_t cols) {
  constexpr int kCols = kVectorBytes / sizeof(T) / kRows;
  int64_t col = 0;
  for (; col + kCols <= cols; col += kCols)
    dots<kRows, kCols>(a, a_row, b + col * b_col, b_col, out + col, out_row, inner);
  for (int row = 0; row < kRows; ++row)
    for (int64_t rest = col; rest < cols; ++rest) {
      T sum = T(0);
      for (int64_t term = 0; term < inner; ++term) sum += a[row * a_row + term] * b[rest * b_col + term];
      out[row * out_row + rest] = sum;
    }
}

// --- many rows of out ----------------------------------------------------------------------------------------

// The columns [0, width) of b over `terms` terms, as rows of kPanel in `panel`, zero beyond width.
template <typename T>
AEFAST_HD void pack_columns(const T* b, int64_t b_row, int64_t b_col, T* panel, int64_t terms, int64_t width) {
  using V = Vector<T>;
  constexpr int64_t kLanes = sizeof(V) / sizeof(T), kPanel = 2 * kLanes;
  if (width < kPanel)
    for (int64_t index = 0; index < terms * kPanel; ++index) panel[index] = T(0);
  if (b_col == 1) {
    for (int64_t term = 0; term < terms; ++term) {
      if (width == kPanel) {
        write(panel + term * kPanel, read<V>(b + term * b_row));
        write(panel + term * kPanel + kLanes, read<V>(b + term * b_row + kLanes));
      } else {
        for (int64_t col = 0; col < width; ++col) panel[term * kPanel + col] = b[term * b_row + col];
      }
    }
    return;
  }
  int64_t col = 0;
  for (; col + kLanes <= width; col += kLanes) {
    int64_t term = 0;
    for (; term + kLanes <= terms; term += kLanes) {
      V square[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) square[lane] = read<V>(b + (col + lane) * b_col + term);
      transpose<T>(square);
      for (int64_t lane = 0; lane < kLanes; ++lane) write(panel + (term + lane) * kPanel + col, square[lane]);
    }
    for (; term < terms; ++term)
      for (int64_t lane = 0; lane < kLanes; ++lane) panel[term * kPanel + col + lane] = b[(col + lane) * b_col + term];
  }
  for (; col < width; ++col)
    for (int64_t term = 0; term < terms; ++term) panel[term * kPanel + col] = b[col * b_col + term];
}

// a's columns are contiguous. Each tile's rows become, term by term, contiguous in `packed`.
template <typename T>
AEFAST_HD void pack_tiles(const T* a, int64_t a_col, T* packed, int64_t rows, int64_t terms) {
  for_tile_rows(rows, [&](int64_t row, auto count) {
    constexpr int kRows = decltype(count)::value;
    T* to = packed + row * terms;
    for (int64_t term = 0; term < terms; ++term)
      for (int index = 0; index < kRows; ++index) to[term * kRows + index] = a[term * a_col + row + index];
  });
}

template <typename T>
void many_rows(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t b_col, T* out,
               int64_t out_row, int64_t rows, int64_t inner, int64_t cols, T* workspace) {
  using V = Vector<T>;
  constexpr int64_t kLanes = sizeof(V) / sizeof(T), kPanel = 2 * kLanes;
  alignas(kVectorBytes) T panel[kTerms * kPanel];
  // With few terms an element is read once or twice, from wherever it is.
  const bool pack_a = a_col != 1 && inner >= kLeastTermsToPack, pack_b = b_col != 1 || inner >= kLeastTermsToPack;
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t block = rows - first < kBlockRows ? rows - first : kBlockRows;
    int64_t begin = 0;
    do {
      const int64_t terms = inner - begin < kTerms ? inner - begin : kTerms;
      const bool add = begin > 0;
      const T* left = a + first * a_row + begin * a_col;
      if (pack_a) {
        pack_tiles(left, a_col, workspace, block, terms);
        left = workspace;
      }
      for (int64_t col = 0; col < cols; col += kPanel) {
        const int64_t width = cols - col < kPanel ? cols - col : kPanel;
        const T* right = b + begin * b_row + col * b_col;
        int64_t right_row = b_row;
        if (pack_b || width < kPanel) {
          pack_columns(right, b_row, b_col, panel, terms, width);
          right = panel;
          right_row = kPanel;
        }
        for_tile_rows(block, [&](int64_t row, auto count) {
          constexpr int kRows = decltype(count)::value;
          const T* rows_of_a = left + row * (pack_a ? terms : a_row);
          const int64_t row_stride = pack_a ? 1 : a_row, col_stride = pack_a ? kRows : a_col;
          T* to = out + (first + row) * out_row + col;
          if (width == kPanel) {
            tile<kRows, 2, V>(rows_of_a, row_stride, col_stride, right, right_row, to, out_row, terms, add);
            return;
          }
          if (width == kLanes) {
            tile<kRows, 1, V>(rows_of_a, row_stride, col_stride, right, right_row, to, out_row, terms, add);
            return;
          }
          T edge[kRows * kPanel];
          if (width < kLanes)
            tile<kRows, 1, V>(rows_of_a, row_stride, col_stride, right, right_row, edge, kPanel, terms, false);
          else
            tile<kRows, 2, V>(rows_of_a, row_stride, col_stride, right, right_row, edge, kPanel, terms, false);
          for (int index = 0; index < kRows; ++index)
            for (int64_t lane = 0; lane < width; ++lane) {
              T& element = to[index * out_row + lane];
              element = add ? element + edge[index * kPanel + lane] : edge[index * kPanel + lane];
            }
        });
      }
      begin += terms;
    } while (begin < inner);
  }
}

template <typename T>
void product_of(ProductOperand left, ProductOperand right, T* out, int64_t out_row, int64_t rows, int64_t inner,
                int64_t cols, T* workspace) {
  const T* a = static_cast<const T*>(left.data);
  const T* b = static_cast<const T*>(right.data);
  const int64_t a_row = left.row_stride, a_col = left.col_stride, b_row = right.row_stride, b_col = right.col_stride;
  if (rows >= 4 || (b_col != 1 && a_col != 1))
    return many_rows(a, a_row, a_col, b, b_row, b_col, out, out_row, rows, inner, cols, workspace);
  for_tile_rows(rows, [&](int64_t row, auto count) {
    constexpr int kRows = decltype(count)::value;
    if constexpr (kRows <= 2) {
      const T* rows_of_a = a + row * a_row;
      if (b_col == 1)
        few_rows<kRows>(rows_of_a, a_row, a_col, b, b_row, out + row * out_row, out_row, inner, cols);
      else
        row_of_dots<kRows>(rows_of_a, a_row, b, b_col, out + row * out_row, out_row, inner, cols);
    }
  });
}

void product(Scalar scalar, ProductOperand a, ProductOperand b, void* out, int64_t out_stride, int64_t rows,
             int64_t inner, int64_t cols, void* workspace) {
  if (scalar == Scalar::float64)
    product_of(a, b, static_cast<double*>(out), out_stride, rows, inner, cols, static_cast<double*>(workspace));
  else
    product_of(a, b, static_cast<float*>(out), out_stride, rows, inner, cols, static_cast<float*>(workspace));
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {product, kBlockRows * kTerms * sizeof(double)};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
