#include <sys/syscall.h>
#include <unistd.h>

#include "dispatch.h"

namespace aefast::cpu {

// Linux hands out the tiles, 8 KiB of each thread's state, on request, and to the whole process.
bool has_matrix_unit() {
  if (!has_amx_bfloat16() || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace aefast::cpu
