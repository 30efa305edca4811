// ModelConfig from and to config.json. GGUF keys: config_gguf.cpp; rotary embeddings:
// config_rope.cpp.
#include "models/config.h"

#include <algorithm>

#include "models/config_reader.h"
#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

using nlohmann::json;

namespace {

// What differs between the families when the file does not say: the defaults of transformers'
// configuration classes.
struct Family {
  const char* model_type;
  const char* architecture;
  int64_t context;         // max_position_embeddings
  int64_t sliding_window;  // 0: off unless switched on
  bool window_switch;      // use_sliding_window exists and is off by default
  bool always_qkv_bias;    // not configurable in this family
  bool qk_norm;
  bool kv_heads_optional;  // absent means as many as heads
};
constexpr Family kFamilies[] = {
    {"llama", "LlamaForCausalLM", 2048, 0, false, false, false, true},
    {"mistral", "MistralForCausalLM", 131072, 4096, false, false, false, false},
    {"qwen2", "Qwen2ForCausalLM", 32768, 4096, true, true, false, false},
    {"qwen3", "Qwen3ForCausalLM", 32768, 4096, true, false, true, false},
};

std::string supported() {
  std::string out;
  for (const Family& f : kFamilies)
    out += fmt::format("{}{}", out.empty() ? "" : ", ", f.model_type);
  return out;
}

// Early conversions wrote "LLaMAForCausalLM".
bool same_name(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](char x, char y) { return lower(x) == lower(y); });
}

const Family& find_family(const ConfigReader& r) {
  const std::string type = r.text("model_type", "");
  std::string architecture;
  if (const json* list = r.find("architectures")) {
    const bool ok = list->is_array() && (list->empty() || list->front().is_string());
    check(ok, "{}: architectures is {}, a list of names is expected", r.name(), r.text_of(*list));
    if (!list->empty()) architecture = list->front().get<std::string>();
  }
  for (const Family& f : kFamilies) {
    const bool same = type.empty() ? same_name(architecture, f.architecture) : type == f.model_type;
    if (!same) continue;
    // A classifier or an embedder shares model_type with the language model.
    check(architecture.empty() || same_name(architecture, f.architecture),
          "{}: architecture {} (model_type {}) is not supported; of this family only {} is",
          r.name(), shown(architecture), shown(type), f.architecture);
    return f;
  }
  fail("{}: unknown model: architectures {}, model_type {}; supported are {}", r.name(),
       architecture.empty() ? "(none)" : shown(architecture), type.empty() ? "(none)" : shown(type),
       supported());
}

// An id, a list of ids, or nothing. Negative ids mean "none" in some files.
std::vector<int64_t> token_ids(const ConfigReader& r, const char* key,
                               std::optional<int64_t> absent, const json& object) {
  std::vector<int64_t> out;
  const auto it = object.find(key);
  if (it == object.end()) {
    if (absent) out.push_back(*absent);
    return out;
  }
  const json list = it->is_array() ? *it : it->is_null() ? json::array() : json::array({*it});
  for (const json& v : list) {
    check(v.is_number_integer(), "{}: {} is {}, a token id or a list of them is expected", r.name(),
          key, r.text_of(*it));
    const int64_t id = v.get<int64_t>();
    if (id >= 0 && std::find(out.begin(), out.end(), id) == out.end()) out.push_back(id);
  }
  return out;
}

// The window in tokens, 0 when attention reaches over everything.
int64_t read_window(const ConfigReader& r, const Family& f, const json& object) {
  if (f.window_switch && !r.boolean("use_sliding_window", false)) return 0;
  if (const json* types = r.find("layer_types")) {
    check(types->is_array(), "{}: layer_types is {}, a list is expected", r.name(),
          r.text_of(*types));
    bool sliding = false;
    for (const json& l : *types) {
      check(l == "full_attention" || l == "sliding_attention", "{}: layer type {} is not supported",
            r.name(), r.text_of(l));
      sliding |= l == "sliding_attention";
    }
    if (!types->empty() && !sliding) return 0;
  }
  const int64_t layers = r.integer("num_hidden_layers", 1, 4096);
  if (f.window_switch && r.integer("max_window_layers", 0, 1 << 20, 0) >= layers) return 0;
  // null switches it off; an absent key means the family's default.
  if (object.contains("sliding_window")) return r.integer("sliding_window", 1, int64_t{1} << 30, 0);
  return f.sliding_window;
}

