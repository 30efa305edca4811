// RowProducts on the CPU: tasks are runs of rows of one matrix (of both, for SiluMul), listed once.
//
// The calling thread brings a row of x into the form that the loops read while the others wait for
// the dispatch: it is a few microseconds' work at most, less than handing it over would cost. Of
// several rows the threads take their share.
#include "tensor/row_products.h"

#include <algorithm>

#include "tensor/cpu/panel_view.h"
#include "tensor/elementwise.h"
#include "tensor/kernels.h"
#include "tensor/parallel.h"

namespace omq {

using cpu::DenseView;
using cpu::PackedIsa;
using cpu::PanelView;

namespace {

constexpr int64_t kDenseGrain = 32;      // rows of a dense matrix a task
constexpr int64_t kPrepareGrain = 8192;  // values of x that are prepared together

// Rows of a packed matrix a task: whole panels, at least as many as gemv has streams, so many tasks
// that threads end together.
int64_t packed_grain(int64_t panels) {
  return kPanelRows * std::clamp<int64_t>(panels / 48 * 4, 4, 16);
}

int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

bool same_chunks(const PanelView& a, const PanelView& b) {
  return a.groups == b.groups && a.group_cols == b.group_cols && a.last_cols == b.last_cols;
}

// The rows of activations as the packed loops read them: it depends on the groups alone, so
// matrices of one grouping share it.
struct Prepared {
  PanelView view;
  Tensor bytes;  // U8 [B, bytes of a row]
  std::byte* row(int64_t i) const {
    return reinterpret_cast<std::byte*>(bytes.data<uint8_t>()) + i * bytes.dim(1);
  }
};

struct Part {  // one matrix
  RowMatrix matrix;
  bool packed = false;
  PanelView panels{};
  DenseView dense{};
  size_t prepared = 0;  // index
  int64_t rows = 0, cols = 0;
  int64_t at = 0;  // of its first row among all
  const float* bias = nullptr;
};

struct Task {
  size_t part;
  int64_t begin, end;  // rows
};

}  // namespace

struct RowProducts::Impl {
  const PackedIsa* floats = nullptr;  // loops for a row of floats
  const PackedIsa* codes = nullptr;   // and for one of codes; null: x is not multiplied as codes
  RowOutput output = RowOutput::Store;
  std::optional<RowQuant> input;
  std::vector<Part> parts;
  std::vector<Prepared> prepared;
  std::vector<Task> tasks;
  QuantizedRows quantized;  // x as codes
  Tensor on_grid;           // x as the floats that these stand for
  Tensor products;          // [B, N] of each matrix, before the output is formed; unused by Store
  Tensor scratch;           // of gemm_codes, a slot a task
  int64_t cols = 0, rows = 0, batch = 1;

