// The DecodePlan of the CPU: stages shared out to the pool.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "models/decode_plan_impl.h"
#include "tensor/decode_attention.h"
#include "tensor/decode_kernels.h"
#include "tensor/kernels.h"

namespace omq {
namespace {

// Matrices that share their input share its quantisation too: they do in every model that is read.
RowProducts products(std::initializer_list<const nn::Linear*> linears, RowOutput output,
                     int64_t batch) {
  std::vector<RowMatrix> matrices;
  for (const nn::Linear* l : linears) matrices.push_back(row_matrix(*l));
  return {std::move(matrices), output, (*linears.begin())->input_quant, batch};
}

struct Layer {
  const LlamaBlock* block;
  RowProducts qkv, o, gate_up, down;
};

void norm(Tensor& y, const Tensor& x, const nn::RMSNorm& n) {
  cpu_kernels().rms_norm(y, x, n.weight, n.bias, n.eps);
}

struct CpuPlan final : DecodePlan::Impl {
  const Model* model;
  std::vector<Layer> layers;
  RowProducts head;
  DecodeAttention attention;
  Tensor ids, position;  // I32 [B], [1]
  Tensor x, normed;      // [B, D]: the residual streams, and what the products read
  Tensor qkv;            // [B · (H + 2K)·d]
  Tensor q, k, v;        // its parts, [B, 1, heads, d]
  Tensor q_turned, k_turned, v_kept, attended;  // [B, 1, heads, d]
  Tensor attended_rows;                         // the same memory as [B, H·d]
  Tensor gated;                                 // [B, F]
  Tensor scores;                                // [B, V]

  CpuPlan(const Model& m, int64_t capacity, int64_t batch);
  void step(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches) override;
  std::span<const float> logits() override;
  void choose(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches,
              std::span<int32_t> chosen) override;
  bool can_choose(const SamplerOptions& sampling) const override {
    return sampling.takes_largest();
  }
  void choose_by(const SamplerOptions&, int64_t, std::span<const double>) override {}
  void embed(std::span<const int32_t> tokens);
  void attend(const nn::Attention& a, nn::KVCache& cache);
  void layer(Layer& l, nn::KVCache& cache);
};

CpuPlan::CpuPlan(const Model& m, int64_t capacity, int64_t B)
    : model(&m),
      head(products({&m.ends.lm_head}, RowOutput::Store, B)),
      attention(m.config().num_heads, m.config().num_kv_heads, m.config().head_dim, capacity, B) {
  for (const auto& block : m.blocks) {
    const nn::Attention& a = block->self_attn;
    const nn::MLP& mlp = block->mlp;
    layers.push_back({block.get(), products({&a.q_proj, &a.k_proj, &a.v_proj}, RowOutput::Store, B),
                      products({&a.o_proj}, RowOutput::Add, B),
                      products({&mlp.gate_proj, &mlp.up_proj}, RowOutput::SiluMul, B),
                      products({&mlp.down_proj}, RowOutput::Add, B)});
  }
  const ModelConfig& c = m.config();
  const int64_t H = c.num_heads, K = c.num_kv_heads, d = c.head_dim;
  ids = Tensor::zeros({B}, DType::I32);
  position = Tensor::zeros({1}, DType::I32);
  x = Tensor::zeros({B, c.hidden_size});
  normed = Tensor::zeros({B, c.hidden_size});
  qkv = Tensor::zeros({B * (H + 2 * K) * d});
  const auto part = [&](int64_t heads, int64_t first) {  // the products stand one behind the other
    return qkv.alias({B, 1, heads, d}, {heads * d, heads * d, d, 1}, B * first * d);
  };
  q = part(H, 0), k = part(K, H), v = part(K, H + K);
  q_turned = Tensor::zeros({B, 1, H, d});
  k_turned = Tensor::zeros({B, 1, K, d});
  v_kept = Tensor::zeros({B, 1, K, d});
  attended = Tensor::zeros({B, 1, H, d});
  attended_rows = attended.alias({B, H * d}, {H * d, 1});
  gated = Tensor::zeros({B, c.intermediate_size});
  scores = Tensor::zeros({B, c.vocab_size});
}

void CpuPlan::embed(std::span<const int32_t> tokens) {
  std::copy(tokens.begin(), tokens.end(), ids.data<int32_t>());
  const nn::Weight& table = model->ends.embed_tokens.table;
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&table))
    cpu_packed_kernels().packed_embedding(
        x, static_cast<const nn::PackedIntWeight&>(**packed).packed(), ids);
  else
    cpu_kernels().embedding(x, std::get<Tensor>(table), ids);
}

// q, k, v as they come from the products → the cache and `attended`.
void CpuPlan::attend(const nn::Attention& a, nn::KVCache& cache) {
  const DenseKernels& kernel = cpu_kernels();
  const nn::RopeTables& tables = model->rope();
  if (a.q_norm) norm(q, q, *a.q_norm);
  if (a.k_norm) norm(k, k, *a.k_norm);
  kernel.rope(q_turned, q, tables.cos, tables.sin, position, false);
  kernel.rope(k_turned, k, tables.cos, tables.sin, position, false);
  if (a.taps.q) kernel.fake_quant_rows(q_turned, q_turned, *a.taps.q);
  // A cache that keeps codes rounds by itself.
  if (a.taps.k && cache.quant().k != a.taps.k)
    kernel.fake_quant_rows(k_turned, k_turned, *a.taps.k);
  const bool round_v = a.taps.v && cache.quant().v != a.taps.v;
  if (round_v) kernel.fake_quant_rows(v_kept, v, *a.taps.v);
  cache.append(k_turned, round_v ? v_kept : v);
  const nn::KVCache::Store &keys = cache.keys(), &values = cache.values();
  attention(q_turned.data<float>(), {keys.floats, keys.codes}, {values.floats, values.codes},
            cache.length(), attended.data<float>());
}

void CpuPlan::layer(Layer& l, nn::KVCache& cache) {
  const LlamaBlock& b = *l.block;
  norm(normed, x, b.input_layernorm);
  l.qkv(normed, qkv.data<float>());
  attend(b.self_attn, cache);
  l.o(attended_rows, x.data<float>());
  norm(normed, x, b.post_attention_layernorm);
  l.gate_up(normed, gated.data<float>());
  l.down(gated, x.data<float>());
}

void CpuPlan::step(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches) {
  embed(tokens);
  *position.data<int32_t>() = static_cast<int32_t>(at);
  for (size_t i = 0; i < layers.size(); ++i) layer(layers[i], caches[i]);
  norm(normed, x, model->ends.norm);
}

std::span<const float> CpuPlan::logits() {
  head(normed, scores.data<float>());
  return {scores.data<float>(), static_cast<size_t>(scores.numel())};
}

void CpuPlan::choose(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches,
                     std::span<int32_t> chosen) {
  step(tokens, at, caches);
  const std::span<const float> all = logits();
  const size_t V = all.size() / chosen.size();
  for (size_t n = 0; n < chosen.size(); ++n) {
    const auto row = all.subspan(n * V, V);
    size_t best = 0;
    bool broken = false;
    for (size_t i = 0; i < V; ++i) {
      broken |= std::isnan(row[i]);
      if (row[i] > row[best]) best = i;
    }
    chosen[n] = broken ? kChosenNaN : static_cast<int32_t>(best);
  }
}

}  // namespace

std::unique_ptr<DecodePlan::Impl> cpu_decode_plan(const Model& model, int64_t capacity,
                                                  int64_t batch) {
  return std::make_unique<CpuPlan>(model, capacity, batch);
}

}  // namespace omq
