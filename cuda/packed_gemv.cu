// Packed weights times up to four rows of activations: decoding. The limit is the memory's: every
// byte of the codes is read once, 4.25 bits a weight at 4 bits and groups of 128.
//
//   block    16 warps, one block a processor; its panels are blockIdx, + gridDim, + 2 gridDim …
//   warp     units w, w + 16, … of all of the block's panels, through a ring in shared memory that
//            copies fill ahead: no register waits for memory, no warp for another
//   unit     16 rows × U columns: U / 32 integer products on tensor cores, the codes as the 16-row
//            operand as they are stored; of the 8 columns two belong to a row of x, its values
//            being whole numbers of two bytes in units of the largest of U columns
//            (packed_layout.cuh)
//   sums     exact in a unit, zero point by the sum of x; F32 from unit to unit; the warps' sums of
//            a panel are added in order at the end
//
// The first copies are issued before the kernel in front has ended (weights depend on nothing).
// Floor of instructions, a lane and unit of 64 weights: 24 to unpack 4 bits (20, 34 and 0 for 2, 3
// and 8), 4 products, 4 loads, about 25 around them.
#include "cuda/packed.h"
#include "cuda/packed_unit.cuh"

namespace omq::cuda {
namespace {

// Slots of a warp's ring: enough bytes under way for the memory's latency.
constexpr int ring_stages(int bits) { return bits == 8 ? 3 : bits == 4 ? 4 : bits == 3 ? 5 : 7; }

// A place in the block's units.
struct Cursor {
  int panel = 0, unit = 0;  // panel: local number
  const uint8_t* codes = nullptr;
  const __half2* grids = nullptr;
};

__device__ __forceinline__ void enter_panel(const GemvArgs& a, Cursor& c, int64_t panel_bytes) {
  const bool pairs = a.output == RowOutput::SiluMul;
  int at =
      static_cast<int>(blockIdx.x) + (pairs ? c.panel / 2 : c.panel) * static_cast<int>(gridDim.x);
  const int i = pairs ? c.panel % 2 : find_matrix(a, at);
  c.codes = static_cast<const uint8_t*>(a.m[i].data) + at * panel_bytes;
  c.grids = a.m[i].grids + static_cast<int64_t>(at) * a.groups * 16;
}

// x and its sums, row by row.
template <int kUnit>
__device__ __forceinline__ void stage_bytes(const GemvArgs& a, const StagedX& x, float* scales) {
  const bool whole = a.in.codes || (a.in.quantise && a.in.s.include_zero);
  stage_input(a.in, scales, [&](int n, int c, float4 v) {
    put_bytes<kUnit>({x.bytes + n * a.x_stride, x.scale + n * a.units, x.sum + n * a.units},
                     a.units, c, v, whole);
  });
}

// The warps' sums of panels p0 … p1 − 1 into y.
__device__ __forceinline__ void write_panels(const GemvArgs& a, const float* parts,
                                             const float* scales, int p0, int p1) {
  const bool pairs = a.output == RowOutput::SiluMul;
  const int rows = a.in.rows, each = 16 * rows, items = (p1 - p0) / (pairs ? 2 : 1) * each;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kGemvThreads) {
    const int local = i / each, row = i % each / rows, n = i % rows;
    int at = static_cast<int>(blockIdx.x) +
             ((pairs ? p0 / 2 : p0) + local) * static_cast<int>(gridDim.x);
    const int first = pairs ? 0 : find_matrix(a, at);
    const int out = at * 16 + row;
    if (out >= a.m[first].rows) continue;
    const auto sum = [&](int panel, int matrix) {
      float v = 0;
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w)
        v += parts[(panel * kGemvWarps + w) * each + row * rows + n];
      v *= scales[n];
      return a.m[matrix].bias ? v + a.m[matrix].bias[out] : v;
    };
    float* y = a.m[first].y + n * a.y_stride + out;
    if (pairs)
      *y = silu(sum(2 * local, 0)) * sum(2 * local + 1, 1);
    else if (a.output == RowOutput::Add)
      *y += sum(local, first);
    else
      *y = sum(local, first);
  }
}

