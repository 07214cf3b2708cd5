// Preloaded into a test process: gives every tensor's memory its own pages with forbidden ones on both sides, so that
// one byte read or written past an end is a segmentation fault, in any kernel of any library, compiled as it ships.
//
// PyTorch's CPU allocator calls posix_memalign and free. Freed pages become forbidden too and are never used again.
// Memory starts as bytes 0xff, NaN in every float format: an output element that a kernel left out shows.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

enum Mode { off = 0, end = 1, start = 2 };  // which end of the memory lies at the forbidden page

constexpr size_t kPage = 4096, kArena = size_t{1} << 40;
std::atomic<int> mode{off};
std::atomic<char*> arena{nullptr};
std::mutex lock;
size_t used = kPage;

std::map<char*, size_t>& live() {  // address of the first page -> bytes
  static auto* pages = new std::map<char*, size_t>;
  return *pages;
}

template <typename Function>
Function original(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" int lfm_guard(int wanted) {
  if (!arena) {
    void* memory = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return -1;
    arena = static_cast<char*>(memory);
  }
  mode = wanted;
  return 0;
}

extern "C" int posix_memalign(void** result, size_t alignment, size_t size) {
  if (mode == off || size == 0) {
    static const auto real = original<int (*)(void**, size_t, size_t)>("posix_memalign");
    return real(result, alignment, size);
  }
  const size_t bytes = (size + kPage - 1) / kPage * kPage;
  const std::lock_guard<std::mutex> hold(lock);
  if (used + bytes + kPage > kArena) return ENOMEM;
  char* pages = arena + used;
  if (mprotect(pages, bytes, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  used += bytes + kPage;
  std::memset(pages, 0xff, bytes);
  live()[pages] = bytes;
  // at the end: aligned as its size is, no more, which is all that a slice of a tensor promises
  *result = mode == end ? pages + bytes - size : pages;
  return 0;
}

extern "C" void free(void* memory) {
  static const auto real = original<void (*)(void*)>("free");
  char* const address = static_cast<char*>(memory);
  char* const first = arena;
  if (first == nullptr || address < first || address >= first + kArena) return real(memory);
  const std::lock_guard<std::mutex> hold(lock);
  const auto found = --live().upper_bound(address);
  mmap(found->first, found->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  live().erase(found);
}
