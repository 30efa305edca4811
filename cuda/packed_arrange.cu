// Packed weights into the order of packed_layout.cuh, and out of it: to dense matrices for products
// with many rows, and row by row for an embedding.
//
// Bytes: arranging reads and writes the codes once, a thread a word; dense rows are written once.
#include "cuda/packed_kernels.cuh"
#include "cuda/packed_layout.cuh"

namespace omq::cuda {
namespace {

constexpr int kThreads = 256;

// ---- panel16 → units ----

struct PanelSource {
  const uint8_t* data;
  int64_t panel_bytes, block_bytes;  // block_bytes: of every group but the last
  int bits, cols, group_cols, padded_last, groups;
  bool symmetric;
};

__device__ int panel_columns(const PanelSource& s, int group) {  // with the padding
  return group == s.groups - 1 ? s.padded_last : s.group_cols;
}

// Code of a row (0 … 15 of its panel) and column, as tensor/packed.h draws them.
__device__ uint32_t panel_code(const PanelSource& s, int panel, int row, int col) {
  if (col >= s.cols) return 0;
  const int group = col / s.group_cols, c = col % s.group_cols;
  const uint8_t* block = s.data + panel * s.panel_bytes + group * s.block_bytes;
  if (s.bits == 8) return block[64 * (c / 4) + 4 * row + c % 4];
  if (s.bits == 4) return block[64 * (c / 8) + 4 * row + c % 4] >> (c % 8 / 4 * 4) & 15;
  if (s.bits == 2) return block[64 * (c / 16) + 4 * row + c % 4] >> (c % 16 / 4 * 2) & 3;
  const uint8_t* vectors = block + 192 * (c / 32) + 4 * row + c % 4;
  const int quad = c % 32 / 4;
  if (quad < 6) return vectors[64 * (quad / 2)] >> (quad % 2 * 3) & 7;
  return vectors[64 * (quad - 6)] >> 6 | (vectors[128] >> quad & 1) << 2;
}

__global__ void arrange_codes_kernel(uint32_t* out, PanelSource s, PackedView v) {
  const int words = unit_words(v.bits, v.unit);
  const int64_t total = int64_t{v.panels} * v.units * words * 32;
  for (int64_t at = grid_index(); at < total; at += grid_stride()) {
    const int lane = static_cast<int>(at % 32), i = static_cast<int>(at / 32 % words);
    const int64_t unit = at / 32 / words;
    const int panel = static_cast<int>(unit / v.units), k = static_cast<int>(unit % v.units);
    const int r = lane / 4, q = lane % 4;
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half)
      for (int f = 0; f < v.unit / 16; ++f) {
        const CodePlace place = code_place(v.bits, v.unit, half, f);
        if (place.word != i && place.third != i) continue;
        for (int c = 0; c < 4; ++c) {
          const uint32_t code =
              panel_code(s, panel, r + 8 * half, k * v.unit + four_column(q, f) + c);
          const uint32_t here = place.third < 0 ? code : code & 3;
          if (place.word == i) word |= here << (place.bit + 8 * c);
          if (place.third == i) word |= (code >> 2) << (place.third_bit + 8 * c);
        }
      }
    out[unit * words * 32 + word_offset(words, i, lane)] = word;
  }
}

__global__ void arrange_grids_kernel(GridWord* out, PanelSource s, PackedView v) {
  const int64_t total = int64_t{v.panels} * v.groups * 16;
  for (int64_t at = grid_index(); at < total; at += grid_stride()) {
    const int row = static_cast<int>(at % 16), group = static_cast<int>(at / 16 % v.groups);
    const int64_t panel = at / 16 / v.groups;
    const uint8_t* grid = s.data + panel * s.panel_bytes + group * s.block_bytes +
                          int64_t{16} * panel_columns(s, group) * s.bits / 8;
    const __half scale = reinterpret_cast<const __half*>(grid)[row];
    out[at] = grid_word(scale, s.symmetric ? 1 << (s.bits - 1) : grid[32 + row]);
  }
}

PanelSource panel_source(const PackedInt& w) {
  PanelSource s{};
  s.data = w.data.data<uint8_t>();
  s.panel_bytes = w.panel_bytes();
  s.block_bytes = w.block_bytes(0);
  s.bits = w.spec.bits;
  s.cols = static_cast<int>(w.cols);
  s.group_cols = static_cast<int>(w.spec.group_cols(w.cols));
  s.groups = static_cast<int>(w.groups());
  s.padded_last =
      static_cast<int>(PackedInt::padded_columns(w.group_columns(w.groups() - 1), w.spec.bits));
  s.symmetric = w.spec.symmetric;
  return s;
}

// ---- units → dense ----

template <int kBits, int kUnit> struct LaneUnit {
  uint32_t words[unit_words(kBits, kUnit)];
  __device__ LaneUnit(const uint32_t* unit, int lane) {
    constexpr int kWords = unit_words(kBits, kUnit);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = unit[word_offset(kWords, i, lane)];
  }
};

// A warp a unit: rows of y [N, K] from the codes. wide: four columns may be stored at once.
template <int kBits, int kUnit>
__global__ void dequantize_kernel(Operand y, PackedView v, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, q = lane % 4;
  const int64_t total = int64_t{v.panels} * v.units;
  for (int64_t at = grid_index() / 32; at < total; at += grid_stride() / 32) {
    const int panel = static_cast<int>(at / v.units), k = static_cast<int>(at % v.units);
    const LaneUnit<kBits, kUnit> unit(
        reinterpret_cast<const uint32_t*>(v.codes) + at * unit_words(kBits, kUnit) * 32, lane);
    const GridWord* grid = v.grids + (int64_t{panel} * v.groups + k / v.units_per_group) * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = panel * 16 + r + 8 * half;
      if (row >= v.rows) continue;
      const GridWord g = grid[r + 8 * half];
      const float scale = grid_scale(g), zero = static_cast<float>(grid_zero(g));
      const int64_t start = row * int64_t{v.cols};
      float value[8];
#pragma unroll
      for (int f = 0; f < kUnit / 16; ++f) {
        const uint32_t codes = four_codes<kBits, kUnit>(unit.words, half, f);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          value[f % 2 * 4 + j] = (static_cast<float>(codes >> (8 * j) & 255) - zero) * scale;
        if (f % 2 == 0) continue;
        const int col = k * kUnit + four_column(q, f - 1);
        if (wide && col < v.cols) {
          Pack p;
#pragma unroll
          for (int j = 0; j < 8; ++j) p.v[j] = value[j];
          store_pack(y, (start + col) / kPack, p);
        } else {
          for (int j = 0; j < 8; ++j)
            if (col + j < v.cols) store(y, start + col + j, value[j]);
        }
      }
    }
  }
}

