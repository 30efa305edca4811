// The files beside a tokenizer: tokenizer_config.json, generation_config.json, config.json, chat
// templates.
//
// They say which tokens begin and end a text, whether the first is added, and how a conversation is
// written. Also opens a Hugging Face folder. Reference: spec/interop-formats.md §8, §9.

#include <nlohmann/json.hpp>

#include <algorithm>

#include "models/json_file.h"
#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

json parse_object(std::string_view text, std::string_view name) {
  json root = json::parse(text, nullptr, false);
  check(root.is_object(), "{}: not a valid JSON object", name);
  return root;
}

// "<s>", {"content": "<s>", …} or nothing
std::string token_text(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end()) return {};
  if (it->is_string()) return it->get<std::string>();
  if (it->is_object() && it->contains("content") && it->at("content").is_string())
    return it->at("content").get<std::string>();
  return {};
}

// One template, or of several named ones the one called "default" (else the first).
std::string template_text(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  std::string first;
  if (!value.is_array()) return first;
  for (const json& entry : value) {
    if (!entry.is_object()) continue;
    const std::string name = entry.value("name", ""), text = entry.value("template", "");
    if (name == "default") return text;
    if (first.empty()) first = text;
  }
  return first;
}

void add_eos(TokenizerData& d, int64_t id) {
  if (id < 0 || id >= static_cast<int64_t>(d.pieces.size())) return;
  if (std::find(d.eos.begin(), d.eos.end(), id) == d.eos.end())
    d.eos.push_back(static_cast<int32_t>(id));
}

// Tokens that a tokenizer.model does not know (added_tokens_decoder); a tokenizer.json has them
// already.
void read_added_tokens(TokenizerData& d, const json& config) {
  const auto it = config.find("added_tokens_decoder");
  if (it == config.end() || !it->is_object() || !d.tokenizer_json.empty()) return;
  for (const auto& [key, entry] : it->items()) {
    const std::string content = entry.is_object() ? entry.value("content", "") : "";
    const bool digits =
        !key.empty() && key.size() < 9 &&
        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    check(digits && !content.empty(),
          "tokenizer_config.json: added_tokens_decoder has a bad entry for id {:?}", key);
    const int64_t id = std::stoll(key);
    const bool special = entry.value("special", false);
    if (d.id_of(content) == id) continue;
    d.set_piece(id, content, special ? TokenType::Control : TokenType::UserDefined);
    d.scores.resize(d.pieces.size(), -1000.0f);
    d.added.push_back({static_cast<int32_t>(id), content, special, entry.value("lstrip", false),
                       entry.value("rstrip", false), entry.value("single_word", false)});
  }
  d.index_pieces();
}

std::string read_file(const fs::path& path) { return read_text_file(path, size_t{512} << 20); }

std::string read_if_present(const fs::path& path) {
  return fs::is_regular_file(path) ? read_file(path) : std::string();
}

}  // namespace

void apply_tokenizer_config(TokenizerData& d, std::string text) {
  try {
    const json config = parse_object(text, "tokenizer_config.json");
    read_added_tokens(d, config);
    if (const auto id = d.id_of(token_text(config, "bos_token"))) d.bos = id;
    if (const auto id = d.id_of(token_text(config, "pad_token"))) d.pad = id;
    if (const auto id = d.id_of(token_text(config, "eos_token"))) {
      d.eos.clear();
      add_eos(d, *id);
    }
    if (const auto it = config.find("add_bos_token"); it != config.end() && it->is_boolean()) {
      d.add_bos = it->get<bool>();
    } else if (token_text(config, "tokenizer_class").starts_with("LlamaTokenizer") &&
               !d.byte_level) {
      d.add_bos = true;  // that class's own default
    }
    if (const auto it = config.find("chat_template"); it != config.end())
      d.chat_template = template_text(*it);
  } catch (const json::exception& e) {
    fail("tokenizer_config.json: {}", e.what());
  }
  d.tokenizer_config_json = std::move(text);
}

void apply_token_ids(TokenizerData& d, std::string_view text, std::string_view name,
                     bool fill_only) {
  const json config = parse_object(text, name);
  if (const auto it = config.find("bos_token_id");
      it != config.end() && it->is_number_integer() && !d.bos) {
    const auto id = it->get<int64_t>();
    if (id >= 0 && id < static_cast<int64_t>(d.pieces.size())) d.bos = static_cast<int32_t>(id);
  }
  const auto it = config.find("eos_token_id");
  if (it == config.end() || (fill_only && !d.eos.empty())) return;
  if (it->is_number_integer()) add_eos(d, it->get<int64_t>());
  if (it->is_array())
    for (const json& id : *it)
      if (id.is_number_integer()) add_eos(d, id.get<int64_t>());
}

void set_chat_template(TokenizerData& d, std::string text) {
  d.chat_template = std::move(text);
  if (d.tokenizer_config_json.empty()) return;  // then the writer makes one with the template in it
  auto config = nlohmann::ordered_json::parse(d.tokenizer_config_json);
  config["chat_template"] = d.chat_template;
  d.tokenizer_config_json = config.dump(2);
}

std::shared_ptr<TokenizerData> read_tokenizer_folder(const fs::path& folder) {
  check(fs::is_directory(folder), "{}: not a folder", folder.string());
  const fs::path json_path = folder / "tokenizer.json", model_path = folder / "tokenizer.model";
  const bool has_json = fs::is_regular_file(json_path);
  check(has_json || fs::is_regular_file(model_path),
        "{}: there is neither tokenizer.json nor tokenizer.model in it", folder.string());
  auto data = has_json ? read_tokenizer_json(read_file(json_path), json_path.string())
                       : read_sentencepiece(read_file(model_path), model_path.string());
  return with_context(fmt::format("reading {}", folder.string()), [&] {
    if (auto text = read_if_present(folder / "tokenizer_config.json"); !text.empty())
      apply_tokenizer_config(*data, std::move(text));
    if (auto text = read_if_present(folder / "chat_template.jinja"); !text.empty())
      set_chat_template(*data, std::move(text));
    if (const auto text = read_if_present(folder / "generation_config.json"); !text.empty())
      apply_token_ids(*data, text, "generation_config.json", false);
    if (const auto text = read_if_present(folder / "config.json"); !text.empty())
      apply_token_ids(*data, text, "config.json", true);
    return data;
  });
}

}  // namespace omq
