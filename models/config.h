// ModelConfig: the numbers that make a LLaMA-family model, from a Hugging Face config.json or from
// GGUF keys.
//
// LLaMA, Mistral, Qwen2 and Qwen3 are one architecture with a few switches (biases, q/k norm, head
// size), so they are configuration, not code. Everything is checked here once: whoever holds a
// ModelConfig need not doubt it. Reference: spec/interop-formats.md §8 (config.json), §5 (GGUF
// keys).
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nn/rope.h"

namespace omq {

class GgufFile;

struct ModelConfig {
  std::string model_type;  // "llama", "mistral", "qwen2" or "qwen3"
  int64_t hidden_size = 0, intermediate_size = 0, num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0;  // num_heads is a multiple of num_kv_heads
  int64_t head_dim = 0;  // even; num_heads · head_dim may differ from hidden_size
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  nn::RopeScaling rope_scaling;
  std::vector<float>
      rope_divisors;  // GGUF only, usually empty: rope_freqs.weight where no rule explains it
  bool tie_word_embeddings = false;
  bool attention_bias = false;      // q, k and v have a bias
  bool attention_out_bias = false;  // o has one
  bool mlp_bias = false;            // gate, up and down have one
  bool qk_norm = false;             // RMSNorm over each head of q and k, before RoPE
  int64_t sliding_window = 0;       // tokens that a query sees; 0: all of them
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;  // the main one first; may be empty
  // quantization_config as it stands in config.json (null when there is none); its reader is
  // whoever wrote it.
  nlohmann::json quantization;
  std::string source;  // the file that it was read from, for messages; may be empty
  // The whole config.json, to be written back; null when the source was not one.
  nlohmann::json raw;

  // Rows of the q, and of the k and v, projections.
  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  // Attention over all tokens is right up to here: the context length, or the sliding window where
  // that is shorter.
  int64_t usable_context() const;
  // Throws Error when a run over `tokens` positions would need a sliding window, which is not
  // implemented.
  void check_context(int64_t tokens) const;
  // A config.json: `raw` when there is one, else written from the fields. Throws Error when
  // rope_divisors are set, which config.json cannot say.
  nlohmann::json to_hf_json() const;

  // Throws Error naming the file (`name`), the key, and what is wrong with it.
  static ModelConfig from_hf(const nlohmann::json& config, std::string_view name = "config.json");
  static ModelConfig from_hf_file(const std::filesystem::path& config_json);
  static ModelConfig from_gguf(const GgufFile& file);
};

}  // namespace omq
