// TinyModel: a LLaMA built from random numbers instead of a checkpoint, every tensor of it
// learnable.
//
// The same blocks as models/model.h runs, so that training proves the code that quantisation and
// running rely on.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "models/llama.h"
#include "models/model.h"

namespace omq {

struct TinyModel {
  ModelConfig config;
  ModelEnds ends;  // head tied to the table
  std::vector<LlamaBlock> blocks;
  nn::RopeTables rope;

  // ids I32 [B,T] → logits F32 [B·T, V].
  Tensor logits(const Tensor& ids) const;
  // Every tensor once, under the checkpoint's name.
  void visit(const std::function<void(const std::string& name, Tensor& tensor)>& v);
};

// Matrices normal with deviation 1/√columns (those that write to the residual stream less by √(2
// layers)), the table 0.05, norms one. Every tensor is a parameter().
TinyModel random_model(const ModelConfig& config, uint64_t seed);

// Rounds every tensor to what F16 holds: from then on the model is what save_tensors() writes.
void round_to_f16(TinyModel& model);

// model.safetensors, in F16.
void save_tensors(TinyModel& model, const std::filesystem::path& file);

// Mean loss in nats per token over the windows of `window` + 1 tokens that fit into ids, one after
// another.
double mean_loss(const TinyModel& model, std::span<const int32_t> ids, int64_t window);

// The most likely continuation of ids until `end` or for n tokens; the prompt is not in it.
std::vector<int32_t> continue_greedily(const TinyModel& model, std::vector<int32_t> ids, int n,
                                       int32_t end);

}  // namespace omq
