// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "product.h"

#include <type_traits>

#include "vector.h"
#if defined(__AVX512BF16__)
#include "matrix_unit.h"
#endif

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

// A tile's rows. With two vectors a row its sums, and what they are made from, fill 15 of AVX2's 16 registers; of the
// 32 that AVX-512 has, 8 rows take 19, and are the more often a divisor.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 6;
// Terms that are added up in registers before they are added to memory, which keeps rounding errors from growing with
// the number of terms; so many rows of b's columns fit beside a tile of a into the first-level cache.
constexpr int64_t kTerms = 272;
// So many rows of b, read from where they are, lie in pages that the processor keeps the addresses of, and each row is
// read on where the last columns ended.
constexpr int64_t kTermsInPlace = 64;
constexpr int64_t kLeastTermsToPack = 8;
// A large product of so few terms is mostly writing, and goes through out by rows, as memory likes it best.
constexpr int64_t kMostTermsOfWriting = 32, kLeastBytesOfWriting = 512 << 10;
// With so few, b's rows stay in the first-level cache, and a row of out is written at once.
constexpr int64_t kMostTermsOfRow = 4;
// Rows of a whose terms stay in the second-level cache while all of b's columns pass.
constexpr int64_t kBlockRows = 256;

// As many elements as V has, in its type.
template <typename V, typename T>
AEFAST_HD V widened(const T* from) {
  return read<V>(from);
}
template <typename V>
AEFAST_HD V widened(const BFloat16* from) {
  if constexpr (std::is_arithmetic_v<V>) {
    return load(*from);
  } else {
    const auto halves = read<Vector<uint16_t, sizeof(V) / 2>>(from);
    return reinterpret_cast<V>(__builtin_convertvector(halves, Vector<uint32_t, sizeof(V)>) << 16);
  }
}

