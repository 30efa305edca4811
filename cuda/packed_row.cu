// Packed weights of two to four bits times one row of activations: decoding one sequence. As
// packed_gemv.cu, which has the general case, but that
//
//   span     four neighbouring units of a panel are a warp's work at a time. A product has room for
//            four rows of x: each unit of the span is given a row of its own, which is x for that
//            unit and zero for its neighbours, so the sums of all four come out of one set of
//            registers, a unit's in the lanes lane % 4 that hold its row, and are scaled together.
//            A warp takes spans that stand one behind another, through the panels of a round
//   sums     stay in registers to the end of a panel, and meet those of the other warps in shared
//            memory, [panel][warp][row]
//   x        stays in registers until it is whole numbers (RowInRegisters); one slot of the ring is
//            filled before the kernel in front has ended; the other would stand in x's way, and is
//            asked for behind it
#include "cuda/packed.h"
#include "cuda/packed_panels.cuh"
#include "cuda/packed_unit.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kSpan = 4;  // units
// Slots of a warp's ring. One is filled before the kernel in front has ended: with none a token
// takes 5 to 9 % longer (H200, 2 to 4 bits); with a ring of four and two of them up to 8 %.
constexpr int kStages = 2, kEarly = 1;
// The other slots are filled while x is on its way, or once it is there: fewer bits are bound by
// instructions, not by what is under way (H200: 4 bits 2 % faster, 3 and 2 bits 1 % slower so).
constexpr bool fill_behind_x(int bits) { return bits == 4; }

constexpr int unit_bytes(int bits, int unit) { return unit_words(bits, unit) * 128; }
constexpr int span_bytes(int bits, int unit) { return kSpan * (unit_bytes(bits, unit) + 64); }
constexpr int kPanelSums = kWarps * 16;

// ---- x ----

// Where a thread's fours of x stand once they are bytes. Turns of RowInRegisters are whole units
// apart, so a place is that of the first turn and a multiple of the turn.
template <int kUnit> struct RowBytes {
  static constexpr int kTeam = kUnit / 4;  // lanes that hold a unit
  static constexpr int kTurnUnits = 4 * kThreads / kUnit;
  char* bytes;
  UnitScale* unit;
  int left;  // units from there on

  __device__ __forceinline__ RowBytes(const StagedX& x, int units) {
    const int own = static_cast<int>(threadIdx.x / kTeam),
              inside = static_cast<int>(threadIdx.x % kTeam * 4);
    bytes = x.bytes + own * (2 * kUnit) + PlanePlace<kUnit>::hi(inside);
    unit = x.units + own;
    left = units - own;
  }
  __device__ __forceinline__ void put(int turn, const float4 (&v)[2]) const {
    FourBytes out[2];
    whole_numbers<kTeam>(out, v);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int after = (turn + f) * kTurnUnits;
      if (after >= left) continue;
      char* at = bytes + after * (2 * kUnit);
      *reinterpret_cast<uint32_t*>(at) = out[f].hi;
      *reinterpret_cast<uint32_t*>(at + PlanePlace<kUnit>::lo_after) = out[f].lo;
      if (threadIdx.x % kTeam == 0) unit[after] = out[f].unit;
    }
  }
};

// ---- a span ----

