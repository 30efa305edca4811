// Model: embed → blocks → norm → head.
#include "models/model.h"

#include <algorithm>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "models/packed_model.h"

namespace omq {

ModelEnds load_ends(const CheckpointReader& reader, LoadAs as) {
  const ModelConfig& c = reader.config();
  const std::optional<PackedConfig> packed = PackedConfig::of(c);
  const PackedConfig* p = packed ? &*packed : nullptr;
  ModelEnds ends;
  ends.embed_tokens.table =
      load_weight(reader, p, "model.embed_tokens", c.vocab_size, c.hidden_size, as);
  ends.norm.weight = to(reader.get("model.norm.weight", {c.hidden_size}), DType::F32);
  ends.norm.eps = c.rms_norm_eps;
  ends.lm_head.weight = c.tie_word_embeddings
                            ? ends.embed_tokens.table
                            : load_weight(reader, p, "lm_head", c.vocab_size, c.hidden_size, as);
  return ends;
}

nn::RopeTables model_rope(const CheckpointReader& reader, int64_t count) {
  const ModelConfig& c = reader.config();
  return nn::rope_tables(
      nn::rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling, c.rope_divisors), count);
}

Model Model::load(const CheckpointReader& reader, int64_t context, LoadAs as) {
  Model m;
  m.config_ = reader.config();
  if (context <= 0) context = std::min<int64_t>(m.config_.usable_context(), 8192);
  m.config_.check_context(context);
  m.ends = load_ends(reader, as);
  for (int i = 0; i < m.config_.num_layers; ++i) m.blocks.push_back(load_block(reader, i, as));
  m.rope_ = model_rope(reader, context);
  return m;
}

Model Model::assemble(ModelConfig config, ModelEnds ends,
                      std::vector<std::unique_ptr<LlamaBlock>> blocks, int64_t context) {
  Model m;
  m.config_ = std::move(config);
  m.ends = std::move(ends);
  m.blocks = std::move(blocks);
  m.rope_ = nn::rope_tables(nn::rope_frequencies(m.config_.head_dim, m.config_.rope_theta,
                                                 m.config_.rope_scaling, m.config_.rope_divisors),
                            context);
  return m;
}

namespace {

// The type in which `rows` rows are multiplied. On a GPU weights that are not F32 meet many rows in
// F16 (cuda/packed.cpp): then attention works in it too, and what is written to be multiplied is
// written in it; a value beyond 65504 is lost.
Compute compute_of(const Model& m, int64_t rows) {
  if (m.device().type == DeviceType::CPU || rows <= kFewRows || m.blocks.empty())
    return Compute::F32;
  const auto linears = m.blocks.front()->linears();
  const bool wide = std::any_of(linears.begin(), linears.end(), [](const auto& l) {
    return !l.linear->is_packed() && l.linear->dense().dtype() == DType::F32;
  });
  return wide ? Compute::F32 : Compute::F16;
}

}  // namespace

Tensor Model::forward(const Tensor& ids, int64_t first, std::vector<nn::KVCache>* caches) const {
  check(ids.ndim() == 2, "model: ids of shape {}, [B,T] wanted", ids.shape());
  const nn::Positions at = nn::positions(first, ids.dim(1), rope_);
  Tensor x = ends.embed_tokens(ids.device() == device() ? ids : to(ids, device()));
  {
    const ComputeScope compute(compute_of(*this, ids.numel()));
    for (size_t i = 0; i < blocks.size(); ++i)
      x = blocks[i]->forward(x, at, caches ? &(*caches)[i] : nullptr);
  }
  return ends.norm(x);
}

std::vector<nn::KVCache> Model::new_caches(int64_t batch, int64_t capacity) const {
  std::vector<nn::KVCache> caches;
  for (const auto& block : blocks) {
    const nn::Attention::Taps& taps = block->self_attn.taps;
    nn::CacheQuant quant{taps.k ? taps.k : kept.k, taps.v ? taps.v : kept.v, kept.floats};
    if (device().type != DeviceType::CPU) {
      if (!kept.k || !kept.v || !quant.alike()) quant.k = quant.v = std::nullopt;
      quant.floats = DType::F16;
    }
    caches.emplace_back(batch, capacity, config_.num_kv_heads, config_.head_dim, device(), quant);
  }
  return caches;
}

namespace {

void move_weight(nn::Weight& w, Device device) {
  if (auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&w)) {
    if (auto moved = (*packed)->on_device(device)) {
      w = std::move(moved);
      return;
    }
    w = (*packed)->dequantize();
  }
  w = to(std::get<Tensor>(w), device);
}

}  // namespace

void Model::move_to(Device device) {
  if (device == this->device()) return;
  const bool tied = config_.tie_word_embeddings;
  move_weight(ends.embed_tokens.table, device);
  if (tied)
    ends.lm_head.weight = ends.embed_tokens.table;
  else
    move_weight(ends.lm_head.weight, device);
  ends.norm.weight = to(ends.norm.weight, device);
  for (const auto& block : blocks) {
    for (const auto& [name, linear] : block->linears()) move_weight(linear->weight, device);
    nn::move_to(*block, device);
  }
  rope_ = {to(rope_.cos, device), to(rope_.sin, device)};
}

namespace {

size_t weight_bytes(const nn::Weight& w) {
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&w))
    return (*packed)->nbytes();
  return std::get<Tensor>(w).nbytes();
}

}  // namespace

ModelSize model_size(const Model& model) {
  ModelSize size;
  for (const auto& block : model.blocks)
    for (const auto& [name, linear] : block->linears()) {
      size.block_weights += linear->in_features() * linear->out_features();
      size.block_bytes += weight_bytes(linear->weight);
    }
  for (const auto& block : model.blocks)
    block->visit([&size](std::string_view name, Tensor& t) {
      if (name.find(".online.") != std::string_view::npos) size.block_bytes += t.nbytes();
    });
  const ModelConfig& c = model.config();
  const int64_t table = c.vocab_size * c.hidden_size;
  const size_t head = weight_bytes(model.ends.lm_head.weight);
  size.weights = size.block_weights + table * (c.tie_word_embeddings ? 1 : 2);
  size.bytes = size.block_bytes + head +
               (c.tie_word_embeddings ? 0 : weight_bytes(model.ends.embed_tokens.table));
  size.token_bytes = size.block_bytes + head;
  return size;
}

Tensor ModelSource::embed(const Tensor& ids) {
  if (std::holds_alternative<Tensor>(embedding_.table) &&
      !std::get<Tensor>(embedding_.table).defined()) {
    const ModelConfig& c = reader_.config();
    embedding_.table = reader_.get("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  }
  return embedding_(ids);
}

}  // namespace omq
