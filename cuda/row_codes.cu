// Rows of activations as codes, and back: what products of codes with codes and the key/value cache
// read. The grid of a row is that of tensor/row_quant.h, so codes equal the CPU's bit for bit.
//
// A warp a row. Bytes: x once (again from the cache), codes once.
#include "cuda/code_bytes.cuh"
#include "tensor/elementwise.h"

namespace omq::cuda {
namespace {

struct Rows {  // leading dims of a tensor with contiguous rows
  int64_t size[3], stride[3];
  __host__ __device__ int64_t at(int64_t row) const {
    const int64_t c = row % size[2], b = row / size[2] % size[1], a = row / size[2] / size[1];
    return a * stride[0] + b * stride[1] + c * stride[2];
  }
};

Rows rows_view(const char* op, const Tensor& x) {
  check(x.ndim() >= 1 && x.ndim() <= 4 && (x.shape().back() == 1 || x.stride(-1) == 1),
        "{}: rows of {} are not contiguous", op, x.shape());
  Rows r{{1, 1, 1}, {0, 0, 0}};
  for (int i = 0; i < x.ndim() - 1; ++i) {
    r.size[4 - x.ndim() + i] = x.dim(i);
    r.stride[4 - x.ndim() + i] = x.stride(i);
  }
  return r;
}

// sums, turned: of signed codes, else null and 0.
template <class T>
__global__ void quantize_rows_kernel(uint8_t* codes, Rows code_rows, float* grid, Rows grid_rows,
                                     int32_t* sums, uint8_t turned, const T* x, Rows x_rows,
                                     int64_t rows, int n, RowQuant s, bool paired) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = grid_index() / 32; row < rows; row += grid_stride() / 32) {
    const T* values = x + x_rows.at(row);
    const auto from = [values](int i) { return static_cast<float>(values[i]); };
    float hi = -INFINITY, lo = -INFINITY;
    int finite = 1;
    for (int i = lane; i < n; i += 32) {
      const float v = from(i);
      hi = fmaxf(hi, v);
      lo = fmaxf(lo, -v);
      finite &= isfinite(v);
    }
    hi = team_max<32>(hi);
    lo = -team_max<32>(lo);
    finite = __all_sync(0xffffffffu, finite);
    const RowGrid<float> g = row_grid(hi, lo, s);
    uint8_t* to = codes + code_rows.at(row);
    const auto code = [&](int i) {
      return finite && i < n ? static_cast<uint8_t>(row_code(from(i), g, top)) : uint8_t{0};
    };
    if (paired)
      for (int i = lane; i < (n + 1) / 2; i += 32)
        to[i] = static_cast<uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
    else
      for (int i = lane; i < n; i += 32) to[i] = code(i) ^ turned;
    if (sums) {
      int sum = 0;
      for (int i = lane; i < n; i += 32) sum += static_cast<int8_t>(to[i]);
      sum = team_sum<32>(sum);
      if (lane == 0) sums[row] = sum;
    }
    if (lane == 0) {
      float* out = grid + grid_rows.at(row);
      out[0] = finite ? g.scale : __int_as_float(0x7fc00000);
      out[1] = finite ? g.zero : 0.0f;
    }
  }
}

// Rows of halves that stand one behind another, a pack of eight at a time: as they are, or made of
// two tensors on the way. All loads of a row are under way before the first is made use of; Held is
// what a thread keeps of a pack between finding the row's range and writing its codes.
__device__ inline Operand halves(const void* data) { return {const_cast<void*>(data), DType::F16}; }
struct PlainRows {
  const void* x;
  using Loaded = Raw;
  using Held = Raw;
  __device__ Loaded load(int64_t pack) const { return load_raw(halves(x), pack); }
  __device__ Held made(const Loaded& raw) const { return raw; }
  __device__ Pack values(const Held& held) const { return unpack(held, DType::F16); }
};
struct GatedRows {  // silu(gate) ⊙ up
  const void *gate, *up;
  struct Loaded {
    Raw gate, up;
  };
  using Held = Pack;
  __device__ Loaded load(int64_t pack) const {
    return {load_raw(halves(gate), pack), load_raw(halves(up), pack)};
  }
  __device__ Held made(const Loaded& raw) const {
    const Pack g = unpack(raw.gate, DType::F16), u = unpack(raw.up, DType::F16);
    Pack out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) out.v[j] = fn::Silu{}.fwd(g.v[j]) * u.v[j];
    return out;
  }
  __device__ Pack values(const Held& held) const { return held; }
};

struct CodesOut {
  uint2* codes;  // eight a pack
  float2* grid;
  int32_t* sums;    // of signed codes, else null
  uint32_t turned;  // in every byte
};

// A block of kThreads a row of at most kThreads · 8 · kPacks elements, read once: what a prompt's
// products ask for.
template <int kThreads, int kPacks, class Source>
__global__ void __launch_bounds__(kThreads)
    quantize_whole_rows_kernel(CodesOut to, Source x, int64_t rows, int packs, RowQuant s) {
  const float top = static_cast<float>((1 << s.bits) - 1);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    typename Source::Loaded loaded[kPacks];
    typename Source::Held held[kPacks];
    const auto each = [&](auto&& body) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        if (const int i = static_cast<int>(threadIdx.x) + j * kThreads; i < packs) body(j, i);
    };
    each([&](int j, int i) { loaded[j] = x.load(row * packs + i); });
    float hi = -INFINITY, lo = -INFINITY;
    bool none = false;  // a NaN, which maxima pass over
    each([&](int j, int) {
      held[j] = x.made(loaded[j]);
      const Pack v = x.values(held[j]);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        hi = fmaxf(hi, v.v[k]);
        lo = fmaxf(lo, -v.v[k]);
        none |= v.v[k] != v.v[k];
      }
    });
    hi = team_max<kThreads>(none ? INFINITY : hi);
    lo = -team_max<kThreads>(lo);
    const bool finite = isfinite(hi) && isfinite(lo);
    const RowGrid<float> g = row_grid(hi, lo, s);
    int sum = 0;
    each([&](int j, int i) {
      const Pack v = x.values(held[j]);
      uint32_t out[2] = {};
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        out[k / 4] |= (finite ? static_cast<uint32_t>(row_code(v.v[k], g, top)) : 0u)
                      << (k % 4 * 8);
      out[0] ^= to.turned, out[1] ^= to.turned;
      to.codes[row * packs + i] = make_uint2(out[0], out[1]);
      sum = byte_sum(out[0], byte_sum(out[1], sum));
    });
    if (to.sums) sum = team_sum<kThreads>(sum);
    if (threadIdx.x != 0) continue;
    if (to.sums) to.sums[row] = sum;
    to.grid[row] =
        finite ? make_float2(g.scale, g.zero) : make_float2(__int_as_float(0x7fc00000), 0.0f);
  }
}

