// The host side of products with few rows: what packed.cpp asks of the .cu files.
#pragma once

#include <span>

#include "tensor/decode_kernels.h"
#include "tensor/packed.h"
#include "tensor/row_quant.h"

namespace omq::cuda {

// Rows first … first + rows − 1 of x, or of codes where they are given.
struct GemvRows {
  const DecodeInput& x;
  const QuantizedRows* codes;
  int64_t first, rows;
  const DecodeNext* next = nullptr;
};

// y [M, …] of those rows; matrices are all packed in one layout, or all dense of one dtype.
void gemv(const char* op, Tensor& y, const GemvRows& x, std::span<const RowMatrix> matrices,
          RowOutput output);
// Rows that one launch takes whose columns are divided among blocks (split_rows.cuh); most 0: none.
struct SplitRows {
  int64_t fewest = 0, most = 0;
};
SplitRows rows_to_split(const char* op, const Tensor& y, const GemvRows& x,
                        std::span<const RowMatrix> matrices, RowOutput output);
// Rows that one launch of any other kernel takes; 0: a device's shared memory does not hold one.
int64_t packed_gemv_rows(const PackedInt& w, RowOutput output, int device);
int64_t dense_gemv_rows(int64_t cols, int device);

// One row that a stage leaves for the next (prepared_row.cuh): its bytes; and its memory, with an
// Error unless `row` is one of so many columns.
int64_t prepared_row_bytes(int64_t cols);
char* prepared_memory(const char* op, const Tensor& row, int64_t cols);
// Whether the kernel for one row takes matrices of one form; leaves: and can leave its results so.
bool packed_row_takes(std::span<const RowMatrix> matrices, RowOutput output, bool leaves);

inline int64_t row_count(const RowMatrix& m) {
  if (const auto* p = std::get_if<PackedInt>(&m.weight)) return p->rows;
  return std::get<Tensor>(m.weight).dim(0);
}

void decode_attention(const DecodeAttentionStage& s);
void choose(Tensor& state, Tensor& told, Tensor& logits, const TokenChoice& by);

// y [M, N] = rows of signed codes times packed weights in int8, exact; for matrices that it takes.
bool integer_matmul_takes(const PackedInt& w);
void integer_matmul(Tensor& y, const QuantizedRows& x, const PackedInt& w);
void integer_gated(Tensor& y, const QuantizedRows& x, const PackedInt& gate, const PackedInt& up);

// code − zero of every element into y, F16 [rows, cols].
void codes_to_numbers(Tensor& y, const QuantizedRows& x);
// y [rows, n], row i of x times grid[i][0]; x F32.
void scale_rows(Tensor& y, const Tensor& x, const Tensor& grid);

}  // namespace omq::cuda
