// PackedConfig and the native output folder.
#include "models/packed_model.h"

namespace omq {

using nlohmann::json;

namespace {

// Without and with online_transforms. 1 and 2 had zero points of two bytes, and third bits apart.
constexpr int kVersion = 3, kOnlineVersion = 4;

json matrix_json(const MatrixSpec& s) {
  return {{"bits", s.bits}, {"group_size", s.group_size}, {"symmetric", s.symmetric}};
}

MatrixSpec read_matrix(const json& j, const std::string& where) {
  auto field = [&](const char* key, bool ok) {
    check(ok, "{}: {} is missing or of the wrong type", where, key);
  };
  check(j.is_object(), "{}: not an object", where);
  field("bits", j.contains("bits") && j["bits"].is_number_integer());
  field("group_size", j.contains("group_size") && j["group_size"].is_number_integer());
  field("symmetric", j.contains("symmetric") && j["symmetric"].is_boolean());
  const auto bits =
      j["bits"].get<int64_t>();  // not int: a huge number must not wrap to a small one
  check(bits >= 2 && bits <= 8, "{}: bits = {}, 2 to 8 wanted", where, bits);
  MatrixSpec s{static_cast<int>(bits), j["group_size"].get<int64_t>(), j["symmetric"].get<bool>()};
  check(s.group_size >= 0 && s.group_size <= (int64_t{1} << 24), "{}: group_size = {}", where,
        s.group_size);
  return s;
}

constexpr std::pair<const char*, int ActivationSpec::*> kActivationKeys[] = {
    {"activation_bits", &ActivationSpec::activation},
    {"q_bits", &ActivationSpec::q},
    {"k_bits", &ActivationSpec::k},
    {"v_bits", &ActivationSpec::v},
    {"p_bits", &ActivationSpec::p}};
constexpr const char* kIncludeZero = "activation_include_zero";
constexpr std::pair<const char*, double ActivationSpec::*> kClipKeys[] = {
    {"activation_clip", &ActivationSpec::activation_clip}, {"qkv_clip", &ActivationSpec::qkv_clip}};

ActivationSpec read_activations(const json& j, const std::string& where) {
  ActivationSpec s;
  for (const auto& [key, field] : kActivationKeys) {
    if (!j.contains(key)) continue;
    check(j[key].is_number_integer(), "{}: {} is {}, a whole number wanted", where, key,
          j[key].dump());
    const auto bits = j[key].get<int64_t>();
    check((bits >= 2 && bits <= 8) || bits == 16, "{}: {} = {}, 2 to 8 or 16 (none) wanted", where,
          key, bits);
    s.*field = static_cast<int>(bits);
  }
  if (j.contains(kIncludeZero)) {
    check(j[kIncludeZero].is_boolean(), "{}: {} is {}, true or false wanted", where, kIncludeZero,
          j[kIncludeZero].dump());
    s.include_zero = j[kIncludeZero].get<bool>();
  }
  for (const auto& [key, field] : kClipKeys) {
    if (!j.contains(key)) continue;
    check(j[key].is_number(), "{}: {} is {}, a number wanted", where, key, j[key].dump());
    s.*field = j[key].get<double>();
    check(s.*field > 0 && s.*field <= 1, "{}: {} = {}, above 0 and at most 1 wanted", where, key,
          s.*field);
  }
  return s;
}

constexpr const char* kLearnedClips = "learned_activation_clips";
constexpr const char* kOnline = "online_transforms";

OnlineSpec read_online(const json& j, const std::string& where) {
  check(j.is_object() && j.contains("type") && j["type"].is_string(), "{}: type is missing", where);
  check(j["type"] == "kronecker", "{}: a transform of type \"{}\" is not known, \"kronecker\" is",
        where, j["type"].get<std::string>());
  const auto size = [&](const char* key) {
    check(j.contains(key) && j[key].is_number_integer(), "{}: {} is missing or no whole number",
          where, key);
    const auto n = j[key].get<int64_t>();
    check(n >= 0 && n <= (1 << 16), "{}: {} = {}, 0 to {} wanted", where, key, n, 1 << 16);
    return n;
  };
  const OnlineSpec s{size("left"), size("right")};
  check(s.left + s.right > 0, "{}: both factors are 0", where);
  return s;
}

OnlineSpecs read_online_specs(const json& j, const std::string& where) {
  const bool wanted = j["omq_format"] == kOnlineVersion;
  check(wanted == j.contains(kOnline), "{}: {} {} in omq_format {}", where, kOnline,
        wanted ? "is missing" : "does not belong", j["omq_format"].dump());
  OnlineSpecs specs;
  if (!wanted) return specs;
  check(j[kOnline].is_object(), "{}: {} is not an object", where, kOnline);
  for (const auto& [name, spec] : j[kOnline].items())
    specs[name] = read_online(spec, fmt::format("{}: {}: {}", where, kOnline, name));
  return specs;
}

Metadata file_metadata(const std::string& config,
                       const std::map<std::string, std::string>& side_files) {
  Metadata m{{kOmqFormatKey, kOmqFormat}, {"config.json", config}};
  m.insert(side_files.begin(), side_files.end());
  return m;
}

std::string config_text(const CheckpointReader& source, const PackedConfig& packed) {
  json config = source.config().to_hf_json();
  if (packed.untied) config["tie_word_embeddings"] = false;
  config["quantization_config"] = packed.to_json();
  return config.dump(2) + "\n";
}

}  // namespace

nn::ActivationQuant ActivationSpec::quant() const {
  const auto rows = [this](int bits, double clip) -> std::optional<RowQuant> {
    if (bits == 16) return std::nullopt;
    return RowQuant{.bits = bits, .include_zero = include_zero, .clip = clip};
  };
  return {rows(activation, activation_clip), rows(q, qkv_clip), rows(k, qkv_clip),
          rows(v, qkv_clip), rows(p, 1)};
}

const MatrixSpec& PackedConfig::spec_of(const std::string& module) const {
  auto it = exceptions.find(module);
  return it == exceptions.end() ? weight : it->second;
}

json PackedConfig::to_json() const {
  json j = matrix_json(weight);
  j["quant_method"] = "omq";
  // What runs otherwise than version 1 says, although its tensors look alike, is version 2.
  const bool plain = online.empty() && activations.activation_clip == 1 &&
                     activations.qkv_clip == 1 && !activations.learned_clips;
  j["omq_format"] = plain ? kVersion : kOnlineVersion;
  j["layout"] = "panel16";
  j["method"] = method;
  for (const auto& [key, field] : kActivationKeys) j[key] = activations.*field;
  j[kIncludeZero] = activations.include_zero;
  for (const auto& [key, field] : kClipKeys)
    if (activations.*field != 1) j[key] = activations.*field;
  if (activations.learned_clips) j[kLearnedClips] = true;
  if (!plain) j[kOnline] = json::object();
  json rest = json::object();
  for (const auto& [module, spec] : exceptions) rest[module] = matrix_json(spec);
  j["exceptions"] = rest;
  for (const auto& [name, s] : online)
    j[kOnline][name] = {{"type", "kronecker"}, {"left", s.left}, {"right", s.right}};
  return j;
}

std::optional<PackedConfig> PackedConfig::of(const ModelConfig& config) {
  const json& j = config.quantization;
  if (j.is_null()) return std::nullopt;
  const std::string where =
      fmt::format("{}{}quantization_config", config.source, config.source.empty() ? "" : ": ");
  check(j.is_object() && j.contains("quant_method") && j["quant_method"].is_string(),
        "{}: quant_method is missing", where);
  check(j["quant_method"] == "omq",
        "{}: quant_method \"{}\" is not supported; omq reads its own packed models and "
        "unquantised checkpoints",
        where, j["quant_method"].get<std::string>());
  check(j.contains("omq_format") &&
            (j["omq_format"] == kVersion || j["omq_format"] == kOnlineVersion),
        "{}: omq_format {} is not supported, {} and {} are; quantise again with this version",
        where, j.contains("omq_format") ? j["omq_format"].dump() : "(missing)", kVersion,
        kOnlineVersion);
  check(j.contains("layout") && j["layout"] == "panel16",
        "{}: layout {} is not supported, \"panel16\" is", where,
        j.contains("layout") ? j["layout"].dump() : "(missing)");
  PackedConfig p;
  p.weight = read_matrix(j, where);
  if (j.contains("method") && j["method"].is_string()) p.method = j["method"].get<std::string>();
  p.activations = read_activations(j, where);
  if (j.contains(kLearnedClips)) {
    check(j[kLearnedClips].is_boolean(), "{}: {} is {}, true or false wanted", where, kLearnedClips,
          j[kLearnedClips].dump());
    p.activations.learned_clips = j[kLearnedClips].get<bool>() && p.activations.activation < 16;
  }
  p.online = read_online_specs(j, where);
  if (j.contains("exceptions")) {
    check(j["exceptions"].is_object(), "{}: exceptions is not an object", where);
    for (const auto& [module, spec] : j["exceptions"].items())
      p.exceptions[module] = read_matrix(spec, where + ": exceptions: " + module);
  }
  return p;
}

OnlineSpecs online_specs(nn::Block& block) {
  OnlineSpecs specs;
  block.visit([&](std::string_view name, Tensor& t) {
    for (const auto& [end, size] :
         {std::pair{".online.left", &OnlineSpec::left}, {".online.right", &OnlineSpec::right}})
      if (name.ends_with(end)) specs[std::string(name.substr(0, name.rfind(end)))].*size = t.dim(0);
  });
  return specs;
}

int64_t online_operations(const OnlineSpecs& online, const ModelConfig& c) {
  int64_t all = 0;
  const auto done = [&](const char* reader, const OnlineSpec& s) {
    const auto it = online.find(reader);
    return it != online.end() && it->second == s;
  };
  for (const auto& [name, s] : online) {
    const bool behind_q = name == "self_attn.k_proj" || name == "self_attn.v_proj";
    if (behind_q ? done("self_attn.q_proj", s) : name == "mlp.up_proj" && done("mlp.gate_proj", s))
      continue;
    const int64_t row = name == "self_attn.k"                                 ? c.kv_size()
                        : name == "self_attn.q" || name == "self_attn.o_proj" ? c.q_size()
                        : name == "mlp.down_proj"                             ? c.intermediate_size
                                                                              : c.hidden_size;
    all += 2 * row * (s.left + s.right);
  }
  return all;
}

nn::CacheQuant cache_quant(const ModelConfig& config) {
  const auto packed = PackedConfig::of(config);
  if (!packed) return {};
  const nn::ActivationQuant s = packed->activations.quant();
  return {s.k, s.v};
}

PackedModelWriter::PackedModelWriter(const CheckpointReader& source, PackedConfig packed,
                                     const std::filesystem::path& out, bool force)
    : dir_(out, force),
      config_(config_text(source, packed)),
      side_files_(source.side_files()),
      weights_(dir_.path() / "model.safetensors", file_metadata(config_, side_files_)) {}

void PackedModelWriter::store(int i, nn::Block& block) {
  block.visit([&](std::string_view name, Tensor& t) {
    weights_.add(fmt::format("model.layers.{}.{}", i, name), t);
  });
}

void PackedModelWriter::add(const std::string& module, const nn::Weight& weight) {
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&weight))
    (*packed)->visit([&](std::string_view name, Tensor& t) {
      weights_.add(module + "." + std::string(name), t);
    });
  else
    weights_.add(module + ".weight", std::get<Tensor>(weight));
}

void PackedModelWriter::close() {
  weights_.finish();
  dir_.write("config.json", config_);
  for (const auto& [name, content] : side_files_) dir_.write(name, content);
}

}  // namespace omq
