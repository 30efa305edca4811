// Products with packed and dense weights on a GPU: few rows go through the gemv kernels, which read
// the weights as they are stored; many rows meet weights that were unpacked to F16 for the occasion
// (4 bytes of traffic a weight against hundreds of multiplications), or codes meet codes in int8
// (integer_matmul.cu). In F16 x is rounded too, so that a value beyond 65504 is lost; sums are F32,
// or exact.
#include "cuda/packed.h"

#include <algorithm>

#include "cuda/stream.h"
#include "tensor/kernels.h"

namespace omq::cuda {
namespace {

// The rows of x that one launch takes of all columns: those whose values fit, of four bytes (dense)
// or two (packed). 0: not even one.
int64_t rows_at_once(const RowMatrix& m, int64_t cols, RowOutput output, Device device) {
  if (const auto* packed = std::get_if<PackedInt>(&m.weight))
    return packed_gemv_rows(*packed, output, device.index);
  return dense_gemv_rows(cols, device.index);
}

void few_rows(const char* op, Tensor& y, const DecodeInput& x, const QuantizedRows* codes,
              std::span<const RowMatrix> matrices, RowOutput output,
              const DecodeNext* next = nullptr) {
  const int64_t rows = codes ? codes->codes.dim(0) : x.x.dim(0);
  const int64_t cols = codes ? codes->cols : x.x.dim(1);
  const int64_t at_once = rows_at_once(matrices[0], cols, output, y.device());
  check(at_once > 0, "{}: a row of {} columns does not fit the shared memory of {}", op, cols,
        to_string(y.device()));
  // Of what is left, a launch's even share.
  const auto share = [](int64_t left, int64_t most) {
    const int64_t launches = (left + most - 1) / most;
    return (left + launches - 1) / launches;
  };
  const SplitRows split = rows_to_split(op, y, {x, codes, 0, rows}, matrices, output);
  for (int64_t first = 0, n; first < rows; first += n) {
    const int64_t left = rows - first;
    const bool splits = split.most > 0 && left >= split.fewest;
    n = splits ? std::max(share(left, split.most), split.fewest) : share(left, at_once);
    gemv(op, y, {x, codes, first, n, next}, matrices, output);
  }
}

// Whether the rows meet weights that are unpacked, or in 16 bits.
bool many(int64_t rows, const RowMatrix& m, int64_t cols, Device device) {
  return rows > kFewRows || rows_at_once(m, cols, RowOutput::Store, device) == 0;
}

bool same_form(const RowMatrix& a, const RowMatrix& b) {
  if (a.weight.index() != b.weight.index()) return false;
  if (const auto* p = std::get_if<PackedInt>(&a.weight)) {
    const auto& q = std::get<PackedInt>(b.weight);
    return p->spec.bits == q.spec.bits && p->spec.group_size == q.spec.group_size &&
           p->cols == q.cols;
  }
  return std::get<Tensor>(a.weight).dtype() == std::get<Tensor>(b.weight).dtype();
}

// The product with w [N, K], x in the type of w.
void many_rows(Tensor& y, const Tensor& x, const Tensor& w) {
  Tensor same = x;
  if (x.dtype() != w.dtype()) {
    same = Tensor::empty(x.shape(), w.dtype(), x.device());
    copy(same, x);
  }
  matmul(y, same, w.alias({w.dim(1), w.dim(0)}, {1, w.dim(1)}, 0));
}

Tensor unpacked(const PackedInt& w) {
  Tensor w16 = Tensor::empty({w.rows, w.cols}, DType::F16, w.data.device());
  packed_dequantize(w16, w);
  return w16;
}

}  // namespace

void packed_matmul(Tensor& y, const Tensor& x, const PackedInt& w) {
  if (y.numel() == 0) return;
  const RowMatrix m{w, {}};
  if (many(x.dim(0), m, w.cols, y.device())) return many_rows(y, x, unpacked(w));
  few_rows("packed_matmul", y, {.x = x}, nullptr, {&m, 1}, RowOutput::Store);
}

void packed_matmul_rows(Tensor& y, const QuantizedRows& x, const PackedInt& w) {
  if (y.numel() == 0) return;
  const RowMatrix m{w, {}};
  const bool unpack = many(x.codes.dim(0), m, w.cols, y.device());
  if (unpack && x.as_signed() && integer_matmul_takes(w)) return integer_matmul(y, x, w);
  if (unpack) {  // codes less zero points are whole numbers: exact in F16
    Tensor values = Tensor::empty({x.codes.dim(0), x.cols}, DType::F16, y.device());
    codes_to_numbers(values, x);
    Tensor sums = Tensor::empty(y.shape(), DType::F32, y.device());
    many_rows(sums, values, unpacked(w));
    return scale_rows(y, sums, x.grid);
  }
  few_rows("packed_matmul_rows", y, {}, &x, {&m, 1}, RowOutput::Store);
}

void packed_gated_rows(Tensor& y, const QuantizedRows& x, const PackedInt& gate,
                       const PackedInt& up) {
  if (y.numel() == 0) return;
  if (many(x.codes.dim(0), {gate, {}}, gate.cols, y.device()) && x.as_signed() &&
      integer_matmul_takes(gate) && integer_matmul_takes(up))
    return integer_gated(y, x, gate, up);
  Tensor left = Tensor::empty(y.shape(), y.dtype(), y.device()),
         right = Tensor::empty(y.shape(), y.dtype(), y.device());
  packed_matmul_rows(left, x, gate);
  packed_matmul_rows(right, x, up);
  silu_mul(y, left, right);
}

void dense_matmul(Tensor& y, const Tensor& x, const Tensor& w) {
  if (y.numel() == 0) return;
  const RowMatrix m{w, {}};
  if (many(x.dim(0), m, w.dim(1), y.device())) {
    if (w.dtype() != DType::BF16) return many_rows(y, x, w);
    Tensor w16 = Tensor::empty(w.shape(), DType::F16, w.device());  // x keeps 11 bits so
    copy(w16, w);
    return many_rows(y, x, w16);
  }
  few_rows("dense_matmul", y, {.x = x}, nullptr, {&m, 1}, RowOutput::Store);
}

// ---- decoding ----

namespace {

const char* unsupported(std::span<const RowMatrix> matrices, RowOutput output) {
  for (const RowMatrix& m : matrices) {
    const auto* packed = std::get_if<PackedInt>(&m.weight);
    const Tensor& stored = m.stored();
    if (!stored.is_contiguous()) return "a weight that is not contiguous";
    if (rows_at_once(m, packed ? packed->cols : stored.dim(1), output, stored.device()) == 0)
      return "rows that do not fit the shared memory of the device";
  }
  if (output == RowOutput::SiluMul && !same_form(matrices[0], matrices[1]))
    return "gate and up are stored differently";
  return nullptr;
}

// Calls f(matrices of one form, column of y where their results begin, columns of those).
template <class F> void each_form(std::span<const RowMatrix> matrices, RowOutput output, F&& f) {
  int64_t column = 0;
  for (size_t begin = 0; begin < matrices.size();) {
    size_t end = begin + 1;
    int64_t columns = row_count(matrices[begin]);
    while (end < matrices.size() && same_form(matrices[begin], matrices[end]))
      columns += row_count(matrices[end++]);
    if (output == RowOutput::SiluMul) columns /= 2;
    f(matrices.subspan(begin, end - begin), column, columns);
    column += columns;
    begin = end;
  }
}

void products(Tensor& y, const DecodeInput& x, std::span<const RowMatrix> matrices,
              RowOutput output, const DecodeNext& next) {
  each_form(matrices, output,
            [&](std::span<const RowMatrix> those, int64_t column, int64_t columns) {
              Tensor part = y.alias({y.dim(0), columns}, {y.stride(0), 1}, column);
              DecodeNext behind = next;
              if (&those.back() != &matrices.back()) behind.weights = {};  // not the last launch
              few_rows("decode", part, x, nullptr, those, output, &behind);
            });
}

int64_t prepared_bytes(const RowStage& from, const RowStage& to) {
  const auto takes = [](const RowStage& s, bool leaves) {
    bool all = true;
    each_form(s.matrices, s.output, [&](std::span<const RowMatrix> those, int64_t, int64_t) {
      all = all && std::holds_alternative<PackedInt>(those[0].weight) &&
            packed_row_takes(those, s.output, leaves);
    });
    return all;
  };
  if (to.matrices.empty() || !takes(to, false) || !takes(from, true)) return 0;
  return prepared_row_bytes(std::get<PackedInt>(to.matrices[0].weight).cols);
}

}  // namespace
}  // namespace omq::cuda

namespace omq {

const DecodeKernels* cuda_decode_kernels() {
  static const DecodeKernels table{cuda::products, cuda::decode_attention, cuda::choose,
                                   cuda::unsupported, cuda::prepared_bytes};
  return &table;
}

}  // namespace omq
