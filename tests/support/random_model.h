// A small random model on disk, whole: config, weights and a byte-level tokenizer that reads any
// text. What the writer of packed models and omq-quant are tested on.
//
//   TempDir dir;
//   write_random_model(dir / "model", {.tied = true});
//   const auto reader = open_checkpoint(dir / "model");
#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "models/safetensors.h"
#include "tests/support/property.h"

namespace omq {

// Sizes that fit nothing well: a vocabulary of 257 (the last panel of 16 rows is nearly empty) and
// 72 columns in `down_proj` (a short last group of 32).
struct RandomModel {
  std::string type = "llama";  // "qwen2": with biases
  bool tied = true;
  DType dtype = DType::F32;
  int layers = 2;
  uint64_t seed = 1;
  // Called for every tensor before it is written; false leaves it out.
  std::function<bool(const std::string& name, Tensor& tensor)> edit = {};
};

inline constexpr int64_t kRandomVocab = 257, kRandomHidden = 32, kRandomFfn = 72;

namespace detail {

// The character that stands for a byte in GPT-2's alphabet, as UTF-8.
inline std::string byte_character(int byte) {
  const auto plain = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b != 173); };
  int code = byte;
  if (!plain(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += plain(b) ? 0 : 1;
  }
  if (code < 128) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

inline nlohmann::json byte_tokenizer() {
  nlohmann::json vocab;
  for (int b = 0; b < 256; ++b) vocab[byte_character(b)] = b;
  const nlohmann::json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  return {{"version", "1.0"},
          {"added_tokens", {{{"id", 256}, {"content", "<|endoftext|>"}, {"special", true}}}},
          {"pre_tokenizer", level},
          {"decoder", level},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
}

inline void write_json(const std::filesystem::path& file, const nlohmann::json& j) {
  std::ofstream(file, std::ios::binary) << j.dump(2) << "\n";
}

}  // namespace detail

inline nlohmann::json random_config(const RandomModel& m) {
  return {{"architectures", {m.type == "qwen2" ? "Qwen2ForCausalLM" : "LlamaForCausalLM"}},
          {"model_type", m.type},
          {"hidden_size", kRandomHidden},
          {"intermediate_size", kRandomFfn},
          {"num_hidden_layers", m.layers},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"max_position_embeddings", 128},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"vocab_size", kRandomVocab},
          {"hidden_act", "silu"},
          {"eos_token_id", 256},
          {"tie_word_embeddings", m.tied}};
}

inline void write_random_model(const std::filesystem::path& folder, const RandomModel& m = {}) {
  std::filesystem::create_directories(folder);
  detail::write_json(folder / "config.json", random_config(m));
  detail::write_json(folder / "tokenizer.json", detail::byte_tokenizer());
  detail::write_json(folder / "tokenizer_config.json", {{"eos_token", "<|endoftext|>"}});
  SafetensorsWriter w(folder / "model.safetensors");
  Rng rng(m.seed);
  const auto add = [&](const std::string& name, Tensor t) {
    if (!m.edit || m.edit(name, t)) w.add(name, t);
  };
  const auto matrix = [&](const std::string& module, int64_t rows, int64_t cols) {
    const double deviation = 1 / std::sqrt(static_cast<double>(cols));
    add(module + ".weight", normal_tensor(rng, {rows, cols}, m.dtype, deviation));
  };
  const auto norm = [&](const std::string& module) {
    add(module + ".weight", random_tensor(rng, {kRandomHidden}, m.dtype, 0.5, 1.5));
  };
  matrix("model.embed_tokens", kRandomVocab, kRandomHidden);
  for (int i = 0; i < m.layers; ++i) {
    const std::string p = fmt::format("model.layers.{}.", i);
    norm(p + "input_layernorm");
    norm(p + "post_attention_layernorm");
    matrix(p + "self_attn.q_proj", kRandomHidden, kRandomHidden);
    matrix(p + "self_attn.k_proj", kRandomHidden / 2, kRandomHidden);
    matrix(p + "self_attn.v_proj", kRandomHidden / 2, kRandomHidden);
    matrix(p + "self_attn.o_proj", kRandomHidden, kRandomHidden);
    for (const char* name : {"q", "k", "v"})
      if (m.type == "qwen2")
        add(fmt::format("{}self_attn.{}_proj.bias", p, name),
            normal_tensor(rng, {name[0] == 'q' ? kRandomHidden : kRandomHidden / 2}, m.dtype));
    matrix(p + "mlp.gate_proj", kRandomFfn, kRandomHidden);
    matrix(p + "mlp.up_proj", kRandomFfn, kRandomHidden);
    matrix(p + "mlp.down_proj", kRandomHidden, kRandomFfn);
  }
  norm("model.norm");
  if (!m.tied) matrix("lm_head", kRandomVocab, kRandomHidden);
  w.finish();
}

}  // namespace omq
