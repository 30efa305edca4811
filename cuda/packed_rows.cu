// Packed weights times four to sixteen rows of activations: split_rows.cuh, with units that come
// through a ring in shared memory and meet x as whole numbers of two bytes (packed_unit.cuh).
#include "cuda/packed.h"
#include "cuda/split_rows.cuh"

namespace omq::cuda {

SplitPlan plan_split(const SplitForm& form, int units, int rows, int work, RowOutput output,
                     const int (&clusters)[2], int limit) {
  const int kinds = output == RowOutput::SiluMul ? 2 : 1, each = 16 * rows;
  for (int split = 2; split <= kMostSplit; split *= 2) {
    const int together = std::min(work, clusters[split / 4]);
    if (together == 0 || units < split) continue;
    SplitPlan p;
    p.split = split;
    const int fewest = units / split, widest = (units + split - 1) / split;
    p.x_stride = widest * form.x_bytes;
    p.x_units = (widest + 1) / 2 * 2;  // the rows keep to 16 bytes
    const int x_bytes = rows * (p.x_stride + p.x_units * static_cast<int>(sizeof(UnitScale)));
    const int panels = (work + together - 1) / together * kinds, most_panels = std::min(panels, 32);
    // Fewer slots rather than a second round, and that rather than more blocks.
    for (p.per_round = most_panels; p.per_round >= kinds; p.per_round -= kinds) {
      p.segments = 0;
      for (const int n : {fewest, widest}) {
        const int most = (p.per_round * n + kSplitWarps - 1) / kSplitWarps;
        p.segments = std::max(p.segments, (most + n - 2) / n + 1);
      }
      p.owned = (p.per_round / kinds + split - 1) / split * kinds;
      const int sums = (kSplitWarps * p.segments + split * p.owned) * each * 4;
      for (const bool many : {true, false}) {
        p.many_slots = many;
        p.shared = x_bytes + sums + kSplitWarps * (many ? form.many_slots : form.few_slots);
        if (p.shared <= limit) return p;
      }
    }
  }
  return {};
}

namespace {

template <int kBits, int kUnit> struct PackedWeights {
  static constexpr int kUnitCols = kUnit, kXBytes = 2 * kUnit, kFewestRows = 4;
  static constexpr int kUnitBytes = unit_words(kBits, kUnit) * 128,
                       kSlot = slot_bytes(kBits, kUnit, 1);
  // Slots of a warp's ring, of a unit each. 8 KiB are under way where there is room for them, 128
  // KiB a processor; half of them before the kernel in front has ended: more would stand in x's
  // way.
  static constexpr int kFew = std::clamp(4096 / kSlot, 2, 6),
                       kMany = std::clamp(8192 / kSlot, kFew + 1, 12);
  static constexpr int ring_bytes(bool many) { return (many ? kMany : kFew) * kSlot; }

  static __device__ __forceinline__ int64_t panel_bytes(const GemvArgs& a) {
    return int64_t{a.units} * kUnitBytes;
  }
  static __device__ __forceinline__ int lane_offset(int lane) { return plane_offset<kUnit>(lane); }
  static __device__ __forceinline__ void put(const StagedX& row, int units, const int (&c)[2],
                                             const float4 (&v)[2]) {
    put_bytes<kUnit>(row, units, c, v);
  }

  struct Stream {
    const GemvArgs& a;
    const RoundPanels& of;
    const char* ring;
    bool many;
    int lane, slots, slot = 0;
    UnitRun ahead;
    const uint8_t* codes;
    const GridWord* grids;
    uint64_t policy = read_once();

    __device__ __forceinline__ Stream(const GemvArgs& args, const RoundPanels& panels,
                                      const char* memory, bool many_slots, int l,
                                      const UnitRun& run)
        : a(args),
          of(panels),
          ring(memory),
          many(many_slots),
          lane(l),
          slots(many ? kMany : kFew),
          ahead(run) {
      begin_panel();
    }
    __device__ __forceinline__ void begin_panel() {
      codes = pointer_of(of.codes, ahead.panel & 31) + lane * 16;
      grids = pointer_of(of.grids, ahead.panel & 31);
    }
    __device__ __forceinline__ void fill(int at) {
      if (ahead.left > 0) {
        const uint32_t to = shared_address(ring) + at * kSlot + lane * 16;
        const int unit = ahead.first + ahead.unit;
        copy_unit<kBits, kUnit>(codes + unit * kUnitBytes, to, lane, policy);
        if (lane < 4)
          copy_async_once<16>(to + kUnitBytes, grids + group_of(a, unit) * 16 + lane * 4, policy);
        --ahead.left;
        if (++ahead.unit == ahead.units) {
          ahead.unit = 0, ++ahead.panel;
          begin_panel();
        }
      }
      copy_async_commit();
    }
    __device__ __forceinline__ void early() {
#pragma unroll 1
      for (int i = 0; i < (slots + 1) / 2; ++i) fill(i);
    }
    __device__ __forceinline__ void rest() {
#pragma unroll 1
      for (int i = (slots + 1) / 2; i < slots; ++i) fill(i);
    }
    template <int kTiles>
    __device__ __forceinline__ void multiply(float (&total)[kTiles][2],
                                             const char* const (&x)[kTiles],
                                             const UnitScale* const (&x_units)[kTiles], int unit) {
      if (many)
        copy_async_wait<kMany - 1>();
      else
        copy_async_wait<kFew - 1>();
      __syncwarp();
      const char* from = ring + slot * kSlot;
      multiply_unit<kBits, kUnit, kTiles>(total, from,
                                          reinterpret_cast<const GridWord*>(from + kUnitBytes), x,
                                          x_units, unit, lane);
      __syncwarp();
      fill(slot);
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
    __device__ __forceinline__ void finish() { copy_async_wait<0>(); }
  };
};

template <class F> void with_weights(const PackedView& v, F&& body) {
  with_layout(v, [&](auto bits, auto unit) {
    body(PackedWeights<decltype(bits)::value, decltype(unit)::value>{});
  });
}

}  // namespace

// ---- launchers ----

SplitRows packed_rows_taken(const PackedView& v, RowOutput output, int device) {
  SplitRows rows;
  with_weights(v, [&](auto w) { rows = rows_taken<decltype(w)>(v.units, output, device); });
  return rows;
}

bool packed_rows(Tensor& y, const GemvArgs& a, const PackedView& v) {
  bool done = false;
  with_weights(v, [&](auto w) { done = split_rows<decltype(w)>("packed_rows", y, a); });
  return done;
}

}  // namespace omq::cuda
