// gemm_tile: the one single-threaded matrix product that every CPU kernel builds on.
//
// Callers cut their work into tiles whose borders do not depend on the number of threads, so
// results do not either. Linked from gemm_onednn.cpp, or from gemm_naive.cpp in a build without
// oneDNN.
#pragma once

#include <cstdint>

#include "tensor/numeric.h"

namespace omq::cpu {

// C = A · B (+ C when accumulate), A [m, k] with element strides (a_row, a_col), B [k, n] with
// (b_row, b_col), C [m, n] with row stride c_row. One of the two strides of A and of B must be 1. C
// must not overlap A or B.
void gemm_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col,
               const float* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
               bool accumulate = false);

// The same with operands of bf16, products and sums in F32. Only where gemm_has_bf16().
void gemm_tile(int64_t m, int64_t n, int64_t k, const bf16_t* a, int64_t a_row, int64_t a_col,
               const bf16_t* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
               bool accumulate = false);

// Whether this processor multiplies bf16 faster than F32 (AVX512-BF16 or AMX, through oneDNN).
bool gemm_has_bf16();

// Name of the implementation, for `omq-run info`.
const char* gemm_name();

}  // namespace omq::cpu
