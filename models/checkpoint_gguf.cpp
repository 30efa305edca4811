// A GGUF file as a checkpoint: Hugging Face names, F32 values, rows of q and k back in half-split
// order.
//
// llama.cpp keeps the two members of a rotary pair in neighbouring rows for architecture "llama"
// (only), Hugging Face half a head apart: row 2i + h of a head here is row h·d/2 + i there.
// Reference: spec/interop-formats.md §5.
#include <charconv>
#include <cstring>

#include "models/checkpoint.h"
#include "models/gguf.h"
#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

namespace {

struct Renaming {
  std::string_view gguf, hf;
};
constexpr Renaming kOutside[] = {{"token_embd.weight", "model.embed_tokens.weight"},
                                 {"output_norm.weight", "model.norm.weight"},
                                 {"output.weight", "lm_head.weight"}};
constexpr Renaming kInBlock[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"}};

bool has_part(std::string_view name, std::string_view part) { return name.find(part) != name.npos; }

// Rows [heads · d, columns] from pairs beside each other to pairs half a head apart.
Tensor split_pairs(const Tensor& w, int64_t heads, std::string_view name) {
  const int64_t rows = w.dim(0), columns = w.numel() / rows;
  check(rows % (2 * heads) == 0, "tensor {}: {} rows are not {} heads of an even size", name, rows,
        heads);
  const int64_t half = rows / heads / 2;
  Tensor out = Tensor::empty(w.shape(), DType::F32);
  const float* from = w.data<float>();
  float* to = out.data<float>();
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < half; ++i) {
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t source = (head * half + i) * 2 + h, target = (head * 2 + h) * half + i;
        std::memcpy(to + target * columns, from + source * columns,
                    static_cast<size_t>(columns) * sizeof(float));
      }
    }
  }
  return out;
}

class GgufCheckpoint : public CheckpointReader {
 public:
  explicit GgufCheckpoint(const std::filesystem::path& file) : GgufCheckpoint(GgufFile(file)) {
    add_file(file);
  }
  explicit GgufCheckpoint(GgufFile opened) : file_(std::move(opened)) {
    path_ = file_.path();
    container_ = fmt::format("GGUF v{}", file_.version());
    config_ = ModelConfig::from_gguf(file_);
    interleaved_ = config_.model_type == "llama";
    for (const GgufTensor& t : file_.tensors()) {
      if (t.name == "rope_freqs.weight") continue;  // part of the config now
      if (t.name == "output.weight" && config_.tie_word_embeddings)
        continue;  // equal to the embedding
      const std::string name = detail::hf_tensor_name(t.name);
      check(gguf_name_.emplace(name, t.name).second, "{}: two tensors mean {}", path_.string(),
            shown(name));
      tensors_[name] = {.dtype = t.type->name, .shape = t.shape, .bytes = t.bytes.size()};
    }
  }

  Tokenizer tokenizer() const override {
    return with_context(fmt::format("reading the tokenizer of {}", path_.string()),
                        [&] { return Tokenizer::from_spec(spec()); });
  }

 protected:
  Tensor load(const std::string& name) const override {
    const Tensor t = file_.get_f32(gguf_name_.find(name)->second);
    if (!interleaved_) return t;
    return with_context(fmt::format("reading {}", path_.string()), [&] {
      if (has_part(name, "self_attn.q_proj.")) return split_pairs(t, config_.num_heads, name);
      if (has_part(name, "self_attn.k_proj.")) return split_pairs(t, config_.num_kv_heads, name);
      return t;
    });
  }

  std::map<std::string, std::string> stored_side_files() const override { return {}; }

 private:
  std::optional<int32_t> id(const char* key) const {
    const auto v = file_.integer(key);
    const bool given = v && *v >= 0 && *v < INT32_MAX;  // 0xFFFFFFFF means none
    return given ? std::optional<int32_t>(static_cast<int32_t>(*v)) : std::nullopt;
  }

  TokenizerSpec spec() const {
    TokenizerSpec s;
    s.model = file_.text("tokenizer.ggml.model").value_or("");
    check(!s.model.empty(), "the key tokenizer.ggml.model is missing");
    s.pre = file_.text("tokenizer.ggml.pre").value_or("default");
    auto tokens = file_.texts("tokenizer.ggml.tokens");
    check(tokens.has_value(), "the key tokenizer.ggml.tokens is missing");
    s.tokens = std::move(*tokens);
    s.scores = file_.reals("tokenizer.ggml.scores").value_or(std::vector<float>{});
    for (const int64_t t :
         file_.integers("tokenizer.ggml.token_type").value_or(std::vector<int64_t>{})) {
      check(t >= 0 && t <= 6, "a token of type {} (0 to 6 are possible)", t);
      s.types.push_back(static_cast<int32_t>(t));
    }
    s.merges = file_.texts("tokenizer.ggml.merges").value_or(std::vector<std::string>{});
    s.bos_id = id("tokenizer.ggml.bos_token_id");
    s.eos_id = id("tokenizer.ggml.eos_token_id");
    s.eot_id = id("tokenizer.ggml.eot_token_id");
    s.unk_id = id("tokenizer.ggml.unknown_token_id");
    s.pad_id = id("tokenizer.ggml.padding_token_id");
    s.add_bos = file_.boolean("tokenizer.ggml.add_bos_token");
    s.add_space_prefix = file_.boolean("tokenizer.ggml.add_space_prefix");
    s.chat_template = file_.text("tokenizer.chat_template").value_or("");
    return s;
  }

  GgufFile file_;
  std::map<std::string, std::string> gguf_name_;  // Hugging Face's → the file's
  bool interleaved_ = false;
};

}  // namespace

std::string detail::hf_tensor_name(std::string_view name) {
  for (const Renaming& r : kOutside) {
    if (name == r.gguf) return std::string(r.hf);
  }
  // blk.N.PART.weight or .bias
  if (!name.starts_with("blk.")) return std::string(name);
  const char* end = name.data() + name.size();
  int layer = 0;
  const auto [rest, error] = std::from_chars(name.data() + 4, end, layer);
  if (error != std::errc{} || rest == end || *rest != '.' || layer < 0) return std::string(name);
  const std::string_view part(rest + 1, static_cast<size_t>(end - rest - 1));
  for (const Renaming& r : kInBlock) {
    if (!part.starts_with(r.gguf)) continue;
    const std::string_view kind = part.substr(r.gguf.size());
    if (kind == ".weight" || kind == ".bias")
      return fmt::format("model.layers.{}.{}{}", layer, r.hf, kind);
  }
  return std::string(name);
}

std::unique_ptr<CheckpointReader> detail::open_gguf(const std::filesystem::path& file) {
  return std::make_unique<GgufCheckpoint>(file);
}

std::unique_ptr<CheckpointReader> detail::open_gguf_bytes(std::shared_ptr<Storage> bytes,
                                                          const std::string& name) {
  return std::make_unique<GgufCheckpoint>(GgufFile(std::move(bytes), name));
}

}  // namespace omq
