// See report_settings.h.
#include "tools/report_settings.h"

#include <fmt/format.h>

#include <set>

#include "tools/cli.h"
#include "tools/report_svg.h"

namespace omq {

using nlohmann::json;
using svg::escaped;

namespace {

std::string shown(const json& j) {
  if (j.is_string()) return j.get<std::string>();
  if (j.is_boolean()) return j.get<bool>() ? "yes" : "no";
  if (j.is_number_float()) return fmt::format("{:g}", j.get<double>());
  if (j.is_null()) return "none";
  if (!j.is_structured()) return j.dump();
  std::string out;
  for (const auto& [key, value] : j.items()) {
    if (!out.empty()) out += ", ";
    out += j.is_object() ? key + " " + shown(value) : shown(value);
  }
  return out.empty() ? "none" : out;
}

std::string big(const std::string& value, const std::string& meaning) {
  return fmt::format("<div><b>{}</b><span>{}</span></div>\n", escaped(value), escaped(meaning));
}

std::string setting(const std::string& name, const std::string& value) {
  if (value.empty()) return "";
  return fmt::format("<div><dt>{}</dt><dd>{}</dd></div>\n", escaped(name), escaped(value));
}

std::string model_name(const json& report) {
  if (const std::string name = text_at(report, "model.name"); !name.empty()) return name;
  return "Unnamed model";
}

std::string weights_text(const json& r) {
  const auto bits = number_at(r, "wbits"), group = number_at(r, "group_size");
  if (!bits) return "";
  std::string s = fmt::format("{:g} bits", *bits);
  if (group) s += *group > 0 ? fmt::format(", groups of {:g}", *group) : ", one group a row";
  if (const json* symmetric = value_at(r, "symmetric"))
    s += *symmetric == true ? ", symmetric" : ", with zero points";
  if (text_at(r, "official_range") == "yes") s += ", ranges as in the official code";
  if (text_at(r, "official_symmetric") == "yes") s += ", middle as in the official code";
  return s;
}

std::string activations_text(const json& r) {
  std::string s;
  bool any = false, known = false;
  for (const auto& [key, name] : {std::pair{"abits", "inputs of linears"},
                                  {"q_bits", "q"},
                                  {"k_bits", "k"},
                                  {"v_bits", "v"},
                                  {"p_bits", "probabilities"}}) {
    const auto bits = number_at(r, key);
    if (!bits) continue;
    known = true;
    any = any || *bits < 16;
    if (*bits < 16) s += fmt::format("{}{} {:g} bits", s.empty() ? "" : ", ", name, *bits);
  }
  // Shares of the ranges that codes span, where they are not the whole.
  for (const auto& [key, what] :
       {std::pair{"act_clip", "inputs of linears"}, {"qkv_clip", "q, k, v"}})
    if (const auto share = number_at(r, key))
      s += fmt::format("; {:g} of the range ({})", *share, what);
  return any ? s : known ? "as they are" : "";
}

std::string transformation_text(const json& r) {
  if (!r.contains("transformation")) return "";
  const json& t = r["transformation"];
  if (!t.is_object()) return shown(t);
  std::string s = fmt::format("equivalent transformation, α {}", text_at(t, "alpha"));
  s += text_at(t, "shift") == "yes" ? ", scales and shifts" : ", scales";
  if (text_at(t, "tied_pairs") == "no") s += ", q–k scales untied";
  if (text_at(t, "up_to_down") == "yes") s += ", up → down too";
  if (text_at(t, "all_consumers") == "no") s += ", started from one consumer";
  if (text_at(t, "signed_max") == "yes") s += ", started from the signed maximum";
  return s;
}

std::string rotation_text(const json& r) {
  if (!value_at(r, "rotation")) return "";
  std::string s;
  for (const auto& [key, name] : {std::pair{"rotation.residual", "residual stream"},
                                  {"rotation.values", "values"},
                                  {"rotation.heads", "across heads"},
                                  {"rotation.down", "before down_proj"},
                                  {"rotation.norms", "what norms give"},
                                  {"rotation.query_key", "queries and keys"}})
    if (text_at(r, key) == "yes") s += fmt::format("{}{}", s.empty() ? "" : ", ", name);
  return fmt::format("{}; seed {}", s, text_at(r, "rotation.seed"));
}

// What the running model does besides its matrices.
std::string online_text(const json& report) {
  const auto operations = number_at(report, "online.operations_per_token");
  const auto share = number_at(report, "online.share_of_matrices");
  if (!operations || !share) return "";
  std::string s;
  if (const json* t = value_at(report, "online.transforms"); t && t->is_object())
    for (const auto& [name, sizes] : t->items())
      s += fmt::format("{}{}", s.empty() ? "" : ", ", name);
  return fmt::format("{}: {:.3g} million operations a token, {:.1f} % of the blocks' matrices", s,
                     *operations / 1e6, 100 * *share);
}

std::string learning_text(const json& r) {
  const auto epochs = number_at(r, "epochs");
  if (!epochs) return "";
  if (*epochs == 0) return "none";
  return fmt::format("{:g} epoch{}, {} window{} a step, products in {}", *epochs,
                     *epochs == 1 ? "" : "s", text_at(r, "batch_size"),
                     text_at(r, "batch_size") == "1" ? "" : "s", text_at(r, "compute"));
}

std::string schedule_text(const json& r) {
  if (!value_at(r, "schedule")) return "";
  std::string s =
      fmt::format("{}, rates {}", text_at(r, "schedule.optimiser"), text_at(r, "schedule.rates"));
  if (const auto slope = number_at(r, "schedule.depth_slope"); slope && *slope > 0)
    s += fmt::format(", larger by {:g} in the last block", *slope);
  return fmt::format(
      "{}; {} kept", s,
      text_at(r, "schedule.keeps").starts_with("best") ? "best epoch" : "last epoch");
}

std::string rates_text(const json& r) {
  const json* rates = value_at(r, "learning_rates");
  if (!rates || !rates->is_object()) return text_at(r, "learning_rates");
  std::string s;
  for (const auto& [key, value] : rates->items())
    s += fmt::format("{}{} {}", s.empty() ? "" : ", ",
                     key == "lwc"   ? "clip factors"
                     : key == "let" ? "transformation"
                                    : key,
                     shown(value));
  return s;
}

std::string weight_text(const json& r) {
  const std::string weight = text_at(r, "augmented_loss_weight");
  return weight.empty() ? "" : " times " + weight;
}

std::string objective_text(const json& r) {
  std::string s = "block error";
  if (text_at(r, "augmented_loss") == "yes")
    s += ", augmented by that on quantised inputs" + weight_text(r);
  if (text_at(r, "token_loss") == "yes") s += "; tokens count by their size, not by its square";
  return s;
}

}  // namespace

const json* value_at(const json& j, std::string_view path) {
  const json* at = &j;
  while (!path.empty()) {
    const size_t end = std::min(path.find('.'), path.size());
    const std::string key(path.substr(0, end));
    if (!at->is_object() || !at->contains(key)) return nullptr;
    at = &(*at)[key];
    path.remove_prefix(std::min(end + 1, path.size()));
  }
  return at->is_null() ? nullptr : at;
}

std::optional<double> number_at(const json& j, std::string_view path) {
  const json* at = value_at(j, path);
  if (!at || !at->is_number()) return std::nullopt;
  return at->get<double>();
}

std::string text_at(const json& j, std::string_view path) {
  const json* at = value_at(j, path);
  return at ? shown(*at) : "";
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string missing(std::string_view sentence) {
  return fmt::format("<p class=\"missing\">{}</p>\n", escaped(sentence));
}

std::string headline(const json& report, size_t blocks) {
  std::string kind = text_at(report, "recipe.setting"), under;
  if (const std::string method = text_at(report, "recipe.method"); !method.empty())
    kind += (kind.empty() ? "" : ", ") + method;
  const auto say = [&under](const std::string& s) {
    if (!s.empty()) under += (under.empty() ? "" : " · ") + s;
  };
  say(text_at(report, "model.type"));
  if (blocks > 0) say(fmt::format("{} block{}", blocks, blocks == 1 ? "" : "s"));
  if (const auto n = number_at(report, "recipe.calibration.windows"))
    say(fmt::format("{:g} calibration windows of {} tokens", *n,
                    text_at(report, "recipe.calibration.tokens")));
  else
    say("no calibration text");
  std::string numbers;
  if (const auto bits = number_at(report, "size.block_bits_per_weight"))
    numbers += big(fmt::format("{:.3f}", *bits), "bits a weight in the blocks");
  if (const auto bits = number_at(report, "size.bits_per_weight"))
    numbers += big(fmt::format("{:.3f}", *bits), "with embedding and head");
  if (const json* list = value_at(report, "evaluation"); list && list->is_array())
    for (const json& e : *list)
      if (const auto ppl = number_at(e, "perplexity"); ppl && text_at(e, "model") != "simulated")
        numbers += big(svg::number(*ppl, 4), "perplexity, " + file_name(text_at(e, "file")));
  if (const auto bytes = number_at(report, "size.weight_bytes"))
    numbers += big(cli::human_bytes(*bytes), "of weights");
  if (const auto seconds = number_at(report, "calibration_seconds"))
    numbers += big(cli::human_seconds(*seconds), "to quantise");
  if (const auto bytes = number_at(report, "peak_memory_bytes"))
    numbers += big(cli::human_bytes(*bytes), "memory at most");
  return fmt::format("<header>\n<h1>{}{}</h1>\n<p class=\"under\">{}</p>\n</header>\n{}",
                     escaped(model_name(report)),
                     kind.empty() ? "" : fmt::format(" <span>{}</span>", escaped(kind)),
                     escaped(under),
                     numbers.empty() ? missing("The report holds none of the headline numbers.")
                                     : fmt::format("<div class=\"numbers\">\n{}</div>\n", numbers));
}

std::string settings_table(const json& report) {
  const json* recipe = value_at(report, "recipe");
  if (!recipe || !recipe->is_object() || recipe->empty())
    return missing("The report does not hold the settings.");
  const json& r = *recipe;
  std::string rows =
      setting("Method", text_at(r, "method")) + setting("Made of", text_at(r, "line")) +
      setting("Weights", weights_text(r)) + setting("Activations", activations_text(r)) +
      setting("Outside the blocks", text_at(report, "kept")) +
      setting("Transformation", transformation_text(r)) + setting("Rotation", rotation_text(r)) +
      setting("Online", online_text(report)) + setting("Learning", learning_text(r));
  if (number_at(r, "epochs").value_or(1) > 0)
    rows += setting("Objective", objective_text(r)) +
            setting("Clipping",
                    text_at(r, "clip_search") == "yes" ? "starts where a search put it" : "") +
            setting("Learning rates", rates_text(r)) + setting("Schedule", schedule_text(r)) +
            setting("Weight decay", text_at(r, "weight_decay"));
  rows += setting("Calibration text", text_at(r, "calibration.source")) +
          setting("Seed", text_at(r, "seed")) + setting("Threads", text_at(report, "threads"));
  // What later versions write is shown too, under its own name.
  static const std::set<std::string> kTold = {
      "method",         "line",         "setting",
      "wbits",          "abits",        "q_bits",
      "k_bits",         "v_bits",       "p_bits",
      "group_size",     "symmetric",    "official_range",
      "epochs",         "batch_size",   "augmented_loss",
      "learning_rates", "weight_decay", "compute",
      "seed",           "calibration",  "official_symmetric",
      "transformation", "clip_search",  "augmented_loss_weight",
      "rotation",       "schedule",     "act_clip",
      "qkv_clip",       "token_loss"};
  for (const auto& [key, value] : r.items())
    if (!kTold.contains(key)) rows += setting(key, shown(value));
  return fmt::format("<dl>\n{}</dl>\n", rows);
}

}  // namespace omq
