// RowProducts: one row of activations, or one of each of B sequences, times all the matrices that
// read it, for decoding.
//
// A row is quantised once and the matrices' panels are shared out to the pool in one dispatch;
// what follows the product (residual, SiLU and gate, bias) is done by whoever made the rows. A
// task's weights come from memory once for all rows of x. Memory is taken when the object is made:
// a product allocates nothing. Results equal packed_matmul, packed_matmul_rows and dense_matmul of
// each row alone bit for bit. CPU only. Reference: kernels spec §2.
#pragma once

#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "tensor/packed.h"
#include "tensor/row_quant.h"
#include "tensor/tensor.h"

namespace omq {

struct RowMatrix {                         // W [N, K]
  std::variant<PackedInt, Tensor> weight;  // packed, or dense of F32, BF16 or F16
  Tensor bias;                             // F32 [N] or undefined
  const Tensor& stored() const {           // W as it lies in memory
    const auto* packed = std::get_if<PackedInt>(&weight);
    return packed ? packed->data : std::get<Tensor>(weight);
  }
};

enum class RowOutput {
  Store,   // y: W x + b of all matrices, [B, N] one behind the other
  Add,     // one matrix: y [B, N] += W x + b
  SiluMul  // two matrices of one size: y [B, N] = silu(W₀ x + b₀) ⊙ (W₁ x + b₁)
};

class RowProducts {
 public:
  // input: the grid on which x is quantised first; codes meet codes where W is packed (and zero
  // points are codes). batch: B, the rows of x. Takes the instruction set that is in use now
  // (tensor/isa.h). Throws Error when the matrices do not fit each other or are malformed.
  RowProducts(std::vector<RowMatrix> matrices, RowOutput output, std::optional<RowQuant> input = {},
              int64_t batch = 1);
  ~RowProducts();
  RowProducts(RowProducts&&) noexcept;
  RowProducts& operator=(RowProducts&&) noexcept;

  int64_t cols() const;  // K
  int64_t rows() const;  // of y, for one row of x
  // x: F32 [B, K] on the CPU. Not to be called by two threads at once.
  void operator()(const Tensor& x, float* y);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace omq
