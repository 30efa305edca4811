// RMSNorm: y = x · r ⊙ w + b with r = 1/√(mean x² + eps), and its gradient.
//
// Bytes: forward x once, y once; backward x and dy once, dx once, and x and dy once more where dw
// or db is wanted. A row is a team's; dw and db are sums over fixed chunks of rows, added in order.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

template <int kTeam, int W>
__global__ void rms_norm_kernel(Operand y, Operand x, Operand w, Operand b, int64_t rows, int64_t n,
                                float eps) {
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    float squares = 0;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const Piece<W> p = load_piece<W>(x, row * n + i);
#pragma unroll
      for (int j = 0; j < W; ++j) squares += p.v[j] * p.v[j];
    }
    squares = team_sum<kTeam>(squares);
    const float r = 1.0f / sqrtf(squares / static_cast<float>(n * W) + eps);
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      Piece<W> p = load_piece<W>(x, row * n + i);
#pragma unroll
      for (int j = 0; j < W; ++j) p.v[j] *= r;
      if (w.data) {
        const Piece<W> gain = load_piece<W>(w, i);
#pragma unroll
        for (int j = 0; j < W; ++j) p.v[j] *= gain.v[j];
      }
      if (b.data) {
        const Piece<W> shift = load_piece<W>(b, i);
#pragma unroll
        for (int j = 0; j < W; ++j) p.v[j] += shift.v[j];
      }
      store_piece<W>(y, row * n + i, p);
    }
  });
}

// dx = r (u − x̂ · mean(u ⊙ x̂)) with u = dy ⊙ w, x̂ = x·r; keeps r for the sums below.
template <int kTeam, int W>
__global__ void rms_norm_dx_kernel(Operand dx, float* inverse, Operand x, Operand w, Operand dy,
                                   int64_t rows, int64_t n, float eps) {
  const auto weighted = [&](Piece<W> d, int64_t i) {
    if (w.data) {
      const Piece<W> gain = load_piece<W>(w, i);
#pragma unroll
      for (int j = 0; j < W; ++j) d.v[j] *= gain.v[j];
    }
    return d;
  };
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    float squares = 0, dot = 0;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(x, row * n + i), c = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, x), u = weighted(expand<W>(c, dy), i);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        squares += p.v[j] * p.v[j];
        dot += u.v[j] * p.v[j];
      }
    }
    const float count = static_cast<float>(n * W);
    squares = team_sum<kTeam>(squares);
    dot = team_sum<kTeam>(dot);
    const float r = 1.0f / sqrtf(squares / count + eps), c = dot * r * r * r / count;
    if (valid && lane == 0 && inverse) inverse[row] = r;
    if (!dx.data) return;
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const auto a = fetch<W>(x, row * n + i), e = fetch<W>(dy, row * n + i);
      const Piece<W> p = expand<W>(a, x), u = weighted(expand<W>(e, dy), i);
      Piece<W> o;
#pragma unroll
      for (int j = 0; j < W; ++j) o.v[j] = u.v[j] * r - p.v[j] * c;
      store_piece<W>(dx, row * n + i, o);
    }
  });
}

constexpr int64_t kRowChunk = 32;

// One thread per column and chunk of rows: part_w[chunk, n] = Σ dy ⊙ x̂, part_b[chunk, n] = Σ dy.
__global__ void rms_norm_sums_kernel(float* part_w, float* part_b, Operand x, Operand dy,
                                     const float* inverse, int64_t rows, int64_t n,
                                     int64_t chunks) {
  for (int64_t i = grid_index(); i < n * chunks; i += grid_stride()) {
    const int64_t chunk = divide(i, n), col = i - chunk * n;
    const int64_t end = min((chunk + 1) * kRowChunk, rows);
    float w = 0, b = 0;
#pragma unroll 4
    for (int64_t row = chunk * kRowChunk; row < end; ++row) {
      const float d = load(dy, row * n + col);
      w += d * load(x, row * n + col) * inverse[row];
      b += d;
    }
    part_w[i] = w;
    part_b[i] = b;
  }
}

// A null output is not wanted.
__global__ void fold_kernel(float* dw, float* db, const float* part_w, const float* part_b,
                            int64_t n, int64_t chunks) {
  for (int64_t col = grid_index(); col < n; col += grid_stride()) {
    double w = 0, b = 0;
#pragma unroll 8
    for (int64_t c = 0; c < chunks; ++c) {
      w += static_cast<double>(part_w[c * n + col]);
      b += static_cast<double>(part_b[c * n + col]);
    }
    if (dw) dw[col] = static_cast<float>(w);
    if (db) db[col] = static_cast<float>(b);
  }
}

}  // namespace

// ---- launchers ----

void rms_norm(Tensor& y, const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  const Operand out = operand("rms_norm", y), in = operand("rms_norm", x),
                gain = operand("rms_norm", w), shift = operand("rms_norm", b);
  with_team(n, in_packs(n, out, in, gain, shift), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("rms_norm", y, rms_norm_kernel<kTeam, kW>, team_blocks<kTeam>(rows), kRowThreads, 0, out,
           in, gain, shift, rows, n / kW, eps);
  });
}

void rms_norm_vjp(Tensor& dx, Tensor& dw, Tensor& db, const Tensor& x, const Tensor& w,
                  const Tensor& dy, double eps) {
  const int64_t n = x.shape().back(), rows = rows_of(x);
  const bool sums = dw.defined() || db.defined();
  const Operand out = operand("rms_norm_vjp", dx), in = operand("rms_norm_vjp", x),
                gain = operand("rms_norm_vjp", w), grad = operand("rms_norm_vjp", dy);
  Tensor inverse;
  if (sums) inverse = Tensor::empty({rows}, DType::F32, x.device());
  float* const r = sums ? inverse.data<float>() : nullptr;
  if (dx.defined() || sums)
    with_team(n, in_packs(n, out, in, gain, grad), [&](auto team, auto width) {
      constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
      launch("rms_norm_vjp", x, rms_norm_dx_kernel<kTeam, kW>, team_blocks<kTeam>(rows),
             kRowThreads, 0, out, r, in, gain, grad, rows, n / kW, eps);
    });
  if (!sums) return;
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  Tensor part = Tensor::empty({2, chunks, n}, DType::F32, x.device());
  float *const part_w = part.data<float>(), *const part_b = part_w + chunks * n;
  launch("rms_norm_vjp", x, rms_norm_sums_kernel, blocks_for(n * chunks, 128), 128, 0, part_w,
         part_b, in, grad, r, rows, n, chunks);
  launch("rms_norm_vjp", x, fold_kernel, blocks_for(n, 128), 128, 0,
         dw.defined() ? dw.data<float>() : nullptr, db.defined() ? db.data<float>() : nullptr,
         part_w, part_b, n, chunks);
}

}  // namespace omq::cuda
