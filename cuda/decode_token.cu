// All layers of a token in one kernel. A layer is five phases with a barrier of the whole grid
// behind each, as the stages of decode_plan.h; what launches and dependencies would cost per stage
// (a few microseconds, five times a layer) is what this kernel exists to save.
//
//   grid     one block of 16 warps a processor, all resident (a cooperative launch)
//   weights  stream through a ring in shared memory as in packed_gemv.cu, but without end: a warp's
//            units of all phases stand one behind the other, so while a block waits at a barrier or
//            prepares x, the next phases' weights are on their way (up to 150 KB a processor)
//   phase    x from the L2 cache → bytes in shared memory; the block's units; the warps' sums added
//            in order and written; barrier
//   attention   (head, split) pairs dealt to the blocks
//
// Buffers that other blocks write are read past the L1 cache. Floor of a layer: its weights' bytes.
#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/decode_attention.cuh"
#include "cuda/packed.h"
#include "cuda/packed_unit.cuh"

namespace omq::cuda {
namespace {

constexpr int kTokenPieces = 6;  // fours of columns that a thread keeps in registers
constexpr int kMaxCols = kTokenPieces * 4 * kGemvThreads;

constexpr int token_stages(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 10 : 15; }

// What a warp must know of a phase to fetch its units.
struct __align__(16) StreamPhase {
  const uint8_t* codes[kMaxMatrices];
  const __half2* grids[kMaxMatrices];
  int panels[kMaxMatrices];
  int work, units, units_per_group, groups, pairs;
};

// And what a block must know to prepare x and to write.
struct __align__(16) TokenPhase {
  const float *x, *gain, *shift;
  float* y;
  const float* bias[kMaxMatrices];
  int rows[kMaxMatrices], panels[kMaxMatrices];
  int matrices, work, units, cols;
  RowOutput output;
  int quantise;
  float eps;
  RowQuant s;
};

struct TokenLayer {
  HeadForm q, k, v;
  Operand keys, values;
};

struct TokenArgs {
  const StreamPhase* stream;  // [phases]
  const TokenPhase* phases;   // [phases], four a layer
  const TokenLayer* layers;
  uint32_t* barrier;        // [2]: blocks that have arrived, blocks that have ended; zeros
  AttentionArgs attention;  // of all layers but for what a TokenLayer says
  int layer_count, x_bytes, x_units, part_panels;
};

// ---- the barrier of the grid ----

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(uint32_t* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}

struct GridBarrier {
  uint32_t* count;
  uint32_t passed = 0;
  // Everything that any block wrote before is seen by all blocks behind it.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    passed += gridDim.x;
    if (threadIdx.x == 0) add_release(count);
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0)
      while (load_acquire(count) < passed) {
      }
    __syncthreads();
  }
};

// ---- a phase ----

