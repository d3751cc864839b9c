// Products of float32 matrices by the processor's matrix unit: Intel's AMX, which multiplies tiles of bfloat16 and adds
// in float32. Included by product.cpp where the compiler has its instructions, or those that do the same with vectors
// (AVX512-BF16, of AMD from Zen 4 on, too).
//
// A float32, of 24 bits, is exactly the sum of three bfloat16, of 8 bits. Of the nine products of two such sums the six
// largest are taken: the other three are below 2^-25 of the whole, less than its own rounding in float32. (Henry, Tang
// and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH
// 2019.) The unit is 16 times as fast as two float32 vector units, so that six products are still 2.7 times as fast.
//
// Where bfloat16's precision will do, and where operands are bfloat16, the first part alone is taken, and one product. The
// vectors' instruction does that, at twice the speed of float32; six products of them would be slower.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "vector.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace matrix_unit {

// A tile has 16 rows of 64 bytes: 16 rows of a with 32 terms each; or of b 16 columns, row by row two terms of each; or
// 16 rows of 16 sums. 32 rows or columns are packed as a panel: 32 terms after 32 terms, in these part after part, in a
// part two tiles.
constexpr int kExactParts = 3;
constexpr int64_t kTile = 16, kRowBytes = 64, kTileBytes = kTile * kRowBytes, kPanel = 2 * kTile, kTermsOfStep = 32;
template <int kParts>
constexpr int64_t kStepBytes = kParts * 2 * kTileBytes;

// The sums of so many rows and columns stay in the second-level cache beside as many steps of the columns, and of a few
// of the rows, as they are packed; a panel of so many steps, and a step of another, in the first-level one.
constexpr int64_t kRows = 512, kCols = 1024, kPackedRows = 128, kMostTermsInPlace = 1024;
template <int kParts>
constexpr int64_t kMostSteps = 12 / kParts;

AEFAST_HD int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

template <int kParts>
AEFAST_HD int64_t panels_bytes(int64_t outer, int64_t terms) {
  return round_up(outer, kPanel) / kPanel * (round_up(terms, kTermsOfStep) / kTermsOfStep) * kStepBytes<kParts>;
}

// --- packing ---------------------------------------------------------------------------------------------------

AEFAST_HD __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1);
}

AEFAST_HD __m512 load_16(const float* from) { return _mm512_loadu_ps(from); }
AEFAST_HD __m256i load_16(const BFloat16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// Of which `count` are there, and the others 0.
AEFAST_HD __m512 load_16(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), from); }
AEFAST_HD __m256i load_16(const BFloat16* from, int64_t count) {
  return _mm256_maskz_loadu_epi16(lanes(count), from);
}

// Splits two vectors of 16 numbers into `kParts` of 32 bfloat16: all of the first vector's and then the second's, or one
// of each by turns.
template <int kParts>
struct Splitter;

template <>
struct Splitter<kExactParts> {
  __m512i order;
  __m512i largest = _mm512_setzero_si512();

  // The words' upper halves.
  AEFAST_HD explicit Splitter(bool by_turns) {
    alignas(64) uint16_t from[32];
    for (int index = 0; index < 32; ++index)
      from[index] = static_cast<uint16_t>(by_turns ? 32 * (index % 2) + index / 2 * 2 + 1 : 2 * index + 1);
    order = _mm512_load_si512(from);
  }

  AEFAST_HD void operator()(__m512 first, __m512 second, __m512i parts[kExactParts]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), half = _mm512_set1_epi32(0x8000);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(first), magnitude));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(second), magnitude));
#pragma GCC unroll 3
    for (int part = 0; part < kExactParts; ++part) {
      __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
      // Rounded to nearest, a part leaves a bit less, of either sign. The last leaves nothing.
      if (part < kExactParts - 1) {
        a = _mm512_add_epi32(a, half);
        b = _mm512_add_epi32(b, half);
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
      }
      parts[part] = _mm512_permutex2var_epi16(a, order, b);
    }
  }

  // The bits of the greatest magnitude.
  AEFAST_HD uint32_t most() const { return _mm512_reduce_max_epu32(largest); }
};

