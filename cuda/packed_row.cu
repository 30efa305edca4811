// Packed weights of two to four bits times one row of activations: decoding one sequence. As
// packed_gemv.cu, which has the general case, but that
//
//   span     four neighbouring units of a panel are a warp's work at a time. A product has room for
//            four rows of x: each unit of the span is given a row of its own, which is x for that
//            unit and zero for its neighbours, so the registers of a product's sums serve all four,
//            a unit's being in the lanes lane % 4 that hold its row. Each is the sum of 32 columns,
//            which have a scale of x. A warp takes spans that stand one behind another, through the
//            panels of a round
//   sums     stay in registers to the end of a panel, and meet those of the other warps in shared
//            memory, [panel][warp][row]
//   x        comes prepared (prepared_row.cuh): each span's columns are copied into the span's slot
//            of the ring, and no warp waits for another; or it is F32, which stays in registers
//            until it is whole numbers in shared memory (RowInRegisters)
//   next     results may be left prepared for the next product. A block then has panels two by two:
//            32 rows are 32 columns of that product, and their scale
//
// One slot of the ring is filled before the kernel in front has ended; the other would stand in x's
// way, and is asked for behind it.
#include "cuda/packed.h"
#include "cuda/packed_panels.cuh"
#include "cuda/packed_span.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// Slots of a warp's ring. One is filled before the kernel in front has ended: with none a token
// takes 5 to 9 % longer (H200, 2 to 4 bits). A third, asked for behind x with the second, gives
// nothing at 2 bits and takes 4 % at 3.
constexpr int kStages = 2;
// Where x is F32 the other slot is filled while x is on its way, or once it is whole numbers: fewer
// bits are bound by instructions, not by what is under way (H200: 4 bits 2 % faster, 3 and 2 bits 1
// % slower so).
constexpr bool fill_behind_x(int bits) { return bits == 4; }

constexpr int kPanelSums = kWarps * 16;

// ---- x ----

// Where a thread's fours of x stand once they are bytes. Turns of RowInRegisters are whole units
// apart, so a place is that of the first turn and a multiple of the turn. A unit has one scale,
// which stands in each of its places; its sum in the first.
template <int kUnit> struct RowBytes {
  static constexpr int kTeam = kUnit / 4;  // lanes that hold a unit
  static constexpr int kTurnColumns = 4 * kThreads, kTurnScales = kTurnColumns / kScaleColumns;
  static_assert(kTurnColumns % 128 == 0);
  char* bytes;
  RowScale* scale;
  int left;  // scales from there on

  __device__ __forceinline__ RowBytes(const PreparedRow& x, int padded) {
    const int column = static_cast<int>(threadIdx.x) * 4, own = column / kScaleColumns;
    bytes = x.bytes + PreparedRow::hi(column);
    scale = x.scales + own;
    left = padded / kScaleColumns - own;
  }
  __device__ __forceinline__ void put(int turn, const float4 (&v)[2]) const {
    FourBytes out[2];
    whole_numbers<kTeam>(out, v);
    const unsigned lane = threadIdx.x % kTeam;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if ((turn + f) * kTurnScales >= left) continue;
      char* at = bytes + (turn + f) * (2 * kTurnColumns);
      *reinterpret_cast<uint32_t*>(at) = out[f].hi;
      *reinterpret_cast<uint32_t*>(at + PreparedRow::kLoAfter) = out[f].lo;
      const UnitScale u = out[f].unit;
      if (lane % 8 == 0)
        scale[(turn + f) * kTurnScales] = {
            u.scale, lane == 0 ? static_cast<float>(u.minus_sum) * u.scale : 0.0f};
    }
  }
};

// Of shared memory, for a row that does not come by spans: it has no squares.
__host__ __device__ constexpr int row_room(bool prepared, int padded) {
  return prepared ? 0 : 2 * padded + padded / kScaleColumns * static_cast<int>(sizeof(RowScale));
}

// The sums of squares that a prepared row came with. The first are asked for early.
class RowSquares {
 public:
  RowSquares() = default;
  __device__ __forceinline__ explicit RowSquares(const GemvInput& in) {
    if (in.gain) first_ = at(in, static_cast<int>(threadIdx.x % 32));
  }
  // What the product's sums are to be multiplied by: the RMSNorm's factor.
  __device__ __forceinline__ float factor(const GemvInput& in) const {
    if (!in.gain) return 1;
    float all = sum(first_);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x % 32) + 32; i < fours(in); i += 32)
      all += sum(at(in, i));
    return rsqrtf(__fdividef(team_sum<32>(all), static_cast<float>(in.cols)) + in.eps);
  }

 private:
  static __device__ __forceinline__ int fours(const GemvInput& in) {
    return (in.cols + 4 * kScaleColumns - 1) / (4 * kScaleColumns);
  }
  static __device__ __forceinline__ float4 at(const GemvInput& in, int i) {
    return i < fours(in) ? __ldcg(reinterpret_cast<const float4*>(in.squares) + i) : float4{};
  }
  static __device__ __forceinline__ float sum(float4 v) { return v.x + v.y + (v.z + v.w); }
  float4 first_{};
};

