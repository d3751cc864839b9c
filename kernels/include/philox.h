// Random words by Philox4x32-10, and normal values of them. Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy
// as 1, 2, 3 (SC 2011). kernels/triton/philox.py makes the same for Triton.
//
// Element i of a draw takes word i % 4 of block i / 4, wherever it is computed: the same seed gives the same noise on
// every backend, whatever the launch. Everything is branch-free code on a W, which is a uint32_t or a vector of them,
// and an F, the float or vector of floats that goes with it.
#pragma once

#include "elementary.h"

namespace aefast::philox {

template <typename W>
struct Block {
  W word[4];
};

template <typename W>
AEFAST_HD Block<W> generate(Block<W> counter, uint32_t low_key, uint32_t high_key) {
  using namespace elementary;
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier2 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high2, low2;
    wide_product(kMultiplier0, counter.word[0], high0, low0);
    wide_product(kMultiplier2, counter.word[2], high2, low2);
    counter = {{high2 ^ counter.word[1] ^ low_key, low2, high0 ^ counter.word[3] ^ high_key, low0}};
    low_key += kWeyl0;
    high_key += kWeyl1;
  }
  return counter;
}

// The words of elements 4 * block to 4 * block + 3. An op that draws twice would give each draw an offset of its own.
AEFAST_HD Block<uint32_t> block_words(uint64_t seed, uint64_t offset, uint64_t block) {
  const Block<uint32_t> counter{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                 static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}};
  return generate(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// -2 log u of the uniform u = (word + 1/2) / 2^32, to 3 ulp; between 2^-32 and 46.
template <typename F, typename W>
AEFAST_HD F squared_radius(W word) {
  using namespace elementary;
  // Below 1/2 from u itself, above it from 1 - u: each keeps all its digits, and neither rounds to 1.
  const W upper = sign_mask(word);
  const F x = signed_float(word ^ upper) * F(0x1p-32f) + F(0x1p-33f);
  // u = (1 + f) 2^e with -1/2 <= f <= 0
  const F f = select_bits(upper, -x, float_of((bits_of(x) & 0x007fffffu) | 0x3f000000u) - F(1.0f));
  const F e = signed_float(((bits_of(x) >> 23) - 126u) & ~upper);
  // log(1 + f) / f
  const F f2 = f * f, f4 = f2 * f2;
  const F low = (F(-2.42805079e-1f) * f + F(3.33700627e-1f)) * f2 + (F(-4.99992847e-1f) * f + F(1.0f));
  const F high = (F(1.69581151f) * f + F(1.25766933f)) * f2 + (F(2.03538790e-1f) * f + F(2.69612730e-1f));
  const F log1p = ((F(1.44110763f) * f4 + high) * f4 + low) * f;
  return F(-1.38629436f) * e - (log1p + log1p);
}

// sin and cos of the angle of (word + 1/2) / 2^32 turns, to 2 ulp.
template <typename F, typename W>
AEFAST_HD void sine_and_cosine(W word, F& sine, F& cosine) {
  using namespace elementary;
  // The nearest quarter turn, and the rest in quarter turns: its low 30 bits as a signed number.
  const W nearest = word + 0x20000000u;
  const F rest = signed_float((nearest & 0x3fffffffu) - 0x20000000u) * F(0x1p-30f) + F(0x1p-31f);
  const F square = rest * rest;
  const F s = ((F(-4.60165786e-3f) * square + F(7.96800330e-2f)) * square + F(-6.45963490e-1f)) * square;
  const F c = ((F(9.03766544e-4f) * square + F(-2.08601654e-2f)) * square + F(2.53669232e-1f)) * square;
  const F near_zero = s * rest + F(1.57079637f) * rest, near_one = (c + F(-1.23370051f)) * square + F(1.0f);
  const W swapped = sign_mask(nearest << 1);
  sine = float_of(bits_of(select_bits(swapped, near_one, near_zero)) ^ (nearest & 0x80000000u));
  cosine = float_of(bits_of(select_bits(swapped, near_zero, near_one)) ^ ((nearest + 0x40000000u) & 0x80000000u));
}

// Two independent normal values of two words, by Box and Muller; none is beyond 6.8.
template <typename F, typename W>
AEFAST_HD void normal_pair(W radius_word, W angle_word, F& first, F& second) {
  using namespace elementary;
  const F radius = square_root(squared_radius<F>(radius_word));
  sine_and_cosine(angle_word, second, first);
  first = radius * first;
  second = radius * second;
}

// The same values in double precision.
AEFAST_HD void normal_pair(uint32_t radius_word, uint32_t angle_word, double& first, double& second) {
  const double radius = ::sqrt(-2.0 * ::log((radius_word + 0.5) * 0x1p-32));
#if defined(__CUDA_ARCH__)
  ::sincospi((angle_word + 0.5) * 0x1p-31, &second, &first);
#else
  const double angle = (angle_word + 0.5) * (6.28318530717958647692 * 0x1p-32);
  first = ::cos(angle);
  second = ::sin(angle);
#endif
  first *= radius;
  second *= radius;
}

// N(0, 1) for the four elements of a block.
template <typename F, typename W>
AEFAST_HD void normals(const Block<W>& words, F values[4]) {
  normal_pair(words.word[0], words.word[1], values[0], values[1]);
  normal_pair(words.word[2], words.word[3], values[2], values[3]);
}

}  // namespace aefast::philox
