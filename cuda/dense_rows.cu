// Dense weights of 16 bits times two to sixteen rows of activations: split_rows.cuh, with units
// that come into registers as they are multiplied. x meets them as two numbers of the weights' type
// whose sum it is: to 17 bits (BF16), or 22 bits of the largest of 64 columns (F16), in units of a
// power of two of these columns, so that no value below 2¹²⁶ is too large.
#include "cuda/packed.h"
#include "cuda/split_rows.cuh"

namespace omq::cuda {
namespace {

// A row of x in a unit: two runs of 32 columns, each the first numbers, then what they leave.
template <class T> struct DenseWeights {
  static constexpr int kUnitCols = 64, kXBytes = 4 * kUnitCols, kFewestRows = 2;
  static constexpr int kRuns = kUnitCols / 32, kLoAfter = 64, kRun = 128;  // bytes
  // Units under way: 64 KiB a processor. One of 128 columns at a time is 3 to 20 % slower.
  static constexpr int kAhead = 2;
  static constexpr int kTeam = kUnitCols / 4;

  static constexpr int ring_bytes(bool) { return 0; }
  static __device__ __forceinline__ int64_t panel_bytes(const GemvArgs& a) {
    return int64_t{a.in.cols} * 32;
  }
  static __device__ __forceinline__ int lane_offset(int lane) {
    return lane / 4 % 2 * kLoAfter + lane % 4 * 16;
  }
  static __device__ __forceinline__ void put(const StagedX& row, int units, const int (&c)[2],
                                             const float4 (&v)[2]) {
    uint32_t top[2];  // bits of the largest |v|, above infinity's where one is no number
#pragma unroll
    for (int f = 0; f < 2; ++f)
      top[f] = __reduce_max_sync(
          team_mask<kTeam>(),
          __float_as_uint(larger_or_nan(larger_or_nan(fabsf(v[f].x), fabsf(v[f].y)),
                                        larger_or_nan(fabsf(v[f].z), fabsf(v[f].w)))));
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int unit = static_cast<int>(static_cast<unsigned>(c[f]) / kUnitCols),
                inside = static_cast<int>(static_cast<unsigned>(c[f]) % kUnitCols);
      if (unit >= units) continue;
      // The largest is made less than 1 and at least ½; denormals are 0.
      const uint32_t exponent = top[f] >> 23;
      const float by = exponent == 0 ? 0.0f : __uint_as_float((253 - exponent) << 23);
      const float t[4] = {v[f].x * by, v[f].y * by, v[f].z * by, v[f].w * by};
      const uint2 hi{pack_pair(T{}, t[0], t[1]), pack_pair(T{}, t[2], t[3])};
      const float2 a = unpack_pair(T{}, hi.x), b = unpack_pair(T{}, hi.y);
      const uint2 lo{pack_pair(T{}, t[0] - a.x, t[1] - a.y),
                     pack_pair(T{}, t[2] - b.x, t[3] - b.y)};
      char* at = row.bytes + unit * kXBytes + inside / 32 * kRun + inside % 32 * 2;
      *reinterpret_cast<uint2*>(at) = hi;
      *reinterpret_cast<uint2*>(at + kLoAfter) = lo;
      // From 2¹²⁶ on, infinite or not a number: then the result is none.
      if (inside == 0)
        row.units[unit] = {
            exponent > 252 ? __int_as_float(0x7fc00000) : __uint_as_float((exponent + 1) << 23), 0};
    }
  }

  struct Stream {
    const GemvArgs& a;
    int64_t row_bytes;
    const uint8_t* panels;  // a lane's: where the panel of that number begins
    int rows_left, lane;    // of that panel's matrix, from there on
    UnitRun ahead;
    const uint8_t* from[2] = {};   // the lane's 16 bytes of rows lane / 4 and lane / 4 + 8
    uint4 next[kAhead][kRuns][2];  // [unit][32 columns][row]
    uint64_t policy = read_once();

