// The packed kernels of an AArch64 build. See packed_isa.h.
#include "tensor/cpu/packed_isa.h"

namespace omq::cpu {

const PackedIsa* const kPackedIsas[] = {&kNeonIsa, &kScalarIsa, nullptr};

}  // namespace omq::cpu
