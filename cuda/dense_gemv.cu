// Dense weights of 16 or 32 bits times up to eight rows of activations: heads that stay in f16, and
// models that are not quantised. Rows of w are read once, 16 bytes a lane, two rows a warp at a
// time and the next pieces before these are used; x stands in shared memory as F32, and all sums
// are F32.
//
// A block's warps divide its rows evenly, to parts of a row: were they dealt whole, five rounds and
// a fifth (gate and up of LLaMA-7B on 132 processors) would take as long as six. The sums of a row
// that several warps have a part of are added in order by the one that begins it.
#include "cuda/gemv.cuh"
#include "cuda/packed.h"

namespace omq::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kPairRows = 2;  // rows of a warp
constexpr int kMostRows = 8;  // of x, of a launch
// Pieces of 8 columns of each row under way.
template <class T> constexpr int ahead_of() { return sizeof(T) == 4 ? 2 : 4; }

template <class T> struct Eight {
  static constexpr int kLoads = sizeof(T) / 2;  // of 16 bytes
  uint4 raw[kLoads];
  __device__ __forceinline__ void fetch(const T* p, uint64_t policy) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      raw[i] = load_once(reinterpret_cast<const uint4*>(p) + i, policy);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = uint4{};
  }
  __device__ __forceinline__ float dot(const float (&x)[8]) const {
    const uint32_t* w = &raw[0].x;
    float sum = 0;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += __uint_as_float(w[j]) * x[j];
    } else {
      using Type = std::conditional_t<std::is_same_v<T, __half>, F16, Bf16>;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = unpack_pair(Type{}, w[j]);
        sum += v.x * x[2 * j];
        sum += v.y * x[2 * j + 1];
      }
    }
    return sum;
  }
};

// The warp's rows number `at` and one more, or a gate's and an up's.
template <class T> struct RowPair {
  const T* w[kPairRows];
  float* y[kPairRows];
  const float* bias[kPairRows];
  __device__ RowPair(const GemvArgs& a, int at) {
    const bool pairs = a.output == RowOutput::SiluMul;
    int row = pairs ? at : at * kPairRows;
#pragma unroll
    for (int i = 0; i < kPairRows; ++i) {
      int in = pairs ? row : row + i;
      const int m = pairs ? i : find_matrix(a, in);
      const bool there = in < a.m[m].rows;
      w[i] = there ? static_cast<const T*>(a.m[m].data) + static_cast<int64_t>(in) * a.in.cols
                   : nullptr;
      y[i] = there ? a.m[m].y + in : nullptr;
      bias[i] = there && a.m[m].bias ? a.m[m].bias + in : nullptr;
    }
  }
};

// Single columns: rows that are no whole pieces or not aligned.
template <class T> __device__ float one(const T* p) {
  if constexpr (std::is_same_v<T, float>) return *p;
  if constexpr (std::is_same_v<T, __half>) return __half2float(*p);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(*p);
}

// How x is staged: RowInRegisters for one row, as it suits, or any rows by stage_input.
template <int kTurns_, bool kGain_> struct OneRow {
  static constexpr bool kRegisters = true;
  static constexpr int kRows = 1, kTurns = kTurns_;
  static constexpr bool kGain = kGain_;
};
template <int kRows_, bool kIntegers_> struct AnyRows {
  static constexpr bool kRegisters = false, kIntegers = kIntegers_;
  static constexpr int kRows = kRows_;  // at most
};

