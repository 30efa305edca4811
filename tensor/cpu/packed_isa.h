// The packed kernels' inner loops as a table of functions, one table per instruction set (internal
// to tensor/).
//
// tensor/cpu/packed.cpp checks shapes, cuts the work and picks a table; the loops behind it see
// plain pointers. This header is included by files compiled for instruction sets that the processor
// may lack (packed_ISA.cpp, packed_ISA_*.cpp), so it and all that they include must stay free of
// inline functions, unless these are local to a file, and of standard headers that have them: the
// linker keeps one copy of an inline function, and that copy could be the one that faults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omq::cpu {

// Products are summed in int32 over chunks of at most this many columns, inside one group of the
// weights. Activations that come as floats become whole numbers of 15 bits, chunk by chunk: 255 ·
// 32512 · 128 < 2³¹. Those that come as codes have at most 8 bits: 255 · 255 · 32768 < 2³¹.
inline constexpr int64_t kChunkCols = 128;
inline constexpr int64_t kCodesChunkCols = 32768;

// gemm and gemm_codes get at most so many rows of x at a time: bounds their scratch memory.
inline constexpr int64_t kMaxGemmRows = 512;

// Rows of x in a block of prepare_codes_block.
inline constexpr int64_t kCodesBlockRows = 32;

// A PackedInt (tensor/packed.h) as the loops see it. Group g of panel p starts at data +
// p·panel_bytes + g·block_bytes.
struct PanelView {
  const uint8_t* data;
  int64_t rows, cols;
  int bits;        // 2, 3, 4 or 8
  bool symmetric;  // no zero points stored; zero = 2ᵇ⁻¹
  int64_t groups, group_cols,
      last_cols;  // the last group has last_cols columns, the others group_cols
  int64_t block_bytes, panel_bytes;
  int64_t chunk_cols;    // of every chunk but the last of a group
  int64_t chunks;        // in one row of activations
  int64_t chunk_stride;  // columns that a chunk takes in prepared activations: a multiple of 32
};

// A row of activations as codes of at most 8 bits: x = scale · (code − zero), zero being a code.
struct RowCodes {
  const uint8_t* codes;  // [cols]
  float scale;
  int32_t zero;
  int bits;
};

// The same in the form that gemm_codes reads, prepare_codes writes it:
//
//   64 bytes: scale F32, rest I32, unused · I32 [chunks], the sums of the chunks' bytes, padded to
//   64 bytes · I8 [chunks, chunk_stride], zeros past a chunk's end, padded to 64 bytes
//
//   x = scale · (byte − rest). Up to 7 bits, byte = code − zero fits and rest is 0; at 8 bits,
//   byte = code − 128.
int64_t prepared_codes_bytes(const PanelView& w);
void prepare_codes(const PanelView& w, const RowCodes& x, std::byte* out);  // out: 64-byte aligned

enum class Stored { F32, BF16, F16 };

// Dense weights [rows, cols], row-major.
struct DenseView {
  const void* data;
  int64_t rows, cols;
  Stored type;
};

// Keys and values of one head, and some queries of one of its query heads: the y of a query is its
// mean of the values, weighted by exp(scale · q·k). Query r sees the first seen + r · more keys, at
// least one. top, total [rows]: its largest score before the scale, and Σ exp(scale · (score −
// top)).
struct AttentionKeys {
  const float *k, *v;
  int64_t k_row, v_row, count, d;
};
struct AttentionTile {
  const float* q;
  int64_t q_row, rows;
  int64_t seen, more;
  float scale;
  float* y;
  int64_t y_row;
  float *top, *total;
};
inline constexpr int64_t kAttentionQueries = 32;  // of a tile at most

struct PackedIsa {
  const char* name;
  bool (*runs_here)();

