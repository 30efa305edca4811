// silu(gate) ⊙ up of one row, for silu_mul and for the row's codes (internal to tensor/).
#pragma once

#include <cstdint>

namespace omq::cpu {

void silu_mul_row(float* out, const float* gate, const float* up, int64_t n);

}  // namespace omq::cpu
