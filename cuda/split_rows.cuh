// Up to sixteen rows of x times packed or dense weights, by clusters of blocks (compute capability
// 9.0 on): several sequences decoded together. packed_rows.cu and dense_rows.cu say what weights
// are (W); packed_gemv.cu and dense_gemv.cu have the same products without clusters.
//
// A block that needs all columns of x spends more time on reading them, and on turning them into
// what tensor cores multiply, than on its share of the weights, once rows are many. So
//
//   cluster  two blocks (four, where two cannot hold their rows) share panels of 16 rows of
//            weights, and each has a part of the columns: of x it reads those alone
//   warp     an equal share of the block's units (16 rows × W::kUnitCols columns), one behind
//            another through the panels
//   sums     F32 in registers to the end of a panel, then in shared memory by warp; those of a
//            panel are added in the order of the warps, sent to the block of the cluster that owns
//            the panel, and added there in the order of the columns
//   rows     each is staged by warps of its own; its norm's factor multiplies the sums
#pragma once

#include "cuda/packed_panels.cuh"
#include "cuda/packed_unit.cuh"

namespace omq::cuda {

constexpr int kSplitThreads = 512, kSplitWarps = kSplitThreads / 32;
constexpr int kSplitRows = 16;  // of a launch, at most
constexpr int kMostSplit = 4;   // blocks of a cluster

struct SplitArgs {
  GemvArgs a;               // work, each, more: of a cluster; per_round: panels
  int split = 0;            // blocks of a cluster
  int segments = 0;         // panels that a warp has a part of in a round, at most
  int owned = 0;            // panels of a round that a block writes, at most
  int ring = 0;             // bytes of shared memory for each warp's weights
  bool many_slots = false;  // of W::ring_bytes()
  bool by_fours = false;    // y may be read and written four rows of weights at a time
  uint32_t inverse = 0;     // of the fours of sums of a panel, for quotient()
};

// A warp's units of a round: `left` of them from unit `unit` of panel `panel` on, of `units` that
// the block has of each panel, the first of them being number `first` of the panel.
struct UnitRun {
  int panel, unit, left, units, first;
};

// Columns first … first + cols − 1 of every row, side by side (RowsSideBySide); put(row, columns
// less `first`, values times the gain). Gives the sum of this thread's squares, where there is a
// gain.
template <class Put>
__device__ __forceinline__ float stage_columns(const GemvInput& in, int first, int cols,
                                               Put&& put) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int row = quotient(warp, in.inverse_row_warps), part = warp - row * in.row_warps,
            step = 128 * in.row_warps;
  float sum = 0;
  if (row >= in.rows) return sum;
  const float* x = in.x + static_cast<int64_t>(row) * in.cols + first;
  const float* gain = in.gain ? in.gain + first : nullptr;
  float4 next[2], next_gain[2] = {};
  const auto fetch = [&](int c) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = c + j * step;
      next[j] = at < cols ? __ldcg(reinterpret_cast<const float4*>(x + at)) : float4{};
      if (gain)
        next_gain[j] = at < cols ? __ldg(reinterpret_cast<const float4*>(gain + at)) : float4{};
    }
  };
  fetch(128 * part + 4 * lane);
#pragma unroll 1
  for (int at = 128 * part; at < cols; at += 2 * step) {  // for all lanes alike
    float4 v[2] = {next[0], next[1]};
    const float4 g[2] = {next_gain[0], next_gain[1]};
    const int c[2] = {at + 4 * lane, at + 4 * lane + step};
    fetch(c[0] + 2 * step);
    if (gain) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum += v[j].x * v[j].x + v[j].y * v[j].y + (v[j].z * v[j].z + v[j].w * v[j].w);
        v[j] = make_float4(v[j].x * g[j].x, v[j].y * g[j].y, v[j].z * g[j].z, v[j].w * g[j].w);
      }
    }
    put(row, c, v);
  }
  return sum;
}