  // Bytes of one row of x once prepared: a multiple of 64.
  int64_t (*prepared_bytes)(const PanelView& w);
  // One row x [cols] in the form that gemv reads; out is 64-byte aligned.
  void (*prepare)(const PanelView& w, const float* x, std::byte* out);
  // y [m, rows] for the rows of panels panel0 … panel1 − 1, from m prepared rows that follow each
  // other.
  void (*gemv)(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1);
  // True when gemv also beats dequantise-and-multiply for many rows (m in the hundreds).
  bool gemv_for_many_rows;
  // A way of its own for many rows, or null. x comes in blocks of 16 rows, the last one perhaps
  // with fewer, prepared one by one from x [rows, cols] and following each other; a block is a
  // multiple of 64 bytes, 64-byte aligned. y [m, rows] for the rows of panels panel0 … panel1 − 1,
  // m ≤ kMaxGemmRows; scratch: gemm_scratch_bytes, 64-byte aligned.
  int64_t (*gemm_block_bytes)(const PanelView& w) = nullptr;
  void (*prepare_gemm_block)(const PanelView& w, const float* x, int64_t rows,
                             std::byte* out) = nullptr;
  void (*gemm)(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
               int64_t panel1, std::byte* scratch) = nullptr;
  int64_t (*gemm_scratch_bytes)(const PanelView& w) = nullptr;
  // The product of codes with codes. With d = Σ (code of w − zero) · (code of x − zero) of a chunk,
  // exact, every table forms y ← fma(float(d), scale of w · scale of x, y) chunk by chunk from y =
  // 0, so that all give the same bits.
  //
  // One row of codes in the form that gemv reads, whose product is then that; null: gemm_codes
  // takes few rows too. A table without gemm_codes leaves such products to the scalar one.
  void (*prepare_codes_for_gemv)(const PanelView& w, const RowCodes& x, std::byte* out);
  // y [m, rows] for the rows of panels panel0 … panel1 − 1, from m ≤ kMaxGemmRows rows of
  // prepare_codes that follow each other; the rest of the last 32 rows, and 64 bytes more, must be
  // readable, whatever they hold. scratch: gemm_codes_scratch_bytes, 64-byte aligned.
  void (*gemm_codes)(const PanelView& w, const std::byte* x, int64_t m, float* y, int64_t panel0,
                     int64_t panel1, std::byte* scratch);
  int64_t (*gemm_codes_scratch_bytes)(const PanelView& w);
  // A form of its own for gemm_codes, or null: x comes in blocks of kCodesBlockRows rows then, the
  // last one perhaps with fewer, that follow each other; a block is a multiple of 64 bytes, 64-byte
  // aligned. x [rows], at least one. Such a table also has prepare_codes_for_gemv.
  int64_t (*codes_block_bytes)(const PanelView& w) = nullptr;
  void (*prepare_codes_block)(const PanelView& w, const RowCodes* x, int64_t rows,
                              std::byte* out) = nullptr;
  // out[c · ld + r] = scale · (code − zero) for all 16 rows r and all columns c of one panel.
  void (*dequantize)(const PanelView& w, int64_t panel, float* out, int64_t ld);

  // y [m, rows] for rows row0 … row1 − 1, from x [m, cols].
  void (*dense_gemv)(const DenseView& w, const float* x, int64_t m, float* y, int64_t row0,
                     int64_t row1);
  // n values to float.
  void (*widen)(const void* values, Stored type, float* out, int64_t n);

  // A way of its own for the attention of many queries, or null. d is a multiple of 32. Keys and
  // values are prepared once, any 32 of them (key0 and key1 multiples of 32, but for an end) apart
  // from the others; all memory is 64-byte aligned. Relative error of a score about 2⁻¹⁵ of
  // |q|·|k|.
  int64_t (*attention_keys_bytes)(int64_t keys, int64_t d) = nullptr;
  void (*prepare_attention_keys)(const AttentionKeys& x, int64_t key0, int64_t key1,
                                 std::byte* out) = nullptr;
  int64_t (*attention_scratch_bytes)(int64_t keys, int64_t d) = nullptr;
  void (*attention_tile)(const AttentionTile& t, const AttentionKeys& x, const std::byte* keys,
                         std::byte* scratch) = nullptr;
};

extern const PackedIsa kScalarIsa;
extern const PackedIsa kAvx2Isa;    // x86-64 builds only
extern const PackedIsa kAvx512Isa;  // x86-64 builds only
extern const PackedIsa kAmxIsa;     // x86-64 builds only
extern const PackedIsa kNeonIsa;    // AArch64 builds only

// The tables of this build, the best first, ended by null. Defined in packed_isa_x86.cpp,
// packed_isa_arm.cpp or packed_isa_other.cpp: the build takes the file that fits the processor
// family.
extern const PackedIsa* const kPackedIsas[];

// The table in use; tensor/isa.h says how it is chosen.
const PackedIsa& active_packed_isa();

// One quad = 4 columns × 16 rows: codes[4r + j] is row r, column 4·quad + j of a block. The
// definition of the layout is this function and its inverse in tensor/packed.cpp.
void unpack_quad(const uint8_t* block, int bits, int64_t quad, uint8_t* codes);

}  // namespace omq::cpu
