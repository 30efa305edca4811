// The CPU's running kernels: y = x · wᵀ for packed and dense weights, with x as floats or as codes,
// dequantisation, embedding rows.
//
// The way through a product goes by the number of rows of x. Few rows (decoding): weights are read
// once, straight from their packed form, panel by panel; the limit is memory. Many rows (prefill):
// the instruction set's own product where it has one, the same loops where they beat floats, else
// tiles of weights become F32 once each and meet all rows in gemm_tile. Work is cut by shape alone,
// every element of y is summed by one thread in one order: results do not depend on the number of
// threads. Codes with codes go the same two ways: straight from the packed form, or over panels
// unpacked to a byte a code, both exact in integers. Inner loops: packed_isa.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "tensor/cpu/gemm.h"
#include "tensor/cpu/packed_isa.h"
#include "tensor/cpu/panel_view.h"
#include "tensor/kernels.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"

namespace omq::cpu {
namespace {

constexpr int64_t kFewRows = 8;                // of x: up to here weights are read as they lie
constexpr int64_t kDenseGrain = 32;            // rows of a dense w a chunk of work
constexpr int64_t kWeightBytes = 1024 * 1024;  // of weights turned to F32: half of a usual L2
constexpr int64_t kPreparedBytes =
    3 * 1024 * 1024;  // of many rows of x: an L2 cache and a half, each pass unpacks w anew

// Scratch of the calling thread; it grows and is kept. Each Use has its own, so that two live ones
// never share.
enum class Use { Prepared, Tile };  // Tile: of weights
template <Use> void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(size)));
    if (memory == nullptr) {
      size = 0;
      fail("no memory for {} bytes of scratch", bytes);
    }
  }
  return memory.get();
}

// Panels a chunk of work: enough that each of gemv's streams (up to 4) has a run to read ahead in,
// few enough that there are about 16 chunks for the threads to share.
int64_t panel_grain(int64_t panels) { return std::clamp<int64_t>(panels / 32 * 4, 8, 16); }

// Rows of w that become F32 together: a multiple of 16 that fits the cache, at least 8 tiles for
// the threads to share where the matrix is not too small for that.
int64_t tile_rows(int64_t rows, int64_t cols) {
  const int64_t fitting =
      std::max<int64_t>(2, kWeightBytes / 4 / std::max<int64_t>(1, cols) / kPanelRows) * kPanelRows;
  const int64_t shared =
      std::max<int64_t>(2, (rows / 8 + kPanelRows - 1) / kPanelRows) * kPanelRows;
  return std::min({fitting, shared, int64_t{256}});
}

void check_plain(const char* op, const char* what, const Tensor& t, DType dtype) {
  check(t.defined(), "{}: {} is undefined", op, what);
  check(t.device().type == DeviceType::CPU, "{}: {} must be on the CPU", op, what);
  check(t.dtype() == dtype, "{}: {} must be {}, got {}", op, what, dtype_name(dtype),
        dtype_name(t.dtype()));
  check(t.is_contiguous(), "{}: {} {} must be contiguous", op, what, t.shape());
}

// y [m, rows] = x [m, cols] · w [rows, cols]ᵀ; gives m.
int64_t check_product(const char* op, const Tensor& y, const Tensor& x, int64_t rows,
                      int64_t cols) {
  check_plain(op, "x", x, DType::F32);
  check_plain(op, "y", y, DType::F32);
  check(x.ndim() == 2 && x.dim(1) == cols, "{}: x {} does not fit w [{}, {}]: inner dims differ",
        op, x.shape(), rows, cols);
  check(y.shape() == (Shape{x.dim(0), rows}), "{}: y is {}, expected [{}, {}]", op, y.shape(),
        x.dim(0), rows);
  return x.dim(0);
}

