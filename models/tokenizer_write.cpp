// Writes a tokenizer that came from GGUF keys or a tokenizer.model as tokenizer.json and
// tokenizer_config.json.
//
// The vocabulary and merges are streamed as text (a DOM of 280k merges would be slower and no
// clearer); the rest is what Hugging Face's converters write. Reference: spec/interop-formats.md
// §9.

#include <nlohmann/json.hpp>

#include "models/tokenizer_data.h"
#include "tensor/error.h"

namespace omq {

namespace {

using Json = nlohmann::ordered_json;

std::string quote(std::string_view text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json byte_level_part() {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", true}};
}

Json pre_tokenizer(const TokenizerData& d) {
  if (!d.byte_level) return nullptr;
  Json byte_level = byte_level_part();
  if (d.pre == "gpt2") return byte_level;
  Json first;
  if (d.pre == "smollm") {
    first = {{"type", "Digits"}, {"individual_digits", true}};
  } else {
    const std::string_view regex = d.pre == "llama3" ? kLlama3Pattern : kQwen2Pattern;
    first = {{"type", "Split"},
             {"pattern", {{"Regex", regex}}},
             {"behavior", "Isolated"},
             {"invert", false}};
    byte_level["use_regex"] = false;
  }
  return {{"type", "Sequence"}, {"pretokenizers", Json::array({first, byte_level})}};
}

Json replace_part(std::string_view from, std::string_view to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

Json normalizer(const TokenizerData& d) {
  if (d.byte_level) return d.normalize_nfc ? Json{{"type", "NFC"}} : Json(nullptr);
  Json parts = Json::array();
  if (d.word_mark != WordMark::None) parts.push_back({{"type", "Prepend"}, {"prepend", kWordMark}});
  parts.push_back(replace_part(" ", kWordMark));
  return {{"type", "Sequence"}, {"normalizers", parts}};
}

Json decoder(const TokenizerData& d) {
  if (d.byte_level) return byte_level_part();
  Json parts =
      Json::array({replace_part(kWordMark, " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}});
  if (d.strip_first_space)
    parts.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  return {{"type", "Sequence"}, {"decoders", parts}};
}

Json post_processor(const TokenizerData& d) {
  if (!d.add_bos) return nullptr;
  const std::string& bos = d.pieces[*d.bos];
  const auto special = [&](int type) {
    return Json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}};
  };
  const auto text = [](const char* id, int type) {
    return Json{{"Sequence", {{"id", id}, {"type_id", type}}}};
  };
  const Json token = {{"id", bos}, {"ids", {*d.bos}}, {"tokens", {bos}}};
  return {{"type", "TemplateProcessing"},
          {"single", Json::array({special(0), text("A", 0)})},
          {"pair", Json::array({special(0), text("A", 0), special(1), text("B", 1)})},
          {"special_tokens", {{bos, token}}}};
}

Json added_tokens(const TokenizerData& d) {
  Json list = Json::array();
  for (const AddedToken& t : d.added)
    list.push_back({{"id", t.id},
                    {"content", d.pieces[t.id]},
                    {"single_word", t.single_word},
                    {"lstrip", t.lstrip},
                    {"rstrip", t.rstrip},
                    // spelled with word marks, it can only be found after spaces became such marks
                    {"normalized", t.content != d.pieces[t.id]},
                    {"special", t.special}});
  return list;
}

void append_model(std::string& out, const TokenizerData& d) {
  Json head = {{"type", "BPE"},
               {"dropout", nullptr},
               {"unk_token", d.unk ? Json(d.pieces[*d.unk]) : Json(nullptr)},
               {"continuing_subword_prefix", nullptr},
               {"end_of_word_suffix", nullptr},
               {"fuse_unk", d.fuse_unk},
               {"byte_fallback", d.byte_fallback},
               {"ignore_merges", d.ignore_merges}};
  std::string text = head.dump();
  text.pop_back();  // the object stays open for vocab and merges
  out += text + ",\"vocab\":{";
  const char* comma = "\n";
  for (size_t id = 0; id < d.pieces.size(); ++id) {
    // the first of two equal pieces has the name
    if (d.pieces[id].empty() || d.id_of(d.pieces[id]) != static_cast<int32_t>(id)) continue;
    out += comma + quote(d.pieces[id]) + ":" + std::to_string(id);
    comma = ",\n";
  }
  out += "\n},\"merges\":[";
  comma = "\n";
  for (const Merge& m : d.merges) {
    const std::string &left = d.pieces[m.left], &right = d.pieces[m.right];
    const bool spaces = left.find(' ') != left.npos || right.find(' ') != right.npos;
    out += comma;
    out += spaces ? "[" + quote(left) + "," + quote(right) + "]" : quote(left + " " + right);
    comma = ",\n";
  }
  out += "\n]}";
}

}  // namespace

std::string write_tokenizer_json(const TokenizerData& d) {
  std::string out = "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null";
  const auto member = [&](const char* key, const Json& value) {
    out += fmt::format(",\n\"{}\":{}", key,
                       value.dump(-1, ' ', false, Json::error_handler_t::replace));
  };
  member("added_tokens", added_tokens(d));
  member("normalizer", normalizer(d));
  member("pre_tokenizer", pre_tokenizer(d));
  member("post_processor", post_processor(d));
  member("decoder", decoder(d));
  out += ",\n\"model\":";
  append_model(out, d);
  return out + "}\n";
}

std::string write_tokenizer_config(const TokenizerData& d) {
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_bos_token", d.add_bos},
                 {"add_eos_token", false},
                 {"clean_up_tokenization_spaces", false}};
  if (d.bos) config["bos_token"] = d.pieces[*d.bos];
  if (!d.eos.empty()) config["eos_token"] = d.pieces[d.eos[0]];
  if (d.unk) config["unk_token"] = d.pieces[*d.unk];
  if (d.pad) config["pad_token"] = d.pieces[*d.pad];
  if (!d.chat_template.empty()) config["chat_template"] = d.chat_template;
  return config.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string write_generation_config(const TokenizerData& d) {
  Json config = Json::object();
  if (d.bos) config["bos_token_id"] = *d.bos;
  if (d.eos.size() == 1) config["eos_token_id"] = d.eos[0];
  if (d.eos.size() > 1) config["eos_token_id"] = d.eos;
  if (d.pad) config["pad_token_id"] = *d.pad;
  return config.dump(2) + "\n";
}

}  // namespace omq