  void add(RowMatrix m);
  void share_out();
  void prepare_input();
  const float* prepare(const Tensor& x);
  void prepare_row(int64_t i, const float* x);
  void multiply(const Part& p, const float* x, float* y, int64_t begin, int64_t end, size_t task);
  void run(const Task& t, size_t index, const float* x, float* y);
  size_t prepared_for(const PanelView& view);
};

// ---- once ----

size_t RowProducts::Impl::prepared_for(const PanelView& view) {
  for (size_t i = 0; i < prepared.size(); ++i)
    if (same_chunks(prepared[i].view, view)) return i;
  const bool plain = codes && !codes->prepare_codes_for_gemv;
  const int64_t bytes = plain ? cpu::prepared_codes_bytes(view)
                              : std::max(floats->prepared_bytes(view),
                                         codes ? codes->prepared_bytes(view) : int64_t{0});
  // gemm_codes may look at the whole of the last 32 rows and 64 bytes more (packed_isa.h).
  const int64_t count = plain ? (batch + 31) / 32 * 32 + 1 : batch;
  prepared.push_back({view, Tensor::zeros({count, bytes}, DType::U8)});
  return prepared.size() - 1;
}

void RowProducts::Impl::add(RowMatrix m) {
  Part p;
  p.matrix = std::move(m);
  if (const auto* w = std::get_if<PackedInt>(&p.matrix.weight)) {
    p.packed = true;
    p.panels = cpu::view_of("row products", *w, codes ? cpu::kCodesChunkCols : cpu::kChunkCols);
    p.rows = w->rows, p.cols = w->cols;
    p.prepared = prepared_for(p.panels);
  } else {
    const Tensor& d = std::get<Tensor>(p.matrix.weight);
    check(d.defined() && d.ndim() == 2 && d.device().type == DeviceType::CPU && d.is_contiguous(),
          "row products: a dense matrix must be [N, K], contiguous, on the CPU");
    p.rows = d.dim(0), p.cols = d.dim(1);
    p.dense = {d.raw(), p.rows, p.cols, cpu::stored_type(d)};
  }
  check(parts.empty() || p.cols == cols, "row products: matrices of {} and {} columns", cols,
        p.cols);
  const Tensor& bias = p.matrix.bias;
  check(!bias.defined() || (bias.shape() == Shape{p.rows} && bias.is_contiguous()),
        "row products: a bias {} for {} rows", bias.shape(), p.rows);
  p.bias = bias.defined() ? bias.data<float>() : nullptr;
  p.at = rows;
  cols = p.cols;
  rows += p.rows;
  parts.push_back(std::move(p));
}

void RowProducts::Impl::share_out() {
  const size_t count = output == RowOutput::SiluMul ? 1 : parts.size();
  for (size_t i = 0; i < count; ++i) {
    const Part& p = parts[i];
    const int64_t grain = p.packed ? packed_grain(panels_of(p.rows)) : kDenseGrain;
    for (int64_t begin = 0; begin < p.rows; begin += grain)
      tasks.push_back({i, begin, std::min(p.rows, begin + grain)});
  }
}

void RowProducts::Impl::prepare_input() {
  const bool any_dense =
      std::any_of(parts.begin(), parts.end(), [](const Part& p) { return !p.packed; });
  if (input && (any_dense || !codes)) on_grid = Tensor::zeros({batch, cols});
  if (!codes) return;
  quantized = {.codes = Tensor::zeros({batch, cols}, DType::U8),
               .grid = Tensor::zeros({batch, 2}),
               .spec = *input,
               .cols = cols};
  int64_t bytes = 0;
  for (const Part& p : parts)
    if (p.packed) bytes = std::max(bytes, codes->gemm_codes_scratch_bytes(p.panels));
  bytes = (bytes + 63) / 64 * 64;
  if (!codes->prepare_codes_for_gemv && bytes > 0)
    scratch = Tensor::zeros({static_cast<int64_t>(tasks.size()), bytes}, DType::U8);
}

RowProducts::RowProducts(std::vector<RowMatrix> matrices, RowOutput output,
                         std::optional<RowQuant> input, int64_t batch)
    : impl_(std::make_unique<Impl>()) {
  Impl& m = *impl_;
  check(!matrices.empty(), "row products: no matrix");
  check(batch >= 1, "row products: {} rows of x", batch);
  check(output != RowOutput::Add || matrices.size() == 1, "row products: Add takes one matrix");
  m.floats = &cpu::active_packed_isa();
  // As packed_matmul_rows: a table without integer loops leaves these to the scalar one.
  if (input && input->include_zero) m.codes = m.floats->gemm_codes ? m.floats : &cpu::kScalarIsa;
  m.output = output;
  m.input = input;
  m.batch = batch;
  for (RowMatrix& matrix : matrices) m.add(std::move(matrix));
  if (output == RowOutput::SiluMul)
    check(m.parts.size() == 2 && m.parts[0].rows == m.parts[1].rows,
          "row products: SiluMul takes two matrices of one size");
  m.share_out();
  m.prepare_input();
  if (output != RowOutput::Store) m.products = Tensor::zeros({batch * m.rows});
}

RowProducts::~RowProducts() = default;
RowProducts::RowProducts(RowProducts&&) noexcept = default;
RowProducts& RowProducts::operator=(RowProducts&&) noexcept = default;

int64_t RowProducts::cols() const { return impl_->cols; }
int64_t RowProducts::rows() const {
  return impl_->output == RowOutput::SiluMul ? impl_->parts[0].rows : impl_->rows;
}

// ---- per token ----

// Row i of x, whose floats are at x, into the form that the packed loops read.
void RowProducts::Impl::prepare_row(int64_t i, const float* x) {
  if (!codes) {
    for (const Prepared& p : prepared) floats->prepare(p.view, x, p.row(i));
    return;
  }
  const float* grid = quantized.grid.data<float>() + 2 * i;
  const cpu::RowCodes row{quantized.codes.data<uint8_t>() + i * cols, grid[0],
                          static_cast<int32_t>(grid[1]), input->bits};
  for (const Prepared& p : prepared)
    codes->prepare_codes_for_gemv ? codes->prepare_codes_for_gemv(p.view, row, p.row(i))
                                  : cpu::prepare_codes(p.view, row, p.row(i));
}

// x in every form that is wanted; gives the floats.
const float* RowProducts::Impl::prepare(const Tensor& x) {
  const float* values = x.data<float>();
  if (on_grid.defined()) {
    cpu::fake_quant_rows(on_grid, x, *input);
    values = on_grid.data<float>();
  }
  if (codes) cpu::quantize_rows(quantized, x);
  if (prepared.empty()) return values;
  parallel_for(batch, std::max<int64_t>(1, kPrepareGrain / cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) prepare_row(i, values + i * cols);
  });
  return values;
}

