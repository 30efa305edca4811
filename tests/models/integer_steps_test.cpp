// Integers against the simulation, step by step: both are given the same numbers at the entrance of
// every step of a block, so that nothing but the step itself can make them differ. What they round
// to codes next must be the same code, unless the value lies on a tie.
//
// (From end to end the two drift apart all the same, as two runs of either do whose inputs differ
// in the last place: docs/performance.md.)
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "models/model.h"
#include "nn/linear_input.h"
#include "quant/activations.h"
#include "quant/calibrate.h"
#include "tests/models/files.h"
#include "tests/support/close.h"
#include "tests/support/random_model.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

constexpr double kRounding = 2e-6;  // ‖difference‖ / ‖value‖ of a product of codes
constexpr double kTie = 1e-4;       // in codes: how far from a tie rounding can carry a value

struct Tally {
  int64_t codes = 0, differ = 0;
};

// simulated and integer: the same rows by both ways, before they are put on the grid s.
void compare(const char* what, const Tensor& simulated, const Tensor& integer,
             const std::optional<RowQuant>& s, Tally& tally) {
  CAPTURE(what);
  CHECK(close(integer, simulated, kRounding * kRounding));
  if (!s) return;
  const QuantizedRows a = nn::quantized(contiguous(simulated), *s),
                      b = nn::quantized(contiguous(integer), *s);
  const std::vector<double> x = values(simulated), y = values(integer);
  const auto code_a = a.codes.to_vector<uint8_t>(), code_b = b.codes.to_vector<uint8_t>();
  const auto grid_a = a.grid.to_vector<float>(), grid_b = b.grid.to_vector<float>();
  const auto cols = static_cast<size_t>(a.cols);
  // How far the middle between two codes is from t.
  const auto from_tie = [](double t) { return std::abs(t - std::floor(t) - 0.5); };
  double farthest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t row = i / cols;
    const double h = static_cast<double>(grid_a[2 * row]);
    const int zero_a = static_cast<int>(grid_a[2 * row + 1]),
              zero_b = static_cast<int>(grid_b[2 * row + 1]);
    const int step = (code_a[i] - zero_a) - (code_b[i] - zero_b);
    ++tally.codes;
    tally.differ += step != 0;
    if (step == 0) continue;
    CHECK(std::abs(step) == 1);
    // Where the zero point went the other way, an end of the row was on a tie of its own, and the
    // codes there are clamped one step apart.
    if (zero_a == zero_b) farthest = std::max({farthest, from_tie(x[i] / h), from_tie(y[i] / h)});
  }
  CHECK(farthest < kTie);
}

// a: simulated, dense; b: the same block packed. Returns what the simulation gives.
Tensor compare_block(const LlamaBlock& a, const LlamaBlock& b, const Tensor& x,
                     const nn::Positions& at, Tally& tally) {
  const nn::Attention& attention_a = a.self_attn;
  const nn::Attention::Taps& taps = attention_a.taps;
  const std::optional<RowQuant> in = attention_a.q_proj.input_quant;
  const int64_t B = x.dim(0), T = x.dim(1), d = attention_a.head_dim;
  const auto heads = [&](const nn::Linear& l, const Tensor& y, int64_t count, bool turned) {
    const Tensor z = reshape(l(y), {B, T, count, d});
    return turned ? rope(z, at.tables.cos, at.tables.sin, at.index) : z;
  };
  const Tensor n = a.input_layernorm(x);
  const Tensor q = heads(attention_a.q_proj, n, attention_a.heads, true),
               k = heads(attention_a.k_proj, n, attention_a.kv_heads, true),
               v = heads(attention_a.v_proj, n, attention_a.kv_heads, false);
  compare("q", q, heads(b.self_attn.q_proj, n, attention_a.heads, true), taps.q, tally);
  compare("k", k, heads(b.self_attn.k_proj, n, attention_a.kv_heads, true), taps.k, tally);
  compare("v", v, heads(b.self_attn.v_proj, n, attention_a.kv_heads, false), taps.v, tally);
  const Tensor y =
      reshape(attention(fake_quant_rows(q, *taps.q), fake_quant_rows(k, *taps.k),
                        fake_quant_rows(v, *taps.v),
                        {.scale = 1 / std::sqrt(static_cast<double>(d)), .causal = true}),
              {B, T, attention_a.heads * d});
  const Tensor h = x + attention_a.o_proj(y), m = a.post_attention_layernorm(h);
  compare("behind o", m, b.post_attention_layernorm(x + b.self_attn.o_proj(y)), in, tally);
  const Tensor f = silu_mul(a.mlp.gate_proj(m), a.mlp.up_proj(m));
  compare("behind gate and up", f, silu_mul(b.mlp.gate_proj(m), b.mlp.up_proj(m)), in, tally);
  const Tensor out = h + a.mlp.down_proj(f);
  compare("behind down", out, h + b.mlp.down_proj(f), std::nullopt, tally);
  return out;
}

