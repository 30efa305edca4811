// Which spans of a block's panels a warp of packed_row.cu takes, and their way into shared memory,
// one ahead of another.
#pragma once

#include "cuda/packed_panels.cuh"
#include "cuda/packed_span.cuh"

namespace omq::cuda {

// What the compiler is not to make anew wherever it is needed.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ const char* kept(const char* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// The spans that a warp takes of a block's round of so many panels: as even a share as may be, for
// a scheduler has a quarter of the warps, and the fullest is waited for.
template <int kWarps> struct WarpSpans {
  int count, panel, span;  // how many; the first one's panel of the round, and place in that
  __device__ __forceinline__ WarpSpans(const GemvArgs& a, int panels, int warp) {
    // Not all blocks ask for the same columns of x at once.
    const unsigned all = static_cast<unsigned>(panels * a.spans), each = all / kWarps,
                   more = all % kWarps, share = (warp + 5 * blockIdx.x) % kWarps;
    const int first = static_cast<int>(share * each + min(share, more));
    count = static_cast<int>(each + (share < more ? 1 : 0));
    panel = quotient(first, a.inverse), span = first - panel * a.spans;
  }
};

// A warp's ring of slots in shared memory, and the next span that goes into one. A warp calls
// together.
template <int kBits, int kUnit, bool kPrepared, int kStages> class SpanRing {
 public:
  using Copy = SpanCopy<kBits, kUnit>;
  static constexpr int kSlot = span_slot_bytes(kPrepared, kBits, kUnit),
                       kRowBytes = span_row_bytes(kUnit), kUnitBytes = unit_bytes(kBits, kUnit);

  // The slot behind the one `at` bytes from the first.
  static __device__ __forceinline__ int behind(int at) {
    return kStages == 2 ? kSlot - at : at + kSlot < kStages * kSlot ? at + kSlot : 0;
  }
  // slots: where they begin, and 16 bytes a lane further; p0: the round's first panel.
  template <class Spans>
  __device__ __forceinline__ SpanRing(const GemvArgs& a, RowOutput output, uint32_t slots, int p0,
                                      const Spans& take, int lane, uint64_t policy)
      : a_(a),
        output_(output),
        slots_(slots),
        p0_(p0),
        lane_(lane),
        policy_(policy),
        spans_(a.spans),
        panel_(take.panel),
        span_(take.span),
        of_(place(take.panel)) {
    if constexpr (kPrepared) prepared_ = kept(a.in.prepared + (lane - Copy::kGridLanes) * 16);
  }
  // The next span into the slot `at` bytes from the first, where there is `one`.
  template <bool kWithRow> __device__ __forceinline__ void fill(int at, bool one) {
    if (one) {
      const uint32_t to = slots_ + at;
      const int unit = span_ * kSpan;
      Copy::codes(to, of_.codes + int64_t{span_} * (kSpan * kUnitBytes), a_.units - unit, lane_,
                  policy_);
      // Behind the panel's end the last.
      const GridWord* grid =
          of_.grids + int64_t{min(unit + lane_ / 4, a_.units - 1) >> a_.group_shift} * 16;
      if constexpr (kPrepared && kWithRow)
        Copy::grids_and_row(to, grid, row_of(span_), lane_, policy_);
      else
        Copy::grids(to, grid, lane_, policy_);
      // There may be no such panel; then nothing is read there.
      if (++span_ == spans_) span_ = 0, of_ = place(++panel_);
    }
    copy_async_commit();
  }
  // Of `left` spans those that go into the slots behind the first.
  __device__ __forceinline__ void fill_others(int left) {
#pragma unroll 1
    for (int s = 1; s < kStages; ++s) fill<true>(s * kSlot, left > s);
  }
  // The row's columns that belong to the first slot's span, where there is `one`.
  __device__ __forceinline__ void fill_row(int span, bool one) const {
    if (one) Copy::row(slots_, row_of(span), lane_);
    copy_async_commit();
  }

 private:
  __device__ __forceinline__ PanelPlace place(int of_round) const {
    PanelPlace of(a_, output_, p0_ + of_round, kUnitBytes, lane_);
    of.grids += lane_ % 4 * 4;
    return of;
  }
  __device__ __forceinline__ const char* row_of(int i) const {
    return prepared_ + uint64_t{static_cast<unsigned>(i)} * kRowBytes;  // unsigned: one instruction
  }
  const GemvArgs& a_;
  const RowOutput output_;
  const uint32_t slots_;
  const int p0_, lane_;
  const uint64_t policy_;
  const int spans_;  // of a panel
  int panel_, span_;
  PanelPlace of_;
  const char* prepared_ = nullptr;  // of this lane, see SpanCopy
};

}  // namespace omq::cuda
