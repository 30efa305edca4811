// The checkpoint as calibration and packing see it: as it is stored, or rotated where the recipe
// says so.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>

#include "models/model.h"
#include "models/packed_model.h"
#include "quant/recipe.h"

namespace omq {

class SourceModel {
 public:
  SourceModel(const CheckpointReader& reader, const quant::Recipe& recipe);
  nn::BlockSource& blocks() { return rotated_ ? static_cast<nn::BlockSource&>(*rotated_) : plain_; }
  // Whether embedding and head are one table.
  bool tied() const { return reader_.config().tie_word_embeddings && !residual_; }
  // "model.embed_tokens" or "lm_head": [V, D].
  Tensor table(const std::string& module) const;
  Tensor final_norm() const;  // F32 [D]
  // Transforms that stay in every block.
  const OnlineSpecs& online() const { return online_; }
  // For the report: those, and what they cost.
  nlohmann::json online_json() const;
  // The same as a line for people.
  std::string online_text() const;

 private:
  OnlineSpecs online_of(const quant::KroneckerOptions& options);
  // Multiplications and additions of a block's matrices for one token.
  int64_t matrix_operations() const;

  const CheckpointReader& reader_;
  ModelSource plain_;
  std::optional<quant::RotatedSource> rotated_;
  std::optional<quant::Rotation> residual_;
  OnlineSpecs online_;
};

// For the report.
nlohmann::json rotation_json(const quant::RotationOptions& options);

}  // namespace omq
