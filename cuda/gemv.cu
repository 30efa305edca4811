// The arguments of the kernels for few rows, and the two passes that integer products of many rows
// need around a dense product.
#include "cuda/gemv.cuh"

#include <vector>

#include "cuda/code_bytes.cuh"
#include "cuda/packed.h"
#include "cuda/prepared_row.cuh"

namespace omq::cuda {
namespace {

const float* vector_of(const char* op, const Tensor& t, int64_t n) {
  if (!t.defined()) return nullptr;
  check(t.numel() == n && t.dtype() == DType::F32 && t.is_contiguous(),
        "{}: a vector {}, {} wanted", op, t.shape(), n);
  return t.data<float>();
}

GemvInput input_of(const char* op, const GemvRows& r) {
  GemvInput in;
  in.rows = static_cast<int>(r.rows);
  if (r.codes) {
    in.cols = static_cast<int>(r.codes->cols);
    in.codes = r.codes->codes.data<uint8_t>() + r.first * in.cols;
    in.grid = reinterpret_cast<const float2*>(r.codes->grid.data<float>()) + r.first;
    return in;
  }
  const Tensor& x = r.x.x;
  check(x.is_contiguous() && x.ndim() == 2, "{}: x {}", op, x.shape());
  in.cols = static_cast<int>(x.dim(1));
  in.x = x.data<float>() + r.first * in.cols;
  in.gain = vector_of(op, r.x.gain, in.cols);
  in.shift = vector_of(op, r.x.shift, in.cols);
  in.eps = static_cast<float>(r.x.eps);
  in.quantise = r.x.quant.has_value();
  if (in.quantise) in.s = *r.x.quant;
  if (r.x.prepared.defined()) {
    check(in.rows == 1 && !in.shift && !in.quantise, "{}: a prepared row among {}", op, in.rows);
    char* row = prepared_memory(op, r.x.prepared, in.cols);
    in.prepared = row;
    in.squares = PreparedRow(row, PreparedRow::padded(in.cols)).squares;
  }
  in.by_fours = in.cols % 4 == 0 && aligned16(in.x) && aligned16(in.gain) && aligned16(in.shift);
  return in;
}

__global__ void numbers_kernel(__half* y, CodeBytes codes, const float2* grid, int64_t rows,
                               int64_t cols) {
  for (int64_t i = grid_index(); i < rows * cols; i += grid_stride())
    y[i] = __float2half_rn(static_cast<float>(codes[i]) - grid[divide(i, cols)].y);
}

__global__ void scale_rows_kernel(Operand y, const float* x, const float2* grid, int64_t rows,
                                  int64_t cols) {
  for (int64_t i = grid_index(); i < rows * cols; i += grid_stride())
    store(y, i, x[i] * grid[divide(i, cols)].x);
}

constexpr int kThreads = 256;

// Codes and grids of the packed ones of these matrices, as many as there is room for.
std::vector<AheadRange> ranges_of(const char* op, std::span<const RowMatrix> matrices) {
  std::vector<AheadRange> all;
  for (const RowMatrix& m : matrices) {
    const auto* packed = std::get_if<PackedInt>(&m.weight);
    if (!packed || all.size() + 2 > WeightsAhead::kMostRanges) continue;
    const PackedView v = view_of(op, *packed);
    const auto *codes = reinterpret_cast<const char*>(v.codes),
               *grids = reinterpret_cast<const char*>(v.grids);
    all.push_back({codes, grids - codes});
    all.push_back({grids, int64_t{v.panels} * v.groups * kPanelRows * int64_t{sizeof(GridWord)}});
  }
  return all;
}

GemvArgs arguments(const char* op, const Tensor& y, const GemvRows& x,
                   std::span<const RowMatrix> matrices, RowOutput output) {
  check(!matrices.empty() && matrices.size() <= kMaxMatrices &&
            (output != RowOutput::SiluMul || matrices.size() == 2) &&
            (output != RowOutput::Add || matrices.size() == 1),
        "{}: {} matrices at once", op, matrices.size());
  GemvArgs a;
  a.in = input_of(op, x);
  a.output = output;
  a.matrices = static_cast<int>(matrices.size());
  a.y_stride = y.stride(0);
  int64_t column = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const int64_t rows = row_count(matrices[i]);
    a.m[i].rows = static_cast<int>(rows);
    a.m[i].bias = vector_of(op, matrices[i].bias, rows);
    a.m[i].y = y.data<float>() + x.first * a.y_stride + column;
    if (output != RowOutput::SiluMul) column += rows;
  }
  if (x.next && x.next->row.defined()) {
    const int64_t columns = row_count(matrices[0]);
    check(x.rows == 1, "{}: {} rows cannot be left prepared", op, x.rows);
    a.next = {prepared_memory(op, x.next->row, columns), vector_of(op, x.next->gain, columns),
              PreparedRow::padded(static_cast<int>(columns))};
  }
  return a;
}

}  // namespace

// ---- launchers ----

char* prepared_memory(const char* op, const Tensor& row, int64_t cols) {
  check(row.dtype() == DType::U8 && row.is_contiguous() && aligned16(row.raw()) &&
            row.numel() == prepared_row_bytes(cols),
        "{}: a prepared row {} of {}, {} bytes wanted", op, row.shape(), dtype_name(row.dtype()),
        prepared_row_bytes(cols));
  return static_cast<char*>(row.raw());
}

SplitRows rows_to_split(const char* op, const Tensor& y, const GemvRows& x,
                        std::span<const RowMatrix> matrices, RowOutput output) {
  GemvArgs a = arguments(op, y, x, matrices, output);
  if (!rows_side_by_side(a.in)) return {};
  const int device = y.device().index;
  if (const auto* packed = std::get_if<PackedInt>(&matrices[0].weight))
    return packed_rows_taken(packed_view(*packed, nullptr), output, device);
  for (size_t i = 0; i < matrices.size(); ++i)
    a.m[i].data = std::get<Tensor>(matrices[i].weight).raw();
  return dense_rows_taken(a, std::get<Tensor>(matrices[0].weight).dtype(), device);
}

void gemv(const char* op, Tensor& y, const GemvRows& x, std::span<const RowMatrix> matrices,
          RowOutput output) {
  const GemvArgs a = arguments(op, y, x, matrices, output);
  if (std::holds_alternative<PackedInt>(matrices[0].weight))
    return packed_gemv(y, a, matrices,
                       x.next ? ranges_of(op, x.next->weights) : std::vector<AheadRange>{});
  if (WeightsAhead* ahead = weights_ahead(y.device().index)) ahead->close();  // 128 registers
  check(!a.in.prepared && !a.next.memory, "{}: dense weights take and leave no prepared row", op);
  dense_gemv(y, a, matrices);
}

void codes_to_numbers(Tensor& y, const QuantizedRows& x) {
  launch("codes_to_numbers", y, numbers_kernel, blocks_for(y.numel(), kThreads), kThreads, 0,
         static_cast<__half*>(y.raw()), CodeBytes(x),
         reinterpret_cast<const float2*>(x.grid.data<float>()), y.dim(0), y.dim(1));
}

void scale_rows(Tensor& y, const Tensor& x, const Tensor& grid) {
  launch("scale_rows", y, scale_rows_kernel, blocks_for(y.numel(), kThreads), kThreads, 0,
         operand("scale_rows", y), x.data<float>(),
         reinterpret_cast<const float2*>(grid.data<float>()), y.dim(0), y.dim(1));
}

}  // namespace omq::cuda
