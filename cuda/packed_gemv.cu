// Packed weights times up to eight rows of activations: decoding. The limit is the memory's: every
// byte of the codes is read once, 4.25 bits a weight at 4 bits and groups of 128.
//
//   block    16 warps, one block a processor; its panels stand side by side
//   warp     slots w, w + 16, … (two neighbouring units or one) of all of the block's panels,
//            through a ring in shared memory that copies fill ahead: no register waits for memory,
//            no warp for another
//   unit     16 rows × U columns: U / 32 integer products on tensor cores, the codes as the 16-row
//            operand as they are stored; of the 8 columns two belong to a row of x, its values
//            being whole numbers of two bytes in units of the largest of U columns
//            (packed_layout.cuh); five rows and more are two tiles of four, which the codes meet
//            one after the other once they are unpacked
//   sums     exact in a unit, zero point by the sum of x; F32 from unit to unit; the warps' sums of
//            a panel are added in order at the end
//
// The first copies are issued before the kernel in front has ended (weights depend on nothing), but
// not more than a ring's: they would stand in x's way. The code is kept short for the sake of the
// instruction cache, see stage_input. Instructions of a lane for two units of 64 weights: 48 to
// unpack 4 bits (56 and 68 for 2 and 3), about 60 to multiply, 40 to copy the next two.
#include "cuda/packed.h"
#include "cuda/packed_panels.cuh"
#include "cuda/packed_unit.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// Slots of a warp's ring: enough bytes under way for the memory's latency. More of them would stand
// in x's way when a kernel begins. A slot has slot_units() units, or one where rows of x leave no
// room for two: each launch reads all weights, so fewer launches are worth half the ring.
constexpr int ring_stages(int bits) { return bits == 2 ? 3 : 2; }

// Where the i-th sum of a round goes. Sums of a panel: [rows of x, 16].
struct Place {
  int local, n, row, matrix, out;  // local: which panel (or pair) of the round
  float* y = nullptr;              // null: there is no such row
  __device__ __forceinline__ Place(const GemvArgs& a, int i, int p0) {
    row = i % 16, local = i / 16, n = 0;
    if (a.in.rows > 1) n = local % a.in.rows, local /= a.in.rows;
    const ResultPanel panel(a, a.output, p0, local);
    matrix = panel.matrix;
    out = panel.row + row;
    if (out < a.m[matrix].rows) y = a.m[matrix].y + n * a.y_stride + out;
  }
};

__device__ __forceinline__ int sums_of(const GemvArgs& a, int count) {
  return (a.output == RowOutput::SiluMul ? count / 2 : count) * 16 * a.in.rows;
}

// What this thread's first sum of a round is added to.
__device__ __forceinline__ float addend(const GemvArgs& a, int p0, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (a.output != RowOutput::Add || i >= sums_of(a, count)) return 0;
  const Place at(a, i, p0);
  return at.y ? __ldcg(at.y) : 0.0f;
}

// The warps' sums of `count` panels from p0 on into y. before: addend().
__device__ __forceinline__ void write_panels(const GemvArgs& a, const float* parts,
                                             const float* scales, float before, int p0, int count) {
  const int each = 16 * a.in.rows, sums = sums_of(a, count);
  const bool pairs = a.output == RowOutput::SiluMul;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < sums; i += kThreads) {
    const Place at(a, i, p0);
    if (!at.y) continue;
    float v[2] = {};
#pragma unroll 1
    for (int half = 0; half <= (pairs ? 1 : 0); ++half) {
      const float* from =
          parts + (pairs ? 2 * at.local + half : at.local) * (kWarps * each) + at.n * 16 + at.row;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * each];
      const float* bias = a.m[pairs ? half : at.matrix].bias;
      sum = sum * scales[at.n] + (bias ? bias[at.out] : 0.0f);
      v[0] = half == 0 ? sum : v[0];
      v[1] = sum;
    }
    if (a.output == RowOutput::Add) v[0] += i < kThreads ? before : __ldcg(at.y);
    *at.y = pairs ? silu(v[0]) * v[1] : v[0];
  }
}

