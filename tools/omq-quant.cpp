// omq-quant: from a checkpoint to a folder of packed weights.
//
//   open checkpoint (mmap) → tokens → embed → for each block { load → calibrate → pack → write →
//   free } → report
//
// stdout carries the results asked for with --eval; everything about the work goes to stderr.
#include <chrono>
#include <nlohmann/json.hpp>
#include <numeric>

#include "autograd/ops.h"
#include "models/evaluate.h"
#include "models/hash.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "quant/block_prefetch.h"
#include "quant/calibrate.h"
#include "tensor/cpu/gemm.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tools/calibration_text.h"
#include "tools/cli.h"
#include "tools/device_option.h"
#include "tools/interrupt.h"
#include "tools/memory_option.h"
#include "tools/option_effects.h"
#include "tools/quant_commands.h"
#include "tools/quant_options.h"
#include "tools/report_command.h"
#include "tools/report_json.h"
#include "tools/source_model.h"
#include "tools/work_folder.h"

namespace omq {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

CalibrationWindows calibration(const QuantOptions& o, const CheckpointReader& reader,
                               const quant::Recipe& recipe) {
  const int64_t context = reader.config().usable_context();
  if (!o.calib_ids.empty()) {
    auto w = windows_from_ids(o.calib_ids, reader.config().vocab_size,
                              o.nsamples_given ? o.nsamples : 0);
    check(w.ids.dim(1) <= context, "{}: windows of {} tokens, the model's context is {}",
          o.calib_ids.string(), w.ids.dim(1), context);
    return w;
  }
  if (o.calib.empty()) {
    if (recipe.needs_text())
      throw cli::UsageError(fmt::format(
          "method {} {} text: give --calib FILE or --calib-ids JSONL; --method rtn needs none",
          recipe.name, recipe.train.epochs > 0 ? "learns from" : "looks at"));
    return {};
  }
  int64_t length = o.seqlen;
  check(length <= context || !o.seqlen_given, "--seqlen {}: the model's context is {}", length,
        context);
  if (length > context) {
    length = context;
    fmt::print(stderr, "windows of {} tokens: the model's context\n", length);
  }
  return windows_from_text(o.calib, reader.tokenizer(), o.nsamples, length, o.seed);
}

KeepSpec kept(const QuantOptions& o, const std::string& name, bool tied) {
  auto it = o.keep.find(name);
  if (it == o.keep.end() && tied) it = o.keep.find(name == "lm_head" ? "embed_tokens" : "lm_head");
  return it == o.keep.end() ? KeepSpec{} : it->second;
}

nn::Weight keep_weight(const Tensor& w, const KeepSpec& keep) {
  if (keep.f16) return to(w, DType::F16);
  return quant::pack_nearest(to(w, DType::F32), keep.spec);
}

// Everything outside the blocks, and which of it is packed.
struct Ends {
  PackedConfig packed;
  std::vector<std::pair<std::string, KeepSpec>> tables;
};

Ends plan_ends(const QuantOptions& o, const ModelConfig& config, const quant::Recipe& recipe,
               const SourceModel& model) {
  auto matrix = [](const quant::QuantSpec& s) {
    return MatrixSpec{s.wbits, s.group_size, s.weight().symmetric};
  };
  Ends e;
  e.packed.method = recipe.title;
  e.packed.weight = matrix(recipe.spec);
  const quant::ActivationBits a = recipe.spec.activations();
  e.packed.activations = {.activation = a.linear,
                          .q = a.q,
                          .k = a.k,
                          .v = a.v,
                          .p = a.p,
                          .include_zero = !recipe.spec.official_range,
                          .activation_clip = recipe.spec.act_clip,
                          .qkv_clip = recipe.spec.qkv_clip,
                          .learned_clips = recipe.train.act_clips};
  e.packed.online = model.online();
  if (const auto embed = o.keep.find("embed_tokens"), head = o.keep.find("lm_head");
      model.tied() && embed != o.keep.end() && head != o.keep.end())
    check(embed->second.to_string() == head->second.to_string(),
          "--keep embed_tokens={} and lm_head={}: {} has one matrix for both; name one form",
          embed->second.to_string(), head->second.to_string(), o.model.string());
  e.packed.untied = config.tie_word_embeddings && !model.tied();
  e.tables.emplace_back("model.embed_tokens", kept(o, "embed_tokens", config.tie_word_embeddings));
  if (!model.tied())
    e.tables.emplace_back("lm_head", kept(o, "lm_head", config.tie_word_embeddings));
  for (const auto& [module, keep] : e.tables)
    if (!keep.f16) e.packed.exceptions[module] = matrix(keep.spec);
  return e;
}

void write_ends(PackedModelWriter& writer, const SourceModel& model, const Ends& ends) {
  for (const auto& [module, keep] : ends.tables)
    writer.add(module, keep_weight(model.table(module), keep));
  writer.add_tensor("model.norm.weight", model.final_norm());
}

// Collects the dense twins of the packed blocks, for --eval sim:FILE.
struct SimulatedBlocks final : nn::BlockSink {
  std::vector<std::unique_ptr<nn::Block>> blocks;
  void store(int, nn::Block& block) override { blocks.push_back(block.clone()); }
};

// One line a block; on a terminal a line that moves with every epoch.
quant::Progress block_progress(int blocks, const quant::Recipe& recipe, bool quiet,
                               cli::Progress& line) {
  auto start = Clock::now();
  int restored = 0;  // from an earlier run: they say nothing of the time that is left
  return [=, &line, epochs = recipe.train.epochs](const quant::BlockReport& b, int epoch,
                                                  int) mutable {
    if (b.restored) {
      restored = b.index + 1;
      start = Clock::now();
      return;
    }
    if (quiet) return;
    const int64_t steps = std::max(1, epochs);
    const bool done = epoch < 0;
    const int64_t at = done ? (b.index + 1) * steps : b.index * steps + epoch;
    if (!done) {
      line.update(at, fmt::format("block {}/{}, epoch {}/{}, loss {:.5g}", b.index + 1, blocks,
                                  epoch, epochs, b.epoch_loss.back()));
      return;
    }
    std::string text = fmt::format("block {}/{}", b.index + 1, blocks);
    if (!b.epoch_loss.empty())
      text += fmt::format("  loss {:.5g} → {:.5g}", b.epoch_loss.front(), b.epoch_loss.back());
    if (b.target_mean_square > 0) text += fmt::format("  committed {:.5g}", b.committed_loss);
    text += fmt::format("  {}  peak {}", cli::human_seconds(b.seconds),
                        cli::human_bytes(static_cast<double>(cli::peak_memory_bytes())));
    const double left = seconds_since(start) / (b.index + 1 - restored) * (blocks - b.index - 1);
    if (b.index + 1 < blocks) text += fmt::format("  ETA {}", cli::human_seconds(left));
    line.finish(text);
  };
}

json transform_json(const quant::Recipe& r) {
  if (r.kronecker) return {{"alpha", r.kronecker->alpha}, {"query_key", r.kronecker->query_key}};
  if (!r.let) return nullptr;
  return {{"alpha", r.let->alpha},
          {"shift", r.let->shift},
          {"tied_pairs", r.let->tied_pairs},
          {"up_to_down", r.let->up_to_down},
          {"all_consumers", r.let->all_consumers},
          {"signed_max", r.let->signed_max}};
}

// Of what learns: a plan has rates for pieces that this recipe is not made of too.
json rates_json(const quant::Recipe& r) {
  const std::set<std::string> learn = learning_groups(r);
  json j = json::object();
  for (const auto& [group, rate] : r.train.lr)
    if (learn.contains(group)) j[group] = rate;
  return j;
}

json schedule_json(const quant::TrainPlan& t) {
  const char* shape = t.rate_shape == RateShape::Cosine   ? "cosine"
                      : t.rate_shape == RateShape::Linear ? "linear"
                                                          : "constant";
  return {{"rates", shape},
          {"last_rate", t.last_rate},
          {"optimiser", t.sign_descent ? "signs of gradients, rates over a run" : "AdamW"},
          {"keeps", t.keep_best ? "best epoch" : "last epoch"},
          {"depth_slope", t.depth_slope}};
}

json recipe_json(const QuantOptions& o, const quant::Recipe& r, const CalibrationWindows& data) {
  const quant::ActivationBits a = r.spec.activations();
  json j = {{"method", r.name},
            {"line", r.line.to_string()},
            {"setting", r.spec.to_string()},
            {"wbits", r.spec.wbits},
            {"abits", a.linear},
            {"q_bits", a.q},
            {"k_bits", a.k},
            {"v_bits", a.v},
            {"p_bits", a.p},
            {"group_size", r.spec.group_size},
            {"symmetric", r.spec.symmetric},
            {"official_range", r.spec.official_range},
            {"official_symmetric", r.spec.official_symmetric},
            {"transformation", transform_json(r)},
            {"epochs", r.train.epochs},
            {"batch_size", r.train.batch_size},
            {"augmented_loss", r.augmented},
            {"learning_rates", rates_json(r)},
            {"weight_decay", r.train.weight_decay},
            {"compute", compute_name(r.train.compute)},
            {"seed", o.seed}};
  // Only where there are any, so that runs without them go on in folders of earlier versions.
  if (r.augmented && r.aug_weight != 1) j["augmented_loss_weight"] = r.aug_weight;
  if (r.train.epochs > 0 && r.objective.weight == quant::TokenWeight::InverseSize)
    j["token_loss"] = true;
  if (r.clip_search) j["clip_search"] = true;
  if (r.train.epochs > 0 && r.train.full_inputs) j["inputs"] = "full precision";
  if (r.spec.act_clip != 1) j["act_clip"] = r.spec.act_clip;
  if (r.spec.qkv_clip != 1) j["qkv_clip"] = r.spec.qkv_clip;
  if (r.train.act_clips) j["learned_act_clips"] = true;
  if (r.train.epochs > 0) j["schedule"] = schedule_json(r.train);
  if (r.rounder->wants_hessian())
    j["solver"] = {
        {"damping", o.recipe.damping >= 0 ? o.recipe.damping : quant::GptqOptions{}.damping},
        {"act_order", o.recipe.act_order}};
  if (r.rotation) j["rotation"] = rotation_json(*r.rotation);
  if (data.ids.defined())
    j["calibration"] = {{"source", data.description},
                        {"windows", data.ids.dim(0)},
                        {"tokens", data.ids.dim(1)},
                        {"ids_sha256", data.hash}};
  return j;
}

json blocks_json(const std::vector<quant::BlockReport>& reports) {
  json list = json::array();
  for (const auto& b : reports) list.push_back(block_json(b));
  return list;
}

// Under which name people know it, and how large it is.
json model_json(const QuantOptions& o, const ModelConfig& c) {
  const std::filesystem::path path = std::filesystem::weakly_canonical(o.model);
  const bool file = std::filesystem::is_regular_file(path);
  return {{"name", (file ? path.stem() : path.filename()).string()},
          {"type", c.model_type},
          {"layers", c.num_layers},
          {"hidden_size", c.hidden_size}};
}

json files_json(const std::vector<CheckpointFile>& files) {
  json list = json::array();
  for (const auto& f : files)
    list.push_back({{"file", f.path.filename().string()},
                    {"bytes", f.bytes},
                    {"sha256", sha256_file(f.path)}});
  return list;
}

// What the bytes of the result depend on. Two runs with the same fingerprint give the same bytes.
json fingerprint(const QuantOptions& o, const json& recipe, const Ends& ends, const json& source) {
  json settings = recipe, calibration;
  if (recipe.contains("calibration")) calibration = recipe["calibration"]["ids_sha256"];
  settings.erase("calibration");
  for (const auto& [module, keep] : ends.tables) settings["kept"][module] = keep.to_string();
  json model;
  for (const json& f : source) model[f["file"].get<std::string>()] = f["sha256"];
  return {{"omq_version", OMQ_VERSION},
          {"program",
           {{"packed_kernels", packed_isa_name()},
            {"matrix_products", cpu::gemm_name()},
            {"device", to_string(o.device.type)}}},
          {"model", model},
          {"calibration_ids", calibration},
          {"settings", settings}};
}

// Tokens of a window of --eval. Nobody asked for more than the model has where nothing is said.
int64_t eval_window(const QuantOptions& o, const ModelConfig& config) {
  const int64_t own = config.usable_context();
  check(o.eval_context.value_or(0) <= own, "--eval-context {}: the model was made for {}",
        o.eval_context.value_or(0), own);
  return std::min<int64_t>(o.eval_context.value_or(2048), own);
}

// One --eval item; prints a line on stdout and returns it for the report.
json evaluate(const QuantOptions& o, const std::string& item, const Model& model,
              const Tokenizer& tokenizer) {
  const std::string file = item.substr(4);
  const bool simulated = item.starts_with("sim:");
  std::optional<cli::Progress> line;
  PerplexityOptions options{.context = model.context(), .max_windows = o.eval_chunks};
  const auto r = evaluate_perplexity(
      model, tokenizer, read_corpus(file), options, [&](int64_t done, int64_t total, double ppl) {
        if (!line) line.emplace(fmt::format("perplexity of {}: window", file), total, o.quiet);
        line->update(done, fmt::format("ppl {:.4f}", ppl));
      });
  fmt::print("{} {:.6f}  ({}, {} windows of {}, {} tokens, {})\n",
             simulated ? "simulated perplexity" : "perplexity", r.perplexity, to_string(r.protocol),
             r.windows, r.context, r.tokens, file);
  std::fflush(stdout);
  return {{"model", simulated ? "simulated" : "packed"},
          {"perplexity", r.perplexity},
          {"protocol", to_string(r.protocol)},
          {"windows", r.windows},
          {"context", r.context},
          {"tokens", r.tokens},
          {"file", file},
          {"file_sha256", sha256_file(file)}};
}

// Opens the written folder and runs a few tokens: a file that cannot be used must not get its name.
// Returns the sizes that were found in it.
ModelSize check_written(const std::filesystem::path& folder) {
  NoGrad off;
  const auto reader = open_checkpoint(folder);
  reader->tokenizer();
  const int64_t tokens =
      std::min<int64_t>({16, reader->config().usable_context(), reader->config().vocab_size});
  const Model model = Model::load(*reader, tokens);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  std::iota(ids.begin(), ids.end(), 0);
  check_finite(model.logits(model.forward(Tensor::from<int32_t>(ids, {1, tokens}))),
               "logits of the written model");
  return model_size(model);
}

json size_json(const ModelSize& size) {
  return {{"bits_per_weight", size.bits_per_weight()},
          {"block_bits_per_weight", size.block_bits_per_weight()},
          {"weight_bytes", size.bytes},
          {"weights", size.weights}};
}

// The evaluations that were asked for, on what is on disk now.
void evaluate_written(const QuantOptions& o, SimulatedBlocks* simulated, json& report) {
  const auto reader = open_checkpoint(o.out);
  Model model = Model::load(*reader, eval_window(o, reader->config()));
  const Tokenizer tokenizer = reader->tokenizer();
  auto run = [&](std::string_view kind) {
    for (const std::string& item : o.eval)
      if (item.starts_with(kind))
        report["evaluation"].push_back(
            with_context("--eval " + item, [&] { return evaluate(o, item, model, tokenizer); }));
  };
  run("ppl:");
  if (!simulated) return;
  for (size_t i = 0; i < model.blocks.size(); ++i)
    *model.blocks[i] = dynamic_cast<const LlamaBlock&>(*simulated->blocks[i]);
  model.move_to(o.device);
  run("sim:");
}

// Before anything is loaded: what will be needed, printed; Error where there is not as much.
quant::MemoryPlan plan_memory_of(const QuantOptions& o, const ModelConfig& config,
                                 const quant::Recipe& recipe, const CalibrationWindows& data) {
  const auto windows = [&](int i) { return data.ids.defined() ? data.ids.dim(i) : 0; };
  const quant::MemoryPlan plan = quant::plan_memory(
      recipe, cli::plan_shapes(config, windows(0), windows(1)), o.device, o.memory_limit);
  fmt::print(stderr, "memory: {}\n", cli::plan_text(plan, o.device, o.memory_limit));
  if (o.memory_limit > 0) device_api(o.device).set_memory_limit(o.memory_limit, o.device.index);
  return plan;
}

std::string report_text(json& report) {
  report["peak_memory_bytes"] = cli::peak_memory_bytes();
  return readable(report);
}

// --force must not let the result take the place of what it is made from.
void check_not_source(const QuantOptions& o) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path folder = fs::is_directory(o.model, ignored) ? o.model : o.model.parent_path();
  check(!fs::equivalent(folder.empty() ? "." : folder, o.out, ignored),
        "output folder {}: holds the model that is to be quantised; choose another name",
        o.out.string());
}

