// Random decoder blocks for the tests of quant/: hidden 32, 4 query heads on 2 key/value heads, ffn
// 72 (which groups of 32, 40 or 64 do not divide), and a source and a sink that hold them in
// memory.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "models/llama.h"
#include "nn/embedding.h"
#include "quant/calibrate.h"
#include "tests/support/property.h"

namespace omq::quant {

inline constexpr int64_t kHidden = 32, kFfn = 72, kVocab = 50;

inline Tensor random_matrix(Rng& rng, int64_t rows, int64_t cols) {
  return normal_tensor(rng, {rows, cols}, DType::F32, 1 / std::sqrt(static_cast<double>(cols)));
}

inline LlamaBlock random_block(Rng& rng) {
  LlamaBlock b;
  b.input_layernorm.weight = random_tensor(rng, {kHidden}, DType::F32, 0.5, 1.5);
  b.post_attention_layernorm.weight = random_tensor(rng, {kHidden}, DType::F32, 0.5, 1.5);
  b.self_attn.heads = 4;
  b.self_attn.kv_heads = 2;
  b.self_attn.head_dim = kHidden / 4;
  b.self_attn.q_proj.weight = random_matrix(rng, kHidden, kHidden);
  b.self_attn.k_proj.weight = random_matrix(rng, kHidden / 2, kHidden);
  b.self_attn.v_proj.weight = random_matrix(rng, kHidden / 2, kHidden);
  b.self_attn.o_proj.weight = random_matrix(rng, kHidden, kHidden);
  b.mlp.gate_proj.weight = random_matrix(rng, kFfn, kHidden);
  b.mlp.up_proj.weight = random_matrix(rng, kFfn, kHidden);
  b.mlp.down_proj.weight = random_matrix(rng, kHidden, kFfn);
  return b;
}

inline nn::RopeTables small_rope(int64_t positions) {
  return nn::rope_tables(nn::rope_frequencies(kHidden / 4, 10000, {}), positions);
}

// What a block was given, in the order of the calls; shared by its clones.
using Seen = std::vector<Tensor>;

// A block that remembers its inputs.
struct WatchedBlock final : nn::Block {
  LlamaBlock inner;
  std::shared_ptr<Seen> seen;

  Tensor forward(const Tensor& x, const nn::Positions& at, nn::KVCache* cache) const override {
    seen->push_back(converted(x, DType::F32));
    return inner.forward(x, at, cache);
  }
  std::unique_ptr<Block> clone() const override { return std::make_unique<WatchedBlock>(*this); }
  void visit(const nn::VisitFn& v) override { inner.visit(v); }
  std::vector<nn::NamedLinear> linears() override { return inner.linears(); }
  std::vector<nn::Site> sites() override { return inner.sites(); }
  nn::Attention::Taps& taps() override { return inner.taps(); }
};

struct RandomSource final : nn::BlockSource {
  std::vector<LlamaBlock> blocks;
  std::vector<std::shared_ptr<Seen>> seen;
  nn::Embedding table;

  explicit RandomSource(int count, uint64_t seed = 1) {
    Rng rng(seed);
    table.table = normal_tensor(rng, {kVocab, kHidden}, DType::F32);
    for (int i = 0; i < count; ++i) {
      blocks.push_back(random_block(rng));
      seen.push_back(std::make_shared<Seen>());
    }
  }
  int size() const override { return static_cast<int>(blocks.size()); }
  std::unique_ptr<nn::Block> load(int i) override {
    auto b = std::make_unique<WatchedBlock>();
    b->inner = blocks[static_cast<size_t>(i)];
    b->seen = seen[static_cast<size_t>(i)];
    return b;
  }
  std::string name(int i) const override { return fmt::format("model.layers.{}", i); }
  Tensor embed(const Tensor& ids) override { return table(ids); }
  nn::RopeTables rope(int64_t positions) override { return small_rope(positions); }
};

struct KeptBlocks final : nn::BlockSink {
  std::vector<std::unique_ptr<nn::Block>> blocks;
  void store(int i, nn::Block& block) override {
    CHECK(i == static_cast<int>(blocks.size()));
    blocks.push_back(block.clone());
  }
};

inline Tensor random_windows(int64_t count, int64_t length, uint64_t seed = 5) {
  Rng rng(seed);
  return random_ids(rng, {count, length}, kVocab);
}

inline const PackedInt& packed_of(const nn::Linear& linear) {
  const auto& weight = std::get<std::shared_ptr<nn::PackedWeight>>(linear.weight);
  return dynamic_cast<const nn::PackedIntWeight&>(*weight).packed();
}

// RandomSource with plain blocks: what watches its inputs cannot be recorded on a GPU.
struct PlainSource final : nn::BlockSource {
  RandomSource random{2};
  int size() const override { return random.size(); }
  std::unique_ptr<nn::Block> load(int i) override {
    return random.blocks[static_cast<size_t>(i)].clone();
  }
  std::string name(int i) const override { return random.name(i); }
  Tensor embed(const Tensor& ids) override { return random.embed(ids); }
  nn::RopeTables rope(int64_t positions) override { return random.rope(positions); }
};

}  // namespace omq::quant