// The same into halves whose rows are whole packs: through shared memory, so that a warp's stores
// cover whole lines.
template <int kBits, int kUnit>
__global__ void __launch_bounds__(kThreads) dequantize_halves_kernel(__half* y, PackedView v) {
  // Two rows' stores of a quarter of a warp meet different banks.
  constexpr int kRowBytes = 2 * kUnit + (kUnit == 32 ? 0 : 64);
  __shared__ __align__(16) char tiles[kThreads / 32][16 * kRowBytes];
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, q = lane % 4;
  char* tile = tiles[threadIdx.x / 32];
  const int64_t total = int64_t{v.panels} * v.units;
  for (int64_t at = grid_index() / 32; at < total; at += grid_stride() / 32) {
    const int panel = static_cast<int>(divide(at, v.units)),
              k = static_cast<int>(at - int64_t{panel} * v.units);
    const LaneUnit<kBits, kUnit> unit(
        reinterpret_cast<const uint32_t*>(v.codes) + at * unit_words(kBits, kUnit) * 32, lane);
    const GridWord* grid = v.grids + (int64_t{panel} * v.groups + k / v.units_per_group) * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const GridWord g = grid[r + 8 * half];
      const float scale = grid_scale(g), zero = static_cast<float>(grid_zero(g));
#pragma unroll
      for (int f = 0; f < kUnit / 16; f += 2) {
        const auto pair = [&](int four, int j) {
          const uint32_t codes = four_codes<kBits, kUnit>(unit.words, half, four);
          const auto value = [&](int i) {
            return (static_cast<float>(codes >> (8 * i) & 255) - zero) * scale;
          };
          return two_16bit(value(j), value(j + 1), DType::F16);
        };
        *reinterpret_cast<uint4*>(tile + (r + 8 * half) * kRowBytes + 2 * four_column(q, f)) =
            make_uint4(pair(f, 0), pair(f, 2), pair(f + 1, 0), pair(f + 1, 2));
      }
    }
    __syncwarp();
    constexpr int kPacks = kUnit / kPack;  // of a row
#pragma unroll
    for (int i = 0; i < 16 * kPacks / 32; ++i) {
      const int n = i * 32 + lane, in_panel = n / kPacks, pack = n % kPacks;
      const int row = panel * 16 + in_panel, col = k * kUnit + pack * kPack;
      if (row < v.rows && col < v.cols)
        *reinterpret_cast<uint4*>(y + static_cast<int64_t>(row) * v.cols + col) =
            *reinterpret_cast<const uint4*>(tile + in_panel * kRowBytes + pack * 16);
    }
    __syncwarp();
  }
}

