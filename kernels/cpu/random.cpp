// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "random.h"

#include "lanes.h"
#include "philox.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

using philox::Block;

// Rows are taken in pieces of at most so many elements, whose noise stays in the first-level cache.
constexpr int64_t kPiece = 1024;
// Noise is made for so many elements at once, and begins at a multiple of 4.
constexpr int64_t kGroup = 4 * kFloats;
constexpr int64_t kBuffer = kPiece + kGroup + 4;

// --- noise ---------------------------------------------------------------------------------------------------

#if defined(__SSE2__)
// Of each 16 bytes the lower halves, and the upper ones, of a and then of b.
AEFAST_HD void unpack_pairs(Vector<uint64_t> a, Vector<uint64_t> b, Vector<uint64_t>& low, Vector<uint64_t>& high) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  low = reinterpret_cast<Vector<uint64_t>>(_mm512_maskz_unpacklo_epi64(0xff, x, y));
  high = reinterpret_cast<Vector<uint64_t>>(_mm512_maskz_unpackhi_epi64(0xff, x, y));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  low = reinterpret_cast<Vector<uint64_t>>(_mm256_unpacklo_epi64(x, y));
  high = reinterpret_cast<Vector<uint64_t>>(_mm256_unpackhi_epi64(x, y));
#else
  const __m128i x = reinterpret_cast<__m128i>(a), y = reinterpret_cast<__m128i>(b);
  low = reinterpret_cast<Vector<uint64_t>>(_mm_unpacklo_epi64(x, y));
  high = reinterpret_cast<Vector<uint64_t>>(_mm_unpackhi_epi64(x, y));
#endif
}
#endif

// The four vectors have one element of each block; puts the blocks one after another. Within 16 bytes of a register the
// elements of four blocks are exchanged, so that lane 4 q + p of a register of 4 n lanes has to be block n p + q.
AEFAST_HD void interleave(Floats values[4]) {
  Register out[4 * kRegisters];
  for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
    const __m512 a = values[0].lanes[i], b = values[1].lanes[i], c = values[2].lanes[i], d = values[3].lanes[i];
    const __m512d ab = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, a, b)),
                  cd = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, c, d)),
                  high_ab = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(0xffff, a, b)),
                  high_cd = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(0xffff, c, d));
    out[4 * i] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, ab, cd));
    out[4 * i + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, ab, cd));
    out[4 * i + 2] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, high_ab, high_cd));
    out[4 * i + 3] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, high_ab, high_cd));
#elif defined(__AVX2__)
    const __m256 a = values[0].lanes[i], b = values[1].lanes[i], c = values[2].lanes[i], d = values[3].lanes[i];
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)),
                  high_ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)),
                  high_cd = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    out[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    out[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    out[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high_ab, high_cd));
    out[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high_ab, high_cd));
#elif defined(__SSE__)
    __m128 a = values[0].lanes[i], b = values[1].lanes[i], c = values[2].lanes[i], d = values[3].lanes[i];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    out[4 * i] = a;
    out[4 * i + 1] = b;
    out[4 * i + 2] = c;
    out[4 * i + 3] = d;
#else
    constexpr int kLanes = kFloats / kRegisters;
    for (int lane = 0; lane < 4 * kLanes; ++lane)
      out[4 * i + lane / kLanes][lane % kLanes] = values[lane % 4].lanes[i][lane / 4];
#endif
  }
  for (int part = 0; part < 4; ++part)
    for (int i = 0; i < kRegisters; ++i) values[part].lanes[i] = out[kRegisters * part + i];
}

