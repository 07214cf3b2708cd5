// What the CUDA library says about itself.
#include <string>

#include "common/signatures.h"

namespace lfm_fast {

std::string& signature_lines() {
  static std::string lines;  // a function's static: the ops register before this file's own statics need exist
  return lines;
}

}  // namespace lfm_fast

extern "C" __attribute__((visibility("default"))) const char* lfm_fast_signatures() {
  return lfm_fast::signature_lines().c_str();
}