    __device__ __forceinline__ Stream(const GemvArgs& args, const RoundPanels& of, char*, bool,
                                      int l, const UnitRun& run)
        : a(args),
          row_bytes(int64_t{a.in.cols} * 2),
          panels(of.codes),
          rows_left(of.rows_left),
          lane(l),
          ahead(run) {
      begin_panel();
    }
    __device__ __forceinline__ void begin_panel() {
      const uint8_t* panel = pointer_of(panels, ahead.panel & 31);
      const int left = __shfl_sync(0xffffffffu, rows_left, ahead.panel & 31);
#pragma unroll
      for (int i = 0; i < 2; ++i)  // behind the last row that again; its sums go nowhere
        from[i] = panel + max(min(lane / 4 + 8 * i, left - 1), 0) * row_bytes + lane % 4 * 16;
    }
    __device__ __forceinline__ void fetch(uint4 (&to)[kRuns][2]) {
      if (ahead.left <= 0) return;
      const int unit = ahead.first + ahead.unit;
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        const bool there = unit * kUnitCols + j * 32 + lane % 4 * 8 < a.in.cols;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          to[j][i] =
              there ? load_once(
                          reinterpret_cast<const uint4*>(from[i] + unit * (2 * kUnitCols) + j * 64),
                          policy)
                    : uint4{};
      }
      --ahead.left;
      if (++ahead.unit == ahead.units) {
        ahead.unit = 0, ++ahead.panel;
        begin_panel();
      }
    }
    __device__ __forceinline__ void early() {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) fetch(next[n]);
    }
    __device__ __forceinline__ void rest() {}
    template <int kTiles>
    __device__ __forceinline__ void multiply(float (&total)[kTiles][2],
                                             const char* const (&x)[kTiles],
                                             const UnitScale* const (&x_units)[kTiles], int unit) {
      uint4 w[kRuns][2];
#pragma unroll
      for (int j = 0; j < kRuns; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          w[j][i] = next[0][j][i];
#pragma unroll
          for (int n = 1; n < kAhead; ++n) next[n - 1][j][i] = next[n][j][i];
        }
      fetch(next[kAhead - 1]);
      float sums[kTiles][4] = {};
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        const uint32_t first[4] = {w[j][0].x, w[j][1].x, w[j][0].y, w[j][1].y},
                       second[4] = {w[j][0].z, w[j][1].z, w[j][0].w, w[j][1].w};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 b = *reinterpret_cast<const uint4*>(x[t] + unit * kXBytes + j * kRun);
          omq::cuda::multiply(T{}, sums[t], first, b.x, b.y);
          omq::cuda::multiply(T{}, sums[t], second, b.z, b.w);
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const float scale = x_units[t][unit].scale;
        total[t][0] += (sums[t][0] + sums[t][1]) * scale;
        total[t][1] += (sums[t][2] + sums[t][3]) * scale;
      }
    }
    __device__ __forceinline__ void finish() {}
  };
};

// Panels of 16 rows instead of rows; false: not for such matrices.
bool in_panels(GemvArgs& a, DType type) {
  if ((type != DType::F16 && type != DType::BF16) || a.in.cols % 8 != 0) return false;
  constexpr int kCols = DenseWeights<F16>::kUnitCols;
  a.units = (a.in.cols + kCols - 1) / kCols;
  a.work = 0;
  for (int i = 0; i < a.matrices; ++i) {
    if (!aligned16(a.m[i].data)) return false;
    a.m[i].panels = (a.m[i].rows + 15) / 16;
    a.work += a.output == RowOutput::SiluMul && i > 0 ? 0 : a.m[i].panels;
  }
  return true;
}

}  // namespace

// ---- launchers ----

SplitRows dense_rows_taken(GemvArgs a, DType type, int device) {
  if (!in_panels(a, type)) return {};
  return rows_taken<DenseWeights<F16>>(a.units, a.output, device);
}

bool dense_rows(Tensor& y, GemvArgs a, DType type) {
  if (!in_panels(a, type)) return false;
  return type == DType::F16 ? split_rows<DenseWeights<F16>>("dense_rows", y, a)
                            : split_rows<DenseWeights<Bf16>>("dense_rows", y, a);
}

}  // namespace omq::cuda
