// omq-quant audit: the proofs of quant/audit.h on blocks of the user's own model.
//
// One line a check on stdout; code 1 when one fails.
#include "quant/audit.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <nlohmann/json.hpp>

#include "models/json_file.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "tensor/parallel.h"
#include "tools/calibration_text.h"
#include "tools/option_effects.h"
#include "tools/quant_commands.h"
#include "tools/quant_options.h"

namespace omq {
namespace {

using cli::UsageError;
using nlohmann::json;

struct AuditCommand {
  QuantOptions quant;
  std::string layers;
  std::optional<int> layer;
  std::optional<int64_t> tokens;
  bool as_json = false, one_method = false;
};

bool parse_options(const cli::Args& args, AuditCommand& c) {
  CLI::App app(
      "Proves on a model that gradients, transformations and packing are what they should be.\n"
      "Every method is audited with the setting that the options ask for; where a method can\n"
      "transform, with scales at all sites and shifts, unless --no-let or --no-let-shift.\n"
      "Of every learnable all entries are moved at once, in a random direction, and a few alone.",
      "omq-quant audit");
  QuantOptions& o = c.quant;
  SettingFlags setting;
  app.add_option("-m,--model", o.model, "checkpoint: Hugging Face folder or GGUF file (required)")
      ->type_name("PATH");
  app.add_option("--layer", c.layer, "the block to audit (default: the middle one)")
      ->type_name("N");
  app.add_option("--layers", c.layers, "blocks a to b - 1; or all")->type_name("a:b");
  add_setting_options(app, o, setting);
  const char* group = "Inputs";
  app.add_option("--calib", o.calib, "text (default: random token ids)")
      ->type_name("TEXT…")
      ->group(group);
  app.add_option("--calib-ids", o.calib_ids, "token ids instead: a JSON array a line")
      ->type_name("JSONL")
      ->group(group);
  app.add_option("--tokens", c.tokens,
                 "of the window that goes through the model (default 32, or what there is)")
      ->type_name("N")
      ->group(group);
  app.add_option("--seed", o.seed, "of everything random (default 2)")
      ->type_name("N")
      ->group(group);
  add_composition_options(app, setting.pieces);
  add_transform_options(app, setting.transform);
  app.add_option("-t,--threads", o.threads, "threads (default: the CPUs this process may use)")
      ->type_name("N");
  app.add_flag("--json", c.as_json, "one JSON object");
  if (!cli::parse(app, args)) return false;
  if (o.model.empty()) throw UsageError("-m MODEL is missing");
  if (c.layer && !c.layers.empty()) throw UsageError("--layer and --layers exclude each other");
  if (!o.calib.empty() && !o.calib_ids.empty())
    throw UsageError("--calib and --calib-ids exclude each other");
  if (c.tokens && *c.tokens < 2) throw UsageError("--tokens: at least 2");
  if (o.threads < 0) throw UsageError("--threads: 0 or more");
  for (const char* name : {"--method", "--transform", "--clip", "--round", "--train"})
    c.one_method = c.one_method || app.get_option(name)->count() > 0;
  check_audit_effects(app);
  settle_setting(setting, o);
  return true;
}

// Blocks [first, last).
struct Layers {
  int first = 0, last = 0;
};

Layers chosen_layers(const AuditCommand& c, int count) {
  if (c.layers == "all") return {0, count};
  Layers l{c.layer.value_or(count / 2), 0};
  l.last = l.first + 1;
  if (!c.layers.empty()) {
    const char* const end = c.layers.data() + c.layers.size();
    const auto a = std::from_chars(c.layers.data(), end, l.first);
    const auto b = a.ec == std::errc{} && a.ptr < end && *a.ptr == ':'
                       ? std::from_chars(a.ptr + 1, end, l.last)
                       : std::from_chars_result{nullptr, std::errc::invalid_argument};
    if (b.ec != std::errc{} || b.ptr != end || l.first >= l.last)
      throw UsageError(fmt::format("--layers {}: a:b with a below b, or all, wanted", c.layers));
  }
  check(l.first >= 0 && l.last <= count, "layer {}: the model has layers 0 to {}",
        l.first < 0 || l.first >= count ? l.first : l.last - 1, count - 1);
  return l;
}

CalibrationWindows one_window(const AuditCommand& c, const CheckpointReader& reader) {
  const QuantOptions& o = c.quant;
  const ModelConfig& config = reader.config();
  constexpr int64_t kTokens = 32;
  const auto at_most = [&](int64_t there, std::string_view what) {
    check(c.tokens.value_or(0) <= there, "--tokens {}: {} {}", c.tokens.value_or(0), what, there);
    return std::min(c.tokens.value_or(kTokens), there);
  };
  const int64_t tokens = at_most(config.usable_context(), "the model's context is");
  if (!o.calib_ids.empty()) {
    CalibrationWindows w = windows_from_ids(o.calib_ids, config.vocab_size, 1);
    const int64_t there = at_most(w.ids.dim(1), "a window of --calib-ids has");
    w.ids = contiguous(slice(w.ids, 1, 0, std::min(tokens, there)));
    return w;
  }
  if (!o.calib.empty()) return windows_from_text(o.calib, reader.tokenizer(), 1, tokens, o.seed);
  PythonRandom random(o.seed);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.randint(0, config.vocab_size - 1));
  return {Tensor::from<int32_t>(ids, {1, tokens}), fmt::format("{} random token ids", tokens), ""};
}

json check_json(const std::string& layer, const std::string& method, const quant::AuditCheck& c) {
  json j = {{"block", layer},   {"method", method}, {"check", c.name}, {"compared", c.compared},
            {"worst", c.worst}, {"bound", c.bound}, {"passed", c.ok()}};
  if (!c.where.empty()) j["where"] = c.where;
  if (!c.fault.empty()) j["fault"] = c.fault;
  return j;
}

void print_heading(const std::string& block, const std::string& name, const quant::Recipe& recipe) {
  fmt::print("{:<77}{:>7} {:>6}\n", fmt::format("{}, {}, {}", block, name, recipe.spec.to_string()),
             "worst", "bound");
}

void print_check(const quant::AuditCheck& c) {
  const std::string worst = !c.fault.empty() ? "-"
                            : c.worst == 0   ? "0"
                                             : fmt::format("{:.1e}", c.worst);
  fmt::print("  {:<32} {:<41} {:>7} {:>6.2g} {}\n", c.name, c.compared, worst, c.bound,
             c.ok() ? "passed" : "FAILED");
  if (c.ok()) return;
  if (!c.where.empty()) fmt::print("      worst in {}\n", c.where);
  if (!c.fault.empty()) fmt::print("      {}\n", c.fault);
}

}  // namespace

