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
//            memory, [panel][warp][row]; a thread adds them up for a result
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
#include "cuda/packed_ring.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// Slots of a warp's ring. One is filled before the kernel in front has ended: with none a token
// takes 5 to 9 % longer (H200, 2 to 4 bits). A third, asked for behind x with the second, costs 2
// %; asked for once x is there, 0.2 to 1 %.
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
  static constexpr int kTurnColumns = 4 * kThreads, kTurnBytes = PreparedRow::bytes(kTurnColumns);
  static_assert(kTurnColumns % 128 == 0);
  char *bytes, *scale;
  int left;  // columns from there on

  __device__ __forceinline__ RowBytes(const PreparedRow& x, int padded) {
    const unsigned column = threadIdx.x * 4;
    bytes = x.records + PreparedRow::hi(column);
    scale = x.records + PreparedRow::scale(column);
    left = padded - static_cast<int>(column);
  }
  __device__ __forceinline__ void put(int turn, const float4 (&v)[2]) const {
    FourBytes out[2];
    whole_numbers<kTeam>(out, v);
    const unsigned lane = threadIdx.x % kTeam;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if ((turn + f) * kTurnColumns >= left) continue;
      const int at = (turn + f) * kTurnBytes;
      *reinterpret_cast<uint32_t*>(bytes + at) = out[f].hi;
      *reinterpret_cast<uint32_t*>(bytes + at + PreparedRow::kLoAfter) = out[f].lo;
      const UnitScale u = out[f].unit;
      if (lane % 8 == 0)
        *reinterpret_cast<RowScale*>(scale + at) = {
            u.scale, lane == 0 ? static_cast<float>(u.minus_sum) * u.scale : 0.0f};
    }
  }
};

