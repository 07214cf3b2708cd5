// Whether there are tiles, asked once.
#include "cpu/amx.h"

#if defined(LFM_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)
// Linux hands the tiles' registers out on request; a kernel or sandbox may refuse.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

}  // namespace

bool has_tiles() {
  static const bool has = may_use_tiles();
  return has && active_level() == Level::avx512;
}

}  // namespace lfm_fast

extern "C" __attribute__((visibility("default"))) bool lfm_fast_cpu_has_tiles() { return lfm_fast::has_tiles(); }