template <int kBits, int kUnit> struct Stream {  // of one warp
  static constexpr int kStages = token_stages(kBits), kSlot = slot_bytes(kBits, kUnit),
                       kUnitBytes = unit_words(kBits, kUnit) * 128;
  const StreamPhase* phases;  // shared
  const char* ring;
  int count, warp, lane;
  int phase = -1, panel = 0, panels = 0, unit = 0;  // of the next unit to fetch
  const uint8_t* codes = nullptr;
  const __half2* grids = nullptr;

  __device__ static int panels_of(const StreamPhase& p) {
    const int mine = (p.work - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                     static_cast<int>(gridDim.x);
    return p.pairs ? 2 * mine : mine;
  }
  __device__ void enter_panel(const StreamPhase& p) {
    int at =
        static_cast<int>(blockIdx.x) + (p.pairs ? panel / 2 : panel) * static_cast<int>(gridDim.x);
    int i = p.pairs ? panel % 2 : 0;
    if (!p.pairs)
      while (i < kMaxMatrices - 1 && at >= p.panels[i]) at -= p.panels[i++];
    codes = p.codes[i] + static_cast<int64_t>(at) * p.units * kUnitBytes;
    grids = p.grids[i] + static_cast<int64_t>(at) * p.groups * 16;
  }
  // The warp's next unit, in this phase or a later one.
  __device__ void settle() {
    while (phase < count) {
      if (phase >= 0) {
        const StreamPhase& p = phases[phase];
        const int before = panel;
        while (unit >= p.units && panel < panels) unit -= p.units, ++panel;
        if (panel < panels) {
          if (panel != before || codes == nullptr) enter_panel(p);
          return;
        }
      }
      if (++phase == count) return;
      panel = 0, unit = warp, panels = panels_of(phases[phase]), codes = nullptr;
    }
  }
  __device__ __forceinline__ void fill(int slot) {
    if (phase < count) {
      copy_unit<kBits, kUnit>(
          codes + static_cast<int64_t>(unit) * kUnitBytes,
          grids + static_cast<int64_t>(unit / phases[phase].units_per_group) * 16,
          shared_address(ring + slot * kSlot), lane);
      unit += kGemvWarps;
      settle();
    }
    copy_async_commit();
  }
};

struct Pieces {
  float4 v[kTokenPieces];
};

// This thread's columns of a vector that no block writes.
__device__ __forceinline__ void load_constant(Pieces& g, const float* p, int cols) {
#pragma unroll
  for (int i = 0; i < kTokenPieces; ++i) {
    const int c = 4 * (static_cast<int>(threadIdx.x) + i * kGemvThreads);
    if (c < cols) g.v[i] = __ldg(reinterpret_cast<const float4*>(p + c));
  }
}

// x of the phase into shared memory; gives what sums are to be multiplied by.
template <int kUnit>
__device__ __forceinline__ float stage_phase(const TokenPhase& p, const StagedX& x,
                                             const Pieces& gain) {
  const int columns = (p.cols + 127) / 128 * 128;
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int c = 4 * (static_cast<int>(threadIdx.x) + i * kGemvThreads);
      if (c < columns) f(i, c);
    }
  };
  Pieces in;
  each([&](int i, int c) {
    in.v[i] = c < p.cols ? __ldcg(reinterpret_cast<const float4*>(p.x + c)) : float4{};
  });
  if (p.gain) {
    float squares = 0;
    each([&](int i, int) {
      const float4 v = in.v[i];
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    });
    squares = team_sum<kGemvThreads>(squares);
    const float r = 1.0f / sqrtf(squares / static_cast<float>(p.cols) + p.eps);
    each([&](int i, int c) {
      if (c >= p.cols) return;
      float4& v = in.v[i];
      const float4 g = gain.v[i];
      v = make_float4(v.x * r * g.x, v.y * r * g.y, v.z * r * g.z, v.w * r * g.w);
      if (!p.shift) return;
      const float4 b = __ldg(reinterpret_cast<const float4*>(p.shift + c));
      v = make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
    });
  }
  float scale = 1;
  if (p.quantise) {
    float hi = -INFINITY, lo = -INFINITY;  // lo: the largest of −v; NaN stays
    each([&](int i, int c) {
      if (c >= p.cols) return;
      const float4 v = in.v[i];
      for (const float f : {v.x, v.y, v.z, v.w}) {
        hi = f > hi || f != f ? f : hi;
        lo = -f > lo || f != f ? -f : lo;
      }
    });
    hi = team_max<kGemvThreads>(hi);
    lo = -team_max<kGemvThreads>(lo);
    const RowGrid<float> g = row_grid(hi, lo, p.s);
    const float top = static_cast<float>((1 << p.s.bits) - 1);
    const float inside = p.s.include_zero ? 1.0f : g.scale;
    each([&](int i, int c) {
      if (c >= p.cols) return;
      float4& v = in.v[i];
      const auto coded = [&](float f) { return (row_code(f, g, top) - g.zero) * inside; };
      v = make_float4(coded(v.x), coded(v.y), coded(v.z), coded(v.w));
    });
    scale = p.s.include_zero ? g.scale : 1.0f;
  }
  const bool whole = p.quantise && p.s.include_zero;
  each([&](int i, int c) { put_bytes<kUnit>(x, p.units, c, in.v[i], whole); });
  return scale;
}

// The element of y that this thread will write: the sum's panel, the matrix and the row in it.
struct Target {
  bool panel = false;                   // there is one
  int local = 0, matrix = 0, row = -1;  // row −1: past the end
  __device__ Target(const TokenPhase& p) {
    const bool pairs = p.output == RowOutput::SiluMul;
    local = static_cast<int>(threadIdx.x) / 16;
    int at = static_cast<int>(blockIdx.x) + local * static_cast<int>(gridDim.x);
    panel = at < p.work;
    if (!panel) return;
    if (!pairs)
      while (matrix + 1 < p.matrices && at >= p.panels[matrix]) at -= p.panels[matrix++];
    row = at * 16 + static_cast<int>(threadIdx.x) % 16;
    if (row >= p.rows[matrix]) row = -1;
  }
};