int quant_audit(const cli::Args& args) {
  AuditCommand c;
  if (!parse_options(args, c)) return 0;
  if (c.quant.threads > 0) set_num_threads(c.quant.threads);
  const auto reader = open_checkpoint(c.quant.model);
  check(!PackedConfig::of(reader->config()), "{}: is quantised already; audit the original",
        c.quant.model.string());
  ModelSource source(*reader);
  const Layers layers = chosen_layers(c, source.size());
  const CalibrationWindows window = one_window(c, *reader);
  const auto recipes =
      quant::audited_recipes(c.quant.recipe, c.one_method ? c.quant.method : std::string());
  fmt::print(stderr, "{} of {} ({}), {}\n", c.quant.recipe.spec.to_string(), c.quant.model.string(),
             reader->container(), window.description);
  Tensor x = source.embed(window.ids);
  const int64_t tokens = window.ids.dim(1);
  const nn::Positions at = nn::positions(0, tokens, source.rope(tokens));
  json checks = json::array();
  int tried = 0, failed = 0;
  for (int i = 0; i < layers.last; ++i)
    with_context("auditing " + source.name(i), [&] {
      const auto block = source.load(i);
      if (i >= layers.first)
        for (const auto& [name, recipe] : recipes) {
          if (!c.as_json) print_heading(source.name(i), name, recipe);
          quant::audit_block(recipe, *block, {x, at}, {.seed = c.quant.seed},
                             [&, &name = name](const quant::AuditCheck& check) {
                               ++tried;
                               failed += !check.ok();
                               checks.push_back(check_json(source.name(i), name, check));
                               if (!c.as_json) print_check(check);
                               std::fflush(stdout);
                             });
        }
      if (i + 1 < layers.last) {
        NoGrad off;
        x = block->forward(x, at);
      }
    });
  if (c.as_json)
    fmt::print("{}\n", json_text(json{{"model", c.quant.model.string()},
                                      {"inputs", window.description},
                                      {"checks", checks},
                                      {"failed", failed}},
                                 2));
  else
    fmt::print("{} checks, {}\n", tried, failed ? fmt::format("{} FAILED", failed) : "all passed");
  return failed ? 1 : 0;
}

}  // namespace omq
