// The kernel permits tiles that are none (see ../immintrin.h).
#pragma once

#include <unistd.h>

enum { SYS_arch_prctl };
template <class... Arguments> long emulated_syscall(Arguments...) { return 0; }
#define syscall emulated_syscall