// A warp a unit of one looked-up row: the lanes whose r is the row's write.
template <int kBits, int kUnit>
__global__ void packed_embedding_kernel(float* y, PackedView v, const int32_t* ids, int64_t count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, q = lane % 4;
  for (int64_t at = grid_index() / 32; at < count * v.units; at += grid_stride() / 32) {
    const int64_t i = at / v.units;
    const int k = static_cast<int>(at % v.units), id = ids[i];
    const bool known = id >= 0 && id < v.rows;
    const int panel = known ? id / 16 : 0, row = known ? id % 16 : 0;
    if (row % 8 != r) continue;
    const LaneUnit<kBits, kUnit> unit(
        reinterpret_cast<const uint32_t*>(v.codes) +
            (int64_t{panel} * v.units + k) * unit_words(kBits, kUnit) * 32,
        lane);
    const GridWord grid = v.grids[(int64_t{panel} * v.groups + k / v.units_per_group) * 16 + row];
    const float scale = known ? grid_scale(grid) : __int_as_float(0x7fc00000),
                zero = static_cast<float>(grid_zero(grid));
#pragma unroll
    for (int f = 0; f < kUnit / 16; ++f) {
      const uint32_t upper = four_codes<kBits, kUnit>(unit.words, 0, f),
                     lower = four_codes<kBits, kUnit>(unit.words, 1, f),
                     codes = row < 8 ? upper : lower;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int col = k * kUnit + four_column(q, f) + j;
        if (col < v.cols)
          y[i * v.cols + col] = (static_cast<float>(codes >> (8 * j) & 255) - zero) * scale;
      }
    }
  }
}

}  // namespace

// ---- launchers ----

void packed_arrange(PackedInt& y, const PackedInt& x) {
  y = x;
  y.data = {};
  if (unit_of(x) == 0) return;
  PackedView v = packed_view(x, nullptr);
  Tensor out = Tensor::empty({packed_bytes(v)}, DType::U8, x.data.device());
  v = packed_view(x, out.data<uint8_t>());
  const PanelSource source = panel_source(x);
  const int64_t words = int64_t{v.panels} * v.units * v.unit_bytes() / 4;
  launch("packed_arrange", out, arrange_codes_kernel, blocks_for(words, kThreads), kThreads, 0,
         reinterpret_cast<uint32_t*>(out.raw()), source, v);
  launch("packed_arrange", out, arrange_grids_kernel,
         blocks_for(int64_t{v.panels} * v.groups * 16, kThreads), kThreads, 0,
         const_cast<GridWord*>(v.grids), source, v);
  y.data = std::move(out);
}

void packed_dequantize(Tensor& y, const PackedInt& w) {
  const PackedView v = view_of("packed_dequantize", w);
  const Operand out = operand("packed_dequantize", y);
  const bool wide = in_packs(v.cols, out);
  with_layout(v, [&](auto bits, auto unit) {
    if (wide && y.dtype() == DType::F16)
      return launch("packed_dequantize", y,
                    dequantize_halves_kernel<decltype(bits)::value, decltype(unit)::value>,
                    blocks_for(int64_t{v.panels} * v.units, kThreads / 32), kThreads, 0,
                    static_cast<__half*>(y.raw()), v);
    launch("packed_dequantize", y, dequantize_kernel<decltype(bits)::value, decltype(unit)::value>,
           blocks_for(int64_t{v.panels} * v.units, kThreads / 32), kThreads, 0, out, v, wide);
  });
}

void packed_embedding(Tensor& y, const PackedInt& table, const Tensor& ids) {
  const PackedView v = view_of("packed_embedding", table);
  const int64_t count = ids.numel();
  with_layout(v, [&](auto bits, auto unit) {
    launch("packed_embedding", y,
           packed_embedding_kernel<decltype(bits)::value, decltype(unit)::value>,
           blocks_for(count * v.units, kThreads / 32), kThreads, 0, y.data<float>(), v,
           ids.data<int32_t>(), count);
  });
}

}  // namespace omq::cuda