// The sum of a panel's row over the warps; what was read is set to zero for the next phase.
__device__ __forceinline__ float take_sum(float* parts, int panel) {
  float v = 0;
#pragma unroll
  for (int w = 0; w < kGemvWarps; ++w) {
    float& part = parts[(panel * kGemvWarps + w) * 16 + static_cast<int>(threadIdx.x) % 16];
    v += part;
    part = 0;
  }
  return v;
}

template <int kBits, int kUnit, class T, int kEach>
__global__ void __launch_bounds__(kGemvThreads, 1)
    decode_token_kernel(const __grid_constant__ TokenArgs a) {
  using Units = Stream<kBits, kUnit>;
  constexpr int kStages = Units::kStages, kSlot = Units::kSlot;
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int phase_count = 4 * a.layer_count;
  StagedX x;
  x.bytes = shared + kGemvWarps * kStages * kSlot;
  x.scale = reinterpret_cast<float*>(x.bytes + a.x_bytes);
  x.sum = reinterpret_cast<int*>(x.scale + a.x_units);
  float* parts = reinterpret_cast<float*>(x.sum + a.x_units);
  StreamPhase* stream = reinterpret_cast<StreamPhase*>(parts + a.part_panels * kGemvWarps * 16);
  auto& memory = *reinterpret_cast<AttentionMemory<kEach, kGemvWarps>*>(stream + phase_count);
  for (int i = static_cast<int>(threadIdx.x);
       i < phase_count * static_cast<int>(sizeof(StreamPhase) / 16); i += kGemvThreads)
    reinterpret_cast<uint4*>(stream)[i] = __ldg(reinterpret_cast<const uint4*>(a.stream) + i);
  for (int i = static_cast<int>(threadIdx.x); i < a.part_panels * kGemvWarps * 16;
       i += kGemvThreads)
    parts[i] = 0;
  __syncthreads();
  Units units{stream, shared + warp * (kStages * kSlot), phase_count, warp, lane};
  units.settle();
  for (int s = 0; s < kStages; ++s) units.fill(s);
  const int position = *a.attention.position;
  const bool sound = position >= 0 && position < a.attention.capacity &&
                     position < a.attention.positions;  // the same in every block
  GridBarrier barrier{a.barrier};
  const char* x_lane =
      x.bytes + lane / 4 % 2 * PlanePlace<kUnit>::lo_after + lane % 4 * PlanePlace<kUnit>::kRun;
  int slot = 0;

  for (int index = 0; index < phase_count; ++index) {
    if (index % 4 == 1) {
      const TokenLayer& layer = a.layers[index / 4];
      AttentionArgs attention = a.attention;
      attention.q = layer.q, attention.k = layer.k, attention.v = layer.v;
      attention.keys = layer.keys, attention.values = layer.values;
      barrier.wait();
      if (sound) {
        const SplitTokens split(position + 1, attention.splits);
        for (int i = static_cast<int>(blockIdx.x); i < attention.heads * split.count;
             i += static_cast<int>(gridDim.x)) {
          attend<T, kEach, kGemvWarps>(attention, memory, position, i % attention.heads,
                                       i / attention.heads, 0);
          __syncthreads();
        }
      }
      barrier.arrive();
    }
    const TokenPhase& p = a.phases[index];
    Pieces gain;
    if (p.gain) load_constant(gain, p.gain, p.cols);
    const Target to(p);
    const int work = p.work, unit_count = p.units;
    const bool pairs = p.output == RowOutput::SiluMul;
    const float bias = to.row >= 0 && p.bias[to.matrix] ? __ldg(p.bias[to.matrix] + to.row) : 0.0f;
    if (index > 0) barrier.wait();
    float before = 0;
    if (to.row >= 0 && p.output == RowOutput::Add) before = __ldcg(p.y + to.row);
    const float scale = stage_phase<kUnit>(p, x, gain);
    __syncthreads();
    const int mine = (work - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                     static_cast<int>(gridDim.x);
    const int panels = pairs ? 2 * mine : mine;
    int panel = 0, unit = warp;
    while (unit >= unit_count && panel < panels) unit -= unit_count, ++panel;
    float total[2] = {};
    int current = panel;
    const auto flush = [&] {
      if (lane % 4 != 0) return;
      float* out = parts + (current * kGemvWarps + warp) * 16 + lane / 4;
      out[0] = total[0], out[8] = total[1];
    };
    while (panel < panels) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      if (panel != current) {
        flush();
        total[0] = total[1] = 0;
        current = panel;
      }
      multiply_unit<kBits, kUnit>(total, units.ring + slot * kSlot, x_lane + unit * (2 * kUnit),
                                  x.scale[unit], x.sum[unit], lane);
      __syncwarp();
      units.fill(slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      unit += kGemvWarps;
      while (unit >= unit_count) unit -= unit_count, ++panel;
    }
    if (current < panels) flush();
    __syncthreads();
    if (to.panel) {
      const float first = take_sum(parts, pairs ? 2 * to.local : to.local) * scale + bias;
      const float second = pairs ? take_sum(parts, 2 * to.local + 1) * scale : 0.0f;
      if (to.row >= 0 && pairs) {
        const float up = p.bias[1] ? second + __ldg(p.bias[1] + to.row) : second;
        p.y[to.row] = silu(first) * up;
      } else if (to.row >= 0) {
        const int column = to.matrix > 0 ? p.rows[0] + (to.matrix > 1 ? p.rows[1] : 0) : 0;
        p.y[column + to.row] = before + first;
      }
    }
    barrier.arrive();
  }
  copy_async_wait<0>();
  // The last block to end leaves the counters as they were found.
  if (threadIdx.x == 0 && atomicAdd(a.barrier + 1, 1) == gridDim.x - 1)
    a.barrier[0] = a.barrier[1] = 0;
}

// ---- the host's side ----

template <class T> Tensor upload(const std::vector<T>& v, Device device) {
  Tensor t = Tensor::empty({static_cast<int64_t>(v.size() * sizeof(T))}, DType::U8, device);
  device_api(device).copy(t.raw(), device, v.data(), Device{}, t.nbytes());
  return t;
}

const float* vector_of(const Tensor& t) { return t.defined() ? t.data<float>() : nullptr; }

struct Form {
  int bits = 0, unit = 0;
  bool operator==(const Form&) const = default;
};

// The phase of these products, added to both lists. False: they are of another form, or too wide.
bool add_phase(const DecodeInput& in, std::span<const RowMatrix> matrices, RowOutput output,
               const Tensor& y, Form* form, std::vector<StreamPhase>* stream,
               std::vector<TokenPhase>* phases) {
  StreamPhase s{};
  TokenPhase p{};
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto* w = std::get_if<PackedInt>(&matrices[i].weight);
    if (!w || matrices.size() > kMaxMatrices) return false;
    const PackedView v = view_of("decode", *w);
    if (form->bits == 0) *form = {v.bits, v.unit};
    if (*form != Form{v.bits, v.unit} || v.cols % 4 != 0 || v.cols > kMaxCols) return false;
    if (i > 0 && (v.units_per_group != s.units_per_group || v.groups != s.groups)) return false;
    s.codes[i] = v.codes, s.grids[i] = v.grids, s.panels[i] = p.panels[i] = v.panels;
    s.units = p.units = v.units, s.units_per_group = v.units_per_group, s.groups = v.groups;
    p.rows[i] = v.rows, p.cols = v.cols;
    p.bias[i] = vector_of(matrices[i].bias);
    if (output != RowOutput::SiluMul || i == 0) s.work += v.panels;
  }
  s.pairs = output == RowOutput::SiluMul;
  p.x = in.x.data<float>(), p.gain = vector_of(in.gain), p.shift = vector_of(in.shift);
  if (!aligned16(p.x) || !aligned16(p.gain) || !aligned16(p.shift)) return false;
  p.y = y.data<float>();
  p.matrices = static_cast<int>(matrices.size()), p.work = s.work, p.output = output;
  p.eps = static_cast<float>(in.eps);
  p.quantise = in.quant.has_value();
  if (in.quant) p.s = *in.quant;
  stream->push_back(s);
  phases->push_back(p);
  return true;
}

