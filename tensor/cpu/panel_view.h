// Matrices of the library as the loops behind packed_isa.h see them (internal to tensor/; not for
// files of one instruction set).
#pragma once

#include "tensor/cpu/packed_isa.h"
#include "tensor/packed.h"

namespace omq::cpu {

// chunk_cols: the most columns of a chunk. `op` opens the message of the Error that is thrown when
// w is malformed or its data are not where and as long as they must be.
PanelView view_of(const char* op, const PackedInt& w, int64_t chunk_cols = kChunkCols);

// Throws Error when w is of another dtype than F32, BF16 and F16.
Stored stored_type(const Tensor& w);

}  // namespace omq::cpu
