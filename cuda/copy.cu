// fill and copy: any strides, any pair of dtypes but F64.
//
// Bytes of a copy: x once, y once. Five ways, the first that fits:
//   same type, both one run           the driver's copy
//   float types, packs of eight       y and x contiguous along the same dim (x may be constant)
//   float types, transposed           32 × 32 tiles through shared memory, so that both sides are
//                                     read and written along their own contiguous dim
//   anything                          element by element
#include "cuda/common.cuh"
#include "cuda/walk.cuh"

namespace omq::cuda {
namespace {

// The CPU's conversion: 16-bit floats go through F32, the rest is a plain cast.
template <class To, class From> __device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>)
    return v;
  else if constexpr (std::is_same_v<From, __nv_bfloat16>)
    return convert<To>(__bfloat162float(v));
  else if constexpr (std::is_same_v<From, __half>)
    return convert<To>(__half2float(v));
  else if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(v));
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(static_cast<float>(v));
  else
    return static_cast<To>(v);
}

template <class F> __device__ void with_type(DType t, F&& f) {
  switch (t) {
    case DType::F32:
      return f(float{});
    case DType::BF16:
      return f(__nv_bfloat16{});
    case DType::F16:
      return f(__half{});
    case DType::I32:
      return f(int32_t{});
    case DType::I8:
      return f(int8_t{});
    case DType::U8:
      return f(uint8_t{});
    case DType::F64:
      return;  // refused by the launchers
  }
}

__global__ void fill_kernel(void* y, DType dtype, Walk<1> w, double value) {
  for (int64_t i = grid_index(); i < w.count; i += grid_stride()) {
    int64_t at[1];
    offsets(w, i, at);
    with_type(dtype,
              [&](auto t) { static_cast<decltype(t)*>(y)[at[0]] = convert<decltype(t)>(value); });
  }
}

__global__ void copy_elements(void* y, DType to, const void* x, DType from, Walk<2> w) {
  for (int64_t i = grid_index(); i < w.count; i += grid_stride()) {
    int64_t at[2];
    offsets(w, i, at);
    with_type(from, [&](auto f) {
      const auto v = static_cast<const decltype(f)*>(x)[at[1]];
      with_type(to, [&](auto t) { static_cast<decltype(t)*>(y)[at[0]] = convert<decltype(t)>(v); });
    });
  }
}

// w counts packs; x's offsets count packs, or elements when x is constant along the inner dim.
__global__ void copy_packs(Operand y, Operand x, Walk<2> w, bool constant) {
  for (int64_t i = grid_index(); i < w.count; i += grid_stride()) {
    int64_t at[2];
    offsets(w, i, at);
    Pack p;
    if (constant) {
      const float v = load(x, at[1]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) p.v[j] = v;
    } else {
      p = load_pack(x, at[1]);
    }
    store_pack(y, at[0], p);
  }
}

constexpr int kTile = 32;

struct Transposed {
  int64_t rows = 0, cols = 0;      // x is contiguous along rows, y along cols
  int64_t x_step = 0, y_step = 0;  // elements from column to column of x, from row to row of y
  int64_t tiles_down = 0, tiles_across = 0;
  Walk<2> rest;  // the other dims: offsets of y, x
};

// 32 × 8 threads a tile.
__global__ void copy_transposed(Operand y, Operand x, Transposed s) {
  __shared__ float tile[kTile][kTile + 1];  // padded: a column falls into 32 banks
  const int tx = static_cast<int>(threadIdx.x) % kTile, ty = static_cast<int>(threadIdx.x) / kTile;
  const int64_t tiles = s.tiles_down * s.tiles_across * s.rest.count;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t up = divide(i, s.tiles_across), batch = divide(up, s.tiles_down);
    const int64_t col0 = (i - up * s.tiles_across) * kTile,
                  row0 = (up - batch * s.tiles_down) * kTile;
    int64_t at[2];
    offsets(s.rest, batch, at);
    for (int j = ty; j < kTile; j += 8)
      if (row0 + tx < s.rows && col0 + j < s.cols)
        tile[j][tx] = load(x, at[1] + (col0 + j) * s.x_step + row0 + tx);
    __syncthreads();
    for (int j = ty; j < kTile; j += 8)
      if (row0 + j < s.rows && col0 + tx < s.cols)
        store(y, at[0] + (row0 + j) * s.y_step + col0 + tx, tile[tx][j]);
    __syncthreads();
  }
}