template <>
struct Splitter<1> {
  __m512i order;
  bool by_turns;

  AEFAST_HD explicit Splitter(bool by_turns) : by_turns(by_turns) {
    alignas(64) uint16_t from[32];
    for (int index = 0; index < 32; ++index) from[index] = static_cast<uint16_t>(16 * (index % 2) + index / 2);
    order = _mm512_load_si512(from);
  }

  AEFAST_HD void operator()(__m512 first, __m512 second, __m512i parts[1]) const {
    parts[0] = in_order(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  }

  AEFAST_HD void operator()(__m256i first, __m256i second, __m512i parts[1]) const {
    parts[0] = in_order(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
  }

  AEFAST_HD uint32_t most() const { return 0; }

 private:
  AEFAST_HD __m512i in_order(__m512i both) const {
    return by_turns ? _mm512_permutexvar_epi16(order, both) : both;
  }
};

// The 16 x 16 words of `rows`, transposed.
AEFAST_HD void transpose_words(__m512i* rows) {
  __m512i mixed[16];
  for (int row = 0; row < 16; row += 2) {
    mixed[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
    mixed[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
  }
  for (int row = 0; row < 16; row += 4) {
    rows[row] = _mm512_unpacklo_epi64(mixed[row], mixed[row + 2]);
    rows[row + 1] = _mm512_unpackhi_epi64(mixed[row], mixed[row + 2]);
    rows[row + 2] = _mm512_unpacklo_epi64(mixed[row + 1], mixed[row + 3]);
    rows[row + 3] = _mm512_unpackhi_epi64(mixed[row + 1], mixed[row + 3]);
  }
  for (int row = 0; row < 4; ++row) {
    mixed[row] = _mm512_shuffle_i32x4(rows[row], rows[row + 4], 0x88);
    mixed[row + 4] = _mm512_shuffle_i32x4(rows[row], rows[row + 4], 0xdd);
    mixed[row + 8] = _mm512_shuffle_i32x4(rows[row + 8], rows[row + 12], 0x88);
    mixed[row + 12] = _mm512_shuffle_i32x4(rows[row + 8], rows[row + 12], 0xdd);
  }
  for (int row = 0; row < 4; ++row) {
    rows[row] = _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0x88);
    rows[row + 8] = _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0xdd);
    rows[row + 4] = _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0x88);
    rows[row + 12] = _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0xdd);
  }
}

// A tile of each part, of up to 16 outer indices (rows of a, columns of b) and up to 32 terms. `from` has terms side by
// side, `stride` between outer indices, or outer indices side by side, `stride` between terms. What is beyond `outer`
// is left to chance, as are the sums it goes into; what is beyond `terms` is 0. The next panel, or the next step, is
// fetched ahead: its rows are too many and too short for the processor to see them coming.
template <int kParts, bool kTermsSideBySide, bool kTransposed, typename T>
AEFAST_HD void pack_tile(const T* from, int64_t stride, int64_t outer, int64_t terms, char* to,
                         Splitter<kParts>& split) {
  __m512i tile[kParts][16];
  const bool is_whole = outer == kTile && terms == kTermsOfStep;
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    decltype(load_16(from)) first, second;
    if constexpr (kTermsSideBySide) {
      const T* const at = from + row * stride;
      _mm_prefetch(at + kPanel * stride, _MM_HINT_T0);
      if constexpr (sizeof(T) == 4) _mm_prefetch(at + kPanel * stride + 16, _MM_HINT_T0);
      const int64_t count = row < outer ? terms : 0;
      first = is_whole ? load_16(at) : load_16(at, count);
      second = is_whole ? load_16(at + 16) : load_16(at + 16, count - 16);
    } else {
      const T* const at = from + 2 * row * stride;
      _mm_prefetch(at + kTermsOfStep * stride, _MM_HINT_T0);
      _mm_prefetch(at + (kTermsOfStep + 1) * stride, _MM_HINT_T0);
      first = is_whole ? load_16(at) : load_16(at, 2 * row < terms ? outer : 0);
      second = is_whole ? load_16(at + stride) : load_16(at + stride, 2 * row + 1 < terms ? outer : 0);
    }
    __m512i parts[kParts];
    split(first, second, parts);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      if constexpr (kTransposed)
        tile[part][row] = parts[part];
      else
        _mm512_store_si512(to + part * 2 * kTileBytes + row * kRowBytes, parts[part]);
    }
  }
  if constexpr (kTransposed)
    for (int part = 0; part < kParts; ++part) {
      transpose_words(tile[part]);
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row)
        _mm512_store_si512(to + part * 2 * kTileBytes + row * kRowBytes, tile[part][row]);
    }
}