// y = x · wᵀ from the packed form: rows of x are prepared once, then every panel meets them.
void multiply_packed(const PackedIsa& isa, const PanelView& w, const float* x, int64_t m,
                     float* y) {
  const int64_t row_bytes = isa.prepared_bytes(w), panels = (w.rows + kPanelRows - 1) / kPanelRows;
  for (int64_t m0 = 0; m0 < m; m0 += kMaxGemmRows) {
    const int64_t rows = std::min(kMaxGemmRows, m - m0);
    auto* prepared = static_cast<std::byte*>(scratch<Use::Prepared>(rows * row_bytes));
    parallel_for(rows, kFewRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        isa.prepare(w, x + (m0 + i) * w.cols, prepared + i * row_bytes);
    });
    parallel_for(panels, panel_grain(panels), [&](int64_t begin, int64_t end) {
      isa.gemv(w, prepared, rows, y + m0 * w.rows, begin, end);
    });
  }
}

// Rows of x in a pass of m rows, by blocks of so many rows and bytes: even passes.
int64_t rows_of_pass(int64_t m, int64_t block_rows, int64_t block_bytes) {
  const int64_t most =
      std::clamp<int64_t>(kPreparedBytes / block_bytes, 2, kMaxGemmRows / block_rows);
  const int64_t blocks = (m + block_rows - 1) / block_rows, passes = (blocks + most - 1) / most;
  return (blocks + passes - 1) / passes * block_rows;
}

// y = x · wᵀ by the table's own way for many rows.
void multiply_blocks(const PackedIsa& isa, const PanelView& w, const float* x, int64_t m,
                     float* y) {
  constexpr int64_t kRows = 16;  // of a block
  const int64_t block_bytes = isa.gemm_block_bytes(w), unpacked = isa.gemm_scratch_bytes(w);
  const int64_t panels = (w.rows + kPanelRows - 1) / kPanelRows;
  const int64_t pass = rows_of_pass(m, kRows, block_bytes);
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    const int64_t rows = std::min(pass, m - m0), blocks = (rows + kRows - 1) / kRows;
    auto* prepared = static_cast<std::byte*>(scratch<Use::Prepared>(blocks * block_bytes));
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        isa.prepare_gemm_block(w, x + (m0 + kRows * b) * w.cols, std::min(kRows, rows - kRows * b),
                               prepared + b * block_bytes);
    });
    parallel_for(panels, panel_grain(panels), [&](int64_t begin, int64_t end) {
      auto* panel = static_cast<std::byte*>(scratch<Use::Tile>(unpacked));
      isa.gemm(w, prepared, rows, y + m0 * w.rows, begin, end, panel);
    });
  }
}

// y = x · wᵀ by tiles of F32 weights, [cols, rows of the tile]: the order in which panels unpack.
void multiply_dequantized(const PackedIsa& isa, const PanelView& w, const float* x, int64_t m,
                          float* y) {
  const int64_t tile = tile_rows(w.rows, w.cols);
  parallel_for(w.rows, tile, [&](int64_t begin, int64_t end) {
    auto* weights = static_cast<float*>(scratch<Use::Tile>(tile * w.cols * 4));
    for (int64_t row = begin; row < end; row += kPanelRows)
      isa.dequantize(w, row / kPanelRows, weights + (row - begin), tile);
    gemm_tile(m, end - begin, w.cols, x, w.cols, 1, weights, tile, 1, y + begin, w.rows);
  });
}

// Rows of codes and their grids.
struct CodesView {
  const uint8_t* codes;
  const float* grid;
  int64_t cols;
  int bits;
  RowCodes row(int64_t i) const {
    return {codes + i * cols, grid[2 * i], static_cast<int32_t>(grid[2 * i + 1]), bits};
  }
};

void multiply_few_codes(const PackedIsa& isa, const PanelView& w, const CodesView& x, int64_t m,
                        float* y) {
  const int64_t row_bytes = isa.prepared_bytes(w), panels = (w.rows + kPanelRows - 1) / kPanelRows;
  auto* prepared = static_cast<std::byte*>(scratch<Use::Prepared>(m * row_bytes));
  for (int64_t i = 0; i < m; ++i) isa.prepare_codes_for_gemv(w, x.row(i), prepared + i * row_bytes);
  parallel_for(panels, panel_grain(panels),
               [&](int64_t begin, int64_t end) { isa.gemv(w, prepared, m, y, begin, end); });
}