// kTiles: of four rows of x. kSpan: units of a slot.
template <int kBits, int kUnit, bool kIntegers, int kTiles, int kSpan>
__global__ void __launch_bounds__(kThreads, 1)
    packed_gemv_kernel(const __grid_constant__ GemvArgs a) {
  constexpr int kStages = ring_stages(kBits), kSlot = slot_bytes(kBits, kUnit, kSpan),
                kUnitBytes = unit_words(kBits, kUnit) * 128;
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int rows = a.in.rows, each = 16 * rows;
  const int spans = (a.units + kSpan - 1) / kSpan;  // of a panel
  char* ring = shared + warp * (kStages * kSlot);
  StagedX x;
  x.bytes = shared + kWarps * kStages * kSlot;
  x.units = reinterpret_cast<UnitScale*>(x.bytes + rows * a.x_stride);
  float* parts = reinterpret_cast<float*>(x.units + rows * a.x_units);
  using SideBySide = RowsSideBySide<kThreads>;
  const bool side_by_side = !kIntegers && a.in.row_warps > 0;
  float* room = a.row_floats > 0 ? parts + a.per_round * kWarps * each : nullptr;
  float* row = side_by_side ? nullptr : room;
  float* gains = row ? row + a.row_floats : room;
  __shared__ float scales[kPackedRows], squares[kWarps];
  const int64_t panel_bytes = int64_t{a.units} * kUnitBytes;
  const int panels = (a.output == RowOutput::SiluMul ? 2 : 1) * work_of_block(a);
  const TileLanes<kTiles> lanes(x, rows, a.x_stride, a.x_units, plane_offset<kUnit>(lane), lane);
  let_next_start();
  const uint64_t policy = read_once();
#pragma unroll 1
  for (int p0 = 0; p0 < panels; p0 += a.per_round) {
    const int count = min(panels - p0, a.per_round);
    const RoundPanels of(a, p0, p0 + count, panel_bytes, lane);
    // The span that is fetched next, and the one that is multiplied next: of which of the round's
    // panels, and the how manieth of it.
    int ahead_panel = 0, ahead = warp, panel = 0, span = warp;
    const auto wrap = [&](int& p, int& u) {
      const int before = p;
      while (u >= spans) u -= spans, ++p;
      return p != before;
    };
    wrap(ahead_panel, ahead);
    wrap(panel, span);
    const uint8_t* codes = pointer_of(of.codes, ahead_panel & 31);
    const GridWord* grids = pointer_of(of.grids, ahead_panel & 31);
    const auto fill = [&](int slot) {
      if (ahead_panel < count) {
        const uint32_t to = shared_address(ring) + slot * kSlot + lane * 16;
        const int unit = ahead * kSpan;
        const uint8_t* at = codes + static_cast<int64_t>(unit) * kUnitBytes + lane * 16;
#pragma unroll
        for (int u = 0; u < kSpan; ++u)
          copy_unit<kBits, kUnit>(at + u * kUnitBytes, to + u * kUnitBytes, lane, policy);
        if (lane < 4 * kSpan)  // a unit's grid by four lanes; behind an odd panel's end the last
          copy_async_once<16>(
              to + kSpan * kUnitBytes,
              grids + group_of(a, min(unit + lane / 4, a.units - 1)) * 16 + lane % 4 * 4, policy);
        ahead += kWarps;
        if (wrap(ahead_panel, ahead)) {
          codes = pointer_of(of.codes, ahead_panel & 31);
          grids = pointer_of(of.grids, ahead_panel & 31);
        }
      }
      copy_async_commit();
    };
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) fill(s);
    if (p0 == 0) {
      stage_gains<kThreads>(a.in, gains);
      if (side_by_side && a.in.gain) __syncthreads();  // elsewhere staging has barriers of its own
      wait_for_previous();
    }
    const float before = addend(a, p0, count);
    if (p0 == 0) {
      const auto row_of_x = [&](int n) {
        return StagedX{x.bytes + n * a.x_stride, x.units + n * a.x_units};
      };
      if (side_by_side) {
        const float sum =
            SideBySide(a.in).put(a.in, gains, [&](int n, const int(&c)[2], const float4(&v)[2]) {
              put_bytes<kUnit>(row_of_x(n), a.units, c, v);
            });
        SideBySide::store_squares(a.in, squares, sum);
      } else {
        const bool whole = kIntegers && (a.in.codes || (a.in.quantise && a.in.s.include_zero));
        stage_input<kThreads, kIntegers>(a.in, row, 0, gains, scales, [&](int n, int c, float4 v) {
          put_bytes<kUnit, 1>(row_of_x(n), a.units, {c}, {v}, whole);
        });
      }
      if (kSpan > 1 && a.units % kSpan != 0)  // one unit more, of zeros
        for (int n = warp; n < rows; n += kWarps) {
          for (int i = lane; i < 2 * kUnit; i += 32)
            x.bytes[n * a.x_stride + a.units * (2 * kUnit) + i] = 0;
          x.units[n * a.x_units + a.units] = {0.0f, 0};
        }
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count * kWarps * each; i += kThreads)
      parts[i] = 0;
    __syncthreads();
    if (side_by_side && p0 == 0) SideBySide::factors(a.in, squares, scales);
    float total[kTiles][2] = {};
    const auto flush = [&](int p) {
      float* to = parts + (p * kWarps + warp) * each;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int n = kTileRows * t + lane % 4, r = lane / 4;
        if (n < rows) to[n * 16 + r] = total[t][0], to[n * 16 + r + 8] = total[t][1];
        total[t][0] = total[t][1] = 0;
      }
    };
    int slot = 0, last = panel;