// ---- results ----

__device__ __forceinline__ int outputs_of(RowOutput output, int count) {
  return (output == RowOutput::SiluMul ? count / 2 : count) * 16;
}

// Where output i of a round goes; null: there is no such row.
struct RowPlace {
  int matrix, out;
  float* y = nullptr;
  __device__ __forceinline__ RowPlace(const GemvArgs& a, RowOutput output, int i, int p0) {
    const ResultPanel panel(a, output, p0, i / 16);
    matrix = panel.matrix;
    out = panel.row + (i & 15);
    if (out < a.m[matrix].rows) y = a.m[matrix].y + out;
  }
};

constexpr int kLanes = 4;  // to an output, each for a quarter of the warps

// What this thread's first output of a round is added to.
__device__ __forceinline__ float addend(const GemvArgs& a, RowOutput output, int p0, int count) {
  const int i = static_cast<int>(threadIdx.x / kLanes);
  if (output != RowOutput::Add || i >= outputs_of(output, count)) return 0;
  const RowPlace at(a, output, i, p0);
  return at.y ? __ldcg(at.y) : 0.0f;
}

// What this thread's result of a round is multiplied by for the next product.
__device__ __forceinline__ float next_gain(const GemvArgs& a, RowOutput output, int p0, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (!a.next.gain || i >= outputs_of(output, count)) return 1;
  return __ldg(a.next.gain + RowPlace(a, output, i, p0).out);
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// results: room for a round's, where they are left for the next product too.
__device__ __forceinline__ void write_outputs(const GemvArgs& a, RowOutput output,
                                              const float* parts, float* results, float scale,
                                              float before, int p0, int count) {
  static_assert(kWarps % kLanes == 0);
  const bool pairs = output == RowOutput::SiluMul;
  const int outputs = outputs_of(output, count), quarter = static_cast<int>(threadIdx.x % kLanes);
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
    const RowPlace at(a, output, i, p0);
    if (quarter != 0 || !at.y) continue;
    if (const float* bias = a.m[at.matrix].bias) v += bias[at.out];
    if (pairs) {
      if (const float* bias = a.m[1].bias) up += bias[at.out];
      v = silu(v) * up;
    }
    if (output == RowOutput::Add) v += i < kThreads / kLanes ? before : __ldcg(at.y);
    *at.y = v;
    if (a.next.memory) results[i] = v;
  }
}

// A round's results for the next product, a warp 32 of them; behind a barrier.
__device__ __forceinline__ void leave_prepared(const GemvArgs& a, RowOutput output,
                                               const float* results, float gain, int p0,
                                               int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= outputs_of(output, count)) return;  // whole warps
  const PreparedRow to(a.next.memory, a.next.padded);
  const int out = RowPlace(a, output, i, p0).out;
  const float v = results[i];
  to.put(out, v * gain);
  if (!a.next.gain) return;
  const float squares = team_sum<32>(v * v);
  if (i % 32 == 0) to.squares[out / kScaleColumns] = squares;
}

constexpr int kMostPanels = 32;  // of a round: leave_prepared has a thread for each result
static_assert(kMostPanels * 16 <= kThreads);

