#include "emulated_unit.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_unit {
namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64, kMostSums = kMostBytes / 4;

struct Tile {
  int rows = 0, bytes = 0;
  uint32_t words[kMostRows][kMostSums];
};

struct Unit {
  bool is_configured = false;
  Tile tiles[kTiles];
};

thread_local Unit unit;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated matrix unit: %s\n", what);
  std::abort();
}

Tile& configured(int tile) {
  require(unit.is_configured, "a tile is used before its configuration, or after its release");
  require(tile >= 0 && tile < kTiles && unit.tiles[tile].rows > 0, "a tile is used that has no rows");
  return unit.tiles[tile];
}

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Within its life this thread's arithmetic is the unit's.
class Arithmetic {
 public:
  Arithmetic() : before_(_mm_getcsr()) {
    constexpr unsigned kMaskedToNearest = 0x1f80, kFlushResults = 0x8000, kFlushOperands = 0x40;
    _mm_setcsr(kMaskedToNearest | kFlushResults | kFlushOperands);
  }
  ~Arithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// Out of line, since the compiler does not know that its arithmetic depends on the control word.
__attribute__((noinline)) void add_rows(Tile& out, const Tile& a, const Tile& b) {
  constexpr uint32_t kUpper = 0xffff0000u;
  for (int row = 0; row < out.rows; ++row) {
    float even[kMostSums] = {}, odd[kMostSums] = {};
    for (int pair = 0; pair < b.rows; ++pair) {
      const float first = as_float(a.words[row][pair] << 16), second = as_float(a.words[row][pair] & kUpper);
      for (int col = 0; col < kMostSums; ++col) {
        even[col] = std::fma(first, as_float(b.words[pair][col] << 16), even[col]);
        odd[col] = std::fma(second, as_float(b.words[pair][col] & kUpper), odd[col]);
      }
    }
    for (int col = 0; col < kMostSums; ++col) {
      const float sum = as_float(out.words[row][col]) + (even[col] + odd[col]);
      std::memcpy(&out.words[row][col], &sum, sizeof sum);
    }
  }
}

}  // namespace

void load_config(const void* config) {
  // Palette, first row, 14 reserved bytes, 16 numbers of bytes a row, 16 numbers of rows.
  const auto* const bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1 && bytes[1] == 0, "a palette or first row that it does not know");
  for (int tile = 0; tile < kTiles; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof row_bytes);
    unit.tiles[tile] = {bytes[48 + tile], row_bytes, {}};
    require(unit.tiles[tile].rows <= kMostRows && row_bytes <= kMostBytes && row_bytes % 4 == 0,
            "a shape that it does not have");
  }
  unit.is_configured = true;
}

void release() { unit.is_configured = false; }

void zero(int tile) { std::memset(configured(tile).words, 0, sizeof(Tile::words)); }

void load(int tile, const void* from, int64_t stride) {
  Tile& to = configured(tile);
  std::memset(to.words, 0, sizeof to.words);
  for (int row = 0; row < to.rows; ++row)
    std::memcpy(to.words[row], static_cast<const char*>(from) + row * stride, to.bytes);
}

void store(int tile, void* to, int64_t stride) {
  const Tile& from = configured(tile);
  for (int row = 0; row < from.rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, from.words[row], from.bytes);
}

void add_product(int sums, int left, int right) {
  Tile& out = configured(sums);
  const Tile &a = configured(left), &b = configured(right);
  require(out.rows == a.rows && out.bytes == b.bytes && a.bytes == 4 * b.rows, "tiles that do not fit each other");
  require(sums != left && sums != right && left != right, "a tile that is used twice in a product");
  const Arithmetic arithmetic;
  add_rows(out, a, b);
}

}  // namespace emulated_unit

namespace aefast::cpu {

// The vectors' instructions that round to bfloat16 are not emulated.
bool has_matrix_unit() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace aefast::cpu