// Of shared memory, for a row that does not come by spans: it has no squares.
__host__ __device__ constexpr int row_room(bool prepared, int padded) {
  return prepared ? 0 : PreparedRow::bytes(padded);
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

// ---- sums ----

// A warp's own, of all panels of a round.
__device__ __forceinline__ void clear_sums(float* parts, int panels, int warp, int lane) {
#pragma unroll 1
  for (int i = lane; i < panels * 4; i += 32)
    reinterpret_cast<float4*>(parts + i / 4 * kPanelSums + warp * 16)[i % 4] = float4{};
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
// Those of a panel, a lane's being of rows lane / 4 and lane / 4 + 8.
__device__ __forceinline__ void store_sums(float* parts, float2 sums, int warp, int lane) {
  sums.x = quad_sum(sums.x), sums.y = quad_sum(sums.y);
  float* to = parts + warp * 16 + lane / 4;
  if (lane % 4 == 0) to[0] = sums.x, to[8] = sums.y;
}

// ---- results ----

__device__ __forceinline__ int outputs_of(RowOutput output, int count) {
  return (output == RowOutput::SiluMul ? count / 2 : count) * 16;
}

// A thread's result of a round: where it goes, and what it meets there. To be looked up once the
// kernel in front has ended.
struct RowResult {
  int panel, row;      // which panel of the round, or pair of panels (SiluMul); row of that
  int out = 0;         // which of its matrix
  float* y = nullptr;  // null: there is none
  float bias = 0, up_bias = 0, gain = 1, before = 0;

  __device__ __forceinline__ RowResult(const GemvArgs& a, RowOutput output, int p0, int count) {
    const int i = static_cast<int>(threadIdx.x);
    panel = static_cast<int>(threadIdx.x / 16), row = static_cast<int>(threadIdx.x % 16);
    if (i >= outputs_of(output, count)) return;
    const ResultPanel at(a, output, p0, panel);
    out = at.row + row;
    const GemvMatrix& m = a.m[at.matrix];
    if (out >= m.rows) return;
    y = m.y + out;
    if (m.bias) bias = __ldg(m.bias + out);
    if (output == RowOutput::SiluMul && a.m[1].bias) up_bias = __ldg(a.m[1].bias + out);
    if (a.next.gain) gain = __ldg(a.next.gain + out);
    if (output == RowOutput::Add) before = __ldcg(y);
  }
  // The sums are complete, and are to be multiplied by `factor`. Whole warps call, where the result
  // is left for the next product.
  __device__ __forceinline__ void write(const GemvArgs& a, RowOutput output, const float* parts,
                                        float factor) const {
    if (!y) return;
    // The other half of a warp reads the warps' sums in another order: from other banks.
    const int odd = panel % 2 * 16;
    const auto sum_of = [&](int p) {
      const float *from = parts + p * kPanelSums + row, *even = from + odd, *uneven = from - odd;
      float sums[4] = {even[0], uneven[16], even[32], uneven[48]};
#pragma unroll
      for (int w = 4; w < kWarps; ++w) sums[w % 4] += (w % 2 == 0 ? even : uneven)[w * 16];
      return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor;
    };
    float v;
    if (output == RowOutput::SiluMul)
      v = silu(sum_of(2 * panel) + bias) * (sum_of(2 * panel + 1) + up_bias);
    else
      v = sum_of(panel) + bias + before;
    *y = v;
    if (!a.next.memory) return;
    const PreparedRow to(a.next.memory, a.next.padded);
    to.put(out, v * gain);
    if (!a.next.gain) return;
    const float squares = team_sum<32>(v * v);
    if (out % kScaleColumns == 0) to.squares[out / kScaleColumns] = squares;
  }
};

constexpr int kMostPanels = 32;  // of a round: a thread for each result
static_assert(kMostPanels * 16 <= kThreads);

// ---- the next stage ----

// This block has asked for all of its weights, and with it all do, more or less.
__device__ __forceinline__ void say_all_asked(const AheadMark& mark) {
  if (mark.said && blockIdx.x == 0 && threadIdx.x == 0)
    *static_cast<volatile uint32_t*>(mark.said) = mark.stage;
}

// kTurns, kGain: of RowInRegisters; 0 turns: x comes prepared, and kOutput is a.output. What a warp
// does once costs as much as what it does in its few spans.
template <int kBits, int kUnit, int kTurns, bool kGain, int kOutput>
__global__ void __launch_bounds__(kThreads, 1)
    packed_row_kernel(const __grid_constant__ GemvArgs a) {
  constexpr bool kPrepared = kTurns == 0;
  using Ring = SpanRing<kBits, kUnit, kPrepared, kStages>;
  constexpr int kSlot = Ring::kSlot;
  const RowOutput output = kPrepared ? static_cast<RowOutput>(kOutput) : a.output;
  extern __shared__ __align__(128) char memory[];
  char* shared = static_cast<char*>(__cvta_shared_to_generic(kept(shared_address(memory))));
  __shared__ float squares[kPrepared ? 1 : kWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int spans = a.spans;  // of a panel
  char* ring = shared + warp * (kStages * kSlot);
  const uint32_t slots = kept(shared_address(ring) + lane * 16);
  const int padded = a.padded;
  char* row_memory = shared + kWarps * kStages * kSlot;
  const PreparedRow x(row_memory, padded);  // where it does not come in slots
  float* parts = reinterpret_cast<float*>(row_memory + row_room(kPrepared, padded));
  const int panels = ((output == RowOutput::SiluMul ? 2 : 1) * work_of_block(a)) << a.neighbours;
  let_next_start();
  const uint64_t policy = read_once();
  using Row = RowInRegisters<kThreads, kPrepared ? 2 : kTurns, kGain>;
  RowSquares row_squares;
  int p0 = 0;  // the round's first panel; a block without one does nothing in it
#pragma unroll 1
  do {
    const int count = min(panels - p0, a.per_round);
    const WarpSpans<kWarps> take(a, count, warp);
    int left = take.count, panel = take.panel, span = take.span;  // those multiplied next
    Ring ahead(a, output, slots, p0, take, lane, policy);
    ahead.template fill<false>(0, left > 0);
    float sum = 0;
    if constexpr (kPrepared) {
      if (p0 == 0) wait_for_previous();
      ahead.fill_row(span, left > 0);
      ahead.fill_others(left);
    } else if (p0 == 0) {
      Row row(a.in);
      const RowBytes<kUnit> to(x, padded);
      wait_for_previous();
      sum = row.put(
          a.in, [&](int turn, const float4(&v)[2]) { to.put(turn, v); },
          [&] {
            if constexpr (fill_behind_x(kBits)) ahead.fill_others(left);
          });
      if constexpr (!fill_behind_x(kBits)) ahead.fill_others(left);
    } else {
      ahead.fill_others(left);
    }
    // All that can wait, while what was asked for is on its way.
    const bool writes =
        static_cast<int>(threadIdx.x / 32 * 32) < outputs_of(output, count);  // the warp
    if (kPrepared && p0 == 0 && writes) row_squares = RowSquares(a.in);
    const RowResult result(a, output, p0, count);
    if (p0 > 0) __syncthreads();  // the last round's sums have been read
    clear_sums(parts, count, warp, lane);
    if (!kPrepared && p0 == 0) {
      __syncthreads();
      Row::store_squares(squares, sum);  // needed at the end
    }
    const bool last_round = p0 + a.per_round >= panels;
    const auto last_asked = [&] {
      if (last_round) say_all_asked(a.mark);
    };
    if (left <= kStages) last_asked();
    int at = 0;  // the slot
    float2 sums{};
    SpanOfRow<kUnit> columns(lane);
#pragma unroll 1
    while (left > 0) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      const char* from = ring + at;
      const char* row = kPrepared ? from + Ring::Copy::kRowAt : x.records + span * Ring::kRowBytes;
      const float2 more = multiply_span<kBits, kUnit>(from, columns, row, lane);
      sums.x += more.x, sums.y += more.y;
      __syncwarp();
      ahead.template fill<true>(at, left > kStages);
      if (left == kStages + 1) last_asked();
      at = Ring::behind(at);
      --left;
      if (++span < spans && left > 0) continue;
      store_sums(parts + panel * kPanelSums, sums, warp, lane);
      sums = {};
      span = 0, ++panel;
    }
    copy_async_wait<0>();
    __syncthreads();
    if (!writes) continue;
    float factor;
    if constexpr (kPrepared)
      factor = row_squares.factor(a.in);
    else
      factor = Row::factor(a.in, squares);
    result.write(a, output, parts, factor);
  } while ((p0 += a.per_round) < panels);
}

// Of shared memory, in bytes.
constexpr int kStatic = 1024;  // what the kernel declares, at most

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

bool packed_row(Tensor& y, GemvArgs a, const PackedView& v, std::span<const AheadRange> behind) {
  if (!a.in.prepared && !row_in_registers(a.in)) return false;
  if (a.next.memory && !leaves_whole_scales(a, v)) return false;
  a.neighbours = a.next.memory ? 1 : 0;
  const RowLaunch how(a, v, a.in.prepared != nullptr, y.device().index);
  if (!how.fits) return false;
  if (WeightsAhead* ahead = weights_ahead(y.device().index)) a.mark = ahead->add(behind);
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
