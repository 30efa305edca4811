// A matrix with its rows and columns scaled, and the gradients of the scales.
//
// Bytes: forward w once, y once; backward w and dy once. A warp of the backward walks down a chunk
// of rows with its own columns: what it has of a row it folds at once, what it has of its columns
// in the end. Partial sums are then added in order, in double.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

template <int W>
__global__ void scale_matrix_kernel(Operand y, Operand w, const float* rows, Operand cols,
                                    int64_t count, int64_t pieces) {
  for (int64_t i = grid_index(); i < count; i += grid_stride()) {
    const auto raw = fetch<W>(w, i);
    const int64_t r = divide(i, pieces);
    Piece<W> p = expand<W>(raw, w);
    if (cols.data) {
      const Piece<W> c = load_piece<W>(cols, i - r * pieces);
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] *= c.v[j];
    }
    if (rows) {
      const float f = rows[r];
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] *= f;
    }
    store_piece<W>(y, i, p);
  }
}

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kChunk = 32;  // rows

struct Sums {
  float *rows, *cols;         // [R, strips], [chunks, C]: partial sums; null: not wanted
  const float* by_row;        // null: 1
  int64_t R, pieces, strips;  // pieces of W columns; strips of 32 pieces
};

template <int W>
__global__ void scale_matrix_vjp_kernel(Sums s, Operand w, Operand dy, Operand cols) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kChunk, end = min(begin + kChunk, s.R);
  const bool inside = piece < s.pieces;
  Piece<W> by_col, down;
#pragma unroll
  for (int j = 0; j < W; ++j) by_col.v[j] = 1.0f, down.v[j] = 0.0f;
  if (cols.data && inside) by_col = load_piece<W>(cols, piece);
#pragma unroll 4
  for (int64_t r = begin; r < end; ++r) {
    float across = 0;
    if (inside) {
      const auto a = fetch<W>(w, r * s.pieces + piece), b = fetch<W>(dy, r * s.pieces + piece);
      const float f = s.by_row ? s.by_row[r] : 1.0f;
      const Piece<W> p = expand<W>(a, w), d = expand<W>(b, dy);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        across += d.v[j] * (p.v[j] * by_col.v[j]);
        down.v[j] += d.v[j] * f * p.v[j];
      }
    }
    if (s.rows) {
      across = team_sum<32>(across);
      if (threadIdx.x % 32 == 0 && strip < s.strips) s.rows[r * s.strips + strip] = across;
    }
  }
  if (s.cols && inside) store_piece<W>({s.cols, DType::F32}, blockIdx.y * s.pieces + piece, down);
}

// y[i] = Σ over k of part[i · outer + k · inner].
__global__ void fold_kernel(float* y, const float* part, int64_t n, int64_t count, int64_t outer,
                            int64_t inner) {
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    double total = 0;
#pragma unroll 8
    for (int64_t k = 0; k < count; ++k) total += static_cast<double>(part[i * outer + k * inner]);
    y[i] = static_cast<float>(total);
  }
}

const float* floats_of(const Tensor& x) { return x.defined() ? x.data<float>() : nullptr; }

}  // namespace

// ---- launchers ----

void scale_matrix(Tensor& y, const Tensor& w, const Tensor& rows, const Tensor& cols) {
  const Operand out = operand("scale_matrix", y), in = operand("scale_matrix", w),
                c = operand("scale_matrix", cols);
  with_width(in_packs(w.dim(1), out, in, c), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    const int64_t count = w.numel() / kW;
    launch("scale_matrix", y, scale_matrix_kernel<kW>, blocks_for(count, kThreads), kThreads, 0,
           out, in, floats_of(rows), c, count, w.dim(1) / kW);
  });
}

void scale_matrix_vjp(Tensor& drows, Tensor& dcols, const Tensor& w, const Tensor& rows,
                      const Tensor& cols, const Tensor& dy) {
  const int64_t R = w.dim(0), C = w.dim(1), chunks = (R + kChunk - 1) / kChunk;
  if (!drows.defined() && !dcols.defined()) return;
  if (w.numel() == 0) {
    if (drows.defined()) fill(drows, 0);
    if (dcols.defined()) fill(dcols, 0);
    return;
  }
  const Operand in = operand("scale_matrix_vjp", w), grad = operand("scale_matrix_vjp", dy),
                c = operand("scale_matrix_vjp", cols);
  with_width(in_packs(C, in, grad, c), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    const int64_t pieces = C / kW, strips = (pieces + 31) / 32;
    Tensor row_parts, col_parts;
    if (drows.defined()) row_parts = Tensor::empty({R, strips}, DType::F32, w.device());
    if (dcols.defined()) col_parts = Tensor::empty({chunks, C}, DType::F32, w.device());
    const Sums s{drows.defined() ? row_parts.data<float>() : nullptr,
                 dcols.defined() ? col_parts.data<float>() : nullptr,
                 floats_of(rows),
                 R,
                 pieces,
                 strips};
    check(chunks <= 65535, "scale_matrix_vjp: {} rows are too many", R);
    launch("scale_matrix_vjp", w, scale_matrix_vjp_kernel<kW>,
           dim3(blocks_for(pieces, kThreads), static_cast<unsigned>(chunks)), kThreads, 0, s, in,
           grad, c);
    if (s.rows)
      launch("scale_matrix_vjp", w, fold_kernel, blocks_for(R, 128), 128, 0, drows.data<float>(),
             s.rows, R, strips, strips, int64_t{1});
    if (s.cols)
      launch("scale_matrix_vjp", w, fold_kernel, blocks_for(C, 128), 128, 0, dcols.data<float>(),
             s.cols, C, chunks, int64_t{1}, C);
  });
}

}  // namespace omq::cuda