class TokenKernel final : public DecodeToken {
 public:
  // Null where the layers do not fit the kernel.
  static std::unique_ptr<DecodeToken> make(std::span<const DecodeLayer> layers) {
    auto token = std::unique_ptr<TokenKernel>(new TokenKernel);
    return !layers.empty() && token->prepare(layers) ? std::move(token) : nullptr;
  }
  void run() override { launch_(); }

 private:
  bool prepare(std::span<const DecodeLayer> layers) {
    std::vector<StreamPhase> stream;
    std::vector<TokenPhase> phases;
    std::vector<TokenLayer> attention;
    Form form;
    for (const DecodeLayer& l : layers) {
      if (l.attention.qkv.dim(0) != 1) return false;
      if (!add_phase(l.qkv_input, l.qkv, RowOutput::Store, l.attention.qkv, &form, &stream,
                     &phases) ||
          !add_phase(l.o_input, l.o, RowOutput::Add, l.x, &form, &stream, &phases) ||
          !add_phase(l.gate_up_input, l.gate_up, RowOutput::SiluMul, l.gated, &form, &stream,
                     &phases) ||
          !add_phase(l.down_input, l.down, RowOutput::Add, l.x, &form, &stream, &phases))
        return false;
      const AttentionArgs a = attention_args(l.attention);
      attention.push_back({a.q, a.k, a.v, a.keys, a.values});
    }
    const DecodeAttentionStage& first = layers[0].attention;
    where_ = first.y;
    const Device device = where_.device();
    args_.attention = attention_args(first);
    args_.layer_count = static_cast<int>(layers.size());
    info_ = &device_info(device.index);
    blocks_ = static_cast<unsigned>(info_->sms);
    for (const StreamPhase& s : stream) {
      const int mine = (s.work + info_->sms - 1) / info_->sms * (s.pairs ? 2 : 1);
      if (mine * 16 / (s.pairs ? 2 : 1) > kGemvThreads) return false;  // one element a thread
      args_.part_panels = std::max(args_.part_panels, mine);
      args_.x_units = std::max(args_.x_units, s.units);
    }
    args_.x_units = (args_.x_units + 31) / 32 * 32;
    // One round of (head, split) pairs.
    args_.attention.splits =
        std::clamp(info_->sms / args_.attention.heads, 1, args_.attention.splits);
    args_.x_bytes = args_.x_units * 2 * form.unit;
    stream_ = upload(stream, device), phases_ = upload(phases, device);
    layers_ = upload(attention, device);
    barrier_ = Tensor::zeros({2}, DType::I32, device);
    args_.stream = static_cast<const StreamPhase*>(stream_.raw());
    args_.phases = static_cast<const TokenPhase*>(phases_.raw());
    args_.layers = static_cast<const TokenLayer*>(layers_.raw());
    args_.barrier = static_cast<uint32_t*>(barrier_.raw());
    bool fits = false;
    PackedView v;
    v.bits = form.bits, v.unit = form.unit;
    const bool halves = first.keys.dtype() == DType::F16;
    with_layout(v, [&](auto bits, auto unit) {
      constexpr int kBits = decltype(bits)::value, kUnit = decltype(unit)::value;
      if (!halves) return;
      if constexpr (kUnit > 32)
        if (args_.attention.dim <= 128) fits = choose<kBits, kUnit, 4>();
    });
    return fits;
  }