#pragma unroll 1
    while (panel < count) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      if (panel != last) {
        flush(last);
        last = panel;
      }
      const char* from = ring + slot * kSlot;
      const GridWord* grid = reinterpret_cast<const GridWord*>(from + kSpan * kUnitBytes);
      const int unit = span * kSpan;
#pragma unroll
      for (int i = 0; i < kSpan; ++i)
        multiply_unit<kBits, kUnit, kTiles>(total, from + i * kUnitBytes, grid + i * 16,
                                            lanes.bytes, lanes.units, unit + i, lane);
      __syncwarp();
      fill(slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      span += kWarps;
      wrap(panel, span);
    }
    if (last < count) flush(last);
    copy_async_wait<0>();
    __syncthreads();
    write_panels(a, parts, scales, before, p0, count);
    __syncthreads();
  }
}

}  // namespace

// ---- launchers ----

namespace {

// Of shared memory, in bytes: the rings, what a row of x takes, and a row's sums of a panel.
struct GemvShared {
  int ring, per_row, sums;
  int x_stride, x_units, span;
  GemvShared(const PackedView& v, int slot)
      : ring(kWarps * ring_stages(v.bits) * slot_bytes(v.bits, v.unit, slot)),
        sums(kWarps * 16 * 4),
        span(slot) {
    const int units = (v.units + span - 1) / span * span;
    x_stride = 2 * units * v.unit;
    x_units = (units + 1) / 2 * 2;  // the rows keep to 16 bytes
    per_row = x_stride + x_units * static_cast<int>(sizeof(UnitScale));
  }
};
constexpr int kStatic = 512;  // what the kernel declares, at most

// Panels of a round, at least: a gate's and an up's together.
constexpr int few_panels(RowOutput output) { return output == RowOutput::SiluMul ? 2 : 1; }

// Rows that fit, of at most kPackedRows.
int64_t rows_that_fit(const GemvShared& s, RowOutput output, int device) {
  const auto limit = static_cast<int64_t>(device_info(device).shared_optin);
  return std::clamp<int64_t>((limit - kStatic - s.ring) / (s.per_row + few_panels(output) * s.sums),
                             0, kPackedRows);
}

}  // namespace

int64_t packed_gemv_rows(const PackedInt& w, RowOutput output, int device) {
  return rows_that_fit({packed_view(w, nullptr), 1}, output, device);
}

