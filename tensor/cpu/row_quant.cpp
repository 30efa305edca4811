// Quantisation of every row on its own range: to codes and back, simulated, and the simulation's
// straight-through gradient (spec omniquant §2.6 with σ(u) = σ(l) = 1): x̂ depends on x directly and
// through the row's extremes.
#include <bit>
#include <limits>
#include <vector>

#include "tensor/cpu/loops.h"
#include "tensor/cpu/silu_row.h"
#include "tensor/elementwise.h"
#include "tensor/kernels.h"

namespace omq::cpu {
namespace {

template <class F> void for_each_token(const Tensor& x, F&& body) {
  const int64_t n = x.shape().back();
  parallel_for(rows_of(x), std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, n)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) body(r * n, n);
               });
}

// ---- codes ----

// Elements before row r, a row being the last dim.
int64_t row_at(const Tensor& t, int64_t r) {
  int64_t at = 0;
  for (int i = t.ndim() - 2; i >= 0; r /= t.shape()[i], --i)
    at += r % t.shape()[i] * t.strides()[i];
  return at;
}

void check_rows(const char* op, const char* what, const Tensor& t, DType dtype, const Tensor& x,
                int64_t cols) {
  Shape wanted = x.shape();
  wanted[wanted.n - 1] = cols;
  check(t.defined() && t.dtype() == dtype && t.shape() == wanted && t.stride(-1) == 1,
        "{}: {} must be {} {} with contiguous rows", op, what, dtype_name(dtype), wanted);
}

// x: the floats of q.
void check_quantized(const char* op, const QuantizedRows& q, const Tensor& x) {
  check(x.defined() && x.ndim() >= 1 && q.cols > 0, "{}: wants [..., N]", op);
  check(q.spec.bits >= 2 && q.spec.bits <= (q.paired ? 4 : 8), "{}: {} bits{}, 2 to {} wanted", op,
        q.spec.bits, q.paired ? ", two codes a byte" : "", q.paired ? 4 : 8);
  check_rows(op, "x", x, DType::F32, x, q.cols);
  check(!q.as_signed(), "{}: signed codes are a GPU's", op);
  check_rows(op, "codes", q.codes, DType::U8, x, q.code_bytes());
  check_rows(op, "the grid", q.grid, DType::F32, x, 2);
}

// Calls body(floats, codes, grid) for every row.
template <class F> void for_each_quantized(const QuantizedRows& q, const Tensor& x, F&& body) {
  float *floats = x.data<float>(), *grid = q.grid.data<float>();
  uint8_t* codes = q.codes.data<uint8_t>();
  parallel_for(
      rows_of(x), std::max<int64_t>(1, kGrain / 4 / q.cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          body(floats + row_at(x, r), codes + row_at(q.codes, r), grid + row_at(q.grid, r));
      });
}

// No exponent that is all ones: in integers, so that it vectorises.
[[gnu::always_inline]] inline bool all_finite(const float* p, int64_t n) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i)
    bad |= static_cast<uint32_t>((std::bit_cast<uint32_t>(p[i]) & kExponent) == kExponent);
  return bad == 0;
}

OMQ_WIDE void quantize_row(const QuantizedRows& q, const float* p, uint8_t* codes, float* grid) {
  const int64_t n = q.cols;
  if (!all_finite(p, n)) {
    std::fill_n(codes, q.code_bytes(), uint8_t{0});
    grid[0] = std::numeric_limits<float>::quiet_NaN(), grid[1] = 0;
    return;
  }
  const float top = static_cast<float>(q.spec.max_code());
  const auto [hi, lo] = extremes(p, n, {p[0], p[0]});
  const RowGrid<float> g = row_grid(hi, lo, q.spec);
  grid[0] = g.scale, grid[1] = g.zero;
  const auto code = [&](int64_t i) {
    return static_cast<uint8_t>(static_cast<int32_t>(row_code(p[i], g, top)));
  };
  if (!q.paired) {
    for (int64_t i = 0; i < n; ++i) codes[i] = code(i);
    return;
  }
  for (int64_t i = 0; i < n / 2; ++i)
    codes[i] = static_cast<uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
  if (n % 2) codes[n / 2] = code(n - 1);
}

}  // namespace

void quantize_rows(QuantizedRows& q, const Tensor& x) {
  check_quantized("quantize_rows", q, x);
  for_each_quantized(
      q, x, [&](const float* p, uint8_t* codes, float* grid) { quantize_row(q, p, codes, grid); });
}