// The panels of a matrix of `outer` indices and `terms` terms. Returns the bits of the greatest magnitude in it, where
// there are several parts.
template <int kParts, bool kTermsSideBySide, bool kTransposed, typename T>
uint32_t pack(const T* from, int64_t stride, int64_t outer, int64_t terms, char* to) {
  Splitter<kParts> split(!kTermsSideBySide);
  for (int64_t panel = 0; panel < outer; panel += kPanel)
    for (int64_t term = 0; term < terms; term += kTermsOfStep, to += kStepBytes<kParts>)
      for (int64_t first = panel; first < panel + kPanel && first < outer; first += kTile)
        pack_tile<kParts, kTermsSideBySide, kTransposed>(
            from + (kTermsSideBySide ? first * stride + term : term * stride + first), stride,
            outer - first < kTile ? outer - first : kTile, terms - term < kTermsOfStep ? terms - term : kTermsOfStep,
            to + (first - panel) / kTile * kTileBytes, split);
  return split.most();
}

template <int kParts, typename T>
AEFAST_HD uint32_t pack_left_of(ProductOperand a, int64_t row, int64_t term, int64_t rows, int64_t terms, char* to) {
  const T* const from = static_cast<const T*>(a.data) + row * a.row_stride + term * a.col_stride;
  return a.col_stride == 1 ? pack<kParts, true, false>(from, a.row_stride, rows, terms, to)
                           : pack<kParts, false, true>(from, a.col_stride, rows, terms, to);
}

template <int kParts, typename T>
AEFAST_HD uint32_t pack_right_of(ProductOperand b, int64_t term, int64_t col, int64_t terms, int64_t cols, char* to) {
  const T* const from = static_cast<const T*>(b.data) + term * b.row_stride + col * b.col_stride;
  return b.row_stride == 1 ? pack<kParts, true, true>(from, b.col_stride, cols, terms, to)
                           : pack<kParts, false, false>(from, b.row_stride, cols, terms, to);
}

template <int kParts>
AEFAST_HD uint32_t pack_left(ProductOperand a, int64_t row, int64_t term, int64_t rows, int64_t terms, char* to) {
  if constexpr (kParts == 1)
    if (a.scalar == Scalar::bfloat16) return pack_left_of<kParts, BFloat16>(a, row, term, rows, terms, to);
  return pack_left_of<kParts, float>(a, row, term, rows, terms, to);
}

template <int kParts>
AEFAST_HD uint32_t pack_right(ProductOperand b, int64_t term, int64_t col, int64_t terms, int64_t cols, char* to) {
  if constexpr (kParts == 1)
    if (b.scalar == Scalar::bfloat16) return pack_right_of<kParts, BFloat16>(b, term, col, terms, cols, to);
  return pack_right_of<kParts, float>(b, term, col, terms, cols, to);
}

// --- products --------------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

// Within its life the tiles are as `multiply_panels` takes them.
class Tiles {
 public:
  AEFAST_HD Tiles() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  AEFAST_HD ~Tiles() { _tile_release(); }
};

// Tiles 0 and 1 are the sums of the upper rows, 2 and 3 those of the lower, left and right columns; 4 and 5 are the
// rows of a, 6 and 7 the columns of b. The instructions take no variables.
#define AEFAST_TILES(upper_left, upper_right, lower_left, lower_right) \
  upper_left;                                                          \
  if constexpr (kColTiles == 2) upper_right;                           \
  if constexpr (kRowTiles == 2) lower_left;                            \
  if constexpr (kRowTiles == 2 && kColTiles == 2) lower_right;