// What the block has of the sums of a round's panels, by warp.
struct SplitSums {
  float* parts;      // [kSplitWarps, segments, each]
  const int* where;  // of a panel: the first warp with a part of it, its segment there, the last
  int segments, each;

  static __device__ __forceinline__ int place(int first, int segment, int last) {
    return first | segment << 8 | last << 16;
  }
  // Four neighbouring sums of a panel, from number i on.
  __device__ __forceinline__ float4 of(int panel, int i) const {
    const int at = where[panel], last = at >> 16;
    int w = at & 255;
    const auto part = [&](int number) {
      return *reinterpret_cast<const float4*>(parts + number * each + i);
    };
    float4 sum = part(w * segments + (at >> 8 & 255));
    for (++w; w <= last; ++w) sum = plus(sum, part(w * segments));
    return sum;
  }
  static __device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
};

// Outputs number 4 i … 4 i + 3 of a round, of those that this block of the cluster writes.
struct SplitPlace {
  int panel, sum;  // the gate's, where there are two; where among the panel's sums
  int matrix, out, n;
  int there = 0;  // rows of the matrix among the four
  float* y;
  __device__ __forceinline__ SplitPlace(const SplitArgs& s, int i, int p0, int rank) {
    const GemvArgs& a = s.a;
    const int own = quotient(i, s.inverse), one = own * s.split + rank;
    sum = 4 * (i - own * (4 * a.in.rows));
    n = sum / 16;
    panel = a.output == RowOutput::SiluMul ? 2 * one : one;
    const ResultPanel of(a, a.output, p0, one);
    matrix = of.matrix;
    out = of.row + sum % 16;
    there = min(a.m[matrix].rows - out, 4);
    y = a.m[matrix].y + n * a.y_stride + out;
  }
  __device__ __forceinline__ float4 load(bool by_fours) const {
    if (by_fours && there == 4) return __ldcg(reinterpret_cast<const float4*>(y));
    const auto one = [&](int i) { return i < there ? __ldcg(y + i) : 0.0f; };
    return make_float4(one(0), one(1), one(2), one(3));
  }
  __device__ __forceinline__ void store(bool by_fours, float4 v) const {
    if (by_fours && there == 4) {
      *reinterpret_cast<float4*>(y) = v;
      return;
    }
    const float of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < there) y[i] = of[i];
  }
};

// A round: panels p0 … p0 + count − 1 of the cluster, of which this block writes each split-th (or
// pair), from `rank` on.
struct SplitRound {
  const SplitArgs& s;
  SplitSums sums;
  float* inbox;  // [split, owned, each], sums of the panels that this block writes, by block
  int rank, p0, count;

