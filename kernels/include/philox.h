// Random words by Philox4x32-10, and what is made of them. Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy
// as 1, 2, 3 (SC 2011). kernels/triton/philox.py makes the same for Triton.
//
// Element i of a draw takes word i % 4 of block i / 4, wherever it is computed: the same seed and offset give the same
// noise on every backend, whatever the launch.
#pragma once

#include "elementary.h"

namespace aefast::philox {

struct Words {
  uint32_t word[4];
};

AEFAST_HD uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return ::__umulhi(a, b);
#else
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

AEFAST_HD Words generate(Words counter, uint32_t low_key, uint32_t high_key) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier2 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(kMultiplier0, counter.word[0]), low0 = kMultiplier0 * counter.word[0];
    const uint32_t high2 = high_product(kMultiplier2, counter.word[2]), low2 = kMultiplier2 * counter.word[2];
    counter = {{high2 ^ counter.word[1] ^ low_key, low2, high0 ^ counter.word[3] ^ high_key, low0}};
    low_key += kWeyl0;
    high_key += kWeyl1;
  }
  return counter;
}

// The words of elements 4 * block to 4 * block + 3. Draws of one seed differ by their offset.
AEFAST_HD Words block_words(uint64_t seed, uint64_t offset, uint64_t block) {
  const Words counter{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(offset),
                       static_cast<uint32_t>(offset >> 32)}};
  return generate(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// In (0, 1): (word + 1/2) / 2^32, which for the largest words would round to 1.
AEFAST_HD float uniform(uint32_t word) {
  const float u = ::fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
  return u < 1.0f ? u : 1.0f - 0x1p-24f;
}

// Two independent normal values of two words, by Box and Muller; none is beyond 6.8.
AEFAST_HD void normal_pair(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float radius = ::sqrtf(-2.0f * ::logf(uniform(radius_word)));
  const float turns = uniform(angle_word);
#if defined(__CUDA_ARCH__)
  ::sincospif(2.0f * turns, &second, &first);
#else
  constexpr float kTwoPi = 6.28318530717958647692f;
  first = ::cosf(kTwoPi * turns);
  second = ::sinf(kTwoPi * turns);
#endif
  first *= radius;
  second *= radius;
}

// N(0, 1) for elements 4 * block to 4 * block + 3.
AEFAST_HD void normals(uint64_t seed, uint64_t offset, uint64_t block, float values[4]) {
  const Words words = block_words(seed, offset, block);
  normal_pair(words.word[0], words.word[1], values[0], values[1]);
  normal_pair(words.word[2], words.word[3], values[2], values[3]);
}

}  // namespace aefast::philox