void quantize_silu_mul(QuantizedRows& q, const Tensor& gate, const Tensor& up) {
  check_quantized("quantize_silu_mul", q, gate);
  check(gate.is_contiguous() && up.is_contiguous() && up.dtype() == DType::F32 &&
            gate.shape() == up.shape(),
        "quantize_silu_mul: gate {} and up {} must be F32, contiguous and of one shape",
        gate.shape(), up.shape());
  for_each_quantized(q, gate, [&](const float* g, uint8_t* codes, float* grid) {
    thread_local std::vector<float> row;
    row.resize(static_cast<size_t>(q.cols));
    const float* u = up.data<float>() + (g - gate.data<float>());
    silu_mul_row(row.data(), g, u, q.cols);
    quantize_row(q, row.data(), codes, grid);
  });
}

void dequantize_rows(Tensor& y, const QuantizedRows& q) {
  check_quantized("dequantize_rows", q, y);
  for_each_quantized(q, y, [&](float* out, const uint8_t* codes, const float* grid) {
    const float scale = grid[0], zero = grid[1];
    const auto value = [&](int code) { return (static_cast<float>(code) - zero) * scale; };
    if (!q.paired) {
      for (int64_t i = 0; i < q.cols; ++i) out[i] = value(codes[i]);
      return;
    }
    for (int64_t i = 0; i < q.cols / 2; ++i) {
      out[2 * i] = value(codes[i] & 15);
      out[2 * i + 1] = value(codes[i] >> 4);
    }
    if (q.cols % 2) out[q.cols - 1] = value(codes[q.cols / 2] & 15);
  });
}

// ---- simulated ----

void fake_quant_rows(Tensor& y, const Tensor& x, RowQuant s) {
  visit_float("fake_quant_rows", x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    T* out = y.data<T>();
    const T top = static_cast<T>(s.max_code());
    for_each_token(x, [&](int64_t at, int64_t n) {
      const T* p = in + at;
      T* o = out + at;
      const auto [hi, lo] = extremes(p, n, {p[0], p[0]});
      const RowGrid<T> g = row_grid(hi, lo, s);
      for (int64_t i = 0; i < n; ++i) o[i] = (row_code(p[i], g, top) - g.zero) * g.scale;
    });
  });
}

// With S = Σ dy · [(q − z) − in · x/h], the gradient of h: dx = in · dy, plus S·clip/(2ᵇ−1) shared
// by the elements that are the row's maximum, less the same shared by its minima. A bound that is
// the zero put in belongs to no element, unless one is 0.
void fake_quant_rows_vjp(Tensor& dx, const Tensor& x, const Tensor& dy, RowQuant s) {
  visit_float("fake_quant_rows_vjp", x.dtype(), [&]<class T>() {
    const T *in = x.data<T>(), *pd = dy.data<T>();
    T* out = dx.data<T>();
    const T top = static_cast<T>(s.max_code());
    const T first = s.end_codes_learn ? T(-0.5) : T(0), last = top - first;
    for_each_token(x, [&](int64_t at, int64_t n) {
      const T *p = in + at, *d = pd + at;
      T* o = out + at;
      auto [hi, lo] = extremes(p, n, {p[0], p[0]});
      const RowGrid<T> g = row_grid(hi, lo, s);
      // Copies and no stores inside the sum: else nothing of this vectorises.
      const T h = g.scale, z = g.zero;
      T up = 0, down = 0;  // to each maximum, from each minimum
      if (g.free_scale) {
        const T total = lane_sum_apart<T>(n, [=](int64_t i) {
          const T r = p[i] / h, t = round_even(r) + z;
          const T inner = ((t > first) & (t < last)) ? r : T(0);
          const T q = t < T(0) ? T(0) : t > top ? top : t;
          return d[i] * ((q - z) - inner);
        });
        if (s.include_zero) hi = std::max(hi, T(0)), lo = std::min(lo, T(0));
        const T end = total * static_cast<T>(s.clip) / top;
        const Extremes<T> count = counts(p, n, {hi, lo});
        up = count.hi > 0 ? end / count.hi : T(0);
        down = count.lo > 0 ? end / count.lo : T(0);
      }
      const T highest = hi, lowest = lo;
      for (int64_t i = 0; i < n; ++i) {
        const T t = round_even(p[i] / h) + z;
        const T straight = ((t > first) & (t < last)) ? d[i] : T(0);
        o[i] = straight + ((p[i] == highest ? up : T(0)) - (p[i] == lowest ? down : T(0)));
      }
    });
  });
}

}  // namespace omq::cpu