__global__ void dequantize_rows_kernel(Operand y, Rows y_rows, CodeBytes codes, Rows code_rows,
                                       const float* grid, Rows grid_rows, int64_t rows, int n,
                                       bool paired) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = grid_index() / 32; row < rows; row += grid_stride() / 32) {
    const int64_t from = code_rows.at(row);
    const float* g = grid + grid_rows.at(row);
    const float scale = g[0], zero = g[1];
    const int64_t to = y_rows.at(row);
    for (int i = lane; i < n; i += 32) {
      const int code = paired ? codes[from + i / 2] >> (i % 2 * 4) & 15 : codes[from + i];
      store(y, to + i, (static_cast<float>(code) - zero) * scale);
    }
  }
}

constexpr int kThreads = 256;

// The longest rows that a block holds: of one tensor, and of two.
constexpr int kMostWhole = 1024 * kPack * 4, kMostGated = 1024 * kPack * 2;

bool takes_whole_rows(const QuantizedRows& q, const Tensor& x) {
  return x.dtype() == DType::F16 && !q.paired && x.is_contiguous() && q.codes.is_contiguous() &&
         q.grid.is_contiguous() && in_packs(q.cols, Operand{x.raw(), x.dtype()}) &&
         aligned16(q.codes.raw()) && q.cols <= kMostWhole;
}

template <class Source> void quantize_whole_rows(QuantizedRows& q, const Source& x, int64_t rows) {
  const CodesOut to{reinterpret_cast<uint2*>(bytes_of(q)),
                    reinterpret_cast<float2*>(q.grid.data<float>()),
                    q.as_signed() ? q.sums.data<int32_t>() : nullptr, turned_bit(q) * 0x01010101u};
  const int packs = static_cast<int>(q.cols / kPack);
  const auto run = [&](auto threads, auto most) {
    constexpr int kEach = decltype(threads)::value, kPacks = decltype(most)::value;
    launch("quantize_rows", q.grid, quantize_whole_rows_kernel<kEach, kPacks, Source>,
           blocks_for(rows, 1), kEach, 0, to, x, rows, packs, q.spec);
  };
  if (packs <= 256 * 2) return run(Int<256>{}, Int<2>{});
  if (packs <= 512 * 3) return run(Int<512>{}, Int<3>{});
  if (packs <= 1024 * 2) return run(Int<1024>{}, Int<2>{});
  if constexpr (std::is_same_v<Source, PlainRows>) run(Int<1024>{}, Int<4>{});
}

}  // namespace

// ---- launchers ----

void quantize_rows(QuantizedRows& q, const Tensor& x) {
  const int64_t rows = rows_of(x);
  check(!q.as_signed() || (!q.paired && q.sums.is_contiguous() && q.sums.numel() == rows),
        "quantize_rows: sums {} of {} rows of signed codes", q.sums.shape(), rows);
  if (takes_whole_rows(q, x)) return quantize_whole_rows(q, PlainRows{x.raw()}, rows);
  const auto run = [&](const auto* values, auto kernel) {
    launch("quantize_rows", x, kernel, blocks_for(rows, kThreads / 32), kThreads, 0, bytes_of(q),
           rows_view("quantize_rows", q.codes), q.grid.data<float>(),
           rows_view("quantize_rows", q.grid), q.as_signed() ? q.sums.data<int32_t>() : nullptr,
           turned_bit(q), values, rows_view("quantize_rows", x), rows, q.cols, q.spec, q.paired);
  };
  if (x.dtype() == DType::F16)
    return run(static_cast<const __half*>(x.raw()), quantize_rows_kernel<__half>);
  run(x.data<float>(), quantize_rows_kernel<float>);
}

void quantize_silu_mul(QuantizedRows& q, const Tensor& gate, const Tensor& up) {
  if (takes_whole_rows(q, gate) && takes_whole_rows(q, up) && q.cols <= kMostGated)
    return quantize_whole_rows(q, GatedRows{gate.raw(), up.raw()}, rows_of(gate));
  Tensor x = Tensor::empty(gate.shape(), gate.dtype(), gate.device());
  silu_mul(x, gate, up);
  quantize_rows(q, x);
}

void dequantize_rows(Tensor& y, const QuantizedRows& q) {
  const int64_t rows = rows_of(y);
  launch("dequantize_rows", y, dequantize_rows_kernel, blocks_for(rows, kThreads / 32), kThreads, 0,
         operand("dequantize_rows", y), rows_view("dequantize_rows", y), CodeBytes(q),
         rows_view("dequantize_rows", q.codes), q.grid.data<float>(),
         rows_view("dequantize_rows", q.grid), rows, q.cols, q.paired);
}

}  // namespace omq::cuda