// out (kRows, kVectors * lanes) = or += a b over `inner` terms; b's rows are contiguous.
template <int kRows, int kVectors, typename V, typename T, typename B>
AEFAST_HD void tile(const T* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, T* out, int64_t out_row,
                    int64_t inner, bool add) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kVectors] = {};
  for (int64_t term = 0; term < inner; ++term) {
    V right[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) right[vector] = widened<V>(b + term * b_row + vector * kLanes);
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

// Asks for `count` elements to be brought into the cache.
template <typename T>
AEFAST_HD void prefetch(const T* from, int64_t count) {
  for (int64_t at = 0; at < count; at += 64 / sizeof(T)) __builtin_prefetch(from + at);
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

// b's rows are contiguous; `rows` is a multiple of kRows, which is small. A few rows of b, which stay in the
// second-level cache, pass all rows of a.
template <int kRows, typename T, typename B>
AEFAST_HD void few_rows(const T* a, int64_t a_row, int64_t a_col, const B* b, int64_t b_row, T* out, int64_t out_row,
                        int64_t rows, int64_t inner, int64_t cols, bool add) {
  int64_t begin = 0;
  do {
    const int64_t terms = inner - begin < kTermsInPlace ? inner - begin : kTermsInPlace;
    const T* const left = a + begin * a_col;
    const B* const right = b + begin * b_row;
    int64_t col = 0;
    const auto columns = [&](auto vector, auto count) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(count)::value, kWidth = kVectors * sizeof(vector) / sizeof(T);
      for (; col + kWidth <= cols; col += kWidth)
        for (int64_t row = 0; row < rows; row += kRows)
          tile<kRows, kVectors, decltype(vector)>(left + row * a_row, a_row, a_col, right + col, b_row,
                                                  out + row * out_row + col, out_row, terms, add);
    };
    // As many sums for few rows as for many hide the latency of one.
    columns(Vector<T>(), std::integral_constant<int, 12 / kRows>());
    columns(Vector<T>(), std::integral_constant<int, 4>());
    columns(Vector<T>(), std::integral_constant<int, 1>());
    if constexpr (kVectorBytes > 32) columns(Vector<T, 32>(), std::integral_constant<int, 1>());
    if constexpr (kVectorBytes > 16) columns(Vector<T, 16>(), std::integral_constant<int, 1>());
    columns(T(), std::integral_constant<int, 1>());
    begin += terms;
    add = true;
  } while (begin < inner);
}

// What a shuffle of two vectors of T takes.
template <typename T, typename V>
using Indices = Vector<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, sizeof(V)>;

// The lanes of kLanes vectors as a square matrix, transposed: blocks off the diagonal change places, at each size.
template <typename T, typename V, int kSize = 1>
AEFAST_HD void transpose(V* rows) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  if constexpr (kSize < kLanes) {
    Indices<T, V> low, high;
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

// Lane i of rows[0] is the sum of the lanes of rows[i], of kLanes vectors: at each size two vectors' halves are added,
// the one as they lie, the other crosswise.
template <typename T, typename V, int kSize = 1>
AEFAST_HD void sum_lanes(V* rows) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  if constexpr (kSize < kLanes) {
    Indices<T, V> straight, crosswise;
    for (int lane = 0; lane < kLanes; ++lane) {
      straight[lane] = lane & kSize ? kLanes + lane : lane;
      crosswise[lane] = straight[lane] ^ kSize;
    }
    for (int row = 0; row < kLanes; row += 2 * kSize) {
      const V upper = rows[row], lower = rows[row + kSize];
      rows[row] = __builtin_shuffle(upper, lower, straight) + __builtin_shuffle(upper, lower, crosswise);
    }
    sum_lanes<T, V, 2 * kSize>(rows);
  }
}

// out (kRows, kCols) of dot products of contiguous rows of a and b^T; kRows * kCols is a vector's lanes.
template <int kRows, int kCols, typename T, typename B>
AEFAST_HD void dots(const T* a, int64_t a_row, const B* b, int64_t b_col, T* out, int64_t out_row, int64_t inner,
                    bool add) {
  using V = Vector<T, kRows * kCols * sizeof(T)>;
  constexpr int kLanes = kRows * kCols;
  V sums[kLanes] = {};
  int64_t term = 0;
  for (; term + kLanes <= inner; term += kLanes) {
    V left[kRows];
    for (int row = 0; row < kRows; ++row) left[row] = read<V>(a + row * a_row + term);
    for (int col = 0; col < kCols; ++col) {
      const V right = widened<V>(b + col * b_col + term);
      for (int row = 0; row < kRows; ++row) sums[row * kCols + col] += left[row] * right;
    }
  }
  sum_lanes<T>(sums);
  T found[kLanes];
  write(found, sums[0]);
  for (; term < inner; ++term)
    for (int row = 0; row < kRows; ++row)
      for (int col = 0; col < kCols; ++col)
        found[row * kCols + col] += a[row * a_row + term] * load(b[col * b_col + term]);
  using Row = Vector<T, kCols * sizeof(T)>;
  for (int row = 0; row < kRows; ++row) {
    T* const to = out + row * out_row;
    const auto sum = read<Row>(found + row * kCols);
    write(to, add ? read<Row>(to) + sum : sum);
  }
}

// `rows` is a multiple of kRows. A few columns of b, which stay in the first-level cache, pass all rows of a.
template <int kRows, typename T, typename B>
AEFAST_HD void rows_of_dots(const T* a, int64_t a_row, const B* b, int64_t b_col, T* out, int64_t out_row, int64_t rows,
                            int64_t inner, int64_t cols, bool add) {
  constexpr int kCols = kVectorBytes / sizeof(T) / kRows;
  int64_t col = 0;
  for (; col + kCols <= cols; col += kCols) {
    // Each pass but a single one asks for a part of the columns that follow.
    const int64_t next = rows > kRows && col + 2 * kCols <= cols ? col + kCols : cols;
    for (int64_t row = 0, term = 0; row < rows; row += kRows) {
      const int64_t end = inner * (row + kRows) / rows;
      for (int64_t one = next; one < cols && one < next + kCols; ++one) prefetch(b + one * b_col + term, end - term);
      term = end;
      dots<kRows, kCols>(a + row * a_row, a_row, b + col * b_col, b_col, out + row * out_row + col, out_row, inner, add);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t rest = col; rest < cols; ++rest) {
      T sum = T(0);
      for (int64_t term = 0; term < inner; ++term) sum += a[row * a_row + term] * load(b[rest * b_col + term]);
      T& element = out[row * out_row + rest];
      element = add ? element + sum : sum;
    }
}

// --- many rows of out ----------------------------------------------------------------------------------------

// The columns [0, width) of b over `terms` terms, as rows of `kWidth` in `panel`, zero beyond width.
template <int64_t kWidth, typename V, typename T>
AEFAST_HD void pack_columns(const T* b, int64_t b_row, int64_t b_col, T* panel, int64_t terms, int64_t width) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  if (width < kWidth)
    for (int64_t index = 0; index < terms * kWidth; ++index) panel[index] = T(0);
  if (b_col == 1) {
    for (int64_t term = 0; term < terms; ++term) {
      if (width == kWidth) {
        for (int64_t col = 0; col < kWidth; col += kLanes) write(panel + term * kWidth + col, read<V>(b + term * b_row + col));
      } else {
        for (int64_t col = 0; col < width; ++col) panel[term * kWidth + col] = b[term * b_row + col];
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
      for (int64_t lane = 0; lane < kLanes; ++lane) write(panel + (term + lane) * kWidth + col, square[lane]);
    }
    for (; term < terms; ++term)
      for (int64_t lane = 0; lane < kLanes; ++lane) panel[term * kWidth + col + lane] = b[(col + lane) * b_col + term];
  }
  for (; col < width; ++col)
    for (int64_t term = 0; term < terms; ++term) panel[term * kWidth + col] = b[col * b_col + term];
}

// With few terms an element is read once or twice, from wherever it is; and the rows of a single tile lie together.
AEFAST_HD bool packs_tiles(int64_t a_col, int64_t rows, int64_t inner) {
  return a_col != 1 && inner >= kLeastTermsToPack && rows > kTileRows;
}

// a's columns are contiguous. Each tile's rows become, term by term, contiguous in `packed`. A few terms of all tiles
// are taken at a time: a line of a is read once for the tiles that share it.
template <typename T>
void pack_tiles(const T* a, int64_t a_col, T* packed, int64_t rows, int64_t terms) {
  constexpr int64_t kFewTerms = 16;
  for (int64_t begin = 0; begin < terms; begin += kFewTerms) {
    const int64_t end = terms - begin < kFewTerms ? terms : begin + kFewTerms;
    for_tile_rows(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      T* to = packed + row * terms;
      for (int64_t term = begin; term < end; ++term)
        for (int index = 0; index < kRows; ++index) to[term * kRows + index] = a[term * a_col + row + index];
    });
  }
}

// V is as wide as the columns fill.
template <typename V, typename T>
void many_rows(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t b_col, T* out,
               int64_t out_row, int64_t rows, int64_t inner, int64_t cols, bool add_first, T* workspace) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  // Across one page more it takes a twentieth longer.
  alignas(4096) T panel[kTerms * 2 * kLanes];
  const bool pack_a = packs_tiles(a_col, rows, inner);
  const bool is_writing = b_col == 1 && inner <= kMostTermsOfWriting &&
                          rows * cols * static_cast<int64_t>(sizeof(T)) >= kLeastBytesOfWriting;
  // What is summed at a time is the same for all the parts of a product, of whatever columns; a part of few has the rows
  // of b near each other, and reads as many in place.
  const bool is_long = rows >= 4 * kTileRows;
  const bool pack_b = b_col != 1 || (!is_writing && is_long && inner >= kLeastTermsToPack && cols > 2 * kLanes);
  const int64_t limit = pack_b || is_long ? kTerms : kTermsInPlace;
  // Of one size: a short last part would spend its time on reading out and writing it again.
  const int64_t parts = inner > limit ? (inner + limit - 1) / limit : 1;
  const int64_t most_terms = parts > 1 ? (inner + parts - 1) / parts : limit;
  // Of out, so many columns ahead of those that are written.
  constexpr int64_t kAheadOfWriting = 8 * kLanes;
  const int64_t most_rows = is_writing ? kTileRows : kBlockRows;
  for (int64_t first = 0; first < rows; first += most_rows) {
    const int64_t block = rows - first < most_rows ? rows - first : most_rows;
    int64_t begin = 0;
    do {
      const int64_t terms = inner - begin < most_terms ? inner - begin : most_terms;
      const bool add = add_first || begin > 0;
      const T* left = a + first * a_row + begin * a_col;
      if (pack_a) {
        pack_tiles(left, a_col, workspace, block, terms);
        left = workspace;
      }
      // The columns [col, col + width) of out, of which vectors' lanes beyond width are nobody's.
      const auto columns = [&](int64_t col, auto vectors, int64_t width) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::value;
        const T* right = b + begin * b_row + col * b_col;
        int64_t right_row = b_row;
        if (pack_b || width < kLanes) {
          pack_columns<kVectors * kLanes, V>(right, b_row, b_col, panel, terms, width);
          right = panel;
          right_row = kVectors * kLanes;
        }
        // While tiles are multiplied, what the next columns are in is asked for: rows of b, or columns.
        const int64_t next = col + width, next_width = cols - next < width ? cols - next : width;
        const int64_t runs = next_width <= 0 || is_writing ? 0 : b_col == 1 ? terms : next_width;
        int64_t asked = 0;
        for_tile_rows(block, [&](int64_t row, auto count) __attribute__((always_inline)) {
          constexpr int kRows = decltype(count)::value;
          for (; asked * block < runs * (row + kRows); ++asked)
            if (b_col == 1)
              prefetch(b + (begin + asked) * b_row + next, next_width);
            else
              prefetch(b + (next + asked) * b_col + begin, terms);
          const int64_t ahead = col + kAheadOfWriting;
          if (is_writing && ahead + width <= cols)
            for (int index = 0; index < kRows; ++index) prefetch(out + (first + row + index) * out_row + ahead, width);
          const T* rows_of_a = left + row * (pack_a ? terms : a_row);
          const int64_t row_stride = pack_a ? 1 : a_row, col_stride = pack_a ? kRows : a_col;
          T* to = out + (first + row) * out_row + col;
          if (width >= kLanes) {
            tile<kRows, kVectors, V>(rows_of_a, row_stride, col_stride, right, right_row, to, out_row, terms, add);
            return;
          }
          T edge[kRows * kLanes];
          tile<kRows, 1, V>(rows_of_a, row_stride, col_stride, right, right_row, edge, kLanes, terms, false);
          for (int index = 0; index < kRows; ++index)
            for (int64_t lane = 0; lane < width; ++lane) {
              T& element = to[index * out_row + lane];
              element = add ? element + edge[index * kLanes + lane] : edge[index * kLanes + lane];
            }
        });
      };
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      int64_t col = 0;
      for (; col + 2 * kLanes <= cols; col += 2 * kLanes) columns(col, two, 2 * kLanes);
      if (col + kLanes <= cols) {
        columns(col, one, kLanes);
        col += kLanes;
      }
      if (col < cols) {
        // Where nothing is added to out, the last vector may overlap the one before: it writes the same again.
        if (!add && inner <= most_terms && cols >= kLanes)
          columns(cols - kLanes, one, kLanes);
        else
          columns(col, one, cols - col);
      }
      begin += terms;
    } while (begin < inner);
  }
}