// Four units against x. from: where the lane's bytes of each unit's row begin in the first span,
// step: from there to the next span's. The lane's sums are those of unit lane % 4, rows lane / 4
// and lane / 4 + 8.
template <int kBits, int kUnit>
__device__ __forceinline__ float2 multiply_span(const char* slot, const char* const (&from)[kSpan],
                                                const int (&step)[kSpan], const UnitScale* x_units,
                                                int span, int lane) {
  constexpr int kPlaces = code_places(kBits, kUnit);
  const auto bit = [](int half, int place) { return place_bit(kBits, kUnit, half, place); };
  int32_t sums[kPlaces][4] = {};
#pragma unroll
  for (int u = 0; u < kSpan; ++u) {
    uint32_t w[unit_words(kBits, kUnit)], b[kUnit / 16];
    load_words<kBits, kUnit>(w, slot + u * unit_bytes(kBits, kUnit), lane);
    load_planes<kUnit>(b, from[u] + span * step[u]);
#pragma unroll
    for (int s = 0; s < kUnit / 32; ++s) {
      const int place = s % kPlaces;
      const auto codes = [&](int half, int f) {
        return four_codes<kBits, kUnit>(w, half, f, bit(half, place));
      };
      const uint32_t a[4] = {codes(0, 2 * s), codes(1, 2 * s), codes(0, 2 * s + 1),
                             codes(1, 2 * s + 1)};
      multiply_bytes(sums[place], a, b[2 * s], b[2 * s + 1]);
    }
  }
  // Σ code · x in whole numbers of x.
  constexpr int64_t kMost = int64_t{kUnit} * ((1 << kBits) - 1) * (127 * 256 + 127);
  static_assert(kMost << std::max(place_bit(kBits, kUnit, 0, kPlaces - 1),
                                  place_bit(kBits, kUnit, 1, kPlaces - 1)) <
                int64_t{1} << 31);
  const auto whole = [&](int half) {
    const int top = bit(half, kPlaces - 1);
    int hi = 0, lo = 0;
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
      hi += sums[p][2 * half] * (1 << (top - bit(half, p)));
      lo += sums[p][2 * half + 1] * (1 << (top - bit(half, p)));
    }
    return (hi * 256 + lo) >> top;
  };
  const auto* grid = reinterpret_cast<const GridWord*>(slot + kSpan * unit_bytes(kBits, kUnit)) +
                     lane % 4 * 16 + lane / 4;
  const GridWord upper = grid[0], lower = grid[8];
  const UnitScale x_unit = x_units[span * kSpan + lane % 4];
  const auto dot = [&](int half, GridWord g) {
    return static_cast<float>(whole(half) + grid_zero(g) * x_unit.minus_sum) * x_unit.scale *
           grid_scale(g);
  };
  return {dot(0, upper), dot(1, lower)};
}

// ---- results ----

__device__ __forceinline__ int outputs_of(const GemvArgs& a, int count) {
  return (a.output == RowOutput::SiluMul ? count / 2 : count) * 16;
}

// Where output i of a round goes; null: there is no such row.
struct RowPlace {
  int matrix, out;
  float* y = nullptr;
  __device__ __forceinline__ RowPlace(const GemvArgs& a, int i, int p0) {
    const ResultPanel panel(a, p0, i / 16);
    matrix = panel.matrix;
    out = panel.row + i % 16;
    if (out < a.m[matrix].rows) y = a.m[matrix].y + out;
  }
};

constexpr int kLanes = 4;  // to an output, each for a quarter of the warps

// What this thread's first output of a round is added to.
__device__ __forceinline__ float addend(const GemvArgs& a, int p0, int count) {
  const int i = static_cast<int>(threadIdx.x / kLanes);
  if (a.output != RowOutput::Add || i >= outputs_of(a, count)) return 0;
  const RowPlace at(a, i, p0);
  return at.y ? __ldcg(at.y) : 0.0f;
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

__device__ __forceinline__ void write_outputs(const GemvArgs& a, const float* parts, float scale,
                                              float before, int p0, int count) {
  static_assert(kWarps % kLanes == 0);
  const bool pairs = a.output == RowOutput::SiluMul;
  const int outputs = outputs_of(a, count), quarter = static_cast<int>(threadIdx.x % kLanes);
  const auto sum_of = [&](int panel, int row) {
    const float* from = parts + panel * kPanelSums + quarter * 16 + row;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w += kLanes) sum += from[w * 16];
    return quad_sum(sum) * scale;
  };
  // Whole warps: eight outputs each.
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x / kLanes); i < outputs; i += kThreads / kLanes) {
    const int panel = i / 16, row = i % 16;
    float v = sum_of(pairs ? 2 * panel : panel, row), up = 0;
    if (pairs) up = sum_of(2 * panel + 1, row);
    const RowPlace at(a, i, p0);
    if (quarter != 0 || !at.y) continue;
    if (const float* bias = a.m[at.matrix].bias) v += bias[at.out];
    if (pairs) {
      if (const float* bias = a.m[1].bias) up += bias[at.out];
      v = silu(v) * up;
    }
    if (a.output == RowOutput::Add) v += i < kThreads / kLanes ? before : __ldcg(at.y);
    *at.y = v;
  }
}