void read_sizes(const ConfigReader& r, const Family& f, const json& object, ModelConfig& c) {
  c.hidden_size = r.integer("hidden_size", 1, 1 << 20);
  c.intermediate_size = r.integer("intermediate_size", 1, 1 << 22);
  c.num_layers = r.integer("num_hidden_layers", 1, 4096);
  c.num_heads = r.integer("num_attention_heads", 1, 1 << 14);
  check(f.kv_heads_optional || object.contains("num_key_value_heads"),
        "{}: the key num_key_value_heads is missing", r.name());
  c.num_kv_heads = r.integer("num_key_value_heads", 1, 1 << 14, c.num_heads);
  check(c.num_heads % c.num_kv_heads == 0,
        "{}: num_attention_heads {} is not a multiple of num_key_value_heads {}", r.name(),
        c.num_heads, c.num_kv_heads);
  if (r.find("head_dim")) {
    c.head_dim = r.integer("head_dim", 2, 8192);
  } else if (f.qk_norm) {
    c.head_dim = 128;  // Qwen3's default does not depend on the other sizes
  } else {
    check(
        c.hidden_size % c.num_heads == 0,
        "{}: hidden_size {} is not a multiple of num_attention_heads {} and head_dim is not given",
        r.name(), c.hidden_size, c.num_heads);
    c.head_dim = c.hidden_size / c.num_heads;
  }
  check(c.head_dim % 2 == 0, "{}: head_dim {} is odd, rotary embeddings need pairs", r.name(),
        c.head_dim);
  c.vocab_size = r.integer("vocab_size", 1, 1 << 24);
  c.max_position_embeddings = r.integer("max_position_embeddings", 1, int64_t{1} << 30, f.context);
}

}  // namespace

ModelConfig ModelConfig::from_hf(const json& config, std::string_view name) {
  const ConfigReader r(config, std::string(name));
  const Family& f = find_family(r);
  ModelConfig c;
  c.model_type = f.model_type;
  read_sizes(r, f, config, c);
  c.rms_norm_eps = r.positive("rms_norm_eps", 0.1, 1e-6);
  read_hf_rope(r, c);
  const std::string act = r.text("hidden_act", "silu");
  check(act == "silu" || act == "swish", "{}: hidden_act \"{}\" is not supported, silu is",
        r.name(), shown(act));
  c.tie_word_embeddings = r.boolean("tie_word_embeddings", false);
  const bool bias = r.boolean("attention_bias", false);
  c.attention_bias = bias || f.always_qkv_bias;
  c.attention_out_bias = bias && !f.always_qkv_bias;
  c.mlp_bias = r.boolean("mlp_bias", false);
  c.qk_norm = f.qk_norm;
  c.sliding_window = read_window(r, f, config);
  // LlamaConfig and MistralConfig have ids 1 and 2 when the file is silent, Qwen's have none.
  const bool ids = !f.always_qkv_bias && !f.qk_norm;
  const auto bos =
      token_ids(r, "bos_token_id", ids ? std::optional<int64_t>(1) : std::nullopt, config);
  if (!bos.empty()) c.bos_token_id = bos.front();
  c.eos_token_ids =
      token_ids(r, "eos_token_id", ids ? std::optional<int64_t>(2) : std::nullopt, config);
  if (const json* q = r.find("quantization_config")) {
    check(q->is_object(), "{}: quantization_config is not an object", r.name());
    c.quantization = *q;
    c.source = r.name();
  }
  c.raw = config;
  return c;
}

ModelConfig ModelConfig::from_hf_file(const std::filesystem::path& config_json) {
  return from_hf(read_json_object(config_json), config_json.string());
}

int64_t ModelConfig::usable_context() const {
  return sliding_window > 0 ? std::min(sliding_window, max_position_embeddings)
                            : max_position_embeddings;
}

void ModelConfig::check_context(int64_t tokens) const {
  check(sliding_window == 0 || tokens <= sliding_window,
        "context of {} tokens: this {} model looks back over a sliding window of {} only, which is "
        "not "
        "implemented; choose a context of at most {}",
        tokens, model_type, sliding_window, sliding_window);
}

json ModelConfig::to_hf_json() const {
  if (!raw.is_null()) return raw;
  const auto* f = std::find_if(std::begin(kFamilies), std::end(kFamilies),
                               [&](const Family& row) { return model_type == row.model_type; });
  check(f != std::end(kFamilies), "config: model_type \"{}\" cannot be written", model_type);
  check(rope_divisors.empty(),
        "config: the model's rope_freqs follow no rule that config.json can name (none, linear, "
        "llama3)");
  json j = {{"architectures", json::array({f->architecture})},
            {"model_type", model_type},
            {"hidden_act", "silu"},
            {"hidden_size", hidden_size},
            {"intermediate_size", intermediate_size},
            {"num_hidden_layers", num_layers},
            {"num_attention_heads", num_heads},
            {"num_key_value_heads", num_kv_heads},
            {"head_dim", head_dim},
            {"vocab_size", vocab_size},
            {"max_position_embeddings", max_position_embeddings},
            {"rms_norm_eps", rms_norm_eps},
            {"rope_theta", rope_theta},
            {"rope_scaling", rope_scaling_json(rope_scaling)},
            {"tie_word_embeddings", tie_word_embeddings},
            {"attention_bias", attention_bias && !f->always_qkv_bias},
            {"mlp_bias", mlp_bias},
            {"bos_token_id", nullptr},
            {"eos_token_id", nullptr},
            {"sliding_window", nullptr},
            {"torch_dtype", "float32"}};
  if (f->window_switch) j["use_sliding_window"] = sliding_window > 0;
  if (sliding_window > 0) j["sliding_window"] = sliding_window;
  if (bos_token_id) j["bos_token_id"] = *bos_token_id;
  if (eos_token_ids.size() == 1) j["eos_token_id"] = eos_token_ids.front();
  if (eos_token_ids.size() > 1) j["eos_token_id"] = eos_token_ids;
  if (!quantization.is_null()) j["quantization_config"] = quantization;
  return j;
}

}  // namespace omq
