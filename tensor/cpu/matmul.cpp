// The dense product. F32 is cut into a grid of tiles whose size depends on the shape alone; each
// tile is one gemm_tile by one thread, so the result has the same bits on any number of threads.
// 16-bit operands are multiplied as they are where the processor can, else widened first. F64 is
// the plain loop.
#include <bit>
#include <type_traits>

#include "tensor/cpu/gemm.h"
#include "tensor/cpu/loops.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

// How a dimension is cut: `parts` pieces of `size`, the last one shorter.
struct Cut {
  int64_t parts, size;
};
Cut cut(int64_t n, int64_t parts) {
  const int64_t size = ((n + parts - 1) / parts + 15) / 16 * 16;
  return {(n + size - 1) / size, size};
}

// Powers of two, so that pieces are equal and two or four threads divide them evenly. Eight pieces
// of F32 at least, so that two threads of unlike speed (a neighbour on one of the cores) end at
// about the same time: with four they waited for each other 5 % of a step of learning, with sixteen
// the products of pieces lose what waiting gains. bf16 is cut across its rows, down to 32 of them,
// and in four: the multiplication is so fast there that copying rows once more for every cut of the
// columns shows (512 × 1536 × 576 on AMX, cut in four: 790 GFLOP/s by rows, 675 by both; F32 does
// not care).
void choose_tiles(int64_t m, int64_t n, int64_t k, bool by_rows, Cut& rows, Cut& cols) {
  const int64_t widest = by_rows ? 1536 : 768;
  int64_t pm = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>((m + 255) / 256)));
  int64_t pn =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>((n + widest - 1) / widest)));
  const bool worth = m * n * k > (int64_t{1} << 21);
  while (worth && pm * pn < (by_rows ? 4 : 8))
    ((by_rows && m / pm > 32) || m / pm >= n / pn ? pm : pn) *= 2;
  rows = cut(m, pm);
  cols = cut(n, pn);
}

// gemm_tile wants one of the two strides to be 1 and rows that do not overlap (as those of an
// expanded tensor do).
Tensor usable(const Tensor& x) {
  const int64_t rows = x.dim(-2), cols = x.dim(-1), down = x.stride(-2), along = x.stride(-1);
  const bool by_rows = (along == 1 || cols == 1) && (down >= cols || rows == 1);
  const bool by_cols = (down == 1 || rows == 1) && (along >= rows || cols == 1);
  if (by_rows || by_cols) return x;
  Tensor y = empty_like(x);
  copy(y, x);
  return y;
}

int64_t batch_offset(const Tensor& x, int64_t b) {
  int64_t at = 0;
  for (int i = x.ndim() - 3; i >= 0; --i) {
    at += b % x.dim(i) * x.stride(i);
    b /= x.dim(i);
  }
  return at;
}

// Dot products of rows of a and columns of b, a column by one thread.
void matmul_f64(Tensor& y, const Tensor& a, const Tensor& b, int64_t batches) {
  const int64_t m = a.dim(-2), k = a.dim(-1), n = b.dim(-1);
  const int64_t down = a.stride(-2), ka = a.stride(-1), kb = b.stride(-2), along = b.stride(-1);
  const auto dot = [k, ka, kb](const double* pa, const double* pb) {
    if (ka == 1 && kb == 1) return lane_sum<double>(k, [&](int64_t p) { return pa[p] * pb[p]; });
    return lane_sum<double>(k, [&](int64_t p) { return pa[p * ka] * pb[p * kb]; });
  };
  for (int64_t i = 0; i < batches; ++i) {
    const double* pa = a.data<double>() + batch_offset(a, i);
    const double* pb = b.data<double>() + batch_offset(b, i);
    double* out = y.data<double>() + i * m * n;
    parallel_for(n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m * k)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c)
                     for (int64_t r = 0; r < m; ++r)
                       out[r * n + c] = dot(pa + r * down, pb + c * along);
                 });
  }
}

Tensor widened(const Tensor& x) {
  Tensor y = Tensor::empty(x.shape(), DType::F32);
  copy(y, x);
  return y;
}

template <class T>
void matmul_tiles(Tensor& y, const Tensor& a_any, const Tensor& b_any, int64_t batches) {
  const int64_t m = a_any.dim(-2), k = a_any.dim(-1), n = b_any.dim(-1);
  const Tensor a = usable(a_any), b = usable(b_any);
  const T *pa = a.data<T>(), *pb = b.data<T>();
  float* out = y.data<float>();
  Cut rows, cols;
  choose_tiles(m, n, k, !std::is_same_v<T, float>, rows, cols);
  const int64_t tiles = rows.parts * cols.parts;
  parallel_for(batches * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / tiles, r0 = i % tiles / cols.parts * rows.size,
                    c0 = i % cols.parts * cols.size;
      gemm_tile(std::min(rows.size, m - r0), std::min(cols.size, n - c0), k,
                pa + batch_offset(a, batch) + r0 * a.stride(-2), a.stride(-2), a.stride(-1),
                pb + batch_offset(b, batch) + c0 * b.stride(-1), b.stride(-2), b.stride(-1),
                out + batch * m * n + r0 * n + c0, n);
    }
  });
}

}  // namespace

void matmul(Tensor& y, const Tensor& a, const Tensor& b) {
  if (y.numel() == 0) return;
  const int64_t batches = y.numel() / (a.dim(-2) * b.dim(-1));
  if (y.dtype() == DType::F64) return matmul_f64(y, a, b, batches);
  const bool narrow = a.dtype() != DType::F32;
  if (narrow && a.dtype() == DType::BF16 && gemm_has_bf16())
    return matmul_tiles<bf16_t>(y, a, b, batches);
  if (narrow) return matmul_tiles<float>(y, widened(a), widened(b), batches);
  matmul_tiles<float>(y, a, b, batches);
}

}  // namespace omq::cpu