  template <int kBits, int kUnit, int kEach> bool choose() {
    const auto kernel = decode_token_kernel<kBits, kUnit, __half, kEach>;
    const size_t shared =
        static_cast<size_t>(kGemvWarps * token_stages(kBits) * slot_bytes(kBits, kUnit)) +
        static_cast<size_t>(args_.x_bytes + args_.x_units * 8 +
                            args_.part_panels * kGemvWarps * 64) +
        static_cast<size_t>(4 * args_.layer_count) * sizeof(StreamPhase) +
        sizeof(AttentionMemory<kEach, kGemvWarps>);
    if (shared + 1024 > info_->shared_optin) return false;
    prepare_shared(kernel, shared);
    int resident = 0;
    OMQ_CUDA(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kGemvThreads, shared));
    if (resident < 1) return false;
    launch_ = [this, kernel, shared] {
      const cudaStream_t stream = stream_of(where_);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(blocks_);
      config.blockDim = dim3(kGemvThreads);
      config.dynamicSmemBytes = shared;
      config.stream = stream;
      cudaLaunchAttribute together{};
      together.id = cudaLaunchAttributeCooperative;
      together.val.cooperative = 1;
      config.attrs = &together;
      config.numAttrs = 1;
      begin_launch(stream);
      OMQ_CUDA(cudaLaunchKernelEx(&config, kernel, args_));
      check_launch("decode_token", stream);
    };
    return true;
  }

  Tensor where_, stream_, phases_, layers_, barrier_;
  const DeviceInfo* info_ = nullptr;
  unsigned blocks_ = 0;
  TokenArgs args_{};
  std::function<void()> launch_;
};

}  // namespace

// ---- launchers ----

std::unique_ptr<DecodeToken> decode_token(std::span<const DecodeLayer> layers) {
  return TokenKernel::make(layers);
}

}  // namespace omq::cuda