// interleave() of what is not yet one vector.
AEFAST_HD void interleaved_words(const ProductWords words[4], Words parts[4]) {
#if defined(__SSE2__)
  const Vector<uint64_t> lower = 0xffffffffu - Vector<uint64_t>{};
  Vector<uint64_t> out[4 * kRegisters];
  for (int i = 0; i < kRegisters; ++i) {
    // The first two words of a block in 64 bits, and the other two; then these behind those.
    const auto pairs = [&](int first, const auto& half) __attribute__((always_inline)) {
      return (half(words[first])[i] & lower) | (half(words[first + 1])[i] << 32);
    };
    const auto even = [](const ProductWords& one) -> const auto& { return one.even; };
    const auto odd = [](const ProductWords& one) -> const auto& { return one.odd; };
    unpack_pairs(pairs(0, even), pairs(2, even), out[4 * i], out[4 * i + 2]);
    unpack_pairs(pairs(0, odd), pairs(2, odd), out[4 * i + 1], out[4 * i + 3]);
  }
  for (int part = 0; part < 4; ++part)
    for (int i = 0; i < kRegisters; ++i)
      parts[part].lanes[i] = reinterpret_cast<Vector<uint32_t>>(out[kRegisters * part + i]);
#else
  Floats values[4];
  for (int word = 0; word < 4; ++word) values[word] = float_of(words[word].words());
  interleave(values);
  for (int part = 0; part < 4; ++part) parts[part] = bits_of(values[part]);
#endif
}

// The numbers of the blocks in the lanes of a vector.
struct LaneBlocks {
  uint32_t of[kFloats];
  constexpr LaneBlocks() : of() {
    constexpr int kLanes = kFloats / kRegisters, kQuarters = kLanes / 4;
    for (int i = 0; i < kFloats; ++i) {
      const int lane = i % kLanes;
      of[i] = i / kLanes * kLanes + kQuarters * (lane % 4) + lane / 4;
    }
  }
};
constexpr LaneBlocks kLaneBlocks;

// The blocks from `block` on, one a lane; the low 32 bits of the last one's number must not overflow.
AEFAST_HD Block<ProductWords> lane_blocks(uint64_t seed, uint64_t block) {
  const ProductWords low(read_words(kLaneBlocks.of) + Words(static_cast<uint32_t>(block))),
      high(static_cast<uint32_t>(block >> 32)), zero(0u);
  return philox::generate(Block<ProductWords>{{low, high, zero, zero}}, static_cast<uint32_t>(seed),
                          static_cast<uint32_t>(seed >> 32));
}

// The same of one block. A function of its own, since the compiler would make vectors of a loop over it, badly.
__attribute__((noinline)) Block<uint32_t> block_words(uint64_t seed, uint64_t block) {
  return philox::block_words(seed, 0, block);
}

AEFAST_HD bool overflows(uint64_t block) { return static_cast<uint32_t>(block) > 0xffffffffu - kFloats; }

// Noise of kFloats blocks from `block` on, in the order of its elements.
AEFAST_HD void make_group(uint64_t seed, uint64_t block, Floats values[4]) {
  const Block<ProductWords> found = lane_blocks(seed, block);
  philox::normals(
      Block<Words>{{found.word[0].words(), found.word[1].words(), found.word[2].words(), found.word[3].words()}}, values);
  interleave(values);
}
AEFAST_HD void make_group(uint64_t seed, uint64_t block, Words words[4]) {
  interleaved_words(lane_blocks(seed, block).word, words);
}

AEFAST_HD void make_block(uint64_t seed, uint64_t block, float values[4]) {
  philox::normals(block_words(seed, block), values);
}
AEFAST_HD void make_block(uint64_t seed, uint64_t block, double values[4]) {
  philox::normals(block_words(seed, block), values);
}
AEFAST_HD void make_block(uint64_t seed, uint64_t block, uint32_t words[4]) {
  const Block<uint32_t> found = block_words(seed, block);
  for (int word = 0; word < 4; ++word) words[word] = found.word[word];
}

AEFAST_HD void write_noise(float* to, Floats values) { write_floats(to, values); }
AEFAST_HD void write_noise(uint32_t* to, Words words) { write_floats(reinterpret_cast<float*>(to), float_of(words)); }
AEFAST_HD Floats read_noise(const float* from) { return read_floats(from); }
AEFAST_HD double read_noise(const double* from) { return *from; }
AEFAST_HD Words read_noise(const uint32_t* from) { return read_words(from); }

