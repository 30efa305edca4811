// What the kernels for a few rows of activations share: the rows on their way into shared memory,
// normed and rounded where that is asked for, and the rows of the result on their way out.
//
// Every block prepares all of x that it needs by itself, as a few KiB from the L2 cache cost less
// than a kernel of their own and the wait for it; but for one row that the kernel in front has left
// ready (prepared_row.cuh).
#pragma once

#include "cuda/packed.h"
#include "cuda/packed_kernels.cuh"
#include "cuda/weights_ahead.h"
#include "tensor/row_quant.h"

namespace omq::cuda {

constexpr int kMaxMatrices = 3;

struct GemvInput {
  const float* x = nullptr;        // [rows, cols], or
  const uint8_t* codes = nullptr;  // the same as codes, with
  const float2* grid = nullptr;    // scale and zero of each row; or
  const char* prepared = nullptr;  // the one row, times the gain, as prepared_row.cuh has it,
  const float* squares = nullptr;  // and its sums of squares
  const float *gain = nullptr, *shift = nullptr;
  float eps = 0;
  int rows = 0, cols = 0;
  bool quantise = false, by_fours = false;  // by_fours: columns may be read four at a time
  RowQuant s;
  int row_warps = 0;               // that stage a row (RowsSideBySide); 0: they stage rows together
  uint32_t inverse_row_warps = 0;  // for quotient()
};

struct GemvMatrix {
  const void* data = nullptr;  // codes, or rows of a dense matrix
  const GridWord* grids = nullptr;
  const float* bias = nullptr;
  float* y = nullptr;        // [rows of x, y_stride]
  int rows = 0, panels = 0;  // 0: no matrix
};

// Where the one row of results is left for the next product, times its gain, as prepared_row.cuh
// has it; memory null: nowhere.
struct GemvNext {
  char* memory = nullptr;
  const float* gain = nullptr;
  int padded = 0;  // columns
};

struct GemvArgs {
  GemvInput in;
  GemvNext next;
  AheadMark mark;
  GemvMatrix m[kMaxMatrices];
  int matrices = 0;
  RowOutput output = RowOutput::Store;
  int64_t y_stride = 0;
  int work = 0;            // panels (or row pairs) of all matrices; pairs of panels for SiluMul
  int each = 0, more = 0;  // of it a block has `each`, the first `more` blocks one more
  int per_round = 0;       // panels whose sums fit the shared memory together
  int neighbours = 0;      // log2 of the panels (or pairs) of a unit of work: 0 or 1
  int spans = 0;           // of a panel (packed_row.cu), or turns of a row (dense_gemv.cu)
  uint32_t inverse = 0;    // of spans, for quotient()
  int units = 0, units_per_group = 1, groups = 1, x_stride = 0, x_units = 0;
  int group_shift = -1;  // log2 units_per_group; −1: that is no power of two
  int padded = 0;        // columns of a prepared row
  // Of shared memory for the gains, and for x's row where packed kernels stage rows one by one,
  // each; 0: none.
  int row_floats = 0;
};

// Divides a.work among as many blocks, which are what is returned.
inline int share_work(GemvArgs& a, int processors) {
  const int blocks = std::max(1, std::min(a.work, processors));
  a.each = a.work / blocks, a.more = a.work % blocks;
  return blocks;
}
__device__ __forceinline__ int work_of_block(const GemvArgs& a) {
  return a.each + (static_cast<int>(blockIdx.x) < a.more ? 1 : 0);
}

// n numbers into shared memory, 16 bytes at a time where `by_fours` allows; gives the sum of this
// thread's squares. Loads of a turn come first: kTurn of them are under way together.
template <int kThreads, class Load>
__device__ __forceinline__ float to_shared(float* to, int n, bool by_fours, Load&& load) {
  constexpr int kTurn = 3;
  float squares = 0;
  if (!by_fours) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const float v = load(i, 0.0f);
      squares += v * v;
      to[i] = v;
    }
    return squares;
  }