#define AEFAST_LEFT(part)                                      \
  _tile_loadd(4, a + (part) * 2 * kTileBytes, kRowBytes);      \
  if constexpr (kRowTiles == 2) _tile_loadd(5, a + ((part) * 2 + 1) * kTileBytes, kRowBytes);
#define AEFAST_RIGHT(part)                                     \
  _tile_loadd(6, b + (part) * 2 * kTileBytes, kRowBytes);      \
  if constexpr (kColTiles == 2) _tile_loadd(7, b + ((part) * 2 + 1) * kTileBytes, kRowBytes);
#define AEFAST_MULTIPLY                                                                          \
  AEFAST_TILES(_tile_dpbf16ps(0, 4, 6), _tile_dpbf16ps(1, 4, 7), _tile_dpbf16ps(2, 5, 6),        \
               _tile_dpbf16ps(3, 5, 7))

// out = or += a panel of a times one of b, of whole tiles.
template <int kParts, int kRowTiles, int kColTiles>
AEFAST_HD void multiply_panels(const char* a, const char* b, int64_t steps, float* out, int64_t out_stride, bool add) {
  const int64_t row_bytes = out_stride * static_cast<int64_t>(sizeof(float));
  float* const lower = out + kTile * out_stride;
  if (add) {
    AEFAST_TILES(_tile_loadd(0, out, row_bytes), _tile_loadd(1, out + kTile, row_bytes),
                 _tile_loadd(2, lower, row_bytes), _tile_loadd(3, lower + kTile, row_bytes))
  } else {
    AEFAST_TILES(_tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3))
  }
  for (int64_t step = 0; step < steps; ++step, a += kStepBytes<kParts>, b += kStepBytes<kParts>) {
    AEFAST_LEFT(0)
    if constexpr (kParts == kExactParts) {
      AEFAST_RIGHT(2)
      AEFAST_MULTIPLY
      AEFAST_RIGHT(1)
      AEFAST_MULTIPLY
    }
    AEFAST_RIGHT(0)
    AEFAST_MULTIPLY
    if constexpr (kParts == kExactParts) {
      AEFAST_LEFT(1)
      AEFAST_MULTIPLY
      AEFAST_RIGHT(1)
      AEFAST_MULTIPLY
      AEFAST_LEFT(2)
      AEFAST_RIGHT(0)
      AEFAST_MULTIPLY
    }
  }
  AEFAST_TILES(_tile_stored(0, out, row_bytes), _tile_stored(1, out + kTile, row_bytes),
               _tile_stored(2, lower, row_bytes), _tile_stored(3, lower + kTile, row_bytes))
}

#undef AEFAST_TILES
#undef AEFAST_LEFT
#undef AEFAST_RIGHT
#undef AEFAST_MULTIPLY
#else
struct Tiles {};

// out = or += a panel of a times one of b, of whole tiles. Two terms of a row of a are a word, which multiplies those of
// 16 columns of b.
template <int kParts, int kRowTiles, int kColTiles>
AEFAST_HD void multiply_panels(const char* a, const char* b, int64_t steps, float* out, int64_t out_stride, bool add) {
  static_assert(kParts == 1);
  // So many sums fill the vector units, and leave registers to what they are made of.
  constexpr int kRowsTogether = 16 / kColTiles;
  for (int row = 0; row < kRowTiles * kTile; row += kRowsTogether) {
    const char* left = a + row / kTile * kTileBytes + row % kTile * kRowBytes;
    const char* right = b;
    float* const to = out + row * out_stride;
    __m512 sums[kRowsTogether][kColTiles];
    for (int index = 0; index < kRowsTogether; ++index)
      for (int tile = 0; tile < kColTiles; ++tile)
        sums[index][tile] = add ? _mm512_loadu_ps(to + index * out_stride + tile * kTile) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step, left += kStepBytes<kParts>, right += kStepBytes<kParts>)
      for (int pair = 0; pair < kTile; ++pair) {
        __m512i columns[kColTiles];
        for (int tile = 0; tile < kColTiles; ++tile)
          columns[tile] = _mm512_load_si512(right + tile * kTileBytes + pair * kRowBytes);
        for (int index = 0; index < kRowsTogether; ++index) {
          const __m512i terms = _mm512_set1_epi32(read<int32_t>(left + index * kRowBytes + pair * 4));
          for (int tile = 0; tile < kColTiles; ++tile)
            sums[index][tile] = _mm512_dpbf16_ps(sums[index][tile], reinterpret_cast<__m512bh>(terms),
                                                 reinterpret_cast<__m512bh>(columns[tile]));
        }
      }
    for (int index = 0; index < kRowsTogether; ++index)
      for (int tile = 0; tile < kColTiles; ++tile)
        _mm512_storeu_ps(to + index * out_stride + tile * kTile, sums[index][tile]);
  }
}
#endif