// Noise for elements `begin` to begin + count - 1: normal values for an N of float or double, and for uint32_t words.
// `buffer` has kBuffer elements, and those after the result are readable too.
template <typename N>
const N* make_noise(uint64_t seed, int64_t begin, int64_t count, N* buffer) {
  const int64_t skipped = begin % 4;
  uint64_t block = static_cast<uint64_t>(begin / 4);
  for (int64_t index = 0; index < skipped + count;) {
    if constexpr (!std::is_same_v<N, double>) {
      if (!overflows(block)) {
        decltype(read_noise(buffer)) parts[4];
        make_group(seed, block, parts);
        for (int part = 0; part < 4; ++part) write_noise(buffer + index + part * kFloats, parts[part]);
        index += kGroup;
        block += kFloats;
        continue;
      }
    }
    make_block(seed, block++, buffer + index);
    index += 4;
  }
  return buffer + skipped;
}

// Elements ahead of which memory is asked for: noise takes so long to make that a processor does not look far enough.
constexpr int64_t kAhead = 4 * kGroup;

// Asks for the kGroup elements that are kAhead behind *from, to read them, or to write them.
template <typename T>
AEFAST_HD void prefetch(const T* from) {
  for (int64_t byte = 0; byte < kGroup * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from + kAhead) + byte, 0);
}
template <typename T>
AEFAST_HD void prefetch(T* to) {
  for (int64_t byte = 0; byte < kGroup * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<char*>(to + kAhead) + byte, 1);
}

// body(at, noise, valid...) for vectors of T, of which `at` is the first, of `count` elements from `begin` on. Where
// blocks begin with vectors the noise stays in registers, and ahead(at) is called at each kGroup elements.
template <typename T, typename N, typename Ahead, typename Body>
AEFAST_HD void for_noise(uint64_t seed, int64_t begin, int64_t count, N* buffer, const Ahead& ahead, const Body& body) {
  int64_t done = 0;
  if constexpr (!std::is_same_v<T, double>) {
    uint64_t block = static_cast<uint64_t>(begin / 4);
    for (; begin % 4 == 0 && done + kGroup <= count && !overflows(block); done += kGroup, block += kFloats) {
      ahead(done);
      decltype(read_noise(buffer)) parts[4];
      make_group(seed, block, parts);
      for (int part = 0; part < 4; ++part) body(done + part * kFloats, parts[part]);
    }
  }
  if (done == count) return;
  const N* const noise = make_noise(seed, begin + done, count - done, buffer);
  for_lanes<T>(count - done, [&](int64_t at, auto... valid) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, double> && !std::is_same_v<N, double>)
      body(done + at, noise[at], valid...);
    else
      body(done + at, read_noise(noise + at), valid...);
  });
}

template <typename N>
void all_noise(uint64_t seed, int64_t first, int64_t count, N* out) {
  N buffer[kBuffer];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t size = count - begin < kPiece ? count - begin : kPiece;
    std::memcpy(out + begin, make_noise(seed, first + begin, size, buffer), size * sizeof(N));
  }
}

// --- rows in pieces ------------------------------------------------------------------------------------------

// A part of a matrix: whole rows, or columns of one row.
struct Piece {
  int64_t row, rows, col, cols;

  int64_t count() const { return rows * cols; }
};

template <typename Body>
AEFAST_HD void for_pieces(int64_t first, int64_t count, int64_t cols, const Body& body) {
  const int64_t together = cols > 0 && cols <= kPiece ? kPiece / cols : 1;
  for (int64_t row = first; row < first + count; row += together) {
    const int64_t rows = first + count - row < together ? first + count - row : together;
    int64_t col = 0;
    do {
      const int64_t width = cols - col < kPiece ? cols - col : kPiece;
      body(Piece{row, rows, col, width});
      col += width;
    } while (col < cols);
  }
}

// A piece's elements side by side: as they lie, or copied to `buffer`.
template <typename T>
AEFAST_HD const T* gathered(const void* matrix, int64_t stride, const Piece& piece, T* buffer) {
  const T* const first = static_cast<const T*>(matrix) + piece.row * stride + piece.col;
  if (piece.rows == 1 || stride == piece.cols) return first;
  for (int64_t row = 0; row < piece.rows; ++row)
    for (int64_t col = 0; col < piece.cols; ++col) buffer[row * piece.cols + col] = first[row * stride + col];
  return buffer;
}