// The block with its matrices packed to nearest, and with them dequantised; both quantise all
// activations to so many bits.
struct Twins {
  LlamaBlock simulated, integer;

  Twins(const LlamaBlock& block, const quant::QuantSpec& spec) : simulated(block), integer(block) {
    const auto dense = simulated.linears(), packed = integer.linears();
    for (size_t i = 0; i < dense.size(); ++i) {
      const auto weight = quant::pack_nearest(dense[i].linear->dense(), spec);
      packed[i].linear->weight = weight;
      dense[i].linear->weight = weight->dequantize();
    }
    quant::quantize_activations(simulated, spec);
    quant::quantize_activations(integer, spec);
  }
};

// Through the first blocks of a checkpoint, each on what the simulated ones before it gave.
Tally compare_blocks(const CheckpointReader& reader, const Tensor& ids, int blocks,
                     const quant::QuantSpec& spec) {
  const NoGrad off;
  ModelSource source(reader);
  const nn::Positions at = nn::positions(0, ids.dim(1), source.rope(ids.dim(1)));
  Tensor x = source.embed(ids);
  Tally tally;
  for (int i = 0; i < blocks; ++i) {
    CAPTURE(i);
    const Twins twins(*load_block(reader, i, LoadAs::F32), spec);
    x = compare_block(twins.simulated, twins.integer, x, at, tally);
  }
  return tally;
}

}  // namespace

TEST_CASE("integer steps: the codes that are simulated, ties aside") {
  TempDir dir;
  write_random_model(dir / "m", {.layers = 2, .seed = 5});
  std::vector<int32_t> ids;
  for (int i = 0; i < 96; ++i) ids.push_back((i * i * 31 + i * 7 + 3) % kRandomVocab);
  for (const quant::QuantSpec& spec :
       {quant::QuantSpec{.wbits = 4, .abits = 4}, quant::QuantSpec{.wbits = 8, .abits = 8},
        quant::QuantSpec{.wbits = 3, .abits = 6, .group_size = 32}}) {
    CAPTURE(spec.to_string());
    const Tally t =
        compare_blocks(*open_checkpoint(dir / "m"), Tensor::from<int32_t>(ids, {1, 96}), 2, spec);
    CHECK(t.codes > 20000);
    CHECK(t.differ * 2000 < t.codes);
  }
}

TEST_CASE("slow: integer steps: SmolLM2 at W4A4") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2; make smollm2 fetches it");
    return;
  }
  const auto reader = open_checkpoint(*file);
  std::vector<int32_t> ids = reader->tokenizer().encode(
      "The tower is 324 metres tall, about the same height as an 81-storey building, and the "
      "tallest structure in the city. Its base is square, measuring 125 metres on each side. "
      "During its construction it became the tallest structure in the world, a title that it held "
      "for 41 years until another was finished. It was the first to pass 200 and then 300 metres.");
  const auto n = static_cast<int64_t>(ids.size());
  CHECK(n > 64);
  const Tally t =
      compare_blocks(*reader, Tensor::from<int32_t>(ids, {1, n}), 6, {.wbits = 4, .abits = 4});
  CHECK(t.codes > 500000);
  CHECK(t.differ * 20000 < t.codes);
}

}  // namespace omq
