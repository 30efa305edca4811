// TinyModel: random weights, forward, and its file.

#include "tools/tiny_model.h"

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "models/safetensors.h"
#include "tools/story_grammar.h"

namespace omq {

namespace {

// Normal enough: the sum of twelve uniform numbers has variance 1, and needs no function that
// libraries round differently.
float normal(StoryRandom& random) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) sum += static_cast<double>(random.next() >> 11) * 0x1p-53;
  return static_cast<float>(sum);
}

Tensor random_matrix(StoryRandom& random, int64_t rows, int64_t cols, double deviation) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (float& v : values) v = normal(random) * static_cast<float>(deviation);
  return parameter(Tensor::from<float>(values, {rows, cols}));
}

Tensor ones(int64_t n) { return parameter(Tensor::full({n}, 1.0)); }

}  // namespace

TinyModel random_model(const ModelConfig& c, uint64_t seed) {
  StoryRandom random(seed);
  TinyModel m;
  m.config = c;
  m.ends.embed_tokens.table = random_matrix(random, c.vocab_size, c.hidden_size, 0.05);
  m.ends.lm_head.weight = m.ends.embed_tokens.table;
  m.ends.norm = {ones(c.hidden_size), {}, c.rms_norm_eps};
  m.rope = nn::rope_tables(nn::rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling),
                           c.max_position_embeddings);
  const double residual = 1.0 / std::sqrt(2.0 * static_cast<double>(c.num_layers));
  const auto linear = [&](nn::Linear& layer, int64_t rows, int64_t cols, double factor = 1.0) {
    layer.weight = random_matrix(random, rows, cols, factor / std::sqrt(static_cast<double>(cols)));
  };
  for (int64_t i = 0; i < c.num_layers; ++i) {
    LlamaBlock& b = m.blocks.emplace_back(empty_block(c));
    b.input_layernorm.weight = ones(c.hidden_size);
    b.post_attention_layernorm.weight = ones(c.hidden_size);
    linear(b.self_attn.q_proj, c.q_size(), c.hidden_size);
    linear(b.self_attn.k_proj, c.kv_size(), c.hidden_size);
    linear(b.self_attn.v_proj, c.kv_size(), c.hidden_size);
    linear(b.self_attn.o_proj, c.hidden_size, c.q_size(), residual);
    linear(b.mlp.gate_proj, c.intermediate_size, c.hidden_size);
    linear(b.mlp.up_proj, c.intermediate_size, c.hidden_size);
    linear(b.mlp.down_proj, c.hidden_size, c.intermediate_size, residual);
  }
  return m;
}

Tensor TinyModel::logits(const Tensor& ids) const {
  const nn::Positions at = nn::positions(0, ids.dim(1), rope);
  Tensor x = ends.embed_tokens(ids);
  for (const LlamaBlock& block : blocks) x = block.forward(x, at);
  return reshape(ends.lm_head(ends.norm(x)), {-1, config.vocab_size});
}

void TinyModel::visit(const std::function<void(const std::string& name, Tensor& tensor)>& v) {
  v("model.embed_tokens.weight", std::get<Tensor>(ends.embed_tokens.table));
  for (size_t i = 0; i < blocks.size(); ++i)
    blocks[i].visit([&](std::string_view name, Tensor& t) {
      v(fmt::format("model.layers.{}.{}", i, name), t);
    });
  v("model.norm.weight", ends.norm.weight);
}

void round_to_f16(TinyModel& model) {
  const NoGrad off;
  model.visit([](const std::string&, Tensor& t) { t = to(to(t, DType::F16), DType::F32); });
  model.ends.lm_head.weight = model.ends.embed_tokens.table;
}

void save_tensors(TinyModel& model, const std::filesystem::path& file) {
  const NoGrad off;
  SafetensorsWriter writer(file);
  model.visit([&](const std::string& name, Tensor& t) { writer.add(name, to(t, DType::F16)); });
  writer.finish();
}

double mean_loss(const TinyModel& model, std::span<const int32_t> ids, int64_t window) {
  const NoGrad off;
  const auto n = static_cast<size_t>(window);
  check(ids.size() > n, "mean_loss: {} tokens are less than one window of {}", ids.size(),
        window + 1);
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i + n + 1 <= ids.size(); i += n, count += window) {
    const Tensor x = Tensor::from(ids.subspan(i, n), {1, window});
    const Tensor y = Tensor::from(ids.subspan(i + 1, n), {window});
    for (const float loss : cross_entropy(model.logits(x), y).to_vector<float>())
      sum += static_cast<double>(loss);
  }
  return sum / static_cast<double>(count);
}

std::vector<int32_t> continue_greedily(const TinyModel& model, std::vector<int32_t> ids, int n,
                                       int32_t end) {
  const NoGrad off;
  const size_t prompt = ids.size();
  const auto room = static_cast<size_t>(model.config.max_position_embeddings);
  for (int i = 0; i < n && ids.size() < room; ++i) {
    const auto length = static_cast<int64_t>(ids.size());
    const std::vector<float> all =
        model.logits(Tensor::from(std::span<const int32_t>(ids), {1, length})).to_vector<float>();
    const auto last = all.end() - model.config.vocab_size;
    const auto id = static_cast<int32_t>(std::max_element(last, all.end()) - last);
    if (id == end) break;
    ids.push_back(id);
  }
  return {ids.begin() + static_cast<std::ptrdiff_t>(prompt), ids.end()};
}

}  // namespace omq
