#include "philox.h"

using namespace aefast::philox;

extern "C" void words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Words found = generate({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int index = 0; index < 4; ++index) out[index] = found.word[index];
}

extern "C" float uniform_of(uint32_t word) { return uniform(word); }

extern "C" void normal_values(uint64_t seed, uint64_t offset, uint64_t first_block, uint64_t blocks, float* out) {
  for (uint64_t block = 0; block < blocks; ++block) normals(seed, offset, first_block + block, out + 4 * block);
}