#pragma unroll 1
  for (int first = 4 * static_cast<int>(threadIdx.x); first < n; first += kTurn * 4 * kThreads) {
    float4 v[kTurn];
#pragma unroll
    for (int j = 0; j < kTurn; ++j)
      if (const int i = first + j * 4 * kThreads; i < n) v[j] = load(i, float4{});
#pragma unroll
    for (int j = 0; j < kTurn; ++j)
      if (const int i = first + j * 4 * kThreads; i < n) {
        *reinterpret_cast<float4*>(to + i) = v[j];
        squares += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
      }
  }
  return squares;
}

// The block's sum of v, for all of it; what the block wrote to shared memory before is seen after.
template <int kThreads> __device__ __forceinline__ float block_sum(float v) {
  __shared__ __align__(16) float parts[kThreads / 32];
  v = team_sum<32>(v);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  const float4* p = reinterpret_cast<const float4*>(parts);
  float4 all = p[0];
#pragma unroll
  for (int i = 1; i < kThreads / 128; ++i)
    all = make_float4(all.x + p[i].x, all.y + p[i].y, all.z + p[i].z, all.w + p[i].w);
  return all.x + all.y + (all.z + all.w);
}

// What no kernel writes and staging needs: the gains, into shared memory while the kernel in front
// still runs. gains: [cols], null: they stay where they are.
template <int kThreads>
__device__ __forceinline__ void stage_gains(const GemvInput& in, float* gains) {
  if (!in.gain || !gains) return;
  to_shared<kThreads>(gains, in.cols, in.by_fours, [&](int i, auto kind) {
    return *reinterpret_cast<const decltype(kind)*>(in.gain + i);
  });
}

