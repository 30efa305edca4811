// How often memory was taken since the program began, by any thread: every malloc, operator new and
// aligned_alloc of the program counts.
#pragma once

#include <cstdint>

namespace omq {

// Whether this build counts: with glibc, and not under the address sanitizer, which brings its own
// malloc.
bool counts_allocations();
int64_t allocation_count();

}  // namespace omq
