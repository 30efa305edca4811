// Typed, range-checked access to the keys of a config.json; shared by config.cpp and
// config_rope.cpp only.
//
// A missing key is named, a value of the wrong kind or size is shown.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "models/config.h"
#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& object, std::string name)
      : object_(object), name_(std::move(name)) {
    check(object_.is_object(), "{}: an object is expected, not {}", name_, object_.type_name());
  }

  const std::string& name() const { return name_; }
  // Null when the key is absent or null.
  const nlohmann::json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  int64_t integer(const char* key, int64_t lowest, int64_t highest) const {
    const nlohmann::json* v = find(key);
    check(v != nullptr, "{}: the key {} is missing", name_, key);
    check(v->is_number_integer(), "{}: {} is {}, a whole number is expected", name_, key,
          text_of(*v));
    const bool huge = v->is_number_unsigned() && v->get<uint64_t>() > uint64_t{INT64_MAX};
    const int64_t n = huge ? INT64_MAX : v->get<int64_t>();
    check(n >= lowest && n <= highest, "{}: {} is {}, {} to {} is possible", name_, key,
          text_of(*v), lowest, highest);
    return n;
  }
  int64_t integer(const char* key, int64_t lowest, int64_t highest, int64_t absent) const {
    return find(key) ? integer(key, lowest, highest) : absent;
  }
  // Greater than 0 and at most `highest`.
  double positive(const char* key, double highest) const {
    const nlohmann::json* v = find(key);
    check(v != nullptr, "{}: the key {} is missing", name_, key);
    check(v->is_number(), "{}: {} is {}, a number is expected", name_, key, text_of(*v));
    const double x = v->get<double>();
    check(x > 0 && x <= highest, "{}: {} is {}, a number above 0 and at most {} is expected", name_,
          key, text_of(*v), highest);
    return x;
  }
  double positive(const char* key, double highest, double absent) const {
    return find(key) ? positive(key, highest) : absent;
  }
  bool boolean(const char* key, bool absent) const {
    const nlohmann::json* v = find(key);
    if (v == nullptr) return absent;
    check(v->is_boolean(), "{}: {} is {}, true or false is expected", name_, key, text_of(*v));
    return v->get<bool>();
  }
  std::string text(const char* key, std::string_view absent) const {
    const nlohmann::json* v = find(key);
    if (v == nullptr) return std::string(absent);
    check(v->is_string(), "{}: {} is {}, a string is expected", name_, key, text_of(*v));
    return v->get<std::string>();
  }
  static std::string text_of(const nlohmann::json& v) {
    return shown(v.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace), 60);
  }

 private:
  const nlohmann::json& object_;
  std::string name_;
};

// Fills rope_theta and rope_scaling from rope_parameters (transformers 5) or rope_theta and
// rope_scaling.
void read_hf_rope(const ConfigReader& r, ModelConfig& c);
// What to_hf_json writes under rope_scaling.
nlohmann::json rope_scaling_json(const nn::RopeScaling& scaling);

}  // namespace omq