// No more than kFewRows of them; a's columns are contiguous, or b's are.
template <typename T, typename B>
void product_of_few(ProductOperand left, ProductOperand right, T* out, int64_t out_row, int64_t rows, int64_t inner,
                    int64_t cols, bool add) {
  const T* a = static_cast<const T*>(left.data);
  const B* b = static_cast<const B*>(right.data);
  const int64_t a_row = left.row_stride, a_col = left.col_stride, b_row = right.row_stride, b_col = right.col_stride;
  int64_t row = 0;
  const auto some = [&](auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    const int64_t count = (rows - row) / kRows * kRows;
    if (count == 0) return;
    if (b_col == 1)
      few_rows<kRows>(a + row * a_row, a_row, a_col, b, b_row, out + row * out_row, out_row, count, inner, cols, add);
    else
      rows_of_dots<kRows>(a + row * a_row, a_row, b, b_col, out + row * out_row, out_row, count, inner, cols, add);
    row += count;
  };
  constexpr int kLanes = kVectorBytes / sizeof(T);
  if constexpr (kLanes >= 4) some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}

template <typename T>
void product_of(ProductOperand left, ProductOperand right, T* out, int64_t out_row, int64_t rows, int64_t inner,
                int64_t cols, bool add, T* workspace) {
  const T* a = static_cast<const T*>(left.data);
  const T* b = static_cast<const T*>(right.data);
  const int64_t a_row = left.row_stride, a_col = left.col_stride, b_row = right.row_stride, b_col = right.col_stride;
  if (b_col == 1 && inner <= kMostTermsOfRow) {
    for (int64_t row = 0; row < rows; ++row)
      few_rows<1>(a + row * a_row, a_row, a_col, b, b_row, out + row * out_row, out_row, 1, inner, cols, add);
    return;
  }
  if (rows <= (b_col == 1 ? kFewRowsOfTiles : kFewRows) && (a_col == 1 || b_col == 1))
    return product_of_few<T, T>(left, right, out, out_row, rows, inner, cols, add);
  const int64_t bytes = cols * static_cast<int64_t>(sizeof(T));
  const auto run = [&](auto vector) {
    many_rows<decltype(vector)>(a, a_row, a_col, b, b_row, b_col, out, out_row, rows, inner, cols, add, workspace);
  };
  if (bytes >= kVectorBytes) return run(Vector<T>());
  if constexpr (kVectorBytes > 32)
    if (bytes >= 32) return run(Vector<T, 32>());
  return run(Vector<T, 16>());
}