template <int kBits, int kUnit>
__global__ void __launch_bounds__(kGemvThreads, 1)
    packed_gemv_kernel(const __grid_constant__ GemvArgs a) {
  constexpr int kStages = ring_stages(kBits), kSlot = slot_bytes(kBits, kUnit);
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int rows = a.in.rows, each = 16 * rows;
  char* ring = shared + warp * (kStages * kSlot);
  StagedX x;
  x.bytes = shared + kGemvWarps * kStages * kSlot;
  x.scale = reinterpret_cast<float*>(x.bytes + rows * a.x_stride);
  x.sum = reinterpret_cast<int*>(x.scale + rows * a.units);
  float* parts = reinterpret_cast<float*>(x.sum + rows * a.units);
  __shared__ float scales[kDecodeRows];
  const int64_t panel_bytes = int64_t{a.units} * (unit_words(kBits, kUnit) * 128);
  const int mine = (a.work - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                   static_cast<int>(gridDim.x);
  const int panels = a.output == RowOutput::SiluMul ? 2 * mine : mine;
  // As an operand this lane reads a plane of row lane / 8; of the results it has row lane % 4.
  const char* x_lane = x.bytes + (lane / 8 < rows ? lane / 8 : 0) * a.x_stride +
                       lane / 4 % 2 * PlanePlace<kUnit>::lo_after +
                       lane % 4 * PlanePlace<kUnit>::kRun;
  const int x_units = (lane % 4 < rows ? lane % 4 : 0) * a.units;
  let_next_start();
  for (int p0 = 0; p0 < panels; p0 += a.per_round) {
    const int p1 = min(panels, p0 + a.per_round);
    Cursor ahead, here;
    const auto seek = [&](Cursor& c, int unit) {
      c.unit += unit;
      const int before = c.panel;
      while (c.unit >= a.units && c.panel < p1) c.unit -= a.units, ++c.panel;
      if (c.panel != before && c.panel < p1) enter_panel(a, c, panel_bytes);
    };
    ahead.panel = here.panel = p0;
    enter_panel(a, ahead, panel_bytes);
    seek(ahead, warp);
    seek(here, warp);
    const auto fill = [&](int slot) {
      if (ahead.panel < p1) {
        copy_unit<kBits, kUnit>(
            ahead.codes + static_cast<int64_t>(ahead.unit) * (unit_words(kBits, kUnit) * 128),
            ahead.grids + static_cast<int64_t>(ahead.unit / a.units_per_group) * 16,
            shared_address(ring + slot * kSlot), lane);
        seek(ahead, kGemvWarps);
      }
      copy_async_commit();
    };
    for (int s = 0; s < kStages; ++s) fill(s);
    if (p0 == 0) {
      wait_for_previous();
      stage_bytes<kUnit>(a, x, scales);
    }
    for (int i = static_cast<int>(threadIdx.x); i < (p1 - p0) * kGemvWarps * each;
         i += kGemvThreads)
      parts[i] = 0;
    __syncthreads();
    float total[2] = {};
    const auto flush = [&](int panel) {
      float* to = parts + ((panel - p0) * kGemvWarps + warp) * each;
      const int n = lane % 4, r = lane / 4;
      if (n < rows) to[r * rows + n] = total[0], to[(r + 8) * rows + n] = total[1];
      total[0] = total[1] = 0;
    };
    int slot = 0, panel = here.panel;
    while (here.panel < p1) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      if (here.panel != panel) {
        flush(panel);
        panel = here.panel;
      }
      multiply_unit<kBits, kUnit>(total, ring + slot * kSlot, x_lane + here.unit * (2 * kUnit),
                                  x.scale[x_units + here.unit], x.sum[x_units + here.unit], lane);
      __syncwarp();
      fill(slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      here.unit += kGemvWarps;
      while (here.unit >= a.units) here.unit -= a.units, ++here.panel;
    }
    if (panel < p1) flush(panel);
    copy_async_wait<0>();
    __syncthreads();
    write_panels(a, parts, scales, p0, p1);
    __syncthreads();
  }
}

}  // namespace

// ---- launchers ----

int64_t packed_gemv_rows(int64_t cols) {
  constexpr int64_t kShared = 96 * 1024;  // of the rows
  return std::clamp<int64_t>(kShared / (2 * (cols + 128)), 1, kPackedRows);
}

void packed_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices) {
  const PackedView v = view_of("packed_matmul", std::get<PackedInt>(matrices[0].weight));
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
  a.x_stride = 2 * v.units * v.unit;
  const DeviceInfo& info = device_info(y.device().index);
  const auto blocks = static_cast<unsigned>(std::min(a.work, info.sms));
  const int panels = (a.work + static_cast<int>(blocks) - 1) / static_cast<int>(blocks) *
                     (a.output == RowOutput::SiluMul ? 2 : 1);
  const int part_bytes = kGemvWarps * 16 * a.in.rows * 4;
  a.per_round = std::min(panels, std::max(2, 24 * 1024 / part_bytes / 2 * 2));
  with_layout(v, [&](auto bits, auto unit) {
    constexpr int kBits = decltype(bits)::value, kUnit = decltype(unit)::value;
    const auto kernel = packed_gemv_kernel<kBits, kUnit>;
    const size_t shared =
        static_cast<size_t>(kGemvWarps * ring_stages(kBits) * slot_bytes(kBits, kUnit) +
                            a.in.rows * (a.x_stride + 8 * a.units) + a.per_round * part_bytes);
    check(shared <= info.shared_optin,
          "packed_matmul: {} rows of {} columns need {} bytes of shared memory, the device has {}",
          a.in.rows, a.in.cols, shared, info.shared_optin);
    prepare_shared(kernel, shared);
    launch_chained("packed_gemv", y, kernel, blocks, kGemvThreads, shared, a);
  });
}

}  // namespace omq::cuda
