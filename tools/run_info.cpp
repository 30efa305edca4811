// omq-run info: what is inside a model, and what this machine would run it with.
#include "models/chat.h"

#include <CLI/CLI.hpp>

#include "models/hash.h"
#include "models/json_file.h"
#include "models/packed_model.h"
#include "tensor/cpu/gemm.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tools/run_common.h"

namespace omq::run {
namespace {

using nlohmann::json;

json config_json(const ModelConfig& c) {
  json j = {{"model_type", c.model_type},
            {"hidden_size", c.hidden_size},
            {"intermediate_size", c.intermediate_size},
            {"num_hidden_layers", c.num_layers},
            {"num_attention_heads", c.num_heads},
            {"num_key_value_heads", c.num_kv_heads},
            {"head_dim", c.head_dim},
            {"vocab_size", c.vocab_size},
            {"context", c.max_position_embeddings},
            {"rope_theta", c.rope_theta},
            {"rms_norm_eps", c.rms_norm_eps},
            {"tie_word_embeddings", c.tie_word_embeddings},
            {"attention_bias", c.attention_bias},
            {"qk_norm", c.qk_norm}};
  if (c.sliding_window > 0) j["sliding_window"] = c.sliding_window;
  return j;
}

json tokenizer_json(const Tokenizer& t) {
  json eos = json::array();
  for (const int32_t id : t.eos_ids()) eos.push_back(id);
  json j = {{"vocab_size", t.vocab_size()}, {"adds_bos", t.adds_bos()}, {"eos_ids", eos}};
  if (t.bos_id()) j["bos_id"] = *t.bos_id();
  return j;
}

// The prompt format's name, or why there is none.
json template_json(const Tokenizer& t) {
  if (t.chat_template().empty())
    return {{"known", false}, {"reason", "the model has no chat template"}};
  try {
    return {{"known", true}, {"name", ChatTemplate::of(t).name()}};
  } catch (const Error& e) {
    return {{"known", false}, {"reason", e.what()}};
  }
}

json dtype_counts(const CheckpointReader& reader) {
  std::map<std::string, json> counts;
  for (const std::string& name : reader.names()) {
    const TensorInfo& info = reader.meta(name);
    json& c = counts[info.dtype];
    if (c.is_null()) c = {{"tensors", 0}, {"bytes", 0}};
    c["tensors"] = c["tensors"].get<int64_t>() + 1;
    c["bytes"] = c["bytes"].get<uint64_t>() + info.bytes;
  }
  return counts;
}

json cache_json(const ModelConfig& c) {
  const nn::CacheQuant kept = cache_quant(c);
  return {{"type_k", cache_type(kept.k, kept.floats)},
          {"type_v", cache_type(kept.v, kept.floats)},
          {"bytes_per_token", cache_token_bytes(c, kept)}};
}

json describe(const OpenModel& m, bool hashes) {
  const CheckpointReader& reader = *m.reader;
  json files = json::array();
  for (const CheckpointFile& f : reader.files()) {
    json file = {{"path", f.path.string()}, {"bytes", f.bytes}};
    if (hashes) file["sha256"] = sha256_file(f.path);
    files.push_back(file);
  }
  const std::optional<PackedConfig> packed = PackedConfig::of(reader.config());
  return {{"model", reader.path().string()},
          {"name", model_name(m)},
          {"container", reader.container()},
          {"files", files},
          {"stored", dtype_counts(reader)},
          {"parameters", parameter_count(m)},
          {"weight_bytes", m.size.bytes},
          {"bits_per_weight", m.size.bits_per_weight()},
          {"block_bits_per_weight", m.size.block_bits_per_weight()},
          {"bytes_per_token", m.size.token_bytes},
          {"quantization", packed ? packed->to_json() : json(nullptr)},
          {"online_operations_per_token",
           packed ? online_operations(packed->online, reader.config()) * reader.config().num_layers
                  : 0},
          {"cache", cache_json(reader.config())},
          {"config", config_json(reader.config())},
          {"tokenizer", tokenizer_json(*m.tokenizer)},
          {"chat_template", template_json(*m.tokenizer)},
          {"runs_with",
           {{"kernels", packed_isa_name()},
            {"matrix_products", cpu::gemm_name()},
            {"threads", num_threads()},
            {"cuda", cuda_packed_kernels() != nullptr}}}};
}

std::string quantization_text(const json& q) {
  if (q.is_null()) return "none";
  auto matrix = [](const json& s) {
    const auto group = s["group_size"].get<int64_t>();
    return fmt::format(
        "{} bits, {}{}", s["bits"].get<int>(),
        group > 0 ? fmt::format("groups of {}", group) : std::string("a group a row"),
        s["symmetric"].get<bool>() ? ", symmetric" : "");
  };
  std::string text = fmt::format("{}: {}, layout {}", q["method"].get<std::string>(), matrix(q),
                                 q["layout"].get<std::string>());
  for (const auto& [name, spec] : q["exceptions"].items())
    text += fmt::format("; {} {}", name, matrix(spec));
  return text;
}

// Bits of what flows through the blocks.
std::string activations_text(const json& q) {
  if (q.is_null()) return "as they are";
  std::string text;
  for (const auto& [key, name] : {std::pair{"activation_bits", "into matrices"},
                                  {"q_bits", "queries"},
                                  {"k_bits", "keys"},
                                  {"v_bits", "values"},
                                  {"p_bits", "probabilities"}})
    if (const int bits = q.value(key, 16); bits < 16)
      text += fmt::format("{}{} {} bits", text.empty() ? "" : ", ", name, bits);
  if (text.empty()) return "as they are";
  const bool integers = q.value("activation_bits", 16) < 16 && q["activation_include_zero"];
  return text + (integers ? "; products in integers" : "");
}

// What is transformed on the way, and its work.
std::string online_text(const json& j) {
  std::string text;
  for (const auto& [name, s] : j["quantization"]["online_transforms"].items())
    text += fmt::format("{}{}", text.empty() ? "" : ", ", name);
  return fmt::format("{}; {:.3g} million operations a token", text,
                     j["online_operations_per_token"].get<double>() / 1e6);
}

void print(const json& j) {
  auto line = [](std::string_view name, const std::string& text) {
    fmt::print("{:14}{}\n", name, text);
  };
  auto bytes = [](const json& b) { return cli::human_bytes(b.get<double>()); };
  line("model",
       fmt::format("{} ({})", j["model"].get<std::string>(), j["name"].get<std::string>()));
  line("container", j["container"].get<std::string>());
  for (const json& f : j["files"])
    line("file",
         fmt::format("{}  {}{}", f["path"].get<std::string>(), bytes(f["bytes"]),
                     f.contains("sha256") ? "  sha256 " + f["sha256"].get<std::string>() : ""));
  for (const auto& [dtype, c] : j["stored"].items())
    line("stored", fmt::format("{:5} {:4} tensors  {}", dtype, c["tensors"].get<int64_t>(),
                               bytes(c["bytes"])));
  line("weights",
       fmt::format("{} parameters, {} as run, {:.3f} bits a weight ({:.3f} inside the blocks)",
                   human_count(j["parameters"].get<int64_t>()), bytes(j["weight_bytes"]),
                   j["bits_per_weight"].get<double>(), j["block_bits_per_weight"].get<double>()));
  line("a token reads", bytes(j["bytes_per_token"]));
  line("quantization", quantization_text(j["quantization"]));
  line("activations", activations_text(j["quantization"]));
  if (j["online_operations_per_token"] > 0) line("online", online_text(j));
  line("cache",
       fmt::format("keys {}, values {}, {} a token", j["cache"]["type_k"].get<std::string>(),
                   j["cache"]["type_v"].get<std::string>(), bytes(j["cache"]["bytes_per_token"])));
  const json& c = j["config"];
  line("shape",
       fmt::format(
           "{} layers, hidden {}, ffn {}, {} query and {} key/value heads of {}, vocabulary {}{}",
           c["num_hidden_layers"].dump(), c["hidden_size"].dump(), c["intermediate_size"].dump(),
           c["num_attention_heads"].dump(), c["num_key_value_heads"].dump(), c["head_dim"].dump(),
           c["vocab_size"].dump(), c["tie_word_embeddings"].get<bool>() ? ", tied head" : ""));
  line("context",
       fmt::format(
           "{} tokens{}, RoPE theta {}", c["context"].dump(),
           c.contains("sliding_window") ? ", sliding window " + c["sliding_window"].dump() : "",
           c["rope_theta"].dump()));
  const json& t = j["tokenizer"];
  line("tokenizer", fmt::format("{} tokens, BOS {}{}, ends at {}", t["vocab_size"].dump(),
                                t.contains("bos_id") ? t["bos_id"].dump() : "none",
                                t["adds_bos"].get<bool>() ? " put in front" : " not put in front",
                                t["eos_ids"].dump()));
  const json& chat = j["chat_template"];
  line("chat", chat["known"].get<bool>() ? chat["name"].get<std::string>()
                                         : "no: " + chat["reason"].get<std::string>());
  const json& r = j["runs_with"];
  line("runs with",
       fmt::format("packed kernels {}, matrix products {}, {} threads, CUDA {}",
                   r["kernels"].get<std::string>(), r["matrix_products"].get<std::string>(),
                   r["threads"].dump(), r["cuda"].get<bool>() ? "yes" : "no"));
}

}  // namespace

int info(const cli::Args& args) {
  ModelOptions options;
  bool as_json = false, hashes = false;
  CLI::App app("What is inside a model.", "omq-run info");
  add_model_options(app, options, /*with_context=*/false);
  app.add_flag("--json", as_json, "one JSON object");
  app.add_flag("--sha256", hashes, "with the hashes of the files");
  if (!cli::parse(app, args, kAliases)) return 0;
  apply(options);
  options.device = "cpu";  // where it is read; nothing is computed
  options.gpu_layers.clear();
  options.quiet = true;
  const OpenModel m = open_model(options, 16);
  const json j = describe(m, hashes);
  if (as_json)
    fmt::print("{}\n", json_text(j, 2));
  else
    print(j);
  return 0;
}

}  // namespace omq::run
