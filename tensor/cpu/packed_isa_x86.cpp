// The packed kernels of an x86-64 build, the best first. See packed_isa.h; other processors take
// packed_isa_arm.cpp or packed_isa_other.cpp.
#include "tensor/cpu/packed_isa.h"

namespace omq::cpu {

const PackedIsa* const kPackedIsas[] = {&kAmxIsa, &kAvx512Isa, &kAvx2Isa, &kScalarIsa, nullptr};

}  // namespace omq::cpu
