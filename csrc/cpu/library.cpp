// What the compiled library says about itself, and the choice of its instruction set.
#include <cstdlib>
#include <string>

#include "common/checks.h"
#include "common/signatures.h"
#include "cpu/levels.h"

#define LFM_EXPORT extern "C" __attribute__((visibility("default")))

namespace lfm_fast {

std::string& signature_lines() {
  static std::string lines;  // a function's static: the ops register before this file's own statics need exist
  return lines;
}

namespace {

bool machine_has(Level level) {
#if defined(LFM_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("fma");
  if (level == Level::avx2) return avx2;
  if (level == Level::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return level == Level::baseline;
}

const char* name_of(Level level) {
  switch (level) {
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    case Level::baseline: break;
  }
  return "baseline";
}

struct Choice {
  Level level = Level::baseline;
  std::string refusal;  // why the wish cannot be granted; empty if it can
};

Choice choose_level() {
  Choice choice;
  for (const Level level : {Level::avx2, Level::avx512})
    if (machine_has(level)) choice.level = level;
  const char* wish = std::getenv("LFM_FAST_CPU_LEVEL");
  if (wish == nullptr || *wish == '\0') return choice;
  for (const Level level : {Level::baseline, Level::avx2, Level::avx512}) {
    if (std::string(wish) != name_of(level)) continue;
    if (machine_has(level))
      choice.level = level;
    else
      choice.refusal = "LFM_FAST_CPU_LEVEL asks for " + std::string(wish) +
                       ", which this machine does not have; its best is " + name_of(choice.level) + ".";
    return choice;
  }
  choice.refusal = "LFM_FAST_CPU_LEVEL must be avx512, avx2 or baseline, got \"" + std::string(wish) + "\".";
  return choice;
}

const Choice kChoice = choose_level();

}  // namespace

Level active_level() {
  LFM_CHECK(kChoice.refusal.empty(), kChoice.refusal);
  return kChoice.level;
}

}  // namespace lfm_fast

LFM_EXPORT const char* lfm_fast_signatures() { return lfm_fast::signature_lines().c_str(); }

LFM_EXPORT const char* lfm_fast_cpu_level() { return lfm_fast::name_of(lfm_fast::kChoice.level); }