// Where a piece's results go side by side: to their place, or to `buffer`, from where scatter() takes them.
template <typename T>
AEFAST_HD T* destination(void* matrix, int64_t stride, const Piece& piece, T* buffer) {
  if (piece.rows == 1 || stride == piece.cols) return static_cast<T*>(matrix) + piece.row * stride + piece.col;
  return buffer;
}
template <typename T>
AEFAST_HD void scatter(void* matrix, int64_t stride, const Piece& piece, const T* buffer) {
  T* const first = static_cast<T*>(matrix) + piece.row * stride + piece.col;
  for (int64_t row = 0; row < piece.rows; ++row)
    for (int64_t col = 0; col < piece.cols; ++col) first[row * stride + col] = buffer[row * piece.cols + col];
}

// kl[row] = the sum of the piece's terms; of a row in several pieces, the sum so far and this piece's.
template <typename C>
AEFAST_HD void sum_rows(const C* terms, const Piece& piece, double& so_far, C factor, C* kl) {
  for (int64_t row = 0; row < piece.rows; ++row) {
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t col = 0; col < piece.cols; ++col) sum += terms[row * piece.cols + col];
    so_far = (piece.col > 0 ? so_far : 0.0) + static_cast<double>(sum);
    kl[piece.row + row] = factor * static_cast<C>(so_far);
  }
}

// One value a row, for each element of the row; absent, nothing.
template <typename C>
AEFAST_HD void repeat_rows(const void* values, int64_t stride, const Piece& piece, C* to) {
  if (!values) return;
  for (int64_t row = 0; row < piece.rows; ++row) {
    const C value = static_cast<const C*>(values)[(piece.row + row) * stride];
#pragma omp simd
    for (int64_t col = 0; col < piece.cols; ++col) to[row * piece.cols + col] = value;
  }
}

// --- samples and their divergence ------------------------------------------------------------------------------

template <typename T, bool kHasNoise>
void sample_loop(const Moments& moments, uint64_t seed, T* z, Accumulator<T>* kl, int64_t first, int64_t count) {
  using A = Accumulator<T>;
  using C = Lanes<T>;
  const int64_t cols = moments.cols;
  const C low(moments.low), high(moments.high);
  alignas(64) A noise_buffer[kHasNoise ? kBuffer + kFloats : 1], terms[kPiece + kFloats];
  alignas(64) T mu_buffer[kPiece], logvar_buffer[kPiece];
  double so_far = 0.0;
  for_pieces(first, count, cols, [&](const Piece& piece) __attribute__((always_inline)) {
    const T* const mu = gathered(moments.mu, moments.mu_stride, piece, mu_buffer);
    const T* const logvar = gathered(moments.logvar, moments.logvar_stride, piece, logvar_buffer);
    const int64_t begin = piece.row * cols + piece.col;
    const auto body = [&](int64_t at, auto noise, auto... valid) __attribute__((always_inline)) {
      const C m = read_lanes(mu + at, valid...);
      const C l = at_most(high, at_least(low, read_lanes(logvar + at, valid...)));
      C less_one;
      [[maybe_unused]] const C deviation = exp_and_less_one(C(0.5) * l, less_one);
      // The variance less one is (deviation - 1) (deviation + 1).
      write_lanes(terms + at, m * m + (less_one * (less_one + C(2.0)) - l));
      if constexpr (kHasNoise) write_lanes(z + begin + at, m + deviation * noise, valid...);
    };
    [[maybe_unused]] const auto ahead = [&](int64_t at) __attribute__((always_inline)) {
      prefetch(mu + at);
      prefetch(logvar + at);
      prefetch(z + begin + at);
    };
    if constexpr (kHasNoise)
      for_noise<T>(seed, begin, piece.count(), noise_buffer, ahead, body);
    else
      for_lanes<T>(piece.count(),
                   [&](int64_t at, auto... valid) __attribute__((always_inline)) { body(at, 0, valid...); });
    sum_rows(terms, piece, so_far, A(0.5), kl);
  });
}

