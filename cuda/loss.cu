// Cross-entropy per row, in nats: loss = log Σ exp(x) − x[target], target −1: 0. A target outside
// the classes gives NaN: a kernel cannot throw.
//
// Bytes: forward the logits once; backward the logits once, their gradient once. A row is a team's;
// sums run in double.
#include "cuda/common.cuh"

namespace omq::cuda {
namespace {

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

// n: pieces of a row.
template <int kTeam, int W>
__global__ void cross_entropy_kernel(float* loss, float* lse, Operand logits,
                                     const int32_t* targets, int64_t rows, int64_t n) {
  for_each_team<kTeam>(rows, [&](int64_t row, int lane, bool valid) {
    float top = minus_infinity();
    double sum = 0;  // of exp(x − top)
    for (int64_t i = lane; valid && i < n; i += kTeam) {
      const Piece<W> p = load_piece<W>(logits, row * n + i);
      float up = top;
#pragma unroll
      for (int j = 0; j < W; ++j) up = p.v[j] > up ? p.v[j] : up;
      if (up == minus_infinity()) continue;
      float part = 0;
#pragma unroll
      for (int j = 0; j < W; ++j) part += expf(p.v[j] - up);
      sum =
          (up == top ? sum : sum * static_cast<double>(expf(top - up))) + static_cast<double>(part);
      top = up;
    }
    const float all = team_max<kTeam>(top);
    sum =
        team_sum<kTeam>(top == minus_infinity() ? 0.0 : sum * exp(static_cast<double>(top) - all));
    if (!valid || lane != 0) return;
    const double log_sum = log(sum) + static_cast<double>(all);
    const int64_t target = targets[row], classes = n * W;
    lse[row] = static_cast<float>(log_sum);
    if (target < -1 || target >= classes)
      loss[row] = not_a_number();
    else
      loss[row] = target < 0 ? 0.0f
                             : static_cast<float>(log_sum - static_cast<double>(load(
                                                                logits, row * classes + target)));
  });
}

template <int W>
__global__ void cross_entropy_vjp_kernel(Operand dlogits, Operand logits, const float* lse,
                                         const int32_t* targets, const float* dloss, int64_t rows,
                                         int64_t n) {
  for (int64_t i = grid_index(); i < rows * n; i += grid_stride()) {
    const auto raw = fetch<W>(logits, i);
    const int64_t row = divide(i, n), target = targets[row], first = (i - row * n) * W;
    const float g = target == -1                    ? 0.0f
                    : target < 0 || target >= n * W ? not_a_number()
                                                    : dloss[row];
    const float norm = lse[row];
    Piece<W> p = expand<W>(raw, logits);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      p.v[j] = g * expf(p.v[j] - norm);
      if (first + j == target) p.v[j] -= g;
    }
    store_piece<W>(dlogits, i, p);
  }
}

// parts[block] = Σ (a − b)² of the block's share; then their sum over n, in order.
constexpr int kMseBlocks = 512, kMseThreads = 256;
template <int W> __global__ void mse_kernel(double* parts, Operand a, Operand b, int64_t n) {
  double total = 0;
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    const auto ra = fetch<W>(a, i), rb = fetch<W>(b, i);
    const Piece<W> x = expand<W>(ra, a), y = expand<W>(rb, b);
    float part = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) part += (x.v[j] - y.v[j]) * (x.v[j] - y.v[j]);
    total += static_cast<double>(part);
  }
  total = team_sum<kMseThreads>(total);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}
__global__ void mse_fold_kernel(float* loss, const double* parts, int64_t blocks, double n) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kMseThreads) total += parts[i];
  total = team_sum<kMseThreads>(total);
  if (threadIdx.x == 0) *loss = static_cast<float>(total / n);
}
template <int W>
__global__ void mse_vjp_kernel(Operand da, Operand db, Operand a, Operand b, const float* dloss,
                               float mean, int64_t n) {
  const float g = *dloss * mean;
  for (int64_t i = grid_index(); i < n; i += grid_stride()) {
    const auto ra = fetch<W>(a, i), rb = fetch<W>(b, i);
    const Piece<W> x = expand<W>(ra, a), y = expand<W>(rb, b);
    Piece<W> d;
#pragma unroll
    for (int j = 0; j < W; ++j) d.v[j] = g * (2.0f * (x.v[j] - y.v[j]));
    if (da.data) store_piece<W>(da, i, d);
    if (!db.data) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) d.v[j] = -d.v[j];
    store_piece<W>(db, i, d);
  }
}

}  // namespace

// ---- launchers ----

void cross_entropy(Tensor& loss, Tensor& lse, const Tensor& logits, const Tensor& targets) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const Operand in = operand("cross_entropy", logits);
  with_team(n, in_packs(n, in), [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kW = decltype(width)::value;
    launch("cross_entropy", logits, cross_entropy_kernel<kTeam, kW>, team_blocks<kTeam>(rows),
           kRowThreads, 0, loss.data<float>(), lse.data<float>(), in, targets.data<int32_t>(), rows,
           n / kW);
  });
}

void cross_entropy_vjp(Tensor& dlogits, const Tensor& logits, const Tensor& lse,
                       const Tensor& targets, const Tensor& dloss) {
  const int64_t rows = logits.dim(0), n = logits.dim(1);
  const Operand out = operand("cross_entropy_vjp", dlogits),
                in = operand("cross_entropy_vjp", logits);
  constexpr int kThreads = 256;
  if (in_packs(n, out, in))
    launch("cross_entropy_vjp", logits, cross_entropy_vjp_kernel<kPack>,
           blocks_for(rows * (n / kPack), kThreads), kThreads, 0, out, in, lse.data<float>(),
           targets.data<int32_t>(), dloss.data<float>(), rows, n / kPack);
  else
    launch("cross_entropy_vjp", logits, cross_entropy_vjp_kernel<1>, blocks_for(rows * n, kThreads),
           kThreads, 0, out, in, lse.data<float>(), targets.data<int32_t>(), dloss.data<float>(),
           rows, n);
}

void mse(Tensor& loss, const Tensor& a, const Tensor& b) {
  const Operand x = operand("mse", a), y = operand("mse", b);
  with_width(in_packs(a.numel(), x, y), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    const int64_t n = a.numel() / kW;
    const unsigned blocks = std::min<unsigned>(kMseBlocks, blocks_for(n, kMseThreads));
    Tensor parts = Tensor::empty({blocks}, DType::F64, a.device());
    launch("mse", a, mse_kernel<kW>, blocks, kMseThreads, 0, parts.data<double>(), x, y, n);
    launch("mse", a, mse_fold_kernel, 1, kMseThreads, 0, loss.data<float>(), parts.data<double>(),
           int64_t{blocks}, static_cast<double>(a.numel()));
  });
}

void mse_vjp(Tensor& da, Tensor& db, const Tensor& a, const Tensor& b, const Tensor& dloss) {
  const Operand to_a = operand("mse_vjp", da), to_b = operand("mse_vjp", db),
                x = operand("mse_vjp", a), y = operand("mse_vjp", b);
  const float mean = static_cast<float>(1.0 / static_cast<double>(a.numel()));
  with_width(in_packs(a.numel(), x, y, to_a, to_b), [&](auto width) {
    constexpr int kW = decltype(width)::value;
    const int64_t n = a.numel() / kW;
    launch("mse_vjp", a, mse_vjp_kernel<kW>, blocks_for(n, 256), 256, 0, to_a, to_b, x, y,
           dloss.data<float>(), mean, n);
  });
}

}  // namespace omq::cuda
