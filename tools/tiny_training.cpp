// The training loop of the bundled model and its data.

#include "tools/tiny_training.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "autograd/ops.h"
#include "nn/adamw.h"
#include "tools/bpe_trainer.h"

namespace omq {

namespace {

constexpr size_t kTokenizerBytes = 400'000;
constexpr double kBeta1 = 0.9, kBeta2 = 0.98;

// Linear warm-up over the first twentieth, then half a cosine down to a twentieth of the rate.
double schedule(int64_t step, int64_t steps) {
  const auto t = static_cast<double>(step), n = static_cast<double>(steps);
  const double warm = std::max(1.0, n / 20);
  if (t < warm) return (t + 1) / warm;
  const double at = (t - warm) / std::max(1.0, n - warm);
  return 0.05 + 0.95 * 0.5 * (1 + std::cos(std::numbers::pi * at));
}

// Decay pulls matrices only: norms have no reason to shrink.
std::vector<nn::ParamGroup> param_groups(TinyModel& model, const TinyOptions& o) {
  nn::ParamGroup matrices{"matrices", {}, o.lr, o.weight_decay};
  nn::ParamGroup vectors{"vectors", {}, o.lr, 0.0};
  model.visit([&](const std::string&, Tensor& t) {
    (t.ndim() == 2 ? matrices : vectors).params.push_back(t);
  });
  return {std::move(matrices), std::move(vectors)};
}

// Scales all gradients in place so that their common norm is at most `limit`; returns the norm
// before.
double clip_gradients(const Gradients& g, const std::vector<nn::ParamGroup>& groups, double limit) {
  double squares = 0;
  for (const nn::ParamGroup& group : groups)
    for (const Tensor& p : group.params)
      squares += static_cast<double>(sum(square(g[p])).item<float>());
  const double norm = std::sqrt(squares);
  if (norm <= limit) return norm;
  for (const nn::ParamGroup& group : groups)
    for (const Tensor& p : group.params) {
      Tensor t = g[p];
      on(t).unary(t, t, Unary{UnaryKind::Affine, limit / norm, 0});
    }
  return norm;
}

}  // namespace

ModelConfig tiny_config(const TinyOptions& o) {
  check(o.hidden > 0 && o.heads > 0 && o.hidden % (2 * o.heads) == 0,
        "train-tiny: hidden size {} does not give {} heads of an even size", o.hidden, o.heads);
  check(o.kv_heads > 0 && o.heads % o.kv_heads == 0,
        "train-tiny: {} heads are no multiple of {} key/value heads", o.heads, o.kv_heads);
  ModelConfig c;
  c.model_type = "llama";
  c.hidden_size = o.hidden;
  c.intermediate_size = o.ffn;
  c.num_layers = o.layers;
  c.num_heads = o.heads;
  c.num_kv_heads = o.kv_heads;
  c.head_dim = o.hidden / o.heads;
  c.vocab_size = o.vocab;
  c.max_position_embeddings = o.window;
  c.rms_norm_eps = 1e-5;
  c.rope_theta = 10000.0;
  c.tie_word_embeddings = true;
  c.bos_token_id = 0;
  c.eos_token_ids = {0};
  nlohmann::json json = c.to_hf_json();
  json["torch_dtype"] = "float16";
  return ModelConfig::from_hf(json);
}

Tokenizer tiny_tokenizer(const TinyOptions& o) {
  const Tokenizer trained = Tokenizer::from_spec(
      train_bpe(make_stories(o.seed, StorySplit::Train, kTokenizerBytes), o.vocab));
  // Read back from the files' texts: training sees exactly what users of the files will.
  return Tokenizer::from_json(trained.to_tokenizer_json(), trained.to_tokenizer_config_json());
}

StoryTokens::StoryTokens(const Tokenizer& tokenizer, uint64_t seed)
    : tokenizer_(tokenizer), seed_(seed), ends_(story_seed(seed, StorySplit::Train, 0)) {}

void StoryTokens::fill(size_t n) {
  while (ids_.size() < n) {
    const std::string text = make_story(story_seed(seed_, StorySplit::Train, story_++)) + "\n\n";
    const std::vector<int32_t> ids = tokenizer_.encode(text);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    if (ends_.chance(50)) ids_.push_back(tokenizer_.eos_ids().at(0));
  }
}

StoryTokens::Batch StoryTokens::next(int64_t batch, int64_t window) {
  const auto n = static_cast<size_t>(batch * window);
  fill(n + 1);
  Batch out{Tensor::from(std::span<const int32_t>(ids_.data(), n), {batch, window}),
            Tensor::from(std::span<const int32_t>(ids_.data() + 1, n), {batch * window})};
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(n));
  return out;
}

TinyModel train_tiny(const TinyOptions& o, const Tokenizer& tokenizer,
                     const std::function<void(const TinyStep&, const TinyModel&)>& report) {
  TinyModel model = random_model(tiny_config(o), o.seed);
  nn::AdamW optimizer(param_groups(model, o), {kBeta1, kBeta2, 1e-8});
  StoryTokens data(tokenizer, o.seed);
  for (int64_t step = 0; step < o.steps; ++step) {
    const StoryTokens::Batch batch = data.next(o.batch, o.window);
    const Tensor loss = mean(cross_entropy(model.logits(batch.ids), batch.targets));
    TinyStep now{step + 1, static_cast<double>(loss.item<float>()), 0, 0};
    check(std::isfinite(now.loss), "train-tiny: the loss of step {} is {}; try a lower --lr",
          now.step, now.loss);
    const Gradients g = backward(loss);
    now.gradient_norm = clip_gradients(g, optimizer.groups(), o.clip);
    optimizer.set_lr_factor(schedule(step, o.steps));
    now.lr = o.lr * schedule(step, o.steps);
    optimizer.step(g);
    report(now, model);
  }
  return model;
}

}  // namespace omq