// Every row of x: put(n, c, values of columns c … c + 3), to be multiplied by scales[n] afterwards;
// columns past the end are 0. Warp w takes columns 128 w …, + 4 kThreads …, lane l four of them, up
// to a multiple of 128. To be called by all of the block, before a barrier of the caller. row: room
// for row n in shared memory at row + n · row_stride, where put may write the same columns, or
// null; gains: of stage_gains. kIntegers: rows may be codes, or are to become whole numbers.
//
// The loops are not unrolled and `put` stands here once: a kernel runs for a few µs, and code that
// has to be fetched costs more than a loop's turns.
template <int kThreads, bool kIntegers, class Put>
__device__ __forceinline__ void stage_input(const GemvInput& in, float* row, int row_stride,
                                            const float* gains, float* scales, Put&& put) {
  const int columns = (in.cols + 127) / 128 * 128, first = 4 * static_cast<int>(threadIdx.x);
  const float* gain = gains ? gains : in.gain;
#pragma unroll 1
  for (int n = 0; n < in.rows; ++n) {
    const float* x = in.x + static_cast<int64_t>(n) * in.cols;
    const uint8_t* codes =
        kIntegers && in.codes ? in.codes + static_cast<int64_t>(n) * in.cols : nullptr;
    float squares = 0;
    if (row && !codes) {
      float* own = row + n * row_stride;
      if (n > 0) __syncthreads();  // the last row, and its sum's parts, have been read
      squares = to_shared<kThreads>(own, in.cols, in.by_fours, [&](int i, auto kind) {
        return __ldcg(reinterpret_cast<const decltype(kind)*>(x + i));
      });
      x = own;
    }
    const auto load = [&](const float* p, int c) {
      if (in.by_fours) return c < in.cols ? *reinterpret_cast<const float4*>(p + c) : float4{};
      const auto at = [&](int j) { return c + j < in.cols ? p[c + j] : 0.0f; };
      return make_float4(at(0), at(1), at(2), at(3));
    };
    float r = 1;
    if (in.gain) {
      if (!row) {
        if (n > 0) __syncthreads();
#pragma unroll 1
        for (int c = first; c < columns; c += 4 * kThreads) {
          const float4 v = load(x, c);
          squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
      }
      r = rsqrtf(block_sum<kThreads>(squares) / static_cast<float>(in.cols) + in.eps);
    } else {
      __syncthreads();
    }
    const auto normed = [&](int c) {
      float4 v = load(x, c);
      if (in.gain) {
        const float4 g = load(gain, c);
        v = make_float4(v.x * r * g.x, v.y * r * g.y, v.z * r * g.z, v.w * r * g.w);
      }
      if (in.shift) {
        const float4 b = load(in.shift, c);
        v = make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
      }
      return v;
    };
    float scale = 1, inside = 1, zero = 0;
    RowGrid<float> g{};
    if constexpr (kIntegers) {
      if (codes) scale = in.grid[n].x, zero = in.grid[n].y;
      if (in.quantise) {
        float hi = -INFINITY, lo = -INFINITY;  // lo: the largest of −v; NaN stays
#pragma unroll 1
        for (int c = first; c < columns; c += 4 * kThreads) {
          const float4 v = normed(c);
          const float of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (c + j >= in.cols) continue;
            hi = of[j] > hi || of[j] != of[j] ? of[j] : hi;
            lo = -of[j] > lo || of[j] != of[j] ? -of[j] : lo;
          }
        }
        hi = team_max<kThreads>(hi);
        lo = -team_max<kThreads>(lo);
        g = row_grid(hi, lo, in.s);
        // Whole numbers, unless the zero point is none of the codes and may be large.
        if (in.s.include_zero)
          scale = g.scale;
        else
          inside = g.scale;
      }
    }
    const float top = static_cast<float>((1 << in.s.bits) - 1);
#pragma unroll 1
    for (int c = first; c < columns; c += 4 * kThreads) {
      float4 v;
      if (codes) {
        const auto at = [&](int j) {
          return c + j < in.cols ? static_cast<float>(codes[c + j]) - zero : 0.0f;
        };
        v = make_float4(at(0), at(1), at(2), at(3));
      } else {
        v = normed(c);
        if (kIntegers && in.quantise) {
          const auto coded = [&](float f, int j) {
            return c + j < in.cols ? (row_code(f, g, top) - g.zero) * inside : 0.0f;
          };
          v = make_float4(coded(v.x, 0), coded(v.y, 1), coded(v.z, 2), coded(v.w, 3));
        }
      }
      put(n, c, v);
    }
    if (threadIdx.x == 0) scales[n] = scale;
  }
}

// ---- one row, in registers ----
//
// What most tokens are decoded by. A thread's columns stay in its registers from their load until
// they are put, and RMSNorm's factor, being one number for the row, multiplies the sums of the
// product at the end: nothing here waits for the sum of the squares, and the caller's one barrier
// is enough.

// Whether the row can be staged so.
inline bool row_in_registers(const GemvInput& in) {
  return in.rows == 1 && in.by_fours && !in.codes && !in.quantise && !in.shift;
}