  __device__ __forceinline__ bool pairs() const { return s.a.output == RowOutput::SiluMul; }
  // Of four sums.
  __device__ __forceinline__ int outputs() const {
    const int ones = pairs() ? count / 2 : count;
    return 4 * s.a.in.rows * ((ones - rank + s.split - 1) / s.split);
  }
  // Where a panel's sums stand in the inbox of the block that writes it, which is `owner`.
  __device__ __forceinline__ int inbox_place(int panel, int& owner) const {
    const int one = pairs() ? panel / 2 : panel, mine = one / s.split;
    owner = one - mine * s.split;
    return (pairs() ? 2 * mine + panel % 2 : mine) * sums.each;
  }
  // What this thread's first outputs are added to.
  __device__ __forceinline__ float4 before() const {
    if (s.a.output != RowOutput::Add || static_cast<int>(threadIdx.x) >= outputs()) return float4{};
    return SplitPlace(s, static_cast<int>(threadIdx.x), p0, rank).load(s.by_fours);
  }
  // The block's sums, to the blocks that write them.
  __device__ __forceinline__ void send() const {
    const int fours = 4 * s.a.in.rows;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count * fours; i += kSplitThreads) {
      const int panel = quotient(i, s.inverse), from = 4 * (i - panel * fours);
      int owner;
      float* to = inbox + rank * s.owned * sums.each + inbox_place(panel, owner) + from;
      if (owner == rank) continue;
      store_in_cluster(shared_address(to), static_cast<uint32_t>(owner), sums.of(panel, from));
    }
  }
  // Those of all blocks, in the order of the columns.
  __device__ __forceinline__ float4 whole(int panel, const SplitPlace& at, float factor,
                                          const float* bias) const {
    int owner;
    const float* from = inbox + inbox_place(panel, owner) + at.sum;
    float4 v{};
    for (int k = 0; k < s.split; ++k, from += s.owned * sums.each)
      v = SplitSums::plus(
          v, k == rank ? sums.of(panel, at.sum) : *reinterpret_cast<const float4*>(from));
    const auto with_bias = [&](float sum, int j) {
      return sum * factor + (bias && j < at.there ? bias[at.out + j] : 0.0f);
    };
    return make_float4(with_bias(v.x, 0), with_bias(v.y, 1), with_bias(v.z, 2), with_bias(v.w, 3));
  }
  // factors: [rows of x], by which sums are multiplied; first: of before().
  __device__ __forceinline__ void write(const float* factors, float4 first) const {
    const GemvArgs& a = s.a;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < outputs(); i += kSplitThreads) {
      const SplitPlace at(s, i, p0, rank);
      const float factor = factors[at.n];
      float4 v = whole(at.panel, at, factor, a.m[at.matrix].bias);
      if (pairs()) {
        const float4 up = whole(at.panel + 1, at, factor, a.m[1].bias);
        v = make_float4(silu(v.x) * up.x, silu(v.y) * up.y, silu(v.z) * up.z, silu(v.w) * up.w);
      }
      if (a.output == RowOutput::Add)
        v = SplitSums::plus(v, i < kSplitThreads ? first : at.load(s.by_fours));
      at.store(s.by_fours, v);
    }
  }
};

// What a row's sums are multiplied by, its norm's factor: each block has the squares of its
// columns.
struct SplitFactors {
  float squares[kSplitWarps], shares[kMostSplit][kSplitRows], of[kSplitRows];

  // To all blocks; a barrier of the cluster behind it.
  __device__ __forceinline__ void send(const SplitArgs& s, int rank) {
    const int warp = static_cast<int>(threadIdx.x / 32), n = static_cast<int>(threadIdx.x % 32);
    if (!s.a.in.gain || warp >= s.split || n >= s.a.in.rows) return;
    float own = 0;
    for (int w = 0; w < s.a.in.row_warps; ++w) own += squares[n * s.a.in.row_warps + w];
    store_in_cluster(shared_address(&shares[rank][n]), static_cast<uint32_t>(warp), own);
  }
  // A barrier of the block behind it.
  __device__ __forceinline__ void add_up(const SplitArgs& s) {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= s.a.in.rows) return;
    float sum = 0;
    for (int k = 0; k < s.split; ++k) sum += s.a.in.gain ? shares[k][n] : 0;
    of[n] =
        s.a.in.gain ? rsqrtf(__fdividef(sum, static_cast<float>(s.a.in.cols)) + s.a.in.eps) : 1.0f;
  }
};