template <class T, class Staging>
__global__ void __launch_bounds__(kThreads, 1)
    dense_gemv_kernel(const __grid_constant__ GemvArgs a) {
  constexpr int kAhead = ahead_of<T>(), kRows = Staging::kRows;
  extern __shared__ __align__(16) float x[];  // [rows, x_stride]
  __shared__ float scales[kMostRows];
  // What a warp has of a row that it goes on with, and of one that it begins and does not end.
  __shared__ float parts[kWarps][2][kRows][kPairRows];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int pieces = a.groups;  // of 8 columns; 0: columns one by one
  const int turns = a.spans, steps = work_of_block(a) * turns;
  const auto share = [&](int w) {  // where warp w begins
    return static_cast<int>(static_cast<unsigned>(steps * w) / kWarps);
  };
  const int end = share(warp + 1);
  int step = share(warp);
  int row_number = quotient(step, a.inverse), turn = step - row_number * turns;
  const auto row_at = [&](int number) {
    return RowPair<T>(a, static_cast<int>(blockIdx.x) + number * static_cast<int>(gridDim.x));
  };
  Eight<T> ahead[kAhead][kPairRows];
  const uint64_t policy = read_once();
  const auto fetch = [&](const RowPair<T>& rows, int first) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
#pragma unroll
      for (int i = 0; i < kPairRows; ++i) {
        const int piece = first + j * 32 + lane;
        if (piece < pieces && rows.w[i])
          ahead[j][i].fetch(rows.w[i] + piece * 8, policy);
        else
          ahead[j][i].clear();
      }
  };
  let_next_start();
  if (step < end) fetch(row_at(row_number), turn * 32 * kAhead);
  float factor = 1;
  if constexpr (Staging::kRegisters) {
    __shared__ float squares[kWarps];
    using Row = RowInRegisters<kThreads, Staging::kTurns, Staging::kGain>;
    Row row(a.in);
    wait_for_previous();
    const auto put = [&](int turn, const float4(&v)[2]) {
      const int c = turn * Row::kTurnColumns + 4 * static_cast<int>(threadIdx.x);
#pragma unroll
      for (int f = 0; f < 2; ++f)
        if (c + f * Row::kTurnColumns < a.x_stride)
          *reinterpret_cast<float4*>(x + c + f * Row::kTurnColumns) = v[f];
    };
    const float sum = row.put(a.in, put, [] {});
    row.store_squares(squares, sum);
    __syncthreads();
    factor = row.factor(a.in, squares);
  } else {
    float* gains = a.row_floats > 0 ? x + a.in.rows * a.x_stride : nullptr;
    const auto put = [&](int n, int c, float4 v) {
      if (c < a.x_stride) *reinterpret_cast<float4*>(x + n * a.x_stride + c) = v;
    };
    stage_gains<kThreads>(a.in, gains);
    if (!Staging::kIntegers && a.in.row_warps > 0) {
      using SideBySide = RowsSideBySide<kThreads>;
      __shared__ float squares[kWarps];
      if (a.in.gain) __syncthreads();
      wait_for_previous();
      const float sum =
          SideBySide(a.in).put(a.in, gains, [&](int n, const int(&c)[2], const float4(&v)[2]) {
            put(n, c[0], v[0]);
            put(n, c[1], v[1]);
          });
      SideBySide::store_squares(a.in, squares, sum);
      __syncthreads();
      SideBySide::factors(a.in, squares, scales);
    } else {
      wait_for_previous();
      stage_input<kThreads, Staging::kIntegers>(a.in, x, a.x_stride, gains, scales, put);
    }
    __syncthreads();
  }
  const auto write = [&](const RowPair<T>& rows, int n, const float(&sums)[kPairRows]) {
    float v[kPairRows];
#pragma unroll
    for (int i = 0; i < kPairRows; ++i) {
      v[i] = sums[i] * (Staging::kRegisters ? factor : scales[n]);
      if (rows.bias[i]) v[i] += *rows.bias[i];
    }
    if (a.output == RowOutput::SiluMul) {
      rows.y[0][n * a.y_stride] = silu(v[0]) * v[1];
      return;
    }
#pragma unroll
    for (int i = 0; i < kPairRows; ++i)
      if (rows.y[i]) {
        float* y = rows.y[i] + n * a.y_stride;
        *y = a.output == RowOutput::Add ? __ldcg(y) + v[i] : v[i];
      }
  };
  while (step < end) {
    const RowPair<T> rows = row_at(row_number);
    const bool begins = turn == 0;
    float sum[kRows][kPairRows] = {};
    for (; turn < turns && step < end; ++turn, ++step) {
      Eight<T> now[kAhead][kPairRows];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int i = 0; i < kPairRows; ++i) now[j][i] = ahead[j][i];
      if (step + 1 < end) {
        if (turn + 1 < turns)
          fetch(rows, (turn + 1) * 32 * kAhead);
        else
          fetch(row_at(row_number + 1), 0);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int piece = (turn * kAhead + j) * 32 + lane;
        if (piece >= pieces) continue;
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          if (n >= a.in.rows) break;
          const float4* in = reinterpret_cast<const float4*>(x + n * a.x_stride + piece * 8);
          const float4 lo = in[0], hi = in[1];
          const float v[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
          for (int i = 0; i < kPairRows; ++i) sum[n][i] += now[j][i].dot(v);
        }
      }
    }
    if (pieces == 0)
      for (int c = lane; c < a.in.cols; c += 32)
        for (int n = 0; n < a.in.rows; ++n)