template <typename T, bool kHasZ, bool kHasKl>
void sample_gradient_loop(const Moments& moments, uint64_t seed, const SampleGradient& gradient, int64_t first,
                          int64_t count) {
  using A = Accumulator<T>;
  using C = Lanes<T>;
  using elementary::select;
  const int64_t cols = moments.cols;
  const C low(moments.low), high(moments.high);
  alignas(64) A noise_buffer[kHasZ ? kBuffer + kFloats : 1], weights[kHasKl ? kPiece + kFloats : 1];
  alignas(64) T mu_buffer[kPiece], logvar_buffer[kPiece], grad_buffer[kHasZ ? kPiece : 1];
  alignas(64) T mu_result[kPiece], logvar_result[kPiece];
  for_pieces(first, count, cols, [&](const Piece& piece) __attribute__((always_inline)) {
    const T* const mu = gathered(moments.mu, moments.mu_stride, piece, mu_buffer);
    const T* const logvar = gathered(moments.logvar, moments.logvar_stride, piece, logvar_buffer);
    T* const mu_gradient = destination(gradient.mu, gradient.stride, piece, mu_result);
    T* const logvar_gradient = destination(gradient.logvar, gradient.stride, piece, logvar_result);
    [[maybe_unused]] const T* grad = nullptr;
    if constexpr (kHasZ) grad = gathered(gradient.grad_z, gradient.grad_z_stride, piece, grad_buffer);
    if constexpr (kHasKl) repeat_rows(gradient.grad_kl, gradient.grad_kl_stride, piece, weights);
    const auto body = [&](int64_t at, auto noise, auto... valid) __attribute__((always_inline)) {
      const C given = read_lanes(logvar + at, valid...);
      C less_one;
      [[maybe_unused]] const C deviation = exp_and_less_one(C(0.5) * at_most(high, at_least(low, given)), less_one);
      C by_mu(0.0), by_logvar(0.0);
      if constexpr (kHasZ) {
        by_mu = read_lanes(grad + at, valid...);
        by_logvar = by_mu * deviation * noise;
      }
      if constexpr (kHasKl) {
        const C weight = read_lanes(weights + at);
        by_mu = by_mu + weight * read_lanes(mu + at, valid...);
        by_logvar = by_logvar + weight * (less_one * (less_one + C(2.0)));
      }
      by_logvar = select(given < low, C(0.0), select(given > high, C(0.0), C(0.5) * by_logvar));
      write_lanes(mu_gradient + at, by_mu, valid...);
      write_lanes(logvar_gradient + at, by_logvar, valid...);
    };
    [[maybe_unused]] const auto ahead = [&](int64_t at) __attribute__((always_inline)) {
      prefetch(grad + at);
      if constexpr (kHasKl) prefetch(mu + at);
      prefetch(logvar + at);
      prefetch(mu_gradient + at);
      prefetch(logvar_gradient + at);
    };
    if constexpr (kHasZ)
      for_noise<T>(seed, piece.row * cols + piece.col, piece.count(), noise_buffer, ahead, body);
    else
      for_lanes<T>(piece.count(),
                   [&](int64_t at, auto... valid) __attribute__((always_inline)) { body(at, 0, valid...); });
    if (mu_gradient == mu_result) {
      scatter(gradient.mu, gradient.stride, piece, mu_result);
      scatter(gradient.logvar, gradient.stride, piece, logvar_result);
    }
  });
}

void sample(Scalar scalar, const Moments& moments, uint64_t seed, void* z, void* kl, int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = z ? &sample_loop<T, true> : &sample_loop<T, false>;
    run(moments, seed, static_cast<T*>(z), static_cast<Accumulator<T>*>(kl), first, count);
  });
}

