// Vectors of floats, and the elementary functions on them. Included once per instruction set; everything lies in a
// namespace of its name, so that no two sets share a function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elementary.h"
#include "scalar.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T, int kBytes = kVectorBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <typename V, typename T>
AEFAST_HD V read(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
AEFAST_HD void write(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Registers in a vector of floats. Instructions of two independent chains, side by side, keep the units busy where
// one chain would fill the scheduler with instructions that wait.
constexpr int kRegisters = 2;
constexpr int kFloats = kRegisters * kVectorBytes / sizeof(float);
using Register = Vector<float>;
using Mask = Vector<int32_t>;

struct Masks {
  Mask lanes[kRegisters];
};

// A vector of 32-bit words, as many as there are floats in one.
struct Words {
  Vector<uint32_t> lanes[kRegisters];

  AEFAST_HD Words() = default;
  AEFAST_HD Words(uint32_t value) {
    for (auto& lane : lanes) lane = value - Vector<uint32_t>{};
  }
};

// A vector of floats with the arithmetic of one, for templates that are written for a scalar.
struct Floats {
  Register lanes[kRegisters];

  AEFAST_HD Floats() = default;
  template <typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>
  AEFAST_HD Floats(S value) {
    for (auto& lane : lanes) lane = static_cast<float>(value) - Register{};
  }
};

AEFAST_HD Floats read_floats(const float* from) {
  Floats out;
  for (int i = 0; i < kRegisters; ++i) out.lanes[i] = read<Register>(from + i * kFloats / kRegisters);
  return out;
}
AEFAST_HD void write_floats(float* to, Floats x) {
  for (int i = 0; i < kRegisters; ++i) write(to + i * kFloats / kRegisters, x.lanes[i]);
}

#define AEFAST_EACH(Result, expression)                                \
  Result out;                                                          \
  for (int i = 0; i < kRegisters; ++i) out.lanes[i] = (expression);    \
  return out

#define AEFAST_EACH_OF(Result, name, expression) \
  Result name;                                   \
  for (int i = 0; i < kRegisters; ++i) name.lanes[i] = (expression)

AEFAST_HD Floats operator+(Floats a, Floats b) { AEFAST_EACH(Floats, a.lanes[i] + b.lanes[i]); }
AEFAST_HD Floats operator-(Floats a, Floats b) { AEFAST_EACH(Floats, a.lanes[i] - b.lanes[i]); }
AEFAST_HD Floats operator*(Floats a, Floats b) { AEFAST_EACH(Floats, a.lanes[i] * b.lanes[i]); }
AEFAST_HD Floats operator/(Floats a, Floats b) { AEFAST_EACH(Floats, a.lanes[i] / b.lanes[i]); }
AEFAST_HD Floats operator-(Floats a) { AEFAST_EACH(Floats, -a.lanes[i]); }
AEFAST_HD Masks operator<(Floats a, Floats b) { AEFAST_EACH(Masks, a.lanes[i] < b.lanes[i]); }
AEFAST_HD Masks operator>(Floats a, Floats b) { AEFAST_EACH(Masks, a.lanes[i] > b.lanes[i]); }
AEFAST_HD Masks operator<=(Floats a, Floats b) { AEFAST_EACH(Masks, a.lanes[i] <= b.lanes[i]); }
AEFAST_HD Masks is_zero(Floats x) { AEFAST_EACH(Masks, x.lanes[i] == 0.0f); }
AEFAST_HD Floats select(Masks m, Floats a, Floats b) { AEFAST_EACH(Floats, m.lanes[i] ? a.lanes[i] : b.lanes[i]); }

AEFAST_HD Words bits_of(Floats x) { AEFAST_EACH(Words, reinterpret_cast<Vector<uint32_t>>(x.lanes[i])); }
AEFAST_HD Floats float_of(Words x) { AEFAST_EACH(Floats, reinterpret_cast<Register>(x.lanes[i])); }
AEFAST_HD Words operator<<(Words a, int b) { AEFAST_EACH(Words, a.lanes[i] << b); }
AEFAST_HD Words operator>>(Words a, int b) { AEFAST_EACH(Words, a.lanes[i] >> b); }
AEFAST_HD Words operator+(Words a, Words b) { AEFAST_EACH(Words, a.lanes[i] + b.lanes[i]); }
AEFAST_HD Words operator-(Words a, Words b) { AEFAST_EACH(Words, a.lanes[i] - b.lanes[i]); }
AEFAST_HD Words operator&(Words a, Words b) { AEFAST_EACH(Words, a.lanes[i] & b.lanes[i]); }
AEFAST_HD Words operator|(Words a, Words b) { AEFAST_EACH(Words, a.lanes[i] | b.lanes[i]); }
AEFAST_HD Words operator^(Words a, Words b) { AEFAST_EACH(Words, a.lanes[i] ^ b.lanes[i]); }
AEFAST_HD Words operator~(Words a) { AEFAST_EACH(Words, ~a.lanes[i]); }
AEFAST_HD Masks operator<(Words a, Words b) { AEFAST_EACH(Masks, a.lanes[i] < b.lanes[i]); }
AEFAST_HD Masks operator<=(Words a, Words b) { AEFAST_EACH(Masks, a.lanes[i] <= b.lanes[i]); }

AEFAST_HD Words read_words(const uint32_t* from) {
  AEFAST_EACH(Words, read<Vector<uint32_t>>(from + i * kFloats / kRegisters));
}

// As a signed number is shifted.
AEFAST_HD Words signed_shift(Words x, int b) {
  AEFAST_EACH(Words, reinterpret_cast<Vector<uint32_t>>(reinterpret_cast<Mask>(x.lanes[i]) >> b));
}

// The functions of elementary.h on words, lane by lane.
AEFAST_HD Words sign_mask(Words x) { return signed_shift(x, 31); }
AEFAST_HD Floats select_bits(Words mask, Floats a, Floats b) {
  AEFAST_EACH(Floats, reinterpret_cast<Register>((reinterpret_cast<Vector<uint32_t>>(a.lanes[i]) & mask.lanes[i]) |
                                                 (reinterpret_cast<Vector<uint32_t>>(b.lanes[i]) & ~mask.lanes[i])));
}
AEFAST_HD Floats signed_float(Words x) {
  AEFAST_EACH(Floats, __builtin_convertvector(reinterpret_cast<Mask>(x.lanes[i]), Register));
}
AEFAST_HD Floats square_root(Floats x) {
#if defined(__AVX512F__)
  AEFAST_EACH(Floats, _mm512_maskz_sqrt_ps(0xffff, x.lanes[i]));
#elif defined(__AVX2__)
  AEFAST_EACH(Floats, _mm256_sqrt_ps(x.lanes[i]));
#elif defined(__SSE__)
  AEFAST_EACH(Floats, _mm_sqrt_ps(x.lanes[i]));
#else
  Floats out;
  for (int i = 0; i < kRegisters; ++i)
    for (size_t lane = 0; lane < kFloats / kRegisters; ++lane) out.lanes[i][lane] = ::sqrtf(x.lanes[i][lane]);
  return out;
#endif
}

#if defined(__SSE2__)
// Words for Philox's rounds. Each is in the lower half of 64 bits, as multiplications want it, and what the upper half
// holds is nobody's: of each register of Words the words at even places, and those at odd ones.
struct ProductWords {
  Vector<uint64_t> even[kRegisters], odd[kRegisters];

  AEFAST_HD ProductWords() = default;
  AEFAST_HD ProductWords(uint32_t value) {
    for (int i = 0; i < kRegisters; ++i) even[i] = odd[i] = value - Vector<uint64_t>{};
  }
  AEFAST_HD explicit ProductWords(Words words) {
    for (int i = 0; i < kRegisters; ++i) {
      even[i] = reinterpret_cast<Vector<uint64_t>>(words.lanes[i]);
      odd[i] = even[i] >> 32;
    }
  }

  AEFAST_HD Words words() const {
    const Vector<uint64_t> lower = 0xffffffffu - Vector<uint64_t>{};
    AEFAST_EACH(Words, reinterpret_cast<Vector<uint32_t>>((even[i] & lower) | (odd[i] << 32)));
  }
};

AEFAST_HD ProductWords operator^(ProductWords a, ProductWords b) {
  for (int i = 0; i < kRegisters; ++i) {
    a.even[i] ^= b.even[i];
    a.odd[i] ^= b.odd[i];
  }
  return a;
}

// The lower halves' products, 64 bits each.
AEFAST_HD Vector<uint64_t> lower_products(Vector<uint64_t> a, Vector<uint64_t> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<uint64_t>>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<uint64_t>>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<Vector<uint64_t>>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}

// The upper halves in the place of the lower ones, by a shuffle: the shifter's port is the multiplier's.
AEFAST_HD Vector<uint64_t> upper_half(Vector<uint64_t> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<uint64_t>>(
      _mm512_maskz_shuffle_epi32(0xffff, reinterpret_cast<__m512i>(x), static_cast<_MM_PERM_ENUM>(0xf5)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<uint64_t>>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(x), 0xf5));
#else
  return reinterpret_cast<Vector<uint64_t>>(_mm_shuffle_epi32(reinterpret_cast<__m128i>(x), 0xf5));
#endif
}

// The two words of the products a * b.
AEFAST_HD void wide_product(uint32_t a, ProductWords b, ProductWords& high, ProductWords& low) {
  const Vector<uint64_t> factor = static_cast<uint64_t>(a) - Vector<uint64_t>{};
  for (int i = 0; i < kRegisters; ++i) {
    low.even[i] = lower_products(factor, b.even[i]);
    low.odd[i] = lower_products(factor, b.odd[i]);
    high.even[i] = upper_half(low.even[i]);
    high.odd[i] = upper_half(low.odd[i]);
  }
}
#else
struct ProductWords {
  Words packed;

  AEFAST_HD ProductWords() = default;
  AEFAST_HD ProductWords(uint32_t value) : packed(value) {}
  AEFAST_HD explicit ProductWords(Words words) : packed(words) {}
  AEFAST_HD Words words() const { return packed; }
};

AEFAST_HD ProductWords operator^(ProductWords a, ProductWords b) { return ProductWords(a.packed ^ b.packed); }

AEFAST_HD void wide_product(uint32_t a, ProductWords b, ProductWords& high, ProductWords& low) {
  for (int i = 0; i < kRegisters; ++i)
    for (size_t lane = 0; lane < kFloats / kRegisters; ++lane) {
      const uint64_t product = static_cast<uint64_t>(a) * b.packed.lanes[i][lane];
      high.packed.lanes[i][lane] = static_cast<uint32_t>(product >> 32);
      low.packed.lanes[i][lane] = static_cast<uint32_t>(product);
    }
}
#endif

// The greater and the lesser of x and a limit; NaN if x is.
AEFAST_HD Floats at_least(Floats limit, Floats x) {
#if defined(__AVX512F__)
  AEFAST_EACH(Floats, _mm512_maskz_max_ps(0xffff, limit.lanes[i], x.lanes[i]));
#elif defined(__AVX2__)
  AEFAST_EACH(Floats, _mm256_max_ps(limit.lanes[i], x.lanes[i]));
#elif defined(__SSE__)
  AEFAST_EACH(Floats, _mm_max_ps(limit.lanes[i], x.lanes[i]));
#else
  return select(x < limit, limit, x);
#endif
}
AEFAST_HD Floats at_most(Floats limit, Floats x) {
#if defined(__AVX512F__)
  AEFAST_EACH(Floats, _mm512_maskz_min_ps(0xffff, limit.lanes[i], x.lanes[i]));
#elif defined(__AVX2__)
  AEFAST_EACH(Floats, _mm256_min_ps(limit.lanes[i], x.lanes[i]));
#elif defined(__SSE__)
  AEFAST_EACH(Floats, _mm_min_ps(limit.lanes[i], x.lanes[i]));
#else
  return select(x > limit, limit, x);
#endif
}

constexpr uint32_t kSignBit = 0x80000000u;
AEFAST_HD Floats magnitude(Floats x) { return float_of(bits_of(x) & ~kSignBit); }

// --- elementary functions ------------------------------------------------------------------------------------
//
// Their polynomials are minimax fits of the function named beside them; errors in units of the last place (ulp).

constexpr float kLog2e = 1.44269504f;
// ln 2 as a sum whose first part has trailing zeros: n * kLn2High is exact for |n| < 2^12.
constexpr float kLn2High = 0.693145752f;
constexpr float kLn2Low = 1.42860677e-6f;
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the significand.
constexpr float kRoundingShift = 12582912.0f;

// exp(x) = (1 + rest) * scale, where |rest| < 0.42 and scale is a power of two.
struct Exponential {
  Floats rest, scale;
};

// That `rest`, and in the low bits of `shifted` the power.
AEFAST_HD Floats exponential_rest(Floats x, Floats& shifted) {
  shifted = x * kLog2e + kRoundingShift;
  const Floats n = shifted - kRoundingShift;
  const Floats r = (x - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
  const Floats square = r * r;
  const Floats low = Floats(1.66665424e-1f) * r + 4.99999981e-1f;
  const Floats high = (Floats(1.38824890e-3f) * r + 8.36669165e-3f) * r + 4.16672054e-2f;
  return r + square * (high * square + low);
}

// For -88 <= x <= 0; scale is 0 below -87.7.
AEFAST_HD Exponential exponential(Floats x) {
  Floats shifted;
  const Floats rest = exponential_rest(x, shifted);
  return {rest, float_of((bits_of(shifted) << 23) + bits_of(Floats(1.0f)))};
}

AEFAST_HD Floats value_of(Exponential e) { return e.scale + e.rest * e.scale; }

// exp(x) to 3 ulp, and in `less_one` exp(x) - 1 to as much; exp is 0 below -86.9, and infinite above 88.7.
AEFAST_HD Floats exp_and_less_one(Floats x, Floats& less_one) {
  Floats shifted;
  const Floats rest = exponential_rest(at_most(89.0f, at_least(-87.0f, x)), shifted);
  // Half of the power of two, which is finite where exp(x) is.
  const Floats half = float_of((bits_of(shifted) << 23) + bits_of(Floats(0.5f)));
  const Floats whole = half + half, change = rest * half;
  less_one = (whole - 1.0f) + (change + change);
  const Floats halved = half + change;
  return halved + halved;
}
AEFAST_HD double exp_and_less_one(double x, double& less_one) {
  less_one = ::expm1(x);
  return ::exp(x);
}
// The same of one double.
using elementary::at_least;
using elementary::at_most;
using elementary::is_zero;
using elementary::log;

// Natural logarithm, 2 ulp; -infinity for 0, NaN below.
AEFAST_HD Floats log(Floats x) {
  // Subnormal numbers are made normal, and their exponent is set right at the end.
  const Masks is_small = x < Floats(0x1p-126f);
  const Floats scaled = select(is_small, x * 0x1p24f, x);
  // x = (1 + f) 2^e with sqrt(1/2) <= 1 + f < sqrt(2)
  const Words shifted = bits_of(scaled) - 0x3f3504f3u;
  const Floats e = signed_float(signed_shift(shifted, 23)) - select(is_small, Floats(24.0f), Floats(0.0f));
  const Floats f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  // (log(1 + f) - f + f^2 / 2) / f^3
  const Floats f2 = f * f;
  const Floats low = (Floats(-1.66233569e-1f) * f + 2.00012267e-1f) * f2 + (Floats(-2.50008196e-1f) * f + 3.33333313e-1f);
  const Floats high = (Floats(-7.63449371e-2f) * f + 1.27615750e-1f) * f2 + (Floats(-1.31601825e-1f) * f + 1.42017588e-1f);
  const Floats log1p = (f + e * kLn2Low) + f2 * (f * (high * (f2 * f2) + low) - 0.5f);
  const Floats value = e * kLn2High + log1p;
  const float infinity = std::numeric_limits<float>::infinity();
  const Floats special = select(x < Floats(0.0f), Floats(std::numeric_limits<float>::quiet_NaN()), Floats(-infinity));
  // A NaN goes through as it is.
  return select(x <= Floats(0.0f), special, select(x < Floats(infinity), value, x));
}

#if defined(__AVX512F__)
// 2^(j / 16) as bits, less j at the place where the sixteenths of a power would be counted.
alignas(64) constexpr uint32_t kRootsOfTwo[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
// What their rounding takes from them, relative to what is left. Without it errors of many powers would not average out.
alignas(64) constexpr float kRestsOfRoots[16] = {
    0.0f, 4.628547e-08f, -1.199216e-08f, 4.729782e-08f, 3.193418e-08f, 3.621057e-08f,
    -3.099072e-08f, -7.475213e-09f, 1.711427e-08f, -3.047683e-08f, 5.233334e-09f,
    6.107592e-09f, -1.471961e-08f, -5.258795e-09f, -6.128260e-09f, 5.140609e-09f};
#endif

// 2^x for x <= 0, 2 ulp; 0 below -127.
AEFAST_HD Floats exp2_nonpositive(Floats x) {
  x = at_least(-127.0f, x);
#if defined(__AVX512F__)
  // The nearest sixteenth, whose number is in the low bits of the sum: its own four choose a root of two, to which those
  // above them are the exponent. A table of one register leaves half of the polynomial.
  constexpr float kShift = kRoundingShift / 16;
  const Floats shifted = x + kShift;
  const Floats r = x - (shifted - kShift);
  const auto roots = read<__m512i>(kRootsOfTwo), rests = read<__m512i>(kRestsOfRoots);
  AEFAST_EACH_OF(Words, root, reinterpret_cast<Vector<uint32_t>>(_mm512_maskz_permutexvar_epi32(
                                  0xffff, reinterpret_cast<__m512i>(shifted.lanes[i]), roots)));
  AEFAST_EACH_OF(Floats, rest, reinterpret_cast<Register>(_mm512_maskz_permutexvar_epi32(
                                   0xffff, reinterpret_cast<__m512i>(shifted.lanes[i]), rests)));
  const Floats power = float_of(root + (bits_of(shifted) << 19));
  // (2^r - 1) / r on |r| <= 1/32
  const Floats sum = (Floats(5.550214e-2f) * r + 2.4023429e-1f) * r + 6.9314718e-1f;
  return power + power * (sum * r + rest);
#else
  // The low bits of the sum are a float's exponent, of which 0 makes it 0.
  const Floats shifted = x + (kRoundingShift + 127.0f);
  const Floats r = x - (shifted - (kRoundingShift + 127.0f));
  // (2^r - 1) / r on |r| <= 1/2
  Floats sum = Floats(1.535336053e-4f) * r + 1.339887488e-3f;
  sum = sum * r + 9.618437367e-3f;
  sum = sum * r + 5.550332470e-2f;
  sum = sum * r + 2.402264791e-1f;
  sum = sum * r + 6.931472029e-1f;
  sum = sum * r + 1.0f;
  return sum * float_of(bits_of(shifted) << 23);
#endif
}

// 1 / x for x >= 1, 2 ulp.
AEFAST_HD Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  x = at_most(0x1p126f, x);
  AEFAST_EACH_OF(Floats, guess, _mm512_maskz_rcp14_ps(0xffff, x.lanes[i]));
  return guess * (Floats(2.0f) - x * guess);
#else
  return Floats(1.0f) / x;
#endif
}

// 1 / sqrt(x) for x > 0, 2 ulp.
AEFAST_HD Floats reciprocal_root(Floats x) {
#if defined(__AVX512F__)
  x = at_most(0x1p126f, x);
  AEFAST_EACH_OF(Floats, guess, _mm512_maskz_rsqrt14_ps(0xffff, x.lanes[i]));
  return guess * (Floats(1.5f) - (Floats(0.5f) * x * guess) * guess);
#else
  return Floats(1.0f) / square_root(x);
#endif
}

// exp(-magnitude), 2 ulp; 0 from 87.7 on.
AEFAST_HD Floats exp_of_negative(Floats magnitude) { return value_of(exponential(-at_most(88.0f, magnitude))); }

// For x <= 0, 2 ulp; any value for x > 0.
AEFAST_HD Floats expm1_nonpositive(Floats x) {
  const Exponential e = exponential(at_least(-25.0f, x));
  return e.scale * e.rest + (e.scale - 1.0f);
}

// 2 ulp.
AEFAST_HD Floats tanh(Floats x) {
  // With e = exp(-2 |x|), (1 - e) / (1 + e): e is subtracted last where it is small, and first, exactly, elsewhere.
  const Exponential power = exponential(at_least(-25.0f, Floats(-2.0f) * magnitude(x)));
  const Floats e = value_of(power);
  const Masks is_small = e < Floats(0.33f);
  const Floats difference = (Floats(1.0f) - power.scale) - power.scale * power.rest;
  const Floats quotient = select(is_small, Floats(2.0f) * e, difference) / (e + 1.0f);
  return float_of(bits_of(select(is_small, Floats(1.0f) - quotient, quotient)) ^ (bits_of(x) & kSignBit));
}

// sigmoid(x), and in `complement` 1 - sigmoid(x), both to 3 ulp.
AEFAST_HD Floats sigmoid_and_complement(Floats x, Floats& complement) {
  const Floats e = exp_of_negative(magnitude(x));
  const Floats large = Floats(1.0f) / (e + 1.0f), small = e * large;
  complement = select(x < Floats(0.0f), large, small);
  return select(x < Floats(0.0f), small, large);
}

AEFAST_HD Floats sigmoid(Floats x) {
  Floats complement;
  return sigmoid_and_complement(x, complement);
}

// log(1 + e) for 0 <= e <= 1, given s = e / (e + 2): it is 2 atanh(s), and (atanh(s) / s - 1) / s^2 on s <= 1/3 is a
// polynomial in s^2.
AEFAST_HD Floats twice_atanh(Floats s) {
  const Floats square = s * s;
  const Floats low = Floats(2.00124545e-1f) * square + 3.33331574e-1f;
  const Floats high = Floats(1.40891710e-1f) * square + 1.39803049e-1f;
  return Floats(2.0f) * (s + s * square * (high * (square * square) + low));
}

// log(1 + exp(x)), 3 ulp; x itself above `threshold`.
AEFAST_HD Floats softplus(Floats x, Floats threshold) {
  const Floats e = exp_of_negative(magnitude(x));
  return select(x > threshold, x, at_least(0.0f, x) + twice_atanh(e / (e + 2.0f)));
}

// log(1 + exp(-|x|)), and in `sigmoid` sigmoid(x), both to 4 ulp.
AEFAST_HD Floats log1p_exp_and_sigmoid(Floats x, Floats& sigmoid) {
  const Floats e = exp_of_negative(magnitude(x));
  // One division for both.
  const Floats inverse = Floats(1.0f) / ((e + 1.0f) * (e + 2.0f));
  const Floats large = (e + 2.0f) * inverse;
  sigmoid = select(x < Floats(0.0f), e * large, large);
  return twice_atanh(e * ((e + 1.0f) * inverse));
}

// log(1 - x) for x <= 1, 3 ulp.
AEFAST_HD Floats log_of_rest(Floats x) {
  const Floats rest = Floats(1.0f) - x;
  // What was rounded off, which is nothing from 1/2 on, divided by the rest to first order.
  const Floats lost = (Floats(1.0f) - rest) - x;
  return log(rest) + (lost + lost * x);
}

// x^exponent for x >= 0 and a positive exponent, to 1 + exponent / 2 ulp.
AEFAST_HD Floats power(Floats x, Floats exponent) {
  const Masks is_small = x < Floats(0x1p-126f);
  const Floats scaled = select(is_small, x * 0x1p24f, x);
  // x = (1 + f) 2^e with sqrt(1/2) <= 1 + f < sqrt(2), as in log().
  const Words difference = bits_of(scaled) - 0x3f3504f3u;
  const Floats e = signed_float(signed_shift(difference, 23)) - select(is_small, Floats(24.0f), Floats(0.0f));
  const Floats f = float_of((difference & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const Floats f2 = f * f;
  const Floats low = (Floats(-1.66233569e-1f) * f + 2.00012267e-1f) * f2 + (Floats(-2.50008196e-1f) * f + 3.33333313e-1f);
  const Floats high = (Floats(-7.63449371e-2f) * f + 1.27615750e-1f) * f2 + (Floats(-1.31601825e-1f) * f + 1.42017588e-1f);
  const Floats log1p = f + f2 * (f * (high * (f2 * f2) + low) - 0.5f);
  // The exponent's leading bits times e is exact, and all of it that is large.
  const Floats leading = float_of(bits_of(exponent) & 0xfffff000u);
  const Floats exact = leading * e, rest = (exponent - leading) * e + exponent * (log1p * kLog2e);
  const Floats shifted = at_most(250.0f, at_least(-250.0f, exact + rest)) + kRoundingShift;
  const Floats r = at_most(1.0f, at_least(-1.0f, (exact - (shifted - kRoundingShift)) + rest));
  // (2^r - 1) / r on |r| <= 1/2
  Floats sum = Floats(1.535336053e-4f) * r + 1.339887488e-3f;
  sum = sum * r + 9.618437367e-3f;
  sum = sum * r + 5.550332470e-2f;
  sum = sum * r + 2.402264791e-1f;
  sum = sum * r + 6.931472029e-1f;
  sum = sum * r + 1.0f;
  // 2^n as two factors: no float holds it in one.
  const Words n = bits_of(shifted) - bits_of(Floats(kRoundingShift)), half = signed_shift(n, 1);
  const Floats value = (sum * float_of((half + 127u) << 23)) * float_of((n - half + 127u) << 23);
  return select(x > Floats(0.0f), select(x < Floats(std::numeric_limits<float>::infinity()), value, x), x);
}

// Phi(x), the distribution function of N(0, 1), to 9e-8 absolute, and in `density_exp` exp(-x^2 / 2), of which the
// density is a multiple. Phi is 0 below -13.2; for NaN it is NaN.
AEFAST_HD Floats normal_cdf(Floats x, Floats& density_exp) {
  // (1 - Phi(|x|)) / exp(-x^2 / 2) is a polynomial in u = |x| / (1 + 0.27 |x|). Its constant is exact, and u small
  // where it is the greater part: the polynomial's rounding errors hardly reach the result.
  const Floats size = at_most(13.25f, magnitude(x));  // exp(-x^2 / 2) is 0 from there on
  const Floats u = size / (Floats(0.27f) * size + 1.0f);
  density_exp = value_of(exponential(Floats(-0.5f) * (size * size)));
  const Floats u2 = u * u;
  const Floats low = Floats(0.142285004f) * u + -0.398942292f;
  const Floats middle = Floats(1.58846425e-3f) * u + -0.0270575937f;
  const Floats high = Floats(-5.07874865e-5f) * u + 3.30206472e-4f;
  const Floats tail = density_exp * (u * ((high * u2 + middle) * u2 + low) + 0.5f);
  return select(x < Floats(0.0f), tail, Floats(1.0f) - tail);
}

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