// kTurns: of four columns a thread, under way together. Few warps run a kernel for a few µs: what
// it does once is counted in instructions, so a row that needs no gain, or two turns, has code of
// its own (with_row).
template <int kThreads, int kTurns, bool kGain> struct RowInRegisters {
  static_assert(kTurns % 2 == 0);
  static constexpr int kTurnColumns = 4 * kThreads;
  float4 gain[kGain ? kTurns : 1];

  // What no kernel writes: before the kernel in front has ended.
  __device__ __forceinline__ explicit RowInRegisters(const GemvInput& in) { load_gains(in, 0); }

  // put(turn, its columns and those of the turn behind it, times the gain) for all columns up to a
  // multiple of 2 kTurnColumns; those of a turn are turn · kTurnColumns + 4 · thread and the three
  // behind it. Gives the sum of this thread's squares, where there is a gain. asked() is called
  // once, when all of the row has been asked for and has yet to come.
  template <class Put, class Asked>
  __device__ __forceinline__ float put(const GemvInput& in, Put&& put, Asked&& asked) {
    float sum = 0;
#pragma unroll 1
    for (int first = 0; first < in.cols; first += kTurns * kTurnColumns) {
      float4 x[kTurns];
      const int column = first + 4 * static_cast<int>(threadIdx.x), left = in.cols - column;
      const float4* from = reinterpret_cast<const float4*>(in.x + column);
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        x[j] = float4{};
        if (j * kTurnColumns < left) x[j] = __ldcg(from + j * kThreads);
      }
      if (first > 0) load_gains(in, first);
      if (first + kTurns * kTurnColumns >= in.cols) asked();
#pragma unroll
      for (int j = 0; j < kTurns; j += 2) {
        if (j > 0 && first + j * kTurnColumns >= in.cols) break;
        const auto of = [&](int i) {
          const float4 v = x[i];
          if constexpr (!kGain) return v;
          const float4 g = gain[kGain ? i : 0];
          sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
          return make_float4(v.x * g.x, v.y * g.y, v.z * g.z, v.w * g.w);
        };
        // Two side by side, each being a chain of long waits.
        put(first / kTurnColumns + j, {of(j), of(j + 1)});
      }
    }
    return sum;
  }
  // The warps' sums of squares, [kThreads / 32] in shared memory, where there is a gain.
  __device__ __forceinline__ static void store_squares(float* squares, float sum) {
    if constexpr (!kGain) return;
    sum = team_sum<32>(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  }
  // What the product's sums are to be multiplied by; a barrier behind store_squares.
  __device__ __forceinline__ static float factor(const GemvInput& in, const float* squares) {
    if constexpr (!kGain) return 1;
    float all = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) all += squares[w];
    return rsqrtf(__fdividef(all, static_cast<float>(in.cols)) + in.eps);
  }

 private:
  __device__ __forceinline__ void load_gains(const GemvInput& in, int first) {
    if constexpr (!kGain) return;
    const int column = first + 4 * static_cast<int>(threadIdx.x), left = in.cols - column;
    const float4* from = reinterpret_cast<const float4*>(in.gain + column);
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      gain[j] = float4{};
      if (j * kTurnColumns < left) gain[j] = __ldg(from + j * kThreads);
    }
  }
};

// Host side: calls body(Int<kTurns>, std::bool_constant<kGain>) with what suits the row.
template <int kThreads, class F> void with_row(const GemvInput& in, F&& body) {
  const auto of_turns = [&](auto turns) {
    if (in.gain)
      body(turns, std::true_type{});
    else
      body(turns, std::false_type{});
  };
  if (in.cols <= 2 * 4 * kThreads)
    of_turns(Int<2>{});
  else
    of_turns(Int<6>{});
}

// ---- several rows, side by side ----

// Whether rows can be staged so.
inline bool rows_side_by_side(const GemvInput& in) {
  return in.rows > 1 && in.by_fours && !in.codes && !in.quantise && !in.shift;
}

// Each row has warps of its own, so that none waits for another; its norm's factor multiplies the
// sums at the end, as that of a row in registers.
template <int kThreads> struct RowsSideBySide {
  static constexpr int kWarps = kThreads / 32;
  int row, part;  // this warp's; row ≥ in.rows: none

  // Host side: the block's warps for each row.
  static void share(GemvInput& in) {
    in.row_warps = kWarps / in.rows;
    in.inverse_row_warps = inverse_of(in.row_warps);
  }
  __device__ __forceinline__ explicit RowsSideBySide(const GemvInput& in) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    row = quotient(warp, in.inverse_row_warps);
    part = warp - row * in.row_warps;
  }
  // put(row, columns, their values times the gain): twice four columns a lane, the warp's being two
  // runs of 128; columns past the end are 0. gains: of stage_gains. Gives the sum of this thread's
  // squares, where there is a gain.
  template <class Put>
  __device__ __forceinline__ float put(const GemvInput& in, const float* gains, Put&& put) const {
    float sum = 0;
    if (row >= in.rows) return sum;
    const float* x = in.x + static_cast<int64_t>(row) * in.cols;
    const float* gain = gains ? gains : in.gain;
    const int lane = static_cast<int>(threadIdx.x % 32), step = 128 * in.row_warps;
    float4 next[2];
    const auto fetch = [&](int c) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        next[j] = c + j * step < in.cols ? __ldcg(reinterpret_cast<const float4*>(x + c + j * step))
                                         : float4{};
    };
    fetch(128 * part + 4 * lane);
