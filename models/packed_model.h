// The native output of omq-quant: a Hugging Face folder whose matrices are stored packed
// (ARCHITECTURE §8).
//
//   config.json         the model's own, plus quantization_config (PackedConfig below); of a
//   rotated model without tied embeddings, since table and head then differ
//   model.safetensors   NAME.packed (U8, panel16) for packed matrices, NAME.weight and NAME.bias
//   for the rest, NAME.online.left and .right for transforms of a matrix's input (PackedConfig);
//   its
//                       metadata carries config.json and the tokenizer, so that this file alone
//                       also opens
//   tokenizer files     as they came, or written from a GGUF's keys
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "models/atomic_dir.h"
#include "models/checkpoint.h"
#include "models/safetensors.h"
#include "nn/block.h"

namespace omq {

// How one matrix was quantised, and what that makes of its stored form.
struct MatrixSpec {
  int bits = 4;
  int64_t group_size = 0;  // 0: one group a row
  bool symmetric = false;
  GroupSpec stored() const {
    return stored_spec({.bits = bits, .group_size = group_size, .symmetric = symmetric});
  }
  bool operator==(const MatrixSpec&) const = default;
};

// Bits at which the running model quantises what flows through its blocks; 16: not at all.
struct ActivationSpec {
  int activation = 16;         // inputs of the blocks' matrices, each token on its own range
  int q = 16, k = 16, v = 16;  // after RoPE, each token's head on its own range; k, v: also in the
                               // cache
  int p = 16;                  // attention probabilities
  bool include_zero = true;    // of those ranges, as RowQuant
  // RowQuant::clip of matrices' inputs, and of q, k and v.
  double activation_clip = 1, qkv_clip = 1;
  // In place of activation_clip each matrix has its own share, a tensor NAME.input_clip [1].
  bool learned_clips = false;
  bool operator==(const ActivationSpec&) const = default;
  nn::ActivationQuant quant() const;
};

// A transform that the running model applies: x·(L ⊗ R) as nn::Kronecker, factors of these sizes,
// 0 for one that is the identity. The factors are tensors of the file, in every block:
// model.layers.N.NAME.online.left [left, left] and .right [right, right].
struct OnlineSpec {
  int64_t left = 0, right = 0;
  bool operator==(const OnlineSpec&) const = default;
};
// NAME → what is there, of one block. Names of matrices ("mlp.down_proj": their input) and
// "self_attn.q", "self_attn.k" (each head behind RoPE).
using OnlineSpecs = std::map<std::string, OnlineSpec>;
OnlineSpecs online_specs(nn::Block& block);
// Floating-point operations of all of them for one token and block. What q, k and v read is
// transformed once, and so is what gate and up read.
int64_t online_operations(const OnlineSpecs& online, const ModelConfig& config);

// quantization_config of config.json. Its key "online_transforms" is there when a block has any,
// {"mlp.down_proj": {"type": "kronecker", "left": 32, "right": 48}}, and then omq_format is 4, so
// that programs that know of none refuse the file.
struct PackedConfig {
  std::string method;                            // "omniquant": for people, loaders do not need it
  MatrixSpec weight;                             // of every packed matrix not listed below
  std::map<std::string, MatrixSpec> exceptions;  // by module name: "lm_head"
  ActivationSpec activations = {};
  OnlineSpecs online = {};
  bool untied = false;  // the source's embeddings are tied, these are not; when writing
  const MatrixSpec& spec_of(const std::string& module) const;

  nlohmann::json to_json() const;
  // None when the checkpoint is not quantised. Throws Error for another quantiser's config, or
  // another version of ours.
  static std::optional<PackedConfig> of(const ModelConfig& config);
};

// How the caches of a checkpoint keep keys and values: as its attention quantises them.
nn::CacheQuant cache_quant(const ModelConfig& config);

// Writes such a folder block by block; it appears under its name only in commit().
class PackedModelWriter final : public nn::BlockSink {
 public:
  // source: the full-precision checkpoint, for config and tokenizer. Throws Error when `out` exists
  // (unless force).
  PackedModelWriter(const CheckpointReader& source, PackedConfig packed,
                    const std::filesystem::path& out, bool force);
  void store(int i, nn::Block& block) override;
  // A matrix outside the blocks ("model.embed_tokens"): packed, or dense in the dtype that it has.
  void add(const std::string& module, const nn::Weight& weight);
  void add_tensor(const std::string& name, const Tensor& t) { weights_.add(name, t); }
  // A further file of the folder.
  void add_file(const std::string& name, const std::string& content) { dir_.write(name, content); }
  // Completes the files. They can be opened at unfinished(), to be checked, before commit() gives
  // them their name.
  void close();
  const std::filesystem::path& unfinished() const { return dir_.path(); }
  void commit() { dir_.commit(); }

 private:
  AtomicDir dir_;
  std::string config_;
  std::map<std::string, std::string> side_files_;
  SafetensorsWriter weights_;
};

}  // namespace omq