// y [B, N of p]: columns begin … end − 1.
void RowProducts::Impl::multiply(const Part& p, const float* x, float* y, int64_t begin,
                                 int64_t end, size_t task) {
  if (!p.packed) {
    floats->dense_gemv(p.dense, x, batch, y, begin, end);
  } else {
    const std::byte* rows_of_x = prepared[p.prepared].row(0);
    const int64_t first = begin / kPanelRows, last = panels_of(end);
    if (!codes || codes->prepare_codes_for_gemv) {
      (codes ? codes : floats)->gemv(p.panels, rows_of_x, batch, y, first, last);
    } else {
      auto* slot = scratch.defined() ? reinterpret_cast<std::byte*>(scratch.data<uint8_t>()) +
                                           static_cast<int64_t>(task) * scratch.dim(1)
                                     : nullptr;
      codes->gemm_codes(p.panels, rows_of_x, batch, y, first, last, slot);
    }
  }
  if (!p.bias) return;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t i = begin; i < end; ++i) y[n * p.rows + i] += p.bias[i];
}

void RowProducts::Impl::run(const Task& t, size_t index, const float* x, float* y) {
  const Part& p = parts[t.part];
  if (output == RowOutput::Store) return multiply(p, x, y + batch * p.at, t.begin, t.end, index);
  float* first = products.data<float>();
  multiply(p, x, first, t.begin, t.end, index);
  float* second = first + batch * p.rows;
  if (output == RowOutput::SiluMul) multiply(parts[1], x, second, t.begin, t.end, index);
  for (int64_t n = 0; n < batch; ++n) {
    const int64_t begin = n * p.rows + t.begin, end = n * p.rows + t.end;
    if (output == RowOutput::Add) {
      for (int64_t i = begin; i < end; ++i) y[i] += first[i];
    } else {
      for (int64_t i = begin; i < end; ++i) y[i] = fn::Silu{}.fwd(first[i]) * second[i];
    }
  }
}

void RowProducts::operator()(const Tensor& x, float* y) {
  Impl& m = *impl_;
  check(x.shape() == (Shape{m.batch, m.cols}) && x.is_contiguous(),
        "row products: x {}, [{}, {}] wanted", x.shape(), m.batch, m.cols);
  const float* values = m.prepare(x);
  parallel_for(static_cast<int64_t>(m.tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      m.run(m.tasks[static_cast<size_t>(i)], static_cast<size_t>(i), values, y);
  });
}

}  // namespace omq
