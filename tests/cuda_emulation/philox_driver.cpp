#include "philox.h"

using namespace aefast::philox;

extern "C" void words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Block<uint32_t> found =
      generate(Block<uint32_t>{{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int index = 0; index < 4; ++index) out[index] = found.word[index];
}

extern "C" float squared_radius_of(uint32_t word) { return squared_radius<float>(word); }

extern "C" void sine_and_cosine_of(uint32_t word, float* out) { sine_and_cosine(word, out[0], out[1]); }

namespace {

template <typename F>
void draw(uint64_t seed, uint64_t offset, uint64_t first_block, uint64_t blocks, F* out) {
  for (uint64_t block = 0; block < blocks; ++block) {
    normals(block_words(seed, offset, first_block + block), out + 4 * block);
  }
}

}  // namespace

extern "C" void normal_values(uint64_t seed, uint64_t offset, uint64_t first_block, uint64_t blocks, float* out) {
  draw(seed, offset, first_block, blocks, out);
}

extern "C" void double_normal_values(uint64_t seed, uint64_t offset, uint64_t first_block, uint64_t blocks,
                                     double* out) {
  draw(seed, offset, first_block, blocks, out);
}