PackedView packed_arguments(GemvArgs& a, std::span<const RowMatrix> matrices) {
  const PackedView v = view_of("packed_matmul", std::get<PackedInt>(matrices[0].weight));
  a.work = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const PackedView m = view_of("packed_matmul", std::get<PackedInt>(matrices[i].weight));
    a.m[i].data = m.codes;
    a.m[i].grids = m.grids;
    a.m[i].panels = m.panels;
    a.work += a.output == RowOutput::SiluMul && i > 0 ? 0 : m.panels;
  }
  a.units = v.units;
  a.units_per_group = v.units_per_group;
  a.groups = v.groups;
  while ((1 << (a.group_shift + 1)) <= a.units_per_group) ++a.group_shift;
  if (1 << a.group_shift != a.units_per_group) a.group_shift = -1;
  if (v.groups == 1) a.group_shift = 31;
  return v;
}

void packed_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices,
                 std::span<const AheadRange> behind) {
  const PackedView v = packed_arguments(a, matrices);
  if (packed_row(y, a, v, behind)) return;
  check(!a.in.prepared && !a.next.memory, "packed_matmul: no kernel takes a prepared row");
  if (packed_rows(y, a, v)) return;
  const bool integers = a.in.codes || a.in.quantise, two_tiles = a.in.rows > kTileRows;
  // As many units to a slot as usual where the rows leave room for it.
  const int usual = slot_units(v.bits), device = y.device().index;
  const GemvShared size(v, a.in.rows <= rows_that_fit({v, usual}, a.output, device) ? usual : 1);
  a.x_stride = size.x_stride;
  a.x_units = size.x_units;
  const DeviceInfo& info = device_info(device);
  const auto blocks = static_cast<unsigned>(share_work(a, info.sms));
  const int panels = (a.work + static_cast<int>(blocks) - 1) / static_cast<int>(blocks) *
                     (a.output == RowOutput::SiluMul ? 2 : 1);
  const int rows_bytes = size.ring + a.in.rows * size.per_row, sums = a.in.rows * size.sums,
            limit = static_cast<int>(info.shared_optin) - kStatic, few = few_panels(a.output);
  check(rows_bytes + few * sums <= limit,
        "packed_matmul: {} rows of {} columns need {} bytes of shared memory, the device has {}",
        a.in.rows, a.in.cols, rows_bytes + few * sums, limit);
  // Panels of a round: 24 KiB of sums a tile, and no more than there are lanes to point at them.
  const int most = std::min((two_tiles ? 48 : 24) * 1024, limit - rows_bytes) / sums / 2 * 2;
  a.per_round = std::min({panels, 32, std::max(few, most)});
  int shared = rows_bytes + a.per_round * sums;
  const bool side_by_side = rows_side_by_side(a.in);
  if (side_by_side) RowsSideBySide<kThreads>::share(a.in);
  const int row_floats = (a.in.cols + 3) / 4 * 4,
            room = row_floats * 4 * ((side_by_side ? 0 : 1) + (a.in.gain ? 1 : 0));
  if (!a.in.codes && shared + room <= limit) {
    a.row_floats = row_floats;
    shared += room;
  }
  with_layout(v, [&](auto bits, auto unit) {
    constexpr int kBits = decltype(bits)::value, kUnit = decltype(unit)::value;
    const auto run = [&](auto kernel) {
      prepare_shared(kernel, static_cast<size_t>(shared));
      launch_chained("packed_gemv", y, kernel, blocks, kThreads, static_cast<size_t>(shared), 1, a);
    };
    const auto of_span = [&](auto span) {
      constexpr int kSpan = decltype(span)::value;
      if (integers)
        two_tiles ? run(packed_gemv_kernel<kBits, kUnit, true, 2, kSpan>)
                  : run(packed_gemv_kernel<kBits, kUnit, true, 1, kSpan>);
      else
        two_tiles ? run(packed_gemv_kernel<kBits, kUnit, false, 2, kSpan>)
                  : run(packed_gemv_kernel<kBits, kUnit, false, 1, kSpan>);
    };
    size.span == 1 ? of_span(Int<1>{}) : of_span(Int<slot_units(kBits)>{});
  });
}

}  // namespace omq::cuda
