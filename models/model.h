// Model: token ids to logits, for running; and ModelSource: the same checkpoint as a row of blocks,
// for calibration.
#pragma once

#include <memory>
#include <vector>

#include "models/checkpoint.h"
#include "models/llama.h"
#include "nn/block.h"
#include "nn/embedding.h"
#include "nn/kv_cache.h"

namespace omq {

// Everything outside the blocks.
struct ModelEnds {
  nn::Embedding embed_tokens;  // [V, D]
  nn::RMSNorm norm;            // [D]
  nn::Linear lm_head;          // [V, D]; shares embed_tokens when tied
};
ModelEnds load_ends(const CheckpointReader& reader, LoadAs as);

// Rotary tables of a checkpoint for positions 0 … count − 1.
nn::RopeTables model_rope(const CheckpointReader& reader, int64_t count);

class Model {
 public:
  // Loads every block; mapped files are used in place. context: positions to prepare for (0: the
  // model's own, at most 8192). Throws Error when tensors are missing, of a wrong shape or not
  // finite.
  static Model load(const CheckpointReader& reader, int64_t context = 0,
                    LoadAs as = LoadAs::Stored);

  // From parts that somebody made; `context` positions.
  static Model assemble(ModelConfig config, ModelEnds ends,
                        std::vector<std::unique_ptr<LlamaBlock>> blocks, int64_t context);

  const ModelConfig& config() const { return config_; }
  int64_t context() const { return rope_.cos.dim(0); }
  const nn::RopeTables& rope() const { return rope_; }  // of that many positions
  // ids I32 [B,T], standing at positions first … first + T − 1 → hidden states after the final
  // norm, F32 [B,T,D]. With caches (one a block) earlier tokens are seen and these are added.
  Tensor forward(const Tensor& ids, int64_t first = 0,
                 std::vector<nn::KVCache>* caches = nullptr) const;
  Tensor logits(const Tensor& hidden) const { return ends.lm_head(hidden); }  // [...,D] → [...,V]
  // Keys and values are kept as their attention quantises them, else as `kept` says. On a GPU they
  // are codes only where `kept` wants that for both and two codes share a byte in both or in
  // neither, else F16: faster, and read by every kernel.
  std::vector<nn::KVCache> new_caches(int64_t batch, int64_t capacity) const;
  // Onto a device. Packed weights whose groups have no form there become F32.
  void move_to(Device device);
  Device device() const { return rope_.cos.device(); }

  ModelEnds ends;
  std::vector<std::unique_ptr<LlamaBlock>> blocks;
  nn::CacheQuant kept;  // of what attention does not quantise itself

 private:
  ModelConfig config_;
  nn::RopeTables rope_;
};

// True sizes: what is stored for the weights; scales, zeros, online transforms and head counted.
struct ModelSize {
  int64_t weights = 0;        // elements of all matrices, a tied table counted once
  size_t bytes = 0;           // stored for them
  int64_t block_weights = 0;  // of the matrices inside the blocks
  size_t block_bytes = 0;
  size_t token_bytes = 0;  // read for one token of decoding: blocks and head
  double bits_per_weight() const {
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(weights);
  }
  double block_bits_per_weight() const {
    return 8.0 * static_cast<double>(block_bytes) / static_cast<double>(block_weights);
  }
};
ModelSize model_size(const Model& model);

// Blocks in F32, one at a time.
class ModelSource final : public nn::BlockSource {
 public:
  explicit ModelSource(const CheckpointReader& reader) : reader_(reader) {}
  int size() const override { return static_cast<int>(reader_.config().num_layers); }
  std::unique_ptr<nn::Block> load(int i) override { return load_block(reader_, i, LoadAs::F32); }
  std::string name(int i) const override { return fmt::format("model.layers.{}", i); }
  Tensor embed(const Tensor& ids) override;
  nn::RopeTables rope(int64_t count) override { return model_rope(reader_, count); }

 private:
  const CheckpointReader& reader_;
  nn::Embedding embedding_;  // loaded at first use
};

}  // namespace omq
