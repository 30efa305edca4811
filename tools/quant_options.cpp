// Parsing of omq-quant's options. Presets give defaults, flags given win; names of the official
// project are accepted, those that ask for something else than we do are refused with the reason.
#include "tools/quant_options.h"

#include <CLI/CLI.hpp>

#include "tensor/cpu/gemm.h"
#include "tools/device_option.h"
#include "tools/memory_option.h"
#include "tools/option_effects.h"

namespace omq {
namespace {

using cli::UsageError;
using quant::QuantSpec;

const std::vector<std::string> kKeepable = {"lm_head", "embed_tokens"};

KeepSpec parse_keep(std::string_view text) {
  if (text == "f16" || text == "fp16") return {.f16 = true};
  std::string full(text);
  const size_t g = full.find('g');
  full.insert(g == std::string::npos ? full.size() : g, "a16");
  if (g == std::string::npos) full += "g128";
  try {
    return {.f16 = false, .spec = QuantSpec::parse(full)};
  } catch (const Error&) {
    throw UsageError(fmt::format("--keep: \"{}\" is not f16 or wN or wNgM", text));
  }
}

struct Raw {
  SettingFlags setting;
  bool aug = false, no_aug = false, token_loss = false, no_token_loss = false, list = false,
       version = false;
  std::filesystem::path output_dir;
  bool unused = false;
  std::optional<double> aug_weight;
  std::string unused_text, compute, device = "auto", cuda_path = "auto", memory_limit;
  std::vector<std::string> keep;
};

void add_main_options(CLI::App& app, QuantOptions& o, Raw& raw) {
  app.add_option("-m,--model", o.model, "checkpoint: Hugging Face folder or GGUF file (required)")
      ->type_name("PATH");
  app.add_option("-o,--output,--save-dir", o.out,
                 "folder to create for the packed model (required)")
      ->type_name("DIR");
  add_setting_options(app, o, raw.setting);
  app.add_option("--keep", raw.keep,
                 "matrices outside the blocks: lm_head=f16|w8|w4, embed_tokens=… (default w8 in "
                 "groups of 128)")
      ->type_name("NAME=FORM");
  app.add_flag("--force", o.force, "replace an existing output folder");
  app.add_option("--work", o.work,
                 "keep every finished block in this folder; the same command goes on from there")
      ->type_name("DIR");
}

void add_calibration_options(CLI::App& app, QuantOptions& o, Raw& raw) {
  const char* group = "Calibration";
  app.add_option("--calib", o.calib, "text files to calibrate on")
      ->type_name("TEXT…")
      ->group(group);
  app.add_option("--calib-ids", o.calib_ids,
                 "token ids instead: a JSON array a line, one window each")
      ->type_name("JSONL")
      ->group(group);
  app.add_option("--nsamples", o.nsamples, "windows (default 128; with --calib-ids all)")
      ->type_name("N")
      ->group(group);
  app.add_option("--seqlen", o.seqlen,
                 "tokens of a window (default 2048, at most the model's context)")
      ->type_name("N")
      ->group(group);
  app.add_option("--seed", o.seed, "which windows are taken (default 2)")
      ->type_name("N")
      ->group(group);
  app.add_option(
         "--epochs", o.recipe.epochs,
         "passes over the windows per block (default 20, omniquant at 2 bits 40; norm-tweaking "
         "4, flatquant 15, signround 50)")
      ->type_name("N")
      ->group(group);
  app.add_option("--batch-size", o.batch_size,
                 "windows a step (default 1; flatquant and signround 4)")
      ->type_name("N")
      ->group(group);
  app.add_option("--lwc-lr", o.recipe.lwc_lr,
                 "learning rate of the clipping factors (default 0.01; flatquant 0.05, "
                 "--round learned 1)")
      ->type_name("X")
      ->group(group);
  app.add_option("--wd", o.recipe.weight_decay, "weight decay (default 0)")
      ->type_name("X")
      ->group(group);
  app.add_option("--cuda-path", raw.cuda_path,
                 "auto, or sm80: no kernels but those of the oldest supported GPUs")
      ->type_name("PATH")
      ->group(group);
  app.add_option("--device", raw.device,
                 "where blocks compute and learn: cpu, cuda, cuda:N or auto (default: a GPU that "
                 "this build can use, else the CPU)")
      ->type_name("WHERE")
      ->group(group);
  app.add_option(
         "--memory-limit", raw.memory_limit,
         "most memory on the device, such as 24G: samples stay on the host where they do not "
         "fit; refused at once where a block does not")
      ->type_name("SIZE")
      ->group(group);
  app.add_option(
         "--compute", raw.compute,
         "products of a training step in f32 (default on a CPU), bf16 (default on a GPU) or "
         "f16 (a GPU's)")
      ->type_name("TYPE")
      ->group(group);
  app.add_flag("--aug-loss", raw.aug,
               "add the loss against the block on its quantised inputs (default at 2 bits)")
      ->group(group);
  app.add_flag("--no-aug-loss", raw.no_aug, "leave it out")->group(group);
  app.add_option("--aug-weight", raw.aug_weight, "weight of that added loss (default 1)")
      ->type_name("X")
      ->group(group);
  app.add_flag("--token-loss", raw.token_loss,
               "tokens count in the loss by their size, not by the square of it, so that a few "
               "massive ones do not decide alone (default where clip factors learn)")
      ->group(group);
  app.add_flag("--no-token-loss", raw.no_token_loss, "the paper's loss")->group(group);
  app.add_flag("--clip-search", o.recipe.clip_search,
               "start each group's clipping at the best of ten shares of its range, from 0.98 down "
               "to 0.55 (default: all at 0.98)")
      ->group(group);
}

void add_other_options(CLI::App& app, QuantOptions& o, Raw& raw) {
  app.add_option("--eval", o.eval,
                 "ppl:FILE perplexity of the written model (gptq protocol); sim:FILE of the "
                 "fake-quantised model")
      ->type_name("WHAT:FILE");
  app.add_option("--eval-context", o.eval_context,
                 "tokens of an evaluation window (default 2048, or the model's context)")
      ->type_name("N");
  app.add_option("--eval-chunks", o.eval_chunks, "only the first N evaluation windows")
      ->type_name("N");
  app.add_option("--report", o.page,
                 "write the report as a page too; later: omq-quant report DIR -o FILE.html")
      ->type_name("FILE.html");
  app.add_option("-t,--threads", o.threads, "threads (default: the CPUs this process may use)")
      ->type_name("N");
  app.add_flag("-q,--quiet", o.quiet, "no progress");
  app.add_flag("--list-methods", raw.list, "print the methods and stop");
  app.add_flag("--version", raw.version, "print the version and stop");
}

// The reference's own flags (spec omniquant §13), so that its users' commands work or say why not.
struct OfficialFlag {
  const char* name;
  bool has_value, refused;
  const char* reason;  // why it is refused, or why it changes nothing
};
constexpr OfficialFlag kOfficialFlags[] = {
    {"--calib-dataset", true, true, "nothing is downloaded here; give the text with --calib FILE"},
    {"--eval-ppl", false, true, "nothing is downloaded here; name the text: --eval ppl:FILE"},
    {"--tasks", true, true, "not available; perplexity is: --eval ppl:FILE"},
    {"--resume", true, true,
     "the official code's files are not read; --work DIR goes on with a killed run"},
    {"--disable-zero-point", false, true, "--symmetric stores no zero points"},
    {"--limit", true, true,
     "there it divides by windows that were not run, so its perplexity is none; --eval-chunks N "
     "takes the first N"},
    {"--lwc", false, false, "--method omniquant always learns clipping"},
    {"--real-quant", false, false, "codes are always what is stored"},
    {"--deactive-amp", false, false, "learning is in f32 unless --compute says otherwise"},
    {"--multigpu", false, false, "evaluation runs on one device"},
    {"--act-scales", true, false, "activation statistics are collected during calibration"},
    {"--act-shifts", true, false, "activation statistics are collected during calibration"},
    {"--net", true, false, "the checkpoint says what it is"},
    {"--cache-dir", true, false, "nothing is cached"},
    {"--num-fewshot", true, false, "there are no tasks"},
    {"--attn-implementation", true, false, "there is one"},
    {"--a-dynamic-method", true, false, "activations have a grid for each token"},
    {"--w-dynamic-method", true, false, "weights have a grid for each row and group"},
};

void add_official_options(CLI::App& app, Raw& raw) {
  const char* group = "Names of the official project";
  app.add_option("--output-dir", raw.output_dir, "the same as -o where that is not given")
      ->group(group);
  for (const OfficialFlag& f : kOfficialFlags) {
    const std::string help = fmt::format("{}: {}", f.refused ? "refused" : "no effect", f.reason);
    auto* option = f.has_value ? app.add_option(f.name, raw.unused_text, help)
                               : app.add_flag(f.name, raw.unused, help);
    option->group(group);
  }
}

void answer_official(const CLI::App& app) {
  for (const OfficialFlag& f : kOfficialFlags)
    if (f.refused && app.get_option(f.name)->count() > 0)
      throw UsageError(fmt::format("{}: {}", f.name, f.reason));
  for (const OfficialFlag& f : kOfficialFlags)
    if (!f.refused && app.get_option(f.name)->count() > 0)
      fmt::print(stderr, "{}: no effect: {}\n", f.name, f.reason);
}

void check_numbers(const QuantOptions& o) {
  auto wanted = [](bool ok, const char* what) {
    if (!ok) throw UsageError(what);
  };
  wanted(o.nsamples >= 1, "--nsamples: at least 1");
  wanted(o.seqlen >= 2, "--seqlen: at least 2");
  wanted(o.recipe.epochs >= -1, "--epochs: 0 or more");
  wanted(o.batch_size.value_or(1) >= 1, "--batch-size: at least 1");
  wanted(!o.recipe.lwc_lr || *o.recipe.lwc_lr > 0, "--lwc-lr: above 0");
  wanted(o.recipe.weight_decay >= 0, "--wd: 0 or more");
  wanted(o.threads >= 0 && o.threads <= 1024, "--threads: 0 to 1024");
  wanted(o.eval_context.value_or(2) >= 2 && o.eval_chunks >= 0,
         "--eval-context: at least 2; --eval-chunks: 0 or more");
}

// What is about the objective and its start, once method and bits are known.
void settle_learning(const Raw& raw, QuantOptions& o) {
  if (raw.aug && raw.no_aug) throw UsageError("--aug-loss and --no-aug-loss exclude each other");
  if (raw.aug || raw.no_aug) o.recipe.aug_loss = raw.aug ? 1 : 0;
  if (raw.token_loss && raw.no_token_loss)
    throw UsageError("--token-loss and --no-token-loss exclude each other");
  if (raw.token_loss || raw.no_token_loss) o.recipe.token_loss = raw.token_loss ? 1 : 0;
  if (!raw.aug_weight) return;
  if (!(*raw.aug_weight > 0 && *raw.aug_weight < 1e6))
    throw UsageError("--aug-weight: above 0 and below 1e6; --no-aug-loss leaves that loss out");
  if (!quant::make_recipe(o.method, o.recipe).augmented)
    throw UsageError("--aug-weight: there is no augmented loss to weigh; add --aug-loss");
  o.recipe.aug_weight = *raw.aug_weight;
}

Compute parse_compute(const std::string& text, Device device) {
  const bool gpu = device.type == DeviceType::CUDA;
  if (text.empty()) return gpu ? Compute::BF16 : Compute::F32;
  if (text == "f32" || text == "fp32") return Compute::F32;
  if (gpu && (text == "f16" || text == "fp16")) return Compute::F16;
  if (text != "bf16")
    throw UsageError(fmt::format("--compute {}: f32{} or bf16 wanted on {}", text,
                                 gpu ? ", f16" : "", to_string(device)));
  if (!gpu && !cpu::gemm_has_bf16())
    throw UsageError(
        "--compute bf16: this processor (or this build) has no bf16 products; use f32");
  return Compute::BF16;
}

void settle(const Raw& raw, QuantOptions& o) {
  if (o.model.empty()) throw UsageError("-m MODEL is missing");
  if (o.out.empty()) o.out = raw.output_dir;
  if (o.out.empty()) throw UsageError("-o OUTDIR is missing");
  o.device = cli::device_from(raw.device);
  cli::choose_cuda_path(raw.cuda_path, o.device);
  if (!raw.memory_limit.empty()) o.memory_limit = cli::parse_memory(raw.memory_limit);
  o.recipe.compute = parse_compute(raw.compute, o.device);
  if (!o.calib.empty() && !o.calib_ids.empty())
    throw UsageError("--calib and --calib-ids exclude each other");
  for (const auto& file : o.calib)
    if (file.empty()) throw UsageError("--calib: the name of a file is empty");
  if (o.batch_size) o.recipe.batch_size = *o.batch_size;
  settle_setting(raw.setting, o);
  settle_learning(raw, o);
  for (const std::string& item : raw.keep) {
    const size_t at = item.find('=');
    const std::string name = item.substr(0, at);
    if (at == std::string::npos ||
        std::find(kKeepable.begin(), kKeepable.end(), name) == kKeepable.end())
      throw UsageError(fmt::format("--keep {}: lm_head=FORM or embed_tokens=FORM wanted", item));
    o.keep[name] = parse_keep(std::string_view(item).substr(at + 1));
  }
  for (const std::string& item : o.eval)
    if ((!item.starts_with("ppl:") && !item.starts_with("sim:")) || item.size() == 4)
      throw UsageError(fmt::format("--eval {}: ppl:FILE or sim:FILE wanted{}", item,
                                   item.size() == 4 ? "; the name of the file is empty" : ""));
  check_numbers(o);
}

}  // namespace

std::string KeepSpec::to_string() const {
  return f16 ? "f16"
             : fmt::format("w{}g{}{}", spec.wbits, spec.group_size, spec.symmetric ? "sym" : "");
}

void add_setting_options(CLI::App& app, QuantOptions& o, SettingFlags& f) {
  app.add_option("--method", o.method,
                 "omniquant (default), rtn, gptq, efficientqat …; see --list-methods")
      ->type_name("NAME");
  app.add_option(
         "--preset", f.preset,
         "bits and group size as in the papers' tables: w4a16g128, w3a16, w2a16g64, w4a4, w6a6 …")
      ->type_name("NAME");
  app.add_option("--wbits", f.wbits, "bits of a weight, 2 to 8 (default 4)")->type_name("N");
  app.add_option("--group-size", f.group_size,
                 "weights that share a scale; 0 or -1: a whole row (default)")
      ->type_name("G");
  app.add_flag("--symmetric", f.symmetric, "no zero points: the range is centred on 0");
}

void settle_setting(const SettingFlags& f, QuantOptions& o) try {
  (void)quant::make_recipe(o.method, {});  // is there such a method?
  QuantSpec spec = f.preset.empty() ? QuantSpec{} : QuantSpec::parse(f.preset);
  if (f.wbits) spec.wbits = *f.wbits;
  if (f.group_size) spec.group_size = *f.group_size == -1 ? 0 : *f.group_size;
  if (f.symmetric) spec.symmetric = true;
  o.recipe.spec = spec;
  settle_transform(f.transform, o.recipe);
  settle_composition(f.pieces, o.recipe);
  const quant::Recipe recipe = quant::make_recipe(o.method, o.recipe);  // are pieces of one whole?
  check_transform(f.transform, recipe);
  check_composition(f.pieces, recipe);
} catch (const UsageError&) {
  throw;
} catch (const Error& e) {
  throw UsageError(e.what());
}

bool parse_quant_options(const cli::Args& args, QuantOptions& o) {
  CLI::App app("Quantises a LLaMA-family checkpoint to 2-8 bits.", "omq-quant");
  app.footer(
      "omq-quant audit  proves on your model what a sceptic would doubt; omq-quant audit --help\n"
      "omq-quant trace  follows one group of weights into its stored bytes; omq-quant trace "
      "--help\n"
      "omq-quant report draws the report of a run as a page; omq-quant report --help");
  Raw raw;
  add_main_options(app, o, raw);
  add_calibration_options(app, o, raw);
  add_composition_options(app, raw.setting.pieces);
  add_transform_options(app, raw.setting.transform);
  add_other_options(app, o, raw);
  add_official_options(app, raw);
  if (!cli::parse(app, args)) return false;
  if (raw.version) {
    fmt::print("{}", cli::version_text("omq-quant"));
    return false;
  }
  if (raw.list) {
    for (const auto& m : quant::methods()) fmt::print("{:<14} {}\n", m.name, m.summary);
    return false;
  }
  o.nsamples_given = app.get_option("--nsamples")->count() > 0;
  o.seqlen_given = app.get_option("--seqlen")->count() > 0;
  settle(raw, o);
  check_effects(app, o, quant::make_recipe(o.method, o.recipe));
  answer_official(app);
  return true;
}

}  // namespace omq
