// Row look-up and its gradient. An id outside the table gives NaN: a kernel cannot throw.
//
// Bytes: forward the rows looked up once, y once. Backward: a block per position; the block at the
// first position of an id adds the rows of all its positions in order, so equal ids never race and
// the sums are the CPU's.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

template <int W>
__global__ void embedding_kernel(Operand y, Operand table, const int32_t* ids, int64_t count,
                                 int64_t vocabulary, int64_t n) {
  for (int64_t i = grid_index(); i < count * n; i += grid_stride()) {
    const int64_t row = divide(i, n), id = ids[row];
    Piece<W> p;
    if (id >= 0 && id < vocabulary) {
      p = load_piece<W>(table, id * n + (i - row * n));
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] = __int_as_float(0x7fc00000);
    }
    store_piece<W>(y, i, p);
  }
}

constexpr int kThreads = 256, kColumns = 4;  // columns of a thread at a time

__global__ void embedding_vjp_kernel(float* dtable, const int32_t* ids, Operand dy, int64_t count,
                                     int64_t vocabulary, int64_t n) {
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int32_t id = ids[i];
    int seen = id < 0 || id >= vocabulary;
    for (int64_t j = threadIdx.x; j < i && !seen; j += kThreads) seen = ids[j] == id;
    if (__syncthreads_or(seen)) continue;  // an earlier block adds these rows
    for (int64_t start = threadIdx.x; start < n; start += kThreads * kColumns) {
      float sum[kColumns] = {};
      for (int64_t j = i; j < count; ++j) {
        if (ids[j] != id) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (start + c * kThreads < n) sum[c] += load(dy, j * n + start + c * kThreads);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (start + c * kThreads < n) dtable[id * n + start + c * kThreads] = sum[c];
    }
  }
}

}  // namespace

// ---- launchers ----

void embedding(Tensor& y, const Tensor& table, const Tensor& ids) {
  const int64_t n = table.dim(1), count = ids.numel();
  const Operand out = operand("embedding", y), in = operand("embedding", table);
  const int32_t* at = ids.data<int32_t>();
  if (in_packs(n, out, in))
    launch("embedding", y, embedding_kernel<kPack>, blocks_for(count * (n / kPack), kThreads),
           kThreads, 0, out, in, at, count, table.dim(0), n / kPack);
  else
    launch("embedding", y, embedding_kernel<1>, blocks_for(count * n, kThreads), kThreads, 0, out,
           in, at, count, table.dim(0), n);
}

void embedding_vjp(Tensor& dtable, const Tensor& ids, const Tensor& dy) {
  const int64_t n = dtable.dim(1), count = ids.numel();
  fill(dtable, 0.0);
  launch("embedding_vjp", dy, embedding_vjp_kernel, blocks_for(count, 1), kThreads, 0,
         dtable.data<float>(), ids.data<int32_t>(), operand("embedding_vjp", dy), count,
         dtable.dim(0), n);
}

}  // namespace omq::cuda