#pragma unroll 1
    for (int first = 128 * part; first < in.cols; first += 2 * step) {  // for all lanes alike
      float4 v[2] = {next[0], next[1]};
      const int c[2] = {first + 4 * lane, first + 4 * lane + step};
      fetch(c[0] + 2 * step);
      if (in.gain) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (c[j] >= in.cols) continue;
          const float4 g = *reinterpret_cast<const float4*>(gain + c[j]);
          sum += v[j].x * v[j].x + v[j].y * v[j].y + (v[j].z * v[j].z + v[j].w * v[j].w);
          v[j] = make_float4(v[j].x * g.x, v[j].y * g.y, v[j].z * g.z, v[j].w * g.w);
        }
      }
      put(row, c, v);
    }
    return sum;
  }
  // The warps' sums of squares, [kWarps] in shared memory, where there is a gain.
  __device__ __forceinline__ static void store_squares(const GemvInput& in, float* squares,
                                                       float sum) {
    if (!in.gain) return;
    sum = team_sum<32>(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  }
  // What the product's sums are to be multiplied by, scales [in.rows]; a barrier behind
  // store_squares, and one before they are read.
  __device__ __forceinline__ static void factors(const GemvInput& in, const float* squares,
                                                 float* scales) {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= in.rows) return;
    float all = 0;
    if (in.gain)
      for (int w = 0; w < in.row_warps; ++w) all += squares[n * in.row_warps + w];
    scales[n] = in.gain ? rsqrtf(__fdividef(all, static_cast<float>(in.cols)) + in.eps) : 1.0f;
  }
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// The panel (or pair of panels) of all matrices that is a block's i-th: they stand side by side.
__device__ __forceinline__ int panel_of_block(const GemvArgs& a, int i) {
  const int block = static_cast<int>(blockIdx.x);
  return ((block * a.each + min(block, a.more)) << a.neighbours) + i;
}

// Which matrix and which of its panels (or rows) stands at `at` among all of them.
__device__ __forceinline__ int find_matrix(const GemvArgs& a, int& at) {
  const int first = a.m[0].panels, two = first + a.m[1].panels;
  if (at < first) return 0;
  const int i = at < two ? 1 : 2;
  at -= i == 1 ? first : two;
  return i;
}

// The 16 rows of results that a block's panel of a round gives, or, for SiluMul, its pair of
// panels. output: a.output, which may be known to the compiler; p0: the round's first panel; i:
// which one behind it.
struct ResultPanel {
  int matrix, row;  // its first row in the matrix; for SiluMul in both
  __device__ __forceinline__ ResultPanel(const GemvArgs& a, RowOutput output, int p0, int i) {
    const bool pairs = output == RowOutput::SiluMul;
    int at = panel_of_block(a, (pairs ? p0 / 2 : p0) + i);
    matrix = output == RowOutput::Store ? find_matrix(a, at) : 0;
    row = at * 16;
  }
};

// y of packed (all of one layout) or dense (all of one dtype) matrices; rows first … of x.
// Those that give a bool do nothing and give false where they are not made for the product.
// behind: what the next stage reads.
bool packed_row(Tensor& y, GemvArgs a, const PackedView& v, std::span<const AheadRange> behind);
bool packed_rows(Tensor& y, const GemvArgs& a, const PackedView& v);
SplitRows packed_rows_taken(const PackedView& v, RowOutput output, int device);
bool dense_rows(Tensor& y, GemvArgs a, DType type);
SplitRows dense_rows_taken(GemvArgs a, DType type, int device);
void packed_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices,
                 std::span<const AheadRange> behind);
void dense_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices);

}  // namespace omq::cuda
