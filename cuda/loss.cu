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

}  // namespace omq::cuda