void product(Scalar scalar, [[maybe_unused]] Unit unit, ProductOperand a, ProductOperand b, void* out,
             int64_t out_stride, int64_t rows, int64_t inner, int64_t cols, bool add, void* workspace) {
#if defined(__AVX512BF16__)
  float* const sums = static_cast<float*>(out);
  if (unit == Unit::matrix_rounding) {
    matrix_unit::multiply<1>(a, b, sums, out_stride, rows, inner, cols, add, workspace);
    return;
  }
#endif
#if defined(__AMX_BF16__)
  if (unit == Unit::matrix &&
      matrix_unit::multiply<matrix_unit::kExactParts>(a, b, sums, out_stride, rows, inner, cols, add, workspace))
    return;
#endif
  if (b.scalar == Scalar::bfloat16)
    product_of_few<float, BFloat16>(a, b, static_cast<float*>(out), out_stride, rows, inner, cols, add);
  else if (scalar == Scalar::float64)
    product_of(a, b, static_cast<double*>(out), out_stride, rows, inner, cols, add, static_cast<double*>(workspace));
  else
    product_of(a, b, static_cast<float*>(out), out_stride, rows, inner, cols, add, static_cast<float*>(workspace));
}

size_t workspace_bytes(Scalar scalar, [[maybe_unused]] Unit unit, ProductOperand a, int64_t rows, int64_t inner,
                       [[maybe_unused]] int64_t cols) {
  size_t bytes = 0;
  if (packs_tiles(a.col_stride, rows, inner))
    bytes = static_cast<size_t>((rows < kBlockRows ? rows : kBlockRows) * (inner < kTerms ? inner : kTerms) *
                                size_of(scalar));
#if defined(__AVX512BF16__)
  if (unit == Unit::matrix_rounding) return matrix_unit::workspace_bytes<1>(rows, inner, cols);
#endif
#if defined(__AMX_BF16__)
  // The unit leaves to vectors what is not in its range.
  const size_t packed =
      unit == Unit::matrix ? matrix_unit::workspace_bytes<matrix_unit::kExactParts>(rows, inner, cols) : 0;
  if (bytes < packed) bytes = packed;
#endif
  return bytes;
}

bool suits([[maybe_unused]] Unit unit, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t inner,
           [[maybe_unused]] int64_t cols) {
#if defined(__AVX512BF16__)
#if !defined(__AMX_BF16__)
  if (unit == Unit::matrix) return false;
#endif
  // Packing takes the time of some 40 rows and columns, or 20 in one part, and a tile 32 terms.
  constexpr int64_t kLeastTerms = 32;
  const int64_t lines_of_packing = unit == Unit::matrix ? 40 : 20;
  return inner >= kLeastTerms && lines_of_packing * (rows + cols) <= rows * cols;
#else
  return false;
#endif
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {product, workspace_bytes, suits};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
