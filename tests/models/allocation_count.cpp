// malloc and its kin in front of glibc's own, with a counter. The linker takes these for the whole
// program, the C++ library's operator new included.
#include "tests/models/allocation_count.h"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>

namespace {
std::atomic<int64_t> count{0};
void* counted(void* p) {
  count.fetch_add(1, std::memory_order_relaxed);
  return p;
}
}  // namespace

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t n) { return counted(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) { return counted(__libc_calloc(n, size)); }
void* realloc(void* p, size_t n) { return counted(__libc_realloc(p, n)); }
void* memalign(size_t align, size_t n) { return counted(__libc_memalign(align, n)); }
void* aligned_alloc(size_t align, size_t n) { return counted(__libc_memalign(align, n)); }
int posix_memalign(void** out, size_t align, size_t n) {
  *out = counted(__libc_memalign(align, n));
  return *out ? 0 : ENOMEM;
}
}

bool omq::counts_allocations() { return true; }

#else

bool omq::counts_allocations() { return (void)counted(nullptr), false; }

#endif

int64_t omq::allocation_count() { return count.load(); }