// kTurns, kGain: of RowInRegisters; 0 turns: x comes prepared, and kOutput is a.output. What a warp
// does once costs as much as what it does in its few spans.
template <int kBits, int kUnit, int kTurns, bool kGain, int kOutput>
__global__ void __launch_bounds__(kThreads, 1)
    packed_row_kernel(const __grid_constant__ GemvArgs a) {
  constexpr bool kPrepared = kTurns == 0;
  constexpr int kUnitBytes = unit_bytes(kBits, kUnit), kInSlot = span_bytes(kBits, kUnit),
                kSlot = span_slot_bytes(kPrepared, kBits, kUnit);
  const RowOutput output = kPrepared ? static_cast<RowOutput>(kOutput) : a.output;
  extern __shared__ __align__(128) char memory[];
  // Otherwise the address is made anew, from a special register, wherever it is needed.
  uint32_t address = shared_address(memory);
  asm volatile("" : "+r"(address));
  char* shared = static_cast<char*>(__cvta_shared_to_generic(address));
  __shared__ float squares[kWarps], results[kMostPanels * 16];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int spans = a.spans;  // of a panel
  char* ring = shared + warp * (kStages * kSlot);
  const uint32_t ring_address = shared_address(ring) + lane * 16;
  const int padded = a.padded;
  char* row_memory = shared + kWarps * kStages * kSlot;
  const PreparedRow x(row_memory, padded);  // where it does not come in slots
  float* parts = reinterpret_cast<float*>(row_memory + row_room(kPrepared, padded));
  const int panels = ((output == RowOutput::SiluMul ? 2 : 1) * work_of_block(a)) << a.neighbours;
  let_next_start();
  const uint64_t policy = read_once();
  using Row = RowInRegisters<kThreads, kPrepared ? 2 : kTurns, kGain>;
  RowSquares row_squares;
#pragma unroll 1
  for (int p0 = 0; p0 < panels; p0 += a.per_round) {
    const int count = min(panels - p0, a.per_round);
    // The warp's spans of the round, and which of which panel is multiplied and fetched next.
    const int all = count * spans, most = static_cast<int>((all + kWarps - 1u) / kWarps),
              first = warp * most;
    int left = min(most, all - first), panel = quotient(first, a.inverse),
        span = first - panel * spans;
    int ahead_left = left, ahead_panel = panel, ahead = span;
    PanelPlace of(a, output, p0 + panel, kUnitBytes, lane);
    const auto fill = [&](int slot, auto with_row) {
      if (ahead_left > 0) {
        uint32_t to = ring_address + slot * kSlot;
        const int unit = ahead * kSpan, units = a.units - unit;
        const uint8_t* at = of.codes + unit * kUnitBytes;
        asm("" : "+l"(at), "+r"(to));  // added up once, not for every unit
#pragma unroll
        for (int u = 0; u < kSpan; ++u)
          if (u < units)
            copy_unit<kBits, kUnit>(at + u * kUnitBytes, to + u * kUnitBytes, lane, policy);
        if (lane < 4 * kSpan)  // a unit's grid by four lanes; behind the panel's end the last
          copy_async_once<16>(
              to + kSpan * kUnitBytes,
              of.grids + (min(unit + lane / 4, a.units - 1) >> a.group_shift) * 16 + lane % 4 * 4,
              policy);
        if constexpr (kPrepared && with_row.value)
          copy_span<kUnit>(to - lane * 16 + kInSlot, a.in.prepared, padded, ahead, lane);
        --ahead_left;
        if (++ahead == spans) {
          ahead = 0, ++ahead_panel;
          if (ahead_left > 0) of = PanelPlace(a, output, p0 + ahead_panel, kUnitBytes, lane);
        }
      }
      copy_async_commit();
    };
    fill(0, std::false_type{});
    const auto fill_others = [&] {
#pragma unroll 1
      for (int s = 1; s < kStages; ++s) fill(s, std::true_type{});
    };
    if (p0 > 0)
      __syncthreads();  // the last round's sums have been read
                        // A warp zeroes its own sums.
#pragma unroll 1
    for (int i = lane; i < count * 4; i += 32)
      reinterpret_cast<float4*>(parts + i / 4 * kPanelSums + warp * 16)[i % 4] = float4{};
    const float gain = next_gain(a, output, p0, count);
    float sum = 0;
    if constexpr (kPrepared) {
      if (p0 == 0) wait_for_previous();
      if (left > 0)
        copy_span<kUnit>(ring_address - lane * 16 + kInSlot, a.in.prepared, padded, span, lane);
      copy_async_commit();
      fill_others();
      if (p0 == 0) row_squares = RowSquares(a.in);
    } else if (p0 == 0) {
      Row row(a.in);
      const RowBytes<kUnit> to(x, padded);
      wait_for_previous();
      sum = row.put(
          a.in, [&](int turn, const float4(&v)[2]) { to.put(turn, v); },
          [&] {
            if constexpr (fill_behind_x(kBits)) fill_others();
          });
      if constexpr (!fill_behind_x(kBits)) fill_others();
    } else {
      fill_others();
    }
    const float before = addend(a, output, p0, count);
    if (!kPrepared && p0 == 0) {
      __syncthreads();
      Row::store_squares(squares, sum);  // needed at the end
    }
    int slot = 0;
    float2 sums{};
    SpanOfRow<kUnit> columns(lane);
#pragma unroll 1
    while (left > 0) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      const char* from = ring + slot * kSlot;
      const char* row = kPrepared ? from + kInSlot : x.bytes + span * columns_bytes(kUnit);
      const char* scales =
          kPrepared ? row + columns_bytes(kUnit)
                    : reinterpret_cast<const char*>(x.scales) + span * scales_bytes(kUnit);
      const float2 more = multiply_span<kBits, kUnit>(
          from, columns, shared_address(row), reinterpret_cast<const RowScale*>(scales), lane);
      sums.x += more.x, sums.y += more.y;
      __syncwarp();
      fill(slot, std::true_type{});
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
    float factor;
    if constexpr (kPrepared)
      factor = row_squares.factor(a.in);
    else
      factor = Row::factor(a.in, squares);
    write_outputs(a, output, parts, results, factor, before, p0, count);
    if (!a.next.memory) continue;
    __syncthreads();
    leave_prepared(a, output, results, gain, p0, count);
  }
}

