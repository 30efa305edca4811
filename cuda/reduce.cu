// Sums over dims, accumulated in double, in an order that depends on shapes alone.
//
// Bytes: x once. The reduced elements are cut into chunks of fixed length; every (output, chunk)
// leaves a partial sum, and a second pass adds each output's partial sums. Where the last dim
// stays, neighbouring threads own neighbouring outputs (columns); where it is summed away, a team
// of threads shares one output (rows).
#include "cuda/common.cuh"
#include "cuda/walk.cuh"

namespace omq::cuda {
namespace {

struct Sum {
  Walk<1> kept, reduced;  // offsets into x
  int64_t chunk = 1, chunks = 1;
};

// Sum of elements [c·chunk, …) of output o belongs to y[o · chunks + c].
template <class Out> __global__ void sum_columns(Out* y, Operand x, Sum s) {
  const int64_t outputs = s.kept.count;
  for (int64_t i = grid_index(); i < outputs * s.chunks; i += grid_stride()) {
    const int64_t c = divide(i, outputs), o = i - c * outputs;
    int64_t base[1], at[1];
    offsets(s.kept, o, base);
    const int64_t begin = c * s.chunk;
    const int64_t end = min(begin + s.chunk, s.reduced.count);
    double total = 0;
    if (s.reduced.n == 1) {
#pragma unroll 8
      for (int64_t r = begin; r < end; ++r)
        total += static_cast<double>(load(x, base[0] + r * s.reduced.step[0][0]));
    } else {
      for (int64_t r = begin; r < end; ++r) {
        offsets(s.reduced, r, at);
        total += static_cast<double>(load(x, base[0] + at[0]));
      }
    }
    y[o * s.chunks + c] = static_cast<Out>(total);
  }
}

template <int kTeam, class Out> __global__ void sum_rows(Out* y, Operand x, Sum s) {
  for_each_team<kTeam>(s.kept.count * s.chunks, [&](int64_t i, int lane, bool valid) {
    double total = 0;
    if (valid) {
      const int64_t o = divide(i, s.chunks), c = i - o * s.chunks;
      int64_t base[1], at[1];
      offsets(s.kept, o, base);
      const int64_t begin = c * s.chunk;
      const int64_t end = min(begin + s.chunk, s.reduced.count);
      if (s.reduced.n == 1) {
#pragma unroll 8
        for (int64_t r = begin + lane; r < end; r += kTeam)
          total += static_cast<double>(load(x, base[0] + r * s.reduced.step[0][0]));
      } else {
        for (int64_t r = begin + lane; r < end; r += kTeam) {
          offsets(s.reduced, r, at);
          total += static_cast<double>(load(x, base[0] + at[0]));
        }
      }
    }
    total = team_sum<kTeam>(total);
    if (valid && lane == 0) y[i] = static_cast<Out>(total);
  });
}

// y[o] = Σ partial[o · chunks + c], a warp each.
__global__ void sum_partial(float* y, const double* partial, int64_t outputs, int64_t chunks) {
  for_each_team<32>(outputs, [&](int64_t o, int lane, bool valid) {
    double total = 0;
    if (valid)
      for (int64_t c = lane; c < chunks; c += 32) total += partial[o * chunks + c];
    total = team_sum<32>(total);
    if (valid && lane == 0) y[o] = static_cast<float>(total);
  });
}

// ---- launchers ----

constexpr int64_t kColumnChunk = 64, kRowChunk = 16384;

template <class Out> void sum_into(Out* out, const Tensor& x, const Sum& s, bool columns) {
  const int64_t sums = s.kept.count * s.chunks;
  const Operand in = operand("sum_to", x);
  if (columns)
    launch("sum_to", x, sum_columns<Out>, blocks_for(sums, 256), 256, 0, out, in, s);
  else if (s.reduced.count <= 512)
    launch("sum_to", x, sum_rows<32, Out>, team_blocks<32>(sums), kRowThreads, 0, out, in, s);
  else
    launch("sum_to", x, sum_rows<kRowThreads, Out>, team_blocks<kRowThreads>(sums), kRowThreads, 0,
           out, in, s);
}

}  // namespace

void sum_to(Tensor& y, const Tensor& x) {
  check(y.ndim() == x.ndim() && y.dtype() == DType::F32, "sum_to: {} {} to {} {}",
        dtype_name(x.dtype()), x.shape(), dtype_name(y.dtype()), y.shape());
  Shape kept, reduced;
  Strides kept_steps, reduced_steps;
  bool keep_last = true;
  for (int i = 0; i < x.ndim(); ++i) {
    const bool keep = y.dim(i) == x.dim(i);
    (keep ? kept : reduced).push_back(x.dim(i));
    (keep ? kept_steps : reduced_steps).push_back(x.stride(i));
    if (x.dim(i) != 1) keep_last = keep;  // of the last dim that counts
  }
  Sum s{make_walk<1>(kept, {kept_steps}), make_walk<1>(reduced, {reduced_steps})};
  if (s.kept.count == 0) return;
  s.chunk = keep_last ? kColumnChunk : kRowChunk;
  s.chunks = std::max<int64_t>(1, (s.reduced.count + s.chunk - 1) / s.chunk);
  if (s.chunks == 1) return sum_into(y.data<float>(), x, s, keep_last);
  Tensor partial = Tensor::empty({s.kept.count, s.chunks}, DType::F64, x.device());
  sum_into(partial.data<double>(), x, s, keep_last);
  launch("sum_to", x, sum_partial, team_blocks<32>(s.kept.count), kRowThreads, 0, y.data<float>(),
         partial.data<double>(), s.kept.count, s.chunks);
}

}  // namespace omq::cuda