template <int kBits, int kUnit, int kTurns, bool kGain>
__global__ void __launch_bounds__(kThreads, 1)
    packed_row_kernel(const __grid_constant__ GemvArgs a) {
  constexpr int kUnitBytes = unit_bytes(kBits, kUnit), kSlot = span_bytes(kBits, kUnit);
  extern __shared__ __align__(128) char memory[];
  // Otherwise the address is made anew, from a special register, wherever it is needed.
  uint32_t address = shared_address(memory);
  asm volatile("" : "+r"(address));
  char* shared = static_cast<char*>(__cvta_shared_to_generic(address));
  __shared__ float squares[kWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int spans = a.spans;  // of a panel
  char* ring = shared + warp * (kStages * kSlot);
  const uint32_t ring_address = shared_address(ring) + lane * 16;
  const StagedX x{shared + kWarps * kStages * kSlot,
                  reinterpret_cast<UnitScale*>(shared + kWarps * kStages * kSlot + a.x_stride)};
  char* zeros = reinterpret_cast<char*>(x.units + spans * kSpan);  // a unit's bytes
  float* parts = reinterpret_cast<float*>(zeros + 2 * kUnit);
  const int64_t panel_bytes = int64_t{a.units} * kUnitBytes;
  const int panels = (a.output == RowOutput::SiluMul ? 2 : 1) * work_of_block(a);
  const char* from[kSpan];
  int step[kSpan];
#pragma unroll
  for (int u = 0; u < kSpan; ++u) {
    const bool own = lane / 8 == u;
    from[u] = own ? x.bytes + u * (2 * kUnit) + lane / 4 % 2 * PlanePlace<kUnit>::lo_after +
                        lane % 4 * PlanePlace<kUnit>::kRun
                  : zeros;
    step[u] = own ? kSpan * 2 * kUnit : 0;
  }
  let_next_start();
  const uint64_t policy = read_once();
  using Row = RowInRegisters<kThreads, kTurns, kGain>;
#pragma unroll 1
  for (int p0 = 0; p0 < panels; p0 += a.per_round) {
    const int count = min(panels - p0, a.per_round);
    if (p0 > 0) __syncthreads();  // the last round's sums have been read
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count * (kPanelSums / 4); i += kThreads)
      reinterpret_cast<float4*>(parts)[i] = float4{};
    if (p0 > 0) __syncthreads();  // a barrier follows below where p0 is 0
    const RoundPanels of(a, p0, p0 + count, panel_bytes, lane);
    // The warp's spans of the round, and which of which panel is multiplied and fetched next.
    const int all = count * spans, most = static_cast<int>((all + kWarps - 1u) / kWarps),
              first = warp * most;
    int left = min(most, all - first), panel = quotient(first, a.inverse),
        span = first - panel * spans;
    int ahead_left = left, ahead_panel = panel, ahead = span;
    const uint8_t* codes = pointer_of(of.codes, ahead_panel & 31) + lane * 16;
    const GridWord* grids = pointer_of(of.grids, ahead_panel & 31);
    const auto fill = [&](int slot) {
      if (ahead_left > 0) {
        uint32_t to = ring_address + slot * kSlot;
        const int unit = ahead * kSpan, units = a.units - unit;
        const uint8_t* at = codes + unit * kUnitBytes;
        asm("" : "+l"(at), "+r"(to));  // added up once, not for every unit
#pragma unroll
        for (int u = 0; u < kSpan; ++u)
          if (u < units)
            copy_unit<kBits, kUnit>(at + u * kUnitBytes, to + u * kUnitBytes, lane, policy);
        if (lane < 4 * kSpan)  // a unit's grid by four lanes; behind the panel's end the last
          copy_async_once<16>(
              to + kSpan * kUnitBytes,
              grids + (min(unit + lane / 4, a.units - 1) >> a.group_shift) * 16 + lane % 4 * 4,
              policy);
        --ahead_left;
        if (++ahead == spans) {
          ahead = 0, ++ahead_panel;
          codes = pointer_of(of.codes, ahead_panel & 31) + lane * 16;
          grids = pointer_of(of.grids, ahead_panel & 31);
        }
      }
      copy_async_commit();
    };
    const int early = p0 == 0 ? kEarly : kStages;
#pragma unroll 1
    for (int s = 0; s < early; ++s) fill(s);
    const auto fill_others = [&] {
#pragma unroll 1
      for (int s = kEarly; s < kStages; ++s) fill(s);
    };
    float sum = 0;
    if (p0 == 0) {
      Row row(a.in);
      if (threadIdx.x < kUnit / 2) reinterpret_cast<uint32_t*>(zeros)[threadIdx.x] = 0;
      const RowBytes<kUnit> to(x, spans * kSpan);
      wait_for_previous();
      sum = row.put(
          a.in, [&](int turn, const float4(&v)[2]) { to.put(turn, v); },
          [&] {
            if constexpr (fill_behind_x(kBits)) fill_others();
          });
    }
    if (p0 == 0 && !fill_behind_x(kBits)) fill_others();
    const float before = addend(a, p0, count);
    if (p0 == 0) {
      __syncthreads();
      Row::store_squares(squares, sum);  // nobody needs them before the end
    }
    int slot = 0;
    float2 sums{};
#pragma unroll 1
    while (left > 0) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      const float2 more =
          multiply_span<kBits, kUnit>(ring + slot * kSlot, from, step, x.units, span, lane);
      sums.x += more.x, sums.y += more.y;
      __syncwarp();
      fill(slot);
      slot = slot + 1 < kStages ? slot + 1 : 0;
      --left;
      if (++span < spans && left > 0) continue;
      sums.x = quad_sum(sums.x), sums.y = quad_sum(sums.y);
      float* to = parts + panel * kPanelSums + warp * 16 + lane / 4;
      if (lane % 4 == 0) to[0] = sums.x, to[8] = sums.y;
      sums = {};
      span = 0, ++panel;
    }
    copy_async_wait<0>();
    __syncthreads();
    write_outputs(a, parts, Row::factor(a.in, squares), before, p0, count);
  }
}