// Rows of a pass, prepared as gemm_codes wants them.
const std::byte* prepare_pass(const PackedIsa& isa, const PanelView& w, const CodesView& x,
                              int64_t m0, int64_t rows, int64_t block_bytes) {
  constexpr int64_t kRows = kCodesBlockRows;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  auto* prepared = static_cast<std::byte*>(scratch<Use::Prepared>(blocks * block_bytes + 64));
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = std::min(kRows, rows - kRows * b);
      std::byte* out = prepared + b * block_bytes;
      RowCodes row[kRows];
      for (int64_t i = 0; i < count; ++i) row[i] = x.row(m0 + kRows * b + i);
      if (isa.prepare_codes_block) {
        isa.prepare_codes_block(w, row, count, out);
      } else {
        for (int64_t i = 0; i < count; ++i)
          prepare_codes(w, row[i], out + i * prepared_codes_bytes(w));
      }
    }
  });
  return prepared;
}

void multiply_codes(const PackedIsa& isa, const PanelView& w, const CodesView& x, int64_t m,
                    float* y) {
  const int64_t block_bytes =
      isa.codes_block_bytes ? isa.codes_block_bytes(w) : kCodesBlockRows * prepared_codes_bytes(w);
  const int64_t unpacked = isa.gemm_codes_scratch_bytes(w);
  const int64_t panels = (w.rows + kPanelRows - 1) / kPanelRows;
  const int64_t grain = std::clamp<int64_t>(panels / 32 * 2, 2, 8);  // panels go in pairs
  // Products as fast as those of tiles, which have a form of x of their own, wait for x; others for
  // their multiplications.
  const int64_t pass =
      isa.codes_block_bytes ? rows_of_pass(m, kCodesBlockRows, block_bytes) : kMaxGemmRows;
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    const int64_t rows = std::min(pass, m - m0);
    const std::byte* prepared = prepare_pass(isa, w, x, m0, rows, block_bytes);
    parallel_for(panels, grain, [&](int64_t begin, int64_t end) {
      auto* panel = static_cast<std::byte*>(scratch<Use::Tile>(unpacked));
      isa.gemm_codes(w, prepared, rows, y + m0 * w.rows, begin, end, panel);
    });
  }
}

float f16_at(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return f16_bits_to_f32(bits);
}

// One row of w, out [cols].
void dequantize_row(const PackedInt& w, const PanelView& view, int64_t row, float* out) {
  const int64_t r = row % kPanelRows;
  const uint8_t* block = view.data + row / kPanelRows * view.panel_bytes;
  for (int64_t g = 0; g < view.groups; ++g, block += view.block_bytes) {
    const int64_t cols = w.group_columns(g);
    const uint8_t* grid = block + PackedInt::code_bytes(cols, view.bits);
    const float scale = f16_at(grid + 2 * r);
    const auto zero =
        static_cast<float>(view.symmetric ? 1 << (view.bits - 1) : grid[2 * kPanelRows + r]);
    uint8_t codes[4 * kPanelRows] = {};
    for (int64_t c = 0; c < cols; ++c) {
      if (c % 4 == 0) unpack_quad(block, view.bits, c / 4, codes);
      *out++ = scale * (static_cast<float>(codes[4 * r + c % 4]) - zero);
    }
  }
}

// Rows begin … end − 1 of w as F32 [end − begin, cols]: w itself when it is F32.
const float* dense_rows(const PackedIsa& isa, const DenseView& w, int64_t begin, int64_t end) {
  if (w.type == Stored::F32) return static_cast<const float*>(w.data) + begin * w.cols;
  auto* out = static_cast<float*>(scratch<Use::Tile>((end - begin) * w.cols * 4));
  isa.widen(static_cast<const uint16_t*>(w.data) + begin * w.cols, w.type, out,
            (end - begin) * w.cols);
  return out;
}

}  // namespace