// The same of up to 32 rows and columns, as many tiles as they reach into.
template <int kParts>
AEFAST_HD void multiply_whole_tiles(const char* a, const char* b, int64_t steps, float* out, int64_t out_stride,
                                    int64_t rows, int64_t cols, bool add) {
  if (rows > kTile && cols > kTile)
    multiply_panels<kParts, 2, 2>(a, b, steps, out, out_stride, add);
  else if (rows > kTile)
    multiply_panels<kParts, 2, 1>(a, b, steps, out, out_stride, add);
  else if (cols > kTile)
    multiply_panels<kParts, 1, 2>(a, b, steps, out, out_stride, add);
  else
    multiply_panels<kParts, 1, 1>(a, b, steps, out, out_stride, add);
}

// How sums of so many steps come into out.
enum class Sums { replace, add, add_apart };  // apart: summed by themselves first

// The same of no more than these rows and columns.
template <int kParts>
void multiply_tiles(const char* a, const char* b, int64_t steps, float* out, int64_t out_stride, int64_t rows,
                           int64_t cols, Sums how) {
  if (how != Sums::add_apart && rows % kTile == 0 && cols % kTile == 0)
    return multiply_whole_tiles<kParts>(a, b, steps, out, out_stride, rows, cols, how == Sums::add);
  alignas(64) float sums[kPanel * kPanel];
  const auto for_vectors = [&](const auto& body) __attribute__((always_inline)) {
    for (int64_t col = 0; col < cols; col += kTile)
      for (int64_t row = 0; row < rows; ++row)
        body(sums + row * kPanel + col, out + row * out_stride + col, lanes(cols - col));
  };
  if (how == Sums::add)
    for_vectors([](float* sum, const float* from, __mmask16 present) __attribute__((always_inline)) {
      _mm512_store_ps(sum, _mm512_maskz_loadu_ps(present, from));
    });
  multiply_whole_tiles<kParts>(a, b, steps, sums, kPanel, rows, cols, how == Sums::add);
  for_vectors([&](const float* sum, float* to, __mmask16 present) __attribute__((always_inline)) {
    __m512 total = _mm512_load_ps(sum);
    if (how == Sums::add_apart) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(present, to));
    _mm512_mask_storeu_ps(to, present, total);
  });
}

// The bits of the greatest magnitude.
inline uint32_t largest_of(ProductOperand operand, int64_t rows, int64_t cols) {
  const bool by_rows = operand.col_stride == 1;
  const int64_t lines = by_rows ? rows : cols, length = by_rows ? cols : rows;
  const int64_t stride = by_rows ? operand.row_stride : operand.col_stride;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t line = 0; line < lines; ++line) {
    const float* const from = static_cast<const float*>(operand.data) + line * stride;
    for (int64_t at = 0; at < length; at += 16)
      largest = _mm512_max_epu32(
          largest, _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes(length - at), from + at), magnitude));
  }
  return _mm512_reduce_max_epu32(largest);
}