// Of shared memory, in bytes.
constexpr int kStatic = 1024;  // what the kernel declares, at most

}  // namespace

// ---- launchers ----

bool packed_row(Tensor& y, GemvArgs a, const PackedView& v) {
  if (v.bits > 4 || a.group_shift < 0 || !row_in_registers(a.in)) return false;
  const DeviceInfo& info = device_info(y.device().index);
  const int limit = static_cast<int>(info.shared_optin) - kStatic;
  const int blocks = share_work(a, info.sms), each = a.output == RowOutput::SiluMul ? 2 : 1;
  const int panels = (a.each + (a.more > 0 ? 1 : 0)) * each;
  const int spans = (v.units + kSpan - 1) / kSpan;
  a.spans = spans, a.inverse = inverse_of(spans);
  a.x_stride = spans * kSpan * 2 * v.unit;
  const int x_bytes = a.x_stride + spans * kSpan * static_cast<int>(sizeof(UnitScale)) + 2 * v.unit;
  const int ring = kWarps * kStages * span_bytes(v.bits, v.unit);
  a.per_round = std::min(panels, 32);  // as many as there are lanes to point at them
  const int shared = ring + x_bytes + a.per_round * (kPanelSums * 4);
  if (shared > limit) return false;
  with_layout(v, [&](auto bits, auto unit) {
    constexpr int kBits = decltype(bits)::value, kUnit = decltype(unit)::value;
    if constexpr (kBits <= 4) {
      with_row<kThreads>(a.in, [&](auto turns, auto gain) {
        const auto kernel =
            packed_row_kernel<kBits, kUnit, decltype(turns)::value, decltype(gain)::value>;
        prepare_shared(kernel, static_cast<size_t>(shared));
        launch_chained("packed_row", y, kernel, static_cast<unsigned>(blocks), kThreads,
                       static_cast<size_t>(shared), 1, a);
      });
    }
  });
  return true;
}

}  // namespace omq::cuda