// W: kFewestRows, below which others are faster; kUnitCols; kXBytes, of a row of x in a unit;
// panel_bytes(a), of 16 rows of weights; ring_bytes(many), of shared memory for a warp;
// lane_offset(lane), where a lane's share of a row of x begins; put(row of x, units, columns,
// values); Stream, a warp's way through its units: early(), before the kernel in front has ended,
// rest(), once x has been asked for, multiply(sums, x, scales of x, unit), finish().
template <class W, int kTiles>
__global__ void __launch_bounds__(kSplitThreads, 1)
    split_rows_kernel(const __grid_constant__ SplitArgs s) {
  extern __shared__ __align__(128) char shared[];
  __shared__ SplitFactors factors;
  __shared__ int where[32];
  const GemvArgs& a = s.a;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int rank = static_cast<int>(blockIdx.y), rows = a.in.rows, each = 16 * rows;
  const int first_unit = rank * a.units / s.split,
            units = (rank + 1) * a.units / s.split - first_unit;
  char* ring = shared + warp * s.ring;
  const StagedX x{shared + kSplitWarps * s.ring,
                  reinterpret_cast<UnitScale*>(shared + kSplitWarps * s.ring + rows * a.x_stride)};
  const SplitSums sums{reinterpret_cast<float*>(x.units + rows * a.x_units), where, s.segments,
                       each};
  float* inbox = sums.parts + kSplitWarps * s.segments * each;
  const int panels = (a.output == RowOutput::SiluMul ? 2 : 1) * work_of_block(a);
  const TileLanes<kTiles> lanes(x, rows, a.x_stride, a.x_units, W::lane_offset(lane), lane);
  cluster_arrive();
  let_next_start();
#pragma unroll 1
  for (int p0 = 0; p0 < panels; p0 += a.per_round) {
    const int count = min(panels - p0, a.per_round);
    const int all = count * units, most = static_cast<int>((all + kSplitWarps - 1u) / kSplitWarps),
              begin = warp * most;
    const RoundPanels of(a, p0, p0 + count, W::panel_bytes(a), lane);
    UnitRun run{begin / units, begin % units, min(most, all - begin), units, first_unit};
    typename W::Stream stream(a, of, ring, s.many_slots, lane, run);
    stream.early();
    float sum = 0;
    if (p0 == 0) {
      wait_for_previous();
      const int first = first_unit * W::kUnitCols;
      sum =
          stage_columns(a.in, first, min(units * W::kUnitCols, a.in.cols - first),
                        [&](int n, const int(&c)[2], const float4(&v)[2]) {
                          W::put({x.bytes + n * a.x_stride, x.units + n * a.x_units}, units, c, v);
                        });
    }
    stream.rest();
    const SplitRound round{s, sums, inbox, rank, p0, count};
    const float4 before = round.before();
    if (p0 == 0) RowsSideBySide<kSplitThreads>::store_squares(a.in, factors.squares, sum);
    if (static_cast<int>(threadIdx.x) < count) {
      const int from = static_cast<int>(threadIdx.x) * units, w = from / most;
      where[threadIdx.x] = SplitSums::place(w, static_cast<int>(threadIdx.x) - w * most / units,
                                            (from + units - 1) / most);
    }
    __syncthreads();
    float total[kTiles][2] = {};
    float* part = sums.parts + warp * s.segments * each + lane / 4;
#pragma unroll 1
    while (run.left > 0) {
      stream.template multiply<kTiles>(total, lanes.bytes, lanes.units, run.unit);
      --run.left;
      if (++run.unit < units && run.left > 0) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int n = kTileRows * t + lane % 4;
        if (n < rows) part[n * 16] = total[t][0], part[n * 16 + 8] = total[t][1];
        total[t][0] = total[t][1] = 0;
      }
      part += each;
      run.unit = 0;
    }
    stream.finish();
    __syncthreads();
    if (p0 == 0) {
      cluster_wait();
      factors.send(s, rank);
    }
    round.send();
    cluster_barrier();
    if (p0 == 0) {
      factors.add_up(s);
      __syncthreads();
    }
    round.write(factors.of, before);
    if (p0 + a.per_round < panels) cluster_barrier();  // all have read what the next round sends
  }
}

// ---- launchers ----

// How a product is divided; split: 0 where its rows do not fit.
struct SplitPlan {
  int split = 0, x_stride = 0, x_units = 0, segments = 0, owned = 0, per_round = 0, shared = 0;
  bool many_slots = false;
};
struct SplitForm {  // W's bytes
  int x_bytes, few_slots, many_slots;
};
template <class W> constexpr SplitForm split_form() {
  return {W::kXBytes, W::ring_bytes(false), W::ring_bytes(true)};
}
// work: panels, or pairs of them. clusters: of SplitClusters. (packed_rows.cu)
SplitPlan plan_split(const SplitForm& form, int units, int rows, int work, RowOutput output,
                     const int (&clusters)[2], int limit);
