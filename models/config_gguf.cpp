// ModelConfig from the keys and tensors of a GGUF file (spec/interop-formats.md §5, "Keys for
// llama").
#include <algorithm>
#include <cmath>

#include "models/config.h"
#include "models/gguf.h"
#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

namespace {

// The keys of one architecture: "llama.block_count" is asked for as "block_count".
class ArchitectureKeys {
 public:
  ArchitectureKeys(const GgufFile& file, std::string architecture)
      : file_(file), prefix_(std::move(architecture) + ".") {}

  std::optional<int64_t> find(const char* key) const { return file_.integer(prefix_ + key); }
  int64_t integer(const char* key, int64_t lowest, int64_t highest) const {
    const auto v = find(key);
    check(v.has_value(), "the key {}{} is missing", prefix_, key);
    check(*v >= lowest && *v <= highest, "key {}{} is {}, {} to {} is possible", prefix_, key, *v,
          lowest, highest);
    return *v;
  }
  int64_t integer(const char* key, int64_t lowest, int64_t highest, int64_t absent) const {
    return find(key) ? integer(key, lowest, highest) : absent;
  }
  double positive(const char* key, double highest, double absent) const {
    const auto v = file_.real(prefix_ + key);
    if (!v) return absent;
    check(*v > 0 && *v <= highest, "key {}{} is {}, a number above 0 and at most {} is expected",
          prefix_, key, *v, highest);
    return *v;
  }
  std::string text(const char* key, const char* absent) const {
    return file_.text(prefix_ + key).value_or(absent);
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

// F32 keys such as 1e-5 arrive as 9.99999975e-06; the shortest decimal that gives the same F32 is
// what was meant.
double as_written(double f32) {
  const std::string text = fmt::format("{}", static_cast<float>(f32));
  return std::stod(text);
}

// rope_freqs.weight holds divisors of the frequencies, [d/2]. The rule behind them is recovered
// where it is a known one, since config.json can only name rules.
void read_divisors(const GgufFile& file, ModelConfig& c) {
  using Type = nn::RopeScaling::Type;
  const Tensor t = file.get_f32("rope_freqs.weight");
  const Shape expected{c.head_dim / 2};
  check(t.shape() == expected, "tensor rope_freqs.weight has shape {}, {} is expected", t.shape(),
        expected);
  c.rope_divisors = t.to_vector<float>();
  for (const float d : c.rope_divisors) {
    check(d > 0 && std::isfinite(d), "tensor rope_freqs.weight: {} is not a divisor", d);
  }
  nn::RopeScaling s;
  s.factor = *std::max_element(c.rope_divisors.begin(), c.rope_divisors.end());
  const std::vector<double> wanted =
      nn::rope_frequencies(c.head_dim, c.rope_theta, {}, c.rope_divisors);
  for (const Type type : {Type::None, Type::Linear, Type::Llama3}) {
    s.type = type;
    const std::vector<double> ruled = nn::rope_frequencies(c.head_dim, c.rope_theta, s);
    const bool same = std::equal(wanted.begin(), wanted.end(), ruled.begin(),
                                 [](double a, double b) { return std::abs(a - b) <= 1e-5 * b; });
    if (!same) continue;
    c.rope_divisors.clear();
    c.rope_scaling = type == Type::None ? nn::RopeScaling{} : s;
    return;
  }
}

void read_scaling(const GgufFile& file, const ArchitectureKeys& keys, ModelConfig& c) {
  if (file.find("rope_freqs.weight")) return read_divisors(file, c);
  const double old = keys.positive("rope.scale_linear", 1e6, 1.0);  // the key of earlier writers
  const std::string type = keys.text("rope.scaling.type", old == 1.0 ? "none" : "linear");
  check(type == "none" || type == "linear",
        "rope scaling \"{}\" is not supported (none and linear are)", shown(type));
  const double factor = keys.positive("rope.scaling.factor", 1e6, old);
  if (type == "none" || factor == 1.0) return;
  c.rope_scaling.type = nn::RopeScaling::Type::Linear;
  c.rope_scaling.factor = factor;
}

void read_sizes(const GgufFile& file, const ArchitectureKeys& keys, ModelConfig& c) {
  c.hidden_size = keys.integer("embedding_length", 1, 1 << 20);
  c.intermediate_size = keys.integer("feed_forward_length", 1, 1 << 22);
  c.num_layers = keys.integer("block_count", 1, 4096);
  c.num_heads = keys.integer("attention.head_count", 1, 1 << 14);
  c.num_kv_heads = keys.integer("attention.head_count_kv", 1, 1 << 14, c.num_heads);
  check(c.num_heads % c.num_kv_heads == 0,
        "attention.head_count {} is not a multiple of head_count_kv {}", c.num_heads,
        c.num_kv_heads);
  check(keys.find("attention.key_length") || c.hidden_size % c.num_heads == 0,
        "embedding_length {} is not a multiple of attention.head_count {}", c.hidden_size,
        c.num_heads);
  c.head_dim = keys.integer("attention.key_length", 2, 8192, c.hidden_size / c.num_heads);
  check(c.head_dim >= 2 && c.head_dim % 2 == 0, "a head size of {}: rotary embeddings need pairs",
        c.head_dim);
  check(keys.integer("attention.value_length", 1, 8192, c.head_dim) == c.head_dim,
        "keys and values of different sizes are not supported");
  check(keys.integer("rope.dimension_count", 1, 8192, c.head_dim) == c.head_dim,
        "rotary embeddings over a part of the head are not supported");
  check(keys.integer("expert_count", 0, 1 << 20, 0) == 0, "mixtures of experts are not supported");
  c.max_position_embeddings = keys.integer("context_length", 1, int64_t{1} << 30);
  const GgufTensor* embedding = file.find("token_embd.weight");
  check(embedding != nullptr && embedding->shape.n == 2, "there is no matrix token_embd.weight");
  c.vocab_size = embedding->shape[0];
  check(c.vocab_size <= 1 << 24, "a vocabulary of {} is absurd", c.vocab_size);
}

bool same_bytes(const GgufTensor& a, const GgufTensor& b) {
  return a.type == b.type && a.shape == b.shape &&
         std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin());
}

// A token id; writers put 0xFFFFFFFF where there is none.
std::optional<int64_t> token_id(const GgufFile& file, const char* key, int64_t vocabulary) {
  const auto id = file.integer(key);
  return id && *id >= 0 && *id < vocabulary ? id : std::nullopt;
}

}  // namespace

ModelConfig ModelConfig::from_gguf(const GgufFile& file) {
  return with_context(fmt::format("reading {}", file.path().string()), [&] {
    const auto architecture = file.text("general.architecture");
    check(architecture.has_value(), "the key general.architecture is missing");
    const bool known =
        *architecture == "llama" || *architecture == "qwen2" || *architecture == "qwen3";
    check(known, "architecture \"{}\" is not supported (llama, qwen2 and qwen3 are)",
          shown(*architecture));
    check(file.integer("split.count").value_or(1) <= 1,
          "this is one part of a split model; join the parts first (llama-gguf-split --merge)");
    const ArchitectureKeys keys(file, *architecture);
    ModelConfig c;
    c.model_type = *architecture;
    read_sizes(file, keys, c);
    c.rms_norm_eps = as_written(keys.positive("attention.layer_norm_rms_epsilon", 0.1, 1e-5));
    c.rope_theta = as_written(keys.positive("rope.freq_base", 1e12, 10000.0));
    read_scaling(file, keys, c);
    c.sliding_window = keys.integer("attention.sliding_window", 0, int64_t{1} << 30, 0);
    c.attention_bias = file.find("blk.0.attn_q.bias") != nullptr;
    c.attention_out_bias = file.find("blk.0.attn_output.bias") != nullptr;
    c.mlp_bias = file.find("blk.0.ffn_down.bias") != nullptr;
    c.qk_norm = file.find("blk.0.attn_q_norm.weight") != nullptr;
    const GgufTensor* head = file.find("output.weight");
    c.tie_word_embeddings = head == nullptr || same_bytes(*head, *file.find("token_embd.weight"));
    c.bos_token_id = token_id(file, "tokenizer.ggml.bos_token_id", c.vocab_size);
    for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
      const auto id = token_id(file, key, c.vocab_size);
      if (id && std::count(c.eos_token_ids.begin(), c.eos_token_ids.end(), *id) == 0) {
        c.eos_token_ids.push_back(*id);
      }
    }
    return c;
  });
}

}  // namespace omq