PanelView view_of(const char* op, const PackedInt& w, int64_t chunk_cols) {
  const int bits = w.spec.bits;
  check(bits == 2 || bits == 3 || bits == 4 || bits == 8,
        "{}: stored width is 2, 3, 4 or 8 bits, got {}", op, bits);
  check(w.rows > 0 && w.cols > 0 && w.spec.group_size >= 0,
        "{}: a packed matrix [{}, {}] with groups of {} is malformed", op, w.rows, w.cols,
        w.spec.group_size);
  check_plain(op, "the packed data", w.data, DType::U8);
  check(static_cast<int64_t>(w.data.nbytes()) == w.nbytes(),
        "{}: a [{}, {}] matrix of {} bits takes {} bytes, the data has {}", op, w.rows, w.cols,
        bits, w.nbytes(), w.data.nbytes());
  const int64_t groups = w.groups(), full = std::min(w.spec.group_cols(w.cols), w.cols);
  const int64_t last = w.group_columns(groups - 1);
  const auto chunks = [=](int64_t cols) { return (cols + chunk_cols - 1) / chunk_cols; };
  return {.data = w.data.data<uint8_t>(),
          .rows = w.rows,
          .cols = w.cols,
          .bits = bits,
          .symmetric = w.spec.symmetric,
          .groups = groups,
          .group_cols = full,
          .last_cols = last,
          .block_bytes = w.block_bytes(0),
          .panel_bytes = w.panel_bytes(),
          .chunk_cols = chunk_cols,
          .chunks = (groups - 1) * chunks(full) + chunks(last),
          .chunk_stride = std::min(chunk_cols, (full + 31) / 32 * 32)};
}

Stored stored_type(const Tensor& w) {
  switch (w.dtype()) {
    case DType::F32:
      return Stored::F32;
    case DType::BF16:
      return Stored::BF16;
    case DType::F16:
      return Stored::F16;
    default:
      fail("dense_matmul: w must be F32, BF16 or F16, got {}", dtype_name(w.dtype()));
  }
}

void packed_matmul(Tensor& y, const Tensor& x, const PackedInt& w) {
  const PanelView view = view_of("packed_matmul", w);
  const int64_t m = check_product("packed_matmul", y, x, w.rows, w.cols);
  if (m == 0) return;
  const PackedIsa& loops = active_packed_isa();
  if (m > kFewRows && loops.gemm)
    multiply_blocks(loops, view, x.data<float>(), m, y.data<float>());
  else if (m <= kFewRows || loops.gemv_for_many_rows)
    multiply_packed(loops, view, x.data<float>(), m, y.data<float>());
  else
    multiply_dequantized(loops, view, x.data<float>(), m, y.data<float>());
}

void packed_matmul_rows(Tensor& y, const QuantizedRows& x, const PackedInt& w) {
  const char* op = "packed_matmul_rows";
  const PanelView view = view_of(op, w, kCodesChunkCols);
  check_plain(op, "the codes of x", x.codes, DType::U8);
  check_plain(op, "the grid of x", x.grid, DType::F32);
  check_plain(op, "y", y, DType::F32);
  check(!x.paired && x.spec.include_zero && x.spec.bits >= 2 && x.spec.bits <= 8,
        "{}: x must have one code a byte, of 2 to 8 bits, and zero points that are codes", op);
  check(x.codes.ndim() == 2 && x.codes.dim(1) == w.cols && x.cols == w.cols,
        "{}: x {} does not fit w [{}, {}]: inner dims differ", op, x.codes.shape(), w.rows, w.cols);
  const int64_t m = x.codes.dim(0);
  check(x.grid.shape() == (Shape{m, 2}) && y.shape() == (Shape{m, w.rows}),
        "{}: grid {} and y {}, expected [{}, 2] and [{}, {}]", op, x.grid.shape(), y.shape(), m, m,
        w.rows);
  if (m == 0) return;
  const PackedIsa& best = active_packed_isa();
  const PackedIsa& loops = best.gemm_codes ? best : kScalarIsa;
  const CodesView codes{x.codes.data<uint8_t>(), x.grid.data<float>(), w.cols, x.spec.bits};
  if (m <= kFewRows && loops.prepare_codes_for_gemv)
    multiply_few_codes(loops, view, codes, m, y.data<float>());
  else
    multiply_codes(loops, view, codes, m, y.data<float>());
}

