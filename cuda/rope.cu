// Rotary embedding, half-split pairs: (x₁, x₂) → (x₁ c − x₂ s, x₂ c + x₁ s); `inverse` turns the
// other way. A position beyond the table gives NaN: a kernel cannot throw.
//
// Bytes: x once, y once; a token's cosines and sines are shared by its heads in the cache. A thread
// turns one pack of each half.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

struct Sizes {
  int64_t rows, tokens, heads, half, table;  // rows = batch · tokens; half in pieces
};

template <int W>
__global__ void rope_kernel(Operand y, Operand x, Operand cos, Operand sin,
                            const int32_t* positions, Sizes s, float sign) {
  const int64_t count = s.rows * s.heads * s.half;
  for (int64_t i = grid_index(); i < count; i += grid_stride()) {
    const int64_t head = divide(i, s.half), j = i - head * s.half, row = divide(head, s.heads);
    const int64_t at = positions[row - divide(row, s.tokens) * s.tokens];
    const int64_t first = head * 2 * s.half + j;
    const auto ra = fetch<W>(x, first), rb = fetch<W>(x, first + s.half);
    Piece<W> c, r;
    if (at >= 0 && at < s.table) {
      c = load_piece<W>(cos, at * s.half + j);
      r = load_piece<W>(sin, at * s.half + j);
    } else {
#pragma unroll
      for (int k = 0; k < W; ++k) c.v[k] = r.v[k] = __int_as_float(0x7fc00000);
    }
    const Piece<W> a = expand<W>(ra, x), b = expand<W>(rb, x);
    Piece<W> oa, ob;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      oa.v[k] = a.v[k] * c.v[k] - b.v[k] * (sign * r.v[k]);
      ob.v[k] = b.v[k] * c.v[k] + a.v[k] * (sign * r.v[k]);
    }
    store_piece<W>(y, first, oa);
    store_piece<W>(y, first + s.half, ob);
  }
}

}  // namespace

// ---- launchers ----

void rope(Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions,
          bool inverse) {
  const int64_t half = x.dim(3) / 2;
  check(x.dim(3) % 2 == 0, "rope: heads of {} elements have no halves", x.dim(3));
  const Operand out = operand("rope", y), in = operand("rope", x), c = operand("rope", cos),
                s = operand("rope", sin);
  const int32_t* at = positions.data<int32_t>();
  const float sign = inverse ? -1.0f : 1.0f;
  constexpr int kThreads = 256;
  const auto run = [&](auto width, auto kernel) {
    constexpr int kW = decltype(width)::value;
    const Sizes sizes{x.dim(0) * x.dim(1), x.dim(1), x.dim(2), half / kW, cos.dim(0)};
    launch("rope", y, kernel, blocks_for(sizes.rows * sizes.heads * sizes.half, kThreads), kThreads,
           0, out, in, c, s, at, sizes, sign);
  };
  if (in_packs(half, out, in, c, s))
    run(Int<kPack>{}, rope_kernel<kPack>);
  else
    run(Int<1>{}, rope_kernel<1>);
}

}  // namespace omq::cuda
