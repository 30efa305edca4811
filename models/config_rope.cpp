// Rotary embedding settings in their two spellings: transformers 5 puts theta and scaling into
// rope_parameters, earlier versions have rope_theta and rope_scaling (spec/interop-formats.md §8).
#include "models/config_reader.h"
#include "tensor/error.h"

namespace omq {

using nlohmann::json;
using nn::RopeScaling;

namespace {

RopeScaling read_scaling(const ConfigReader& r) {
  using Type = RopeScaling::Type;
  RopeScaling s;
  const std::string type = r.text(r.find("rope_type") ? "rope_type" : "type", "default");
  if (type == "default") return s;
  check(type == "linear" || type == "llama3",
        "{}: rope type \"{}\" is not supported (default, linear and llama3 are)", r.name(),
        shown(type));
  s.factor = r.positive("factor", 1e6);
  s.type = Type::Linear;
  if (type == "linear") return s;
  s.type = Type::Llama3;
  s.low_freq_factor = r.positive("low_freq_factor", 1e6);
  s.high_freq_factor = r.positive("high_freq_factor", 1e6);
  check(s.high_freq_factor > s.low_freq_factor,
        "{}: high_freq_factor {} is not above low_freq_factor {}", r.name(), s.high_freq_factor,
        s.low_freq_factor);
  s.original_max_positions =
      static_cast<double>(r.integer("original_max_position_embeddings", 1, int64_t{1} << 30));
  return s;
}

}  // namespace

void read_hf_rope(const ConfigReader& r, ModelConfig& c) {
  constexpr double kMaxTheta = 1e12;
  c.rope_theta = r.positive("rope_theta", kMaxTheta, 10000.0);
  const json* both = r.find("rope_parameters");
  const json* scaling = both ? both : r.find("rope_scaling");
  if (scaling != nullptr) {
    const char* key = both ? "rope_parameters" : "rope_scaling";
    const ConfigReader s(*scaling, fmt::format("{}: {}", r.name(), key));
    check(s.find("full_attention") == nullptr && s.find("sliding_attention") == nullptr,
          "{}: settings per layer type are not supported", s.name());
    if (both) c.rope_theta = s.positive("rope_theta", kMaxTheta, c.rope_theta);
    const double part = s.positive("partial_rotary_factor", 1.0, 1.0);
    check(part == 1.0, "{}: partial_rotary_factor {} is not supported, 1 is", s.name(), part);
    c.rope_scaling = read_scaling(s);
  }
  const double part = r.positive("partial_rotary_factor", 1.0, 1.0);
  check(part == 1.0, "{}: partial_rotary_factor {} is not supported, 1 is", r.name(), part);
}

json rope_scaling_json(const RopeScaling& s) {
  if (s.type == RopeScaling::Type::None) return nullptr;
  json j = {{"factor", s.factor}};
  j["rope_type"] = s.type == RopeScaling::Type::Linear ? "linear" : "llama3";
  if (s.type == RopeScaling::Type::Llama3) {
    j["low_freq_factor"] = s.low_freq_factor;
    j["high_freq_factor"] = s.high_freq_factor;
    j["original_max_position_embeddings"] = static_cast<int64_t>(s.original_max_positions);
  }
  return j;
}

}  // namespace omq