void sample_gradient(Scalar scalar, const Moments& moments, uint64_t seed, const SampleGradient& gradient,
                     int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = !gradient.grad_kl  ? &sample_gradient_loop<T, true, false>
                     : !gradient.grad_z ? &sample_gradient_loop<T, false, true>
                                        : &sample_gradient_loop<T, true, true>;
    run(moments, seed, gradient, first, count);
  });
}

// --- corruption ------------------------------------------------------------------------------------------------

template <typename T, NoiseKind kKind>
void corrupt_loop(const Noise& noise, uint64_t seed, const T* x, T* out, int64_t first, int64_t count) {
  using C = Lanes<T>;
  using W = typename LanesOf<Accumulator<T>>::words;
  using elementary::select;
  constexpr bool kIsGaussian = kKind == NoiseKind::gaussian;
  const C a(noise.first), b(noise.second);
  const W last(noise.last), half(noise.half);
  alignas(64) std::conditional_t<kIsGaussian, Accumulator<T>, uint32_t> buffer[kBuffer + kFloats];
  for (int64_t begin = first; begin < first + count; begin += kPiece) {
    const int64_t size = first + count - begin < kPiece ? first + count - begin : kPiece;
    const T* const from = x + begin;
    T* const to = out + begin;
    const auto ahead = [&](int64_t at) __attribute__((always_inline)) {
      prefetch(from + at);
      prefetch(to + at);
    };
    for_noise<T>(seed, begin, size, buffer, ahead, [&](int64_t at, auto drawn, auto... valid) __attribute__((always_inline)) {
      C kept = read_lanes(from + at, valid...);
      if constexpr (kIsGaussian) {
        kept = kept + (b * drawn + a);
      } else {
        C replacement(0.0);
        if constexpr (kKind == NoiseKind::dropout) kept = kept * a;
        if constexpr (kKind == NoiseKind::salt_and_pepper) replacement = select(drawn < half, a, b);
        kept = select(drawn <= last, replacement, kept);
      }
      write_lanes(to + at, kept, valid...);
    });
  }
}

void corrupt(Scalar scalar, const Noise& noise, uint64_t seed, const void* x, void* out, int64_t first,
             int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = noise.kind == NoiseKind::gaussian          ? &corrupt_loop<T, NoiseKind::gaussian>
                     : noise.kind == NoiseKind::salt_and_pepper ? &corrupt_loop<T, NoiseKind::salt_and_pepper>
                     : noise.kind == NoiseKind::masking         ? &corrupt_loop<T, NoiseKind::masking>
                                                                : &corrupt_loop<T, NoiseKind::dropout>;
    run(noise, seed, static_cast<const T*>(x), static_cast<T*>(out), first, count);
  });
}

template <typename T>
void mask_squares_loop(const Noise& noise, uint64_t seed, const Images& images, const T* x, T* out, int64_t first,
                       int64_t count) {
  const int64_t block = images.block, height = images.height, width = images.width;
  const int64_t squares_down = (height + block - 1) / block, squares_across = (width + block - 1) / block;
  uint32_t buffer[kBuffer];
  uint8_t is_masked[kPiece];
  for (int64_t image = first; image < first + count; ++image)
    for (int64_t down = 0; down < squares_down; ++down)
      for (int64_t left = 0; left < width; left += kPiece) {
        const int64_t across = left / block, columns = width - left < kPiece ? width - left : kPiece;
        const int64_t squares = (left + columns - 1) / block - across + 1;
        const int64_t first_square = (image * squares_down + down) * squares_across + across;
        const uint32_t* const found = make_noise(seed, first_square, squares, buffer);
        for (int64_t col = 0; col < columns; ++col)
          is_masked[col] = found[(left + col) / block - across] <= noise.last;
        const int64_t bottom = (down + 1) * block < height ? (down + 1) * block : height;
        for (int64_t channel = 0; channel < images.channels; ++channel)
          for (int64_t row = down * block; row < bottom; ++row) {
            const int64_t at = ((image * images.channels + channel) * height + row) * width + left;
#pragma omp simd
            for (int64_t col = 0; col < columns; ++col) out[at + col] = is_masked[col] ? T{} : x[at + col];
          }
      }
}