void packed_gated_rows(Tensor& y, const QuantizedRows& x, const PackedInt& gate,
                       const PackedInt& up) {
  Tensor right = Tensor::empty(y.shape(), DType::F32);
  packed_matmul_rows(y, x, gate);
  packed_matmul_rows(right, x, up);
  silu_mul(y, y, right);
}

// Files hold the CPU's own order.
void packed_arrange(PackedInt& y, const PackedInt& w) { y = w; }

void packed_dequantize(Tensor& y, const PackedInt& w) {
  const PanelView view = view_of("packed_dequantize", w);
  check_plain("packed_dequantize", "y", y, DType::F32);
  check(y.shape() == (Shape{w.rows, w.cols}), "packed_dequantize: y is {}, expected [{}, {}]",
        y.shape(), w.rows, w.cols);
  const PackedIsa& loops = active_packed_isa();
  float* out = y.data<float>();
  parallel_for(w.panels(), 1, [&](int64_t begin, int64_t end) {
    auto* columns = static_cast<float*>(scratch<Use::Tile>(kPanelRows * w.cols * 4));
    for (int64_t panel = begin; panel < end; ++panel) {
      loops.dequantize(view, panel, columns, kPanelRows);
      const int64_t first = panel * kPanelRows, live = std::min(kPanelRows, w.rows - first);
      for (int64_t r = 0; r < live; ++r)
        for (int64_t c = 0; c < w.cols; ++c)
          out[(first + r) * w.cols + c] = columns[c * kPanelRows + r];
    }
  });
}

void packed_embedding(Tensor& y, const PackedInt& table, const Tensor& ids) {
  const PanelView view = view_of("packed_embedding", table);
  check_plain("packed_embedding", "ids", ids, DType::I32);
  check_plain("packed_embedding", "y", y, DType::F32);
  check(ids.ndim() == 1 && y.shape() == (Shape{ids.dim(0), table.cols}),
        "packed_embedding: ids {} and a table [{}, {}] do not give y {}", ids.shape(), table.rows,
        table.cols, y.shape());
  const int32_t* id = ids.data<int32_t>();
  for (int64_t t = 0; t < ids.dim(0); ++t)
    check(id[t] >= 0 && id[t] < table.rows, "packed_embedding: id {} at {} is outside [0, {})",
          id[t], t, table.rows);
  float* out = y.data<float>();
  parallel_for(ids.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) dequantize_row(table, view, id[t], out + t * table.cols);
  });
}

void dense_matmul(Tensor& y, const Tensor& x, const Tensor& w) {
  check(w.defined() && w.ndim() == 2, "dense_matmul: w must be a matrix [N, K]");
  const DenseView view{w.raw(), w.dim(0), w.dim(1), stored_type(w)};
  check_plain("dense_matmul", "w", w, w.dtype());
  const int64_t m = check_product("dense_matmul", y, x, view.rows, view.cols);
  const PackedIsa& loops = active_packed_isa();
  const float* in = x.data<float>();
  float* out = y.data<float>();
  if (m <= kFewRows) {
    parallel_for(view.rows, kDenseGrain, [&](int64_t begin, int64_t end) {
      loops.dense_gemv(view, in, m, out, begin, end);
    });
    return;
  }
  parallel_for(view.rows, tile_rows(view.rows, view.cols), [&](int64_t begin, int64_t end) {
    const float* weights = dense_rows(loops, view, begin, end);
    gemm_tile(m, end - begin, view.cols, in, view.cols, 1, weights, 1, view.cols, out + begin,
              view.rows);
  });
}

}  // namespace omq::cpu