constexpr int kSplitStatic = 1024;  // bytes of shared memory that the kernel declares, at most

// The most that may be asked for beside it.
inline int split_limit(const DeviceInfo& info) {
  return static_cast<int>(info.shared_optin) - kSplitStatic;
}

// Clusters of two and of four blocks that run together; `kernel` may ask for split_limit().
struct SplitClusters {
  int of[2] = {};
  template <class Kernel> SplitClusters(Kernel kernel, const DeviceInfo& info) {
    const auto shared = static_cast<size_t>(split_limit(info));
    prepare_shared(kernel, shared);
    for (int i = 0; i < 2; ++i) {
      const unsigned blocks = 2u << i;
      if (static_cast<unsigned>(info.sms) < blocks) continue;
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {1, blocks, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(info.sms) / blocks, blocks);
      config.blockDim = dim3(kSplitThreads);
      config.dynamicSmemBytes = shared;
      config.attrs = &cluster;
      config.numAttrs = 1;
      OMQ_CUDA(cudaOccupancyMaxActiveClusters(&of[i], kernel, &config));
    }
  }
};

// Whether rows fit does not hang on the panels: a round may be one of them.
template <class W> SplitRows rows_taken(int units, RowOutput output, int device) {
  const DeviceInfo& info = device_info(device);
  if (info.major < 9) return {};
  const SplitClusters clusters(split_rows_kernel<W, 4>, info);
  for (int rows = kSplitRows; rows >= W::kFewestRows; --rows)
    if (plan_split(split_form<W>(), units, rows, 1, output, clusters.of, split_limit(info)).split >
        0)
      return {W::kFewestRows, rows};
  return {};
}

// Launches the product where it fits; units, x's rows, m[].panels and work are set.
template <class W> bool split_rows(const char* op, Tensor& y, const GemvArgs& product) {
  SplitArgs s{.a = product};
  GemvArgs& a = s.a;
  const DeviceInfo& info = device_info(y.device().index);
  if (info.major < 9 || !rows_side_by_side(a.in) || a.in.rows < W::kFewestRows ||
      a.in.rows > kSplitRows)
    return false;
  const auto run = [&](auto kernel) {
    const SplitClusters clusters(kernel, info);
    const SplitPlan plan = plan_split(split_form<W>(), a.units, a.in.rows, a.work, a.output,
                                      clusters.of, split_limit(info));
    if (plan.split == 0) return false;
    s.split = plan.split, s.segments = plan.segments, s.owned = plan.owned;
    s.many_slots = plan.many_slots, s.ring = W::ring_bytes(plan.many_slots);
    s.inverse = inverse_of(4 * a.in.rows);
    s.by_fours = a.y_stride % 4 == 0;
    for (int i = 0; i < a.matrices; ++i) s.by_fours = s.by_fours && aligned16(a.m[i].y);
    a.x_stride = plan.x_stride, a.x_units = plan.x_units, a.per_round = plan.per_round;
    RowsSideBySide<kSplitThreads>::share(a.in);
    const int grid = share_work(a, clusters.of[plan.split / 4]);
    launch_chained(op, y, kernel,
                   dim3(static_cast<unsigned>(grid), static_cast<unsigned>(plan.split)),
                   kSplitThreads, static_cast<size_t>(plan.shared), plan.split, s);
    return true;
  };
  if (a.in.rows <= kTileRows) return run(split_rows_kernel<W, 1>);
  if (a.in.rows <= 2 * kTileRows) return run(split_rows_kernel<W, 2>);
  return run(split_rows_kernel<W, 4>);
}

}  // namespace omq::cuda