// Of shared memory, in bytes.
constexpr int kStatic = 3072;  // what the kernel declares, at most

// How a product is launched.
struct RowLaunch {
  int blocks = 0, shared = 0;
  bool fits = false;

  // Completes a: its shares, spans and columns.
  RowLaunch(GemvArgs& a, const PackedView& v, bool prepared, int device) {
    if (v.bits > 4 || a.group_shift < 0) return;
    const DeviceInfo& info = device_info(device);
    a.work >>= a.neighbours;
    blocks = share_work(a, info.sms);
    const int each = (a.output == RowOutput::SiluMul ? 2 : 1) << a.neighbours;
    a.spans = (v.units + kSpan - 1) / kSpan, a.inverse = inverse_of(a.spans);
    a.padded = PreparedRow::padded(v.cols);
    a.per_round = std::min((a.each + (a.more > 0 ? 1 : 0)) * each, kMostPanels);
    shared = kWarps * kStages * span_slot_bytes(prepared, v.bits, v.unit) +
             row_room(prepared, a.padded) + a.per_round * (kPanelSums * 4);
    fits = shared <= static_cast<int>(info.shared_optin) - kStatic;
  }
};

}  // namespace

// ---- launchers ----

int64_t prepared_row_bytes(int64_t cols) {
  return PreparedRow::size(PreparedRow::padded(static_cast<int>(cols)));
}

// Whether the results' scales stand in one block each: those of one matrix, or of a pair.
static bool leaves_whole_scales(const GemvArgs& a, const PackedView& v) {
  return v.rows % kScaleColumns == 0 && (a.matrices == 1 || a.output == RowOutput::SiluMul);
}

bool packed_row_takes(std::span<const RowMatrix> matrices, RowOutput output, bool leaves) {
  GemvArgs a;
  a.output = output;
  a.matrices = static_cast<int>(matrices.size());
  a.neighbours = leaves ? 1 : 0;
  const PackedView v = packed_arguments(a, matrices);
  const int device = matrices[0].stored().device().index;
  if (leaves && !leaves_whole_scales(a, v)) return false;
  // What leaves a row may itself have one that nobody prepared, as F32.
  if (leaves && v.cols % 4 != 0) return false;
  GemvArgs b = a;
  return RowLaunch(a, v, true, device).fits && (!leaves || RowLaunch(b, v, false, device).fits);
}

bool packed_row(Tensor& y, GemvArgs a, const PackedView& v) {
  if (!a.in.prepared && !row_in_registers(a.in)) return false;
  if (a.next.memory && !leaves_whole_scales(a, v)) return false;
  a.neighbours = a.next.memory ? 1 : 0;
  const RowLaunch how(a, v, a.in.prepared != nullptr, y.device().index);
  if (!how.fits) return false;
  const auto shared = static_cast<size_t>(how.shared);
  with_layout(v, [&](auto bits, auto unit) {
    constexpr int kBits = decltype(bits)::value, kUnit = decltype(unit)::value;
    if constexpr (kBits <= 4) {
      const auto run = [&](auto turns, auto gain, auto output) {
        const auto kernel = packed_row_kernel<kBits, kUnit, decltype(turns)::value,
                                              decltype(gain)::value, decltype(output)::value>;
        prepare_shared(kernel, shared);
        launch_chained("packed_row", y, kernel, static_cast<unsigned>(how.blocks), kThreads, shared,
                       1, a);
      };
      const auto prepared = [&](auto output) { run(Int<0>{}, std::false_type{}, output); };
      if (!a.in.prepared)
        with_row<kThreads>(a.in, [&](auto turns, auto gain) { run(turns, gain, Int<0>{}); });
      else if (a.output == RowOutput::Store)
        prepared(Int<static_cast<int>(RowOutput::Store)>{});
      else if (a.output == RowOutput::Add)
        prepared(Int<static_cast<int>(RowOutput::Add)>{});
      else
        prepared(Int<static_cast<int>(RowOutput::SiluMul)>{});
    }
  });
  return true;
}

}  // namespace omq::cuda
