#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dispatch.h"

namespace aefast::cpu {

// Linux hands out the tiles, 8 KiB of each thread's state, on request, and to the whole process.
bool has_matrix_unit() {
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22, kVectorBFloat16 = 1u << 5;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBFloat16)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kVectorBFloat16)) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace aefast::cpu
