// The packed kernels of a build for any other processor than x86-64 and AArch64: the portable
// loops. See packed_isa.h.
#include "tensor/cpu/packed_isa.h"

namespace omq::cpu {

const PackedIsa* const kPackedIsas[] = {&kScalarIsa, nullptr};

}  // namespace omq::cpu
