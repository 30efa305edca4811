// See source_model.h.
#include "tools/source_model.h"

#include "autograd/ops.h"

namespace omq {

using nlohmann::json;

SourceModel::SourceModel(const CheckpointReader& reader, const quant::Recipe& recipe)
    : reader_(reader), plain_(reader) {
  if (recipe.kronecker) online_ = online_of(*recipe.kronecker);
  if (!recipe.rotation) return;
  const int64_t hidden = reader.config().hidden_size;
  rotated_.emplace(plain_, hidden, *recipe.rotation);
  if (recipe.rotation->residual)
    residual_ = quant::residual_rotation(hidden, recipe.rotation->seed);
  if (!recipe.kronecker) online_ = online_specs(*rotated_->load(0));
}

// What the transform leaves in a block, before any has been learned.
OnlineSpecs SourceModel::online_of(const quant::KroneckerOptions& options) {
  NoGrad off;
  const auto block = plain_.load(0);
  quant::kronecker_transform(*block, {}, options)->apply(*block);
  return online_specs(*block);
}

Tensor SourceModel::table(const std::string& module) const {
  const ModelConfig& c = reader_.config();
  const bool head = module == "lm_head";
  const std::string stored = head && c.tie_word_embeddings ? "model.embed_tokens" : module;
  const Tensor t = reader_.get(stored + ".weight", {c.vocab_size, c.hidden_size});
  if (!residual_) return t;
  const Tensor gain = head ? reader_.get("model.norm.weight", {c.hidden_size}) : Tensor{};
  return quant::rotate_rows(t, gain, *residual_);
}

Tensor SourceModel::final_norm() const {
  const int64_t hidden = reader_.config().hidden_size;
  if (residual_) return Tensor::full({hidden}, 1.0);
  return to(reader_.get("model.norm.weight", {hidden}), DType::F32);
}

int64_t SourceModel::matrix_operations() const {
  const ModelConfig& c = reader_.config();
  return 2 * c.hidden_size * (2 * c.q_size() + 2 * c.kv_size() + 3 * c.intermediate_size);
}

json SourceModel::online_json() const {
  const int64_t operations = online_operations(online_, reader_.config());
  json transforms;
  for (const auto& [name, s] : online_) transforms[name] = {{"left", s.left}, {"right", s.right}};
  return {{"transforms", transforms},
          {"operations_per_token_and_block", operations},
          {"operations_per_token", operations * reader_.config().num_layers},
          {"share_of_matrices",
           static_cast<double>(operations) / static_cast<double>(matrix_operations())}};
}

std::string SourceModel::online_text() const {
  const int64_t operations = online_operations(online_, reader_.config());
  std::string text;
  for (const auto& [name, s] : online_)
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name,
                        s.left == 0    ? fmt::format("{}", s.right)
                        : s.right == 0 ? fmt::format("{}", s.left)
                                       : fmt::format("{}x{}", s.left, s.right));
  return fmt::format(
      "{}: {} operations a token and block, {:.1f} % of what its matrices take", text, operations,
      100.0 * static_cast<double>(operations) / static_cast<double>(matrix_operations()));
}

json rotation_json(const quant::RotationOptions& r) {
  return {{"seed", r.seed},          {"residual", r.residual}, {"norms", r.norms},
          {"values", r.values},      {"heads", r.heads},       {"down", r.down},
          {"query_key", r.query_key}};
}

}  // namespace omq
