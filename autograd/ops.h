// Every differentiable op, on one page. Shapes in comments; letters as in nn/README.md.
//
// Ops check shapes, allocate their result, call one kernel, and state their gradient next to it
// (autograd/ops/*.cpp). Nothing is converted or moved implicitly: F32 with F32 (or F64 with F64,
// for gradient checks) on one device. A name ending in _composed is the plain-op definition that
// the fused op of that name is tested against.
#pragma once

#include "autograd/node.h"
#include "tensor/kernels.h"

namespace omq {

// ---- scalar functions (elementwise.h), shape kept ----
Tensor affine(const Tensor& x, double a, double b);  // a·x + b
Tensor exp(const Tensor& x);
Tensor log(const Tensor& x);
Tensor sqrt(const Tensor& x);
Tensor square(const Tensor& x);
Tensor abs(const Tensor& x);
Tensor sigmoid(const Tensor& x);
Tensor silu(const Tensor& x);
Tensor clamp(const Tensor& x, double lo, double hi);  // gradient 1 inside and on the bounds
Tensor round(const Tensor& x);                        // half to even, gradient 0
Tensor round_ste(const Tensor& x);                    // half to even, gradient 1 (straight-through)

// ---- two operands, broadcast as NumPy does ----
Tensor add(const Tensor& a, const Tensor& b);
Tensor sub(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, const Tensor& b);
Tensor div(const Tensor& a, const Tensor& b);
Tensor maximum(const Tensor& a, const Tensor& b);
inline Tensor operator+(const Tensor& a, const Tensor& b) { return add(a, b); }
inline Tensor operator-(const Tensor& a, const Tensor& b) { return sub(a, b); }
inline Tensor operator*(const Tensor& a, const Tensor& b) { return mul(a, b); }
inline Tensor operator/(const Tensor& a, const Tensor& b) { return div(a, b); }
inline Tensor operator*(const Tensor& a, double b) { return affine(a, b, 0); }
inline Tensor operator*(double a, const Tensor& b) { return affine(b, a, 0); }
inline Tensor operator+(const Tensor& a, double b) { return affine(a, 1, b); }
inline Tensor operator-(const Tensor& a, double b) { return affine(a, 1, -b); }
inline Tensor operator/(const Tensor& a, double b) { return affine(a, 1.0 / b, 0); }
inline Tensor operator-(const Tensor& a) { return affine(a, -1, 0); }

// ---- views: share the Storage ----
Tensor reshape(const Tensor& x,
               Shape shape);  // one size may be −1; copies when x is not contiguous
Tensor transpose(const Tensor& x, int a, int b);  // swaps two dims
Tensor slice(const Tensor& x, int dim, int64_t begin, int64_t end);
Tensor expand(const Tensor& x, const Shape& shape);  // size-1 dims repeat (stride 0)
Tensor contiguous(const Tensor& x);                  // x itself when it is

// ---- type and device ----
Tensor to(const Tensor& x, DType dtype);    // gradient is converted back
Tensor to(const Tensor& x, Device device);  // not differentiable

// ---- reductions ----
Tensor sum(const Tensor& x);                         // → [1]
Tensor mean(const Tensor& x);                        // → [1]
Tensor sum_to(const Tensor& x, const Shape& shape);  // sizes equal x's or 1
struct Range {
  Tensor hi, lo;
};
// Largest and smallest element of every group of a row (with 0 among them when s.include_zero): x
// [R,C] → [R,G]. Ties share the gradient evenly (spec omniquant §2.6).
Range group_range(const Tensor& x, GroupSpec s);

// ---- products ----
Tensor matmul(const Tensor& a, const Tensor& b);  // [...,M,K] · [...,K,N] → [...,M,N]
// [...,K], [N,K], [N] → [...,N]; w may be of the ComputeScope's type already.
// WriteAs::Operand: y is read by nothing that needs more than the ComputeScope's type; a GPU then
// writes that (unless there is a bias).
enum class WriteAs : uint8_t { Wide, Operand };
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& bias = {},
              WriteAs write = WriteAs::Wide);
// (I + N)⁻¹ of every N [...,n,n] that is strictly lower, or strictly upper, triangular.
Tensor unit_triangular_inverse(const Tensor& n);

// ---- layers ----
Tensor softmax(const Tensor& x);  // over the last dim
Tensor rms_norm(const Tensor& x, const Tensor& w, const Tensor& b,
                double eps);  // x [...,D]; w, b [D] or undefined
Tensor rms_norm_composed(const Tensor& x, const Tensor& w, const Tensor& b, double eps);
Tensor silu_mul(const Tensor& gate, const Tensor& up);  // silu(gate) ⊙ up
// Rotates channel pairs (i, i + d/2) of x [B,T,H,d] by the angle of their token's position; cos,
// sin [P, d/2] tables, positions I32 [T].
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions);
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 AttentionSpec s);  // see kernels.h → [B,T,H,d]
// on_probabilities (optional) is applied to the probabilities [B,H,T,S].
Tensor attention_composed(const Tensor& q, const Tensor& k, const Tensor& v, AttentionSpec s,
                          const std::function<Tensor(const Tensor&)>& on_probabilities = {});
Tensor embedding(const Tensor& table, const Tensor& ids);  // [V,D], I32 [...] → [...,D]

// w [R,C] with every column c times cols[c], every row r times rows[r]: [R], [C], either undefined.
Tensor scale_matrix(const Tensor& w, const Tensor& rows, const Tensor& cols);
Tensor scale_matrix_composed(const Tensor& w, const Tensor& rows, const Tensor& cols);

// ---- losses ----
Tensor cross_entropy(const Tensor& logits,
                     const Tensor& targets);   // [N,V], I32 [N] → [N] in nats; target −1 → 0
Tensor mse(const Tensor& a, const Tensor& b);  // mean of squared differences → [1]
Tensor mse_composed(const Tensor& a, const Tensor& b);

// ---- quantisation with straight-through gradients (spec omniquant §2.4, §2.6) ----
// (clamp(⌊x/h⌉ + z, 0, 2ᵇ−1) − z)·h, x [R,C]; h = scale, z = zero [R,G], whole numbers. Gradients
// reach x and h, and z only with s.zero_learns. The result has the type of the ComputeScope: it is
// made to be multiplied.
Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s);
Tensor fake_quant_composed(const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s);
// The entry of a grid [R,G] for each of `cols` columns: [R,cols].
Tensor repeat_groups(const Tensor& grid, int64_t cols, GroupSpec s);
// `value` with the gradient going to x as it is: value is what some rounding made of x.
Tensor straight_through(const Tensor& x, const Tensor& value);
// The grid of a range whose ends are clipped by learnables (tensor/lwc_grid.h): scale and zero from
// u, l, hi ≥ lo, all of one shape. Gradients reach all four through the scale.
struct ScaleZero {
  Tensor scale, zero;
};
ScaleZero lwc_grid(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                   GroupSpec s);
ScaleZero lwc_grid_composed(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                            GroupSpec s);
// fake_quant of x on the lwc_grid of its group_range, in fewer passes over x: x [R,C]; u, l [R,G].
Tensor fake_quant_lwc(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s);
Tensor fake_quant_lwc_composed(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s);
// Each row of x [..., N] on a grid of its own extremes (tensor/row_quant.h), which gradients reach.
Tensor fake_quant_rows(const Tensor& x, RowQuant s);
Tensor fake_quant_rows_composed(const Tensor& x, RowQuant s);
// The same with a share [1] of the range that gradients reach, in place of s.clip.
Tensor fake_quant_rows(const Tensor& x, RowQuant s, const Tensor& share);

}  // namespace omq