void mask_squares(Scalar scalar, const Noise& noise, uint64_t seed, const Images& images, const void* x, void* out,
                  int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    mask_squares_loop(noise, seed, images, static_cast<const T*>(x), static_cast<T*>(out), first, count);
  });
}

// --- divergence of discrete distributions ----------------------------------------------------------------------

template <typename T>
void divergence_loop(const void* p_matrix, int64_t p_stride, const void* q_matrix, int64_t q_stride,
                     Accumulator<T>* kl, int64_t cols, int64_t first, int64_t count) {
  using A = Accumulator<T>;
  using C = Lanes<T>;
  using elementary::select;
  alignas(64) A terms[kPiece + kFloats];
  alignas(64) T p_buffer[kPiece], q_buffer[kPiece];
  double so_far = 0.0;
  for_pieces(first, count, cols, [&](const Piece& piece) __attribute__((always_inline)) {
    const T* const p_values = gathered(p_matrix, p_stride, piece, p_buffer);
    const T* const q_values = gathered(q_matrix, q_stride, piece, q_buffer);
    for_lanes<T>(piece.count(), [&](int64_t at, auto... valid) __attribute__((always_inline)) {
      const C p = read_lanes(p_values + at, valid...), q = read_lanes(q_values + at, valid...);
      const C term = p * (log(p) - log(q));
      write_lanes(terms + at, C(select(is_zero(p), C(0.0), term)));
    });
    sum_rows(terms, piece, so_far, A(1), kl);
  });
}

template <typename T>
void divergence_gradient_loop(const void* grad, int64_t grad_stride, const void* p_matrix, int64_t p_stride,
                              const void* q_matrix, int64_t q_stride, void* p_gradient, void* q_gradient, int64_t cols,
                              int64_t first, int64_t count) {
  using A = Accumulator<T>;
  using C = Lanes<T>;
  using elementary::select;
  alignas(64) A weights[kPiece + kFloats];
  alignas(64) T p_buffer[kPiece], q_buffer[kPiece];
  for_pieces(first, count, cols, [&](const Piece& piece) __attribute__((always_inline)) {
    const T* const p_values = gathered(p_matrix, p_stride, piece, p_buffer);
    const T* const q_values = gathered(q_matrix, q_stride, piece, q_buffer);
    T* const by_p = static_cast<T*>(p_gradient) + piece.row * cols + piece.col;
    T* const by_q = static_cast<T*>(q_gradient) + piece.row * cols + piece.col;
    repeat_rows(grad, grad_stride, piece, weights);
    for_lanes<T>(piece.count(), [&](int64_t at, auto... valid) __attribute__((always_inline)) {
      const C p = read_lanes(p_values + at, valid...), q = read_lanes(q_values + at, valid...);
      const C weight = read_lanes(weights + at);
      const auto is_out = is_zero(p);
      write_lanes(by_p + at, C(select(is_out, C(0.0), weight * (log(p) - log(q) + C(1.0)))), valid...);
      write_lanes(by_q + at, C(select(is_out, C(0.0), -weight * (p / q))), valid...);
    });
  });
}

void divergence(Scalar scalar, const void* p, int64_t p_stride, const void* q, int64_t q_stride, void* kl, int64_t cols,
                int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    divergence_loop<T>(p, p_stride, q, q_stride, static_cast<Accumulator<T>*>(kl), cols, first, count);
  });
}

void divergence_gradient(Scalar scalar, const void* grad, int64_t grad_stride, const void* p, int64_t p_stride,
                         const void* q, int64_t q_stride, void* p_gradient, void* q_gradient, int64_t cols,
                         int64_t first, int64_t count) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    divergence_gradient_loop<T>(grad, grad_stride, p, p_stride, q, q_stride, p_gradient, q_gradient, cols, first,
                                count);
  });
}

}  // namespace

extern const RandomKernels random_kernels;
const RandomKernels random_kernels = {all_noise<float>, all_noise<uint32_t>, sample,             sample_gradient, corrupt,
                                      mask_squares, divergence, divergence_gradient};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