// Whether sums of so many products of numbers up to these (their bits) are as exact as float32's: an infinity's parts, or
// those of what rounds to one, are no numbers, and the unit takes subnormal parts and products for zeros.
AEFAST_HD bool is_exact(uint32_t left, uint32_t right, int64_t inner) {
  constexpr int kBias = 127, kLeast = -80, kLeastOfBoth = -86;
  constexpr uint32_t kMost = 0x7f000000;
  if (left >= kMost || right >= kMost) return false;
  if (left == 0 || right == 0) return true;
  const int a = static_cast<int>(left >> 23) - kBias, b = static_cast<int>(right >> 23) - kBias;
  const int terms = 64 - __builtin_clzll(static_cast<unsigned long long>(inner));
  return a >= kLeast && b >= kLeast && a + b >= kLeastOfBoth && a + b + 2 + terms <= kBias;
}

AEFAST_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Those that are packed at a time: whole steps, and as many each time as can be, since each time costs the sums' way.
template <int kParts>
AEFAST_HD int64_t terms_together(int64_t inner) {
  const int64_t steps = (inner + kTermsOfStep - 1) / kTermsOfStep;
  const int64_t times = (steps + kMostSteps<kParts> - 1) / kMostSteps<kParts>;
  return (steps + times - 1) / times * kTermsOfStep;
}

template <int kParts>
AEFAST_HD size_t workspace_bytes(int64_t rows, int64_t inner, int64_t cols) {
  const int64_t terms = terms_together<kParts>(inner);
  return static_cast<size_t>(panels_bytes<kParts>(least(rows, kPackedRows), terms) +
                             panels_bytes<kParts>(least(cols, kCols), terms));
}

// out = or += a b; false, with `out` as it was if that is added to, if there are several parts and the result would be
// less exact than in float32.
template <int kParts>
bool multiply(ProductOperand a, ProductOperand b, float* out, int64_t out_stride, int64_t rows, int64_t inner,
                     int64_t cols, bool add, void* workspace) {
  constexpr bool kIsExact = kParts == kExactParts;
  if (kIsExact && add && !is_exact(largest_of(a, rows, inner), largest_of(b, inner, cols), inner)) return false;
  // For every step a sum is rounded six times, if mostly for the sake of small numbers, which in long sums adds up.
  const Sums how_to_add = kIsExact && (add || inner > kMostTermsInPlace) ? Sums::add_apart : Sums::add;
  const int64_t most_terms = terms_together<kParts>(inner);
  char* const left = static_cast<char*>(workspace);
  char* const right = left + panels_bytes<kParts>(least(rows, kPackedRows), most_terms);
  uint32_t largest_left = 0, largest_right = 0;
  [[maybe_unused]] const Tiles tiles;
  for (int64_t first_row = 0; first_row < rows; first_row += kRows)
    for (int64_t first_col = 0; first_col < cols; first_col += kCols)
      for (int64_t term = 0; term < inner; term += most_terms) {
        const int64_t end_row = least(rows, first_row + kRows), its_cols = least(cols - first_col, kCols);
        const int64_t terms = least(inner - term, most_terms);
        const int64_t steps = round_up(terms, kTermsOfStep) / kTermsOfStep, panel_bytes = steps * kStepBytes<kParts>;
        const uint32_t right_bits = pack_right<kParts>(b, term, first_col, terms, its_cols, right);
        largest_right = largest_right < right_bits ? right_bits : largest_right;
        for (int64_t row = first_row; row < end_row; row += kPackedRows) {
          const int64_t its_rows = least(end_row - row, kPackedRows);
          const uint32_t left_bits = pack_left<kParts>(a, row, term, its_rows, terms, left);
          largest_left = largest_left < left_bits ? left_bits : largest_left;
          for (int64_t i = 0; i < its_rows; i += kPanel)
            for (int64_t j = 0; j < its_cols; j += kPanel)
              multiply_tiles<kParts>(left + i / kPanel * panel_bytes, right + j / kPanel * panel_bytes, steps,
                             out + (row + i) * out_stride + first_col + j, out_stride, least(its_rows - i, kPanel),
                             least(its_cols - j, kPanel), add || term > 0 ? how_to_add : Sums::replace);
        }
      }
  return !kIsExact || add || is_exact(largest_left, largest_right, inner);
}

}  // namespace matrix_unit
}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
