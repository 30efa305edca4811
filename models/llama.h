// LlamaBlock: one decoder layer of LLaMA, Mistral, Qwen2 and Qwen3 (differences are configuration),
// and how a block is read from a checkpoint under Hugging Face's names.
#pragma once

#include <memory>

#include "models/checkpoint.h"
#include "nn/attention.h"
#include "nn/block.h"
#include "nn/mlp.h"

namespace omq {

struct PackedConfig;  // models/packed_model.h

struct LlamaBlock final : nn::Block {
  nn::RMSNorm input_layernorm, post_attention_layernorm;  // [D]
  nn::Attention self_attn;
  nn::MLP mlp;

  Tensor forward(const Tensor& x, const nn::Positions& at,
                 nn::KVCache* cache = nullptr) const override;
  std::unique_ptr<nn::Block> clone() const override { return std::make_unique<LlamaBlock>(*this); }
  void visit(const nn::VisitFn& v) override;
  std::vector<nn::NamedLinear> linears() override;
  std::vector<nn::Site> sites() override;
  nn::Attention::Taps& taps() override { return self_attn.taps; }
};

// A block with the head layout of `config` and no tensors yet.
LlamaBlock empty_block(const ModelConfig& config);

// Which dtype dense matrices get when loaded; norms and biases are always F32.
enum class LoadAs { Stored, F32 };

// Layer i. Matrices stored as NAME.packed stay packed, and the block quantises its activations as
// the configuration says. Throws Error naming the file and tensor that
// is missing, of the wrong shape, or not finite.
std::unique_ptr<LlamaBlock> load_block(const CheckpointReader& reader, int i, LoadAs as);

// One matrix by its module name ("model.layers.0.mlp.up_proj"): dense [rows, cols] or packed.
nn::Weight load_weight(const CheckpointReader& reader, const PackedConfig* packed,
                       const std::string& module, int64_t rows, int64_t cols, LoadAs as);

}  // namespace omq