// ---- launchers ----

constexpr int kThreads = 256;

void no_f64(const char* op, const Tensor& x) {
  check(x.dtype() != DType::F64, "{}: F64 lives on the CPU only", op);
}

bool floating(DType t) { return t == DType::F32 || t == DType::BF16 || t == DType::F16; }

bool copy_as_packs(Tensor& y, const Tensor& x, Walk<2> w) {
  if (!packable<2>(w, {y.raw(), x.raw()}, {false, true})) return false;
  const bool constant = w.inner_step(1) == 0;
  for (int d = 0; d < w.n - 1; ++d) {
    w.step[0][d] /= kPack;
    if (!constant) w.step[1][d] /= kPack;
  }
  w.size[w.n - 1] /= kPack;
  w.count /= kPack;
  launch("copy", y, copy_packs, blocks_for(w.count, kThreads), kThreads, 0, operand("copy", y),
         operand("copy", x), w, constant);
  return true;
}

bool copy_as_tiles(Tensor& y, const Tensor& x, const Walk<2>& w) {
  if (w.inner_step(0) != 1) return false;
  int down = -1;
  for (int d = 0; d < w.n - 1; ++d)
    if (w.step[1][d] == 1) down = d;
  if (down < 0 || w.size[down] < kTile / 2 || w.inner() < kTile / 2) return false;
  Transposed s;
  s.rows = w.size[down];
  s.cols = w.inner();
  s.x_step = w.inner_step(1);
  s.y_step = w.step[0][down];
  s.tiles_down = (s.rows + kTile - 1) / kTile;
  s.tiles_across = (s.cols + kTile - 1) / kTile;
  s.rest.count = w.count / (s.rows * s.cols);
  for (int d = 0; d < w.n - 1; ++d) {
    if (d == down) continue;
    s.rest.size[s.rest.n] = w.size[d];
    s.rest.step[0][s.rest.n] = w.step[0][d];
    s.rest.step[1][s.rest.n] = w.step[1][d];
    ++s.rest.n;
  }
  if (s.rest.n == 0) s.rest.n = s.rest.size[0] = 1;
  launch("copy", y, copy_transposed, blocks_for(s.tiles_down * s.tiles_across * s.rest.count, 1),
         kTile * 8, 0, operand("copy", y), operand("copy", x), s);
  return true;
}

}  // namespace

int compiled_for() {
  cudaFuncAttributes attributes{};
  OMQ_CUDA(cudaFuncGetAttributes(&attributes, copy_transposed));
  return attributes.ptxVersion;
}

void fill(Tensor& y, double value) {
  no_f64("fill", y);
  const Walk<1> w = make_walk<1>(y.shape(), {y.strides()});
  launch("fill", y, fill_kernel, blocks_for(w.count, kThreads), kThreads, 0, y.raw(), y.dtype(), w,
         value);
}

void copy(Tensor& y, const Tensor& x) {
  check(y.shape() == x.shape(), "copy: {} into {}", x.shape(), y.shape());
  no_f64("copy", y);
  no_f64("copy", x);
  const Walk<2> w = make_walk<2>(y.shape(), {y.strides(), x.strides()});
  if (w.count == 0) return;
  if (y.dtype() == x.dtype() && w.n == 1 && w.step[0][0] == 1 && w.step[1][0] == 1) {
    OMQ_CUDA(cudaMemcpyAsync(y.raw(), x.raw(), y.nbytes(), cudaMemcpyDeviceToDevice, stream_of(y)));
    return;
  }
  if (floating(y.dtype()) && floating(x.dtype()) &&
      (copy_as_packs(y, x, w) || copy_as_tiles(y, x, w)))
    return;
  launch("copy", y, copy_elements, blocks_for(w.count, kThreads), kThreads, 0, y.raw(), y.dtype(),
         x.raw(), x.dtype(), w);
}

}  // namespace omq::cuda