int quantize_checkpoint(const cli::Args& args) {
  if (!args.empty() && args[0] == "report") return report_command({args.begin() + 1, args.end()});
  QuantOptions o;
  if (!parse_quant_options(args, o)) return 0;
  if (o.threads > 0) set_num_threads(o.threads);
  const auto start = Clock::now();
  const quant::Recipe recipe = quant::make_recipe(o.method, o.recipe);
  const auto reader = open_checkpoint(o.model);
  check(!PackedConfig::of(reader->config()), "{}: is quantised already; quantise the original",
        o.model.string());
  check_not_source(o);
  if (!o.page.empty()) check_page_path(o.page, o.out);
  const CalibrationWindows data = calibration(o, *reader, recipe);
  SourceModel model(*reader, recipe);
  const Ends ends = plan_ends(o, reader->config(), recipe, model);
  const int64_t window = eval_window(o, reader->config());
  for (const std::string& item : o.eval) {  // what is wrong with a text must not cost a whole run
    const std::string text = read_corpus(item.substr(4));
    // A byte is a token at most, and a line's end becomes two.
    check(2 * static_cast<int64_t>(text.size()) >= window,
          "--eval {}: a text of {} bytes, less than one window of {} tokens (--eval-context)", item,
          text.size(), window);
  }
  if (o.method == "best")
    fmt::print(stderr, "best for {}: {}{} ({})\n", recipe.spec.to_string(), recipe.title,
               recipe.rotation && recipe.rotation->norms ? " --rotate norms" : "",
               recipe.line.to_string());
  fmt::print(stderr, "{} {} of {} ({}) on {}\n", recipe.title, recipe.spec.to_string(),
             o.model.string(), reader->container(), cli::device_text(o.device));
  if (data.ids.defined()) fmt::print(stderr, "calibration: {}\n", data.description);
  if (!model.online().empty()) fmt::print(stderr, "online: {}\n", model.online_text());
  const quant::MemoryPlan plan = plan_memory_of(o, reader->config(), recipe, data);

  cli::catch_interrupts();
  const json recipe_report = recipe_json(o, recipe, data);
  const json source_files = files_json(reader->files());
  const auto notice = [](const std::string& text) { fmt::print(stderr, "{}\n", text); };
  std::optional<WorkFolder> work;
  if (!o.work.empty()) {
    work.emplace(o.work, fingerprint(o, recipe_report, ends, source_files), notice);
    if (const int n = work->finished(); n > 0)
      notice(fmt::format("{}: {} of {} blocks are finished", o.work.string(), n,
                         reader->config().num_layers));
  }
  PackedModelWriter writer(*reader, ends.packed, o.out, o.force);
  write_ends(writer, model, ends);
  // A GPU works while the host reads; on the CPU both would want its cores and its memory.
  std::optional<quant::PrefetchedSource> ahead;
  if (o.device.type != DeviceType::CPU) ahead.emplace(model.blocks());
  nn::BlockSource& source = ahead ? *ahead : model.blocks();
  SimulatedBlocks simulated;
  const bool simulate =
      std::any_of(o.eval.begin(), o.eval.end(), [](auto& e) { return e.starts_with("sim:"); });
  std::vector<quant::BlockReport> blocks;
  {
    cli::Progress line("calibrating", int64_t{source.size()} * std::max(1, recipe.train.epochs),
                       o.quiet);
    blocks = quant::quantize(
        source, writer, recipe, {data.ids, o.device, plan.samples_on_host},
        block_progress(source.size(), recipe, o.quiet, line), simulate ? &simulated : nullptr,
        {.poll = cli::check_interrupted, .notice = notice, .store = work ? &*work : nullptr});
  }
  writer.close();
  const ModelSize size = check_written(writer.unfinished());
  json report = {{"omq_version", OMQ_VERSION},
                 {"model", model_json(o, reader->config())},
                 {"recipe", recipe_report},
                 {"source", source_files},
                 {"calibration_seconds", seconds_since(start)},
                 {"threads", num_threads()},
                 {"device", cli::device_text(o.device)},
                 {"blocks", blocks_json(blocks)},
                 {"size", size_json(size)},
                 {"evaluation", json::array()},
                 {"model_sha256", sha256_file(writer.unfinished() / "model.safetensors")}};
  for (const auto& [module, keep] : ends.tables) report["kept"][module] = keep.to_string();
  if (!model.online().empty()) report["online"] = model.online_json();
  writer.add_file("report.json", report_text(report));  // the folder is whole before it has a name
  writer.commit();
  fmt::print(stderr,
             "{}: {:.3f} bits a weight in the blocks, {:.3f} with embedding and head ({})\n",
             o.out.string(), size.block_bits_per_weight(), size.bits_per_weight(),
             cli::human_bytes(static_cast<double>(size.bytes)));
  if (!o.eval.empty()) {
    evaluate_written(o, simulate ? &simulated : nullptr, report);
    AtomicFile file(o.out / "report.json");
    file.write(report_text(report));
    file.commit();
  }
  if (!o.page.empty()) write_page(o.page, report, "report");
  fmt::print(stderr, "done in {}, peak memory {}\n", cli::human_seconds(seconds_since(start)),
             cli::human_bytes(static_cast<double>(cli::peak_memory_bytes())));
  return 0;
}

int run(const cli::Args& args) {
  const cli::Args rest(args.begin() + (args.empty() ? 0 : 1), args.end());
  if (!args.empty() && args.front() == "audit") return quant_audit(rest);
  if (!args.empty() && args.front() == "trace") return quant_trace(rest);
  return quantize_checkpoint(args);
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) { return omq::cli::run_program("omq-quant", argc, argv, omq::run); }