#pragma unroll
          for (int i = 0; i < kPairRows; ++i)
            if (rows.w[i]) sum[n][i] += one(rows.w[i] + c) * x[n * a.x_stride + c];
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      if (n >= a.in.rows) break;
#pragma unroll
      for (int i = 0; i < kPairRows; ++i) sum[n][i] = team_sum<32>(sum[n][i]);
      if (lane != 0) continue;
      if (begins && turn == turns) {
        write(rows, n, sum[n]);
      } else {
#pragma unroll
        for (int i = 0; i < kPairRows; ++i) parts[warp][begins ? 1 : 0][n][i] = sum[n][i];
      }
    }
    if (turn == turns) turn = 0, ++row_number;
  }
  __syncthreads();
  // The row that this warp began and did not end: its end is where the next one's begins.
  const int row_end = (row_number + 1) * turns;
  if (lane != 0 || turn == 0 || row_number * turns < share(warp)) return;
  const RowPair<T> rows = row_at(row_number);
  for (int n = 0; n < a.in.rows; ++n) {
    float sums[kPairRows];
#pragma unroll
    for (int i = 0; i < kPairRows; ++i) sums[i] = parts[warp][1][n][i];
    for (int w = warp + 1; share(w) < row_end; ++w)
#pragma unroll
      for (int i = 0; i < kPairRows; ++i)
        sums[i] += share(w) < share(w + 1) ? parts[w][0][n][i] : 0;
    write(rows, n, sums);
  }
}

}  // namespace

// ---- launchers ----

constexpr int kStatic = 3072;  // bytes of shared memory that the kernel declares, at most

int64_t dense_gemv_rows(int64_t cols, int device) {
  const auto limit = static_cast<int64_t>(device_info(device).shared_optin) - kStatic;
  return std::clamp<int64_t>(limit / (4 * (cols + 4)), 0, kMostRows);
}

void dense_gemv(Tensor& y, GemvArgs a, std::span<const RowMatrix> matrices) {
  const DType type = std::get<Tensor>(matrices[0].weight).dtype();
  bool whole = a.in.cols % 8 == 0;
  int rows = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& w = std::get<Tensor>(matrices[i].weight);
    check(w.is_contiguous() && w.dtype() == type, "dense_matmul: w {} of {}", w.shape(),
          dtype_name(w.dtype()));
    a.m[i].data = w.raw();
    a.m[i].panels = a.m[i].rows;
    whole = whole && aligned16(w.raw());
    rows += a.m[i].rows;
  }
  if (dense_rows(y, a, type)) return;
  a.work = a.output == RowOutput::SiluMul ? a.m[0].rows : (rows + kPairRows - 1) / kPairRows;
  a.groups = whole ? a.in.cols / 8 : 0;
  a.x_stride = (a.in.cols + 3) / 4 * 4;
  const DeviceInfo& info = device_info(y.device().index);
  const int blocks = share_work(a, info.sms);
  size_t shared = static_cast<size_t>(a.in.rows) * static_cast<size_t>(a.x_stride) * 4;
  const size_t limit = info.shared_optin - kStatic;
  check(shared <= limit,
        "dense_matmul: {} rows of {} columns need {} bytes of shared memory, the device has {}",
        a.in.rows, a.in.cols, shared, limit);
  if (const size_t gains = static_cast<size_t>(a.x_stride) * 4;
      a.in.gain && shared + gains <= limit) {
    a.row_floats = a.x_stride;
    shared += gains;
  }
  if (rows_side_by_side(a.in)) RowsSideBySide<kThreads>::share(a.in);
  const auto run = [&](auto kernel) {
    prepare_shared(kernel, shared);
    launch_chained("dense_gemv", y, kernel, static_cast<unsigned>(blocks), kThreads, shared, 1, a);
  };
  const auto of_rows = [&](auto t) {
    using T = decltype(t);
    constexpr int kTurn = 32 * ahead_of<T>();  // pieces
    a.spans = std::max(1, (a.groups + kTurn - 1) / kTurn);
    a.inverse = inverse_of(a.spans);
    if (row_in_registers(a.in))
      return with_row<kThreads>(a.in, [&](auto turns, auto gain) {
        run(dense_gemv_kernel<T, OneRow<decltype(turns)::value, decltype(gain)::value>>);
      });
    if (a.in.codes || a.in.quantise)
      return a.in.rows == 1 ? run(dense_gemv_kernel<T, AnyRows<1, true>>)
                            : run(dense_gemv_kernel<T, AnyRows<8, true>>);
    a.in.rows == 1 ? run(dense_gemv_kernel<T, AnyRows<1, false>>)
                   : run(dense_gemv_kernel<T, AnyRows<8, false>>);
  };
  if (type == DType::F32) return of_rows(float{});
  if (type == DType::F16) return of_rows(__half{});
  check(type == DType::BF16, "dense_matmul: w of {}", dtype_name(type));
  of_rows(__nv_bfloat16{});
}

}  // namespace omq::cuda
