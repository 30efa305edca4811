// Opening a model and checking the options that all subcommands share.
#include "tools/run_common.h"

#include <unistd.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <iterator>
#include <limits>
#include <random>

#include "models/json_file.h"
#include "models/packed_model.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tools/device_option.h"

namespace omq::run {

const cli::Aliases kAliases = {{"-sys", "--system"},       {"-ngl", "--gpu-layers"},
                               {"-dev", "--device"},       {"-ctk", "--cache-type-k"},
                               {"-ctv", "--cache-type-v"}, {"-ub", "--batch-size"},
                               {"-tb", "--threads-batch"}, {"-ubatch", "--batch-size"},
                               {"-st", "--single-turn"},   {"-np", "--parallel"}};

// ---- the model ----

void add_device_options(CLI::App& app, ModelOptions& o) {
  app.add_option("--device", o.device,
                 "cpu, cuda, cuda:N or auto (default: a GPU that this build can use, else the CPU)")
      ->type_name("DEVICE");
  app.add_option("--cuda-path", o.cuda_path,
                 "auto, or sm80: no kernels but those of the oldest supported GPUs")
      ->type_name("PATH");
  app.add_option("--gpu-layers", o.gpu_layers,
                 "-ngl of llama.cpp: 0 is --device cpu, more is --device cuda (all layers)")
      ->type_name("N");
}

void add_cache_options(CLI::App& app, ModelOptions& o) {
  app.add_option("--cache-type-k", o.cache_k,
                 "-ctk: type of the key cache: f32 (default, where the model has none of its own; "
                 "on a GPU f16), f16, int8, int4")
      ->type_name("TYPE");
  app.add_option("--cache-type-v", o.cache_v, "-ctv: type of the value cache: likewise")
      ->type_name("TYPE");
}

void add_model_options(CLI::App& app, ModelOptions& o, bool with_context) {
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-m,--model,model", o.model,
                 "model: a folder, a .gguf, or a model.safetensors of omq-quant")
      ->required()
      ->type_name("MODEL");
  app.add_option("-t,--threads", o.threads, "threads (default: the CPUs this process may use)")
      ->type_name("N");
  add_device_options(app, o);
  app.add_option("--isa", o.isa,
                 "instruction set of the packed kernels: amx, avx512, avx2, neon, scalar")
      ->type_name("NAME");
  app.add_flag("-q,--quiet", o.quiet, "no notes about the model on stderr");
  if (!with_context) return;
  app.add_option("-c,--ctx-size", o.context, "context in tokens (default 0: the model's own)")
      ->type_name("N");
  add_cache_options(app, o);
}

namespace {

struct CacheType {
  int bits = 0;  // of codes; 0: floats
  DType floats = DType::F32;
};

CacheType parse_cache_type(const std::string& name) {
  if (name.empty() || name == "f32") return {};
  if (name == "f16") return {0, DType::F16};
  if (name == "int8" || name == "q8_0") return {8};
  if (name == "int4" || name == "q4_0") return {4};
  throw cli::UsageError(fmt::format("cache type {}: f32, f16, int8 or int4", name));
}

}  // namespace

Device device_of(const ModelOptions& o) {
  const bool named = o.device != "auto";
  // As llama.cpp takes them: −1 and "all" are all.
  if (o.gpu_layers != "-1" && o.gpu_layers != "all" &&
      o.gpu_layers.find_first_not_of("0123456789") != std::string::npos)
    throw cli::UsageError(fmt::format("--gpu-layers {}: a number, or all", o.gpu_layers));
  if (!named && o.gpu_layers == "0") return {};
  return cli::device_from(!named && !o.gpu_layers.empty() ? "cuda" : o.device);
}

void apply(const ModelOptions& o) {
  using cli::UsageError;
  if (o.model.empty()) throw UsageError("-m: the name of the model is empty");
  cli::choose_cuda_path(o.cuda_path, device_of(o));  // what cannot be used is said at once
  for (const std::string& name : {o.cache_k, o.cache_v}) parse_cache_type(name);
  if (o.threads < 0 || o.threads > 1024)
    throw UsageError(fmt::format("--threads {}: 1 to 1024", o.threads));
  if (o.context < 0) throw UsageError(fmt::format("--ctx-size {} is negative", o.context));
  if (o.threads > 0) set_num_threads(o.threads);
  if (!o.isa.empty() && !force_packed_isa(o.isa)) {
    std::string here;
    for (const char* name : packed_isas_here())
      here += fmt::format("{}{}", here.empty() ? "" : ", ", name);
    throw UsageError(fmt::format("--isa {}: this machine runs {}", o.isa, here));
  }
}

namespace {

// The context to prepare for when the user named none. token_bytes: of keys and values.
int64_t default_context(const ModelConfig& c, int64_t token_bytes, bool quiet) {
  const int64_t own = c.usable_context();
  int64_t context = std::min<int64_t>(own, 8192);
  const auto half_free = static_cast<int64_t>(cli::available_memory_bytes() / 2);
  if (half_free > 0) context = std::min(context, std::max<int64_t>(512, half_free / token_bytes));
  context = std::min(context, own);
  if (context < own && !quiet)
    fmt::print(stderr,
               "note: context of {} tokens; the model has {} (-c {} for all of it, {} of cache)\n",
               context, own, own, cli::human_bytes(static_cast<double>(own * token_bytes)));
  return context;
}

}  // namespace

OpenModel open_model(const ModelOptions& options, int64_t context) {
  const auto start = std::chrono::steady_clock::now();
  OpenModel m;
  m.reader = open_checkpoint(options.model);
  m.tokenizer = std::make_unique<Tokenizer>(m.reader->tokenizer());
  const ModelConfig& c = m.reader->config();
  const Device device = device_of(options);
  const nn::CacheQuant kept = kept_caches(c, options, device);
  if (context == 0)
    context = default_context(c, options.caches * cache_token_bytes(c, kept), options.quiet);
  check(context <= c.usable_context(),
        "{}: a context of {} tokens is wanted, the model was made for {}", options.model, context,
        c.usable_context());
  m.model = std::make_unique<Model>(Model::load(*m.reader, context));
  m.model->kept = kept;
  m.size = model_size(*m.model);
  m.model->move_to(device);
  m.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!options.quiet)
    fmt::print(stderr, "{}: {}, {}, {:.2f} bits a weight, context {}, {}, loaded in {:.2f} s\n",
               options.model, model_name(m), cli::human_bytes(static_cast<double>(m.size.bytes)),
               m.size.bits_per_weight(), m.model->context(),
               device.type == DeviceType::CPU
                   ? fmt::format("{} threads, kernels {}", num_threads(), packed_isa_name())
                   : cli::device_text(device),
               m.seconds);
  if (const std::string reason = DecodePlan::unsupported(*m.model);
      !options.quiet && !reason.empty())
    fmt::print(stderr, "{}: single tokens run block by block, which is slower: {}\n", options.model,
               reason);
  return m;
}

namespace {

// own: what the model quantises by itself.
void settle(std::optional<RowQuant>& own, const std::string& name, const char* option) {
  const CacheType wanted = parse_cache_type(name);
  if (own && !name.empty() && own->bits != wanted.bits)
    throw cli::UsageError(
        fmt::format("{} {}: this model keeps codes of {} bits there, as its "
                    "attention reads them",
                    option, name, own->bits));
  if (!own && wanted.bits > 0) own = RowQuant{.bits = wanted.bits};
}

nn::CacheQuant kept_on_cpu(const ModelConfig& config, const ModelOptions& o) {
  nn::CacheQuant kept = cache_quant(config);
  settle(kept.k, o.cache_k, "--cache-type-k");
  settle(kept.v, o.cache_v, "--cache-type-v");
  // What is not named is as the other is.
  const bool k_floats = !kept.k && !o.cache_k.empty(), v_floats = !kept.v && !o.cache_v.empty();
  const DType k = parse_cache_type(o.cache_k).floats, v = parse_cache_type(o.cache_v).floats;
  if (k_floats && v_floats && k != v)
    throw cli::UsageError(
        fmt::format("-ctk {} -ctv {}: floats of one type only", o.cache_k, o.cache_v));
  kept.floats = k_floats ? k : v_floats ? v : DType::F32;
  return kept;
}

// Both alike: F16, or codes where they are asked for.
nn::CacheQuant kept_on_gpu(const ModelConfig& config, const ModelOptions& o) {
  const std::string &k = o.cache_k.empty() ? o.cache_v : o.cache_k,
                    &v = o.cache_v.empty() ? o.cache_k : o.cache_v;
  for (const std::string& name : {k, v})
    if (name == "f32")
      throw cli::UsageError("cache type f32: a GPU keeps f16, int8 or int4; --device cpu has it");
  const int bits = parse_cache_type(k).bits;
  if (bits != parse_cache_type(v).bits)
    throw cli::UsageError(
        fmt::format("-ctk {} -ctv {}: a GPU keeps keys and values alike, both f16, both int8 or "
                    "both int4",
                    k, v));
  nn::CacheQuant kept;
  if (bits > 0) {
    kept = cache_quant(config);
    settle(kept.k, k, "--cache-type-k");
    settle(kept.v, v, "--cache-type-v");
  }
  kept.floats = DType::F16;
  return kept;
}

}  // namespace

nn::CacheQuant kept_caches(const ModelConfig& config, const ModelOptions& o, Device device) {
  return device.type == DeviceType::CPU ? kept_on_cpu(config, o) : kept_on_gpu(config, o);
}

std::string cache_type(const std::optional<RowQuant>& quant, DType floats) {
  return quant ? fmt::format("u{}", quant->bits) : floats == DType::F16 ? "f16" : "f32";
}

int64_t cache_token_bytes(const ModelConfig& c, const nn::CacheQuant& kept) {
  return c.num_layers * kept.token_bytes(c.num_kv_heads, c.head_dim);
}

int64_t parameter_count(const OpenModel& m) {
  const ModelConfig& c = m.model->config();
  int64_t n = m.size.weights + c.hidden_size;  // the final norm
  for (const auto& block : m.model->blocks)
    block->visit([&](std::string_view name, Tensor& t) {
      if (name.ends_with("norm.weight") || name.ends_with(".bias")) n += t.numel();
    });
  return n;
}

std::string human_count(int64_t n) {
  const auto x = static_cast<double>(n);
  if (n >= 1'000'000'000) return fmt::format("{:.2f}B", x / 1e9);
  if (n >= 10'000'000) return fmt::format("{:.0f}M", x / 1e6);
  if (n >= 1'000'000) return fmt::format("{:.2f}M", x / 1e6);
  return fmt::format("{:.0f}K", x / 1e3);
}

std::string model_name(const OpenModel& m) {
  return fmt::format("{} {}", m.model->config().model_type, human_count(parameter_count(m)));
}

// ---- sampling and prompts ----

void add_sampling_options(CLI::App& app, SamplingOptions& o) {
  SamplerOptions& s = o.sampler;
  app.add_option("-n,--n-predict,--predict,--max-tokens", o.max_tokens,
                 "tokens to make; -1 (default): until the model ends the text")
      ->type_name("N");
  app.add_option("--threads-batch", o.batch_threads, "-tb: threads for the prompt (default: -t)")
      ->type_name("N");
  app.add_option("-b,--batch-size", o.batch, "prompt tokens at a time (default 512)")
      ->type_name("N");
  app.add_option("--temp,--temperature", s.temperature, "0: greedy, exactly (default 0.8)");
  app.add_option("--top-k", s.top_k,
                 "keep the k most probable; 0: all (default 40). A GPU draws from up to 128 by "
                 "itself; what is "
                 "more, or penalised, the host does, which is slower");
  app.add_option("--top-p", s.top_p, "keep this share of the probability; 1: all (default 0.95)");
  app.add_option("--min-p", s.min_p,
                 "keep tokens at least this share as probable as the first (default 0.05)");
  app.add_option("--repeat-penalty", s.repeat_penalty, "1: none (default)");
  app.add_option("--repeat-last-n", s.repeat_last_n,
                 "tokens that penalties look back; -1: all (default 64)");
  app.add_option("--presence-penalty", s.presence_penalty, "0: none (default)");
  app.add_option("--frequency-penalty", s.frequency_penalty, "0: none (default)");
  app.add_option("-l,--logit-bias", o.bias, "ID+BIAS, ID-BIAS or ID=-inf; may be repeated")
      ->take_all()
      ->allow_extra_args(false)
      ->type_name("ID±BIAS");
  app.add_option("-s,--seed", o.seed, "-1 (default): a new one each time")->type_name("N");
  app.add_option("--stop,-r,--reverse-prompt", o.stop,
                 "end the text before this string; may be repeated")
      ->take_all()
      ->allow_extra_args(false)
      ->type_name("TEXT");
  app.add_flag("--ignore-eos", o.ignore_eos, "never let the model end the text");
}

namespace {

std::pair<int32_t, double> parse_bias(const std::string& text) {
  int32_t id = 0;
  double bias = 0;
  const char* end = text.data() + text.size();
  const auto [at, id_error] = std::from_chars(text.data(), end, id);
  bool ok = id_error == std::errc{} && at != end;
  if (ok) {
    const char* value = *at == '-' ? at : at + 1;  // "+1.5", "=-inf"
    const auto number = cli::decimal_at({value, end});
    ok = (*at == '+' || *at == '-' || *at == '=') && number && value + number->length == end;
    if (ok) bias = number->value;
  }
  if (!ok)
    throw cli::UsageError(
        fmt::format("--logit-bias {}: a token id and a bias are wanted, as 15+1.5", text));
  return {id, bias};
}

}  // namespace

GenerateOptions generate_options(const SamplingOptions& o, int64_t vocab_size) {
  GenerateOptions g;
  g.sampling = o.sampler;
  for (const std::string& text : o.bias) g.sampling.logit_bias.push_back(parse_bias(text));
  std::random_device fresh;
  g.sampling.seed = o.seed >= 0 ? static_cast<uint64_t>(o.seed) : fresh();
  g.max_tokens = o.max_tokens;
  g.stop = o.stop;
  g.ignore_eos = o.ignore_eos;
  g.batch = o.batch;
  g.batch_threads = o.batch_threads;
  if (o.batch_threads > 0) g.threads = num_threads();
  if (o.batch_threads < 0 || o.batch_threads > 1024)
    throw cli::UsageError(fmt::format("--threads-batch {}: 1 to 1024", o.batch_threads));
  if (o.batch < 1) throw cli::UsageError(fmt::format("--batch-size {}: at least 1", o.batch));
  if (o.max_tokens < -1)
    throw cli::UsageError(fmt::format("--n-predict {}: -1 or more", o.max_tokens));
  try {
    g.sampling.validate(vocab_size);
  } catch (const Error& e) {
    throw cli::UsageError(e.what());
  }
  return g;
}

void check_sampling(const SamplingOptions& options) {
  generate_options(options, std::numeric_limits<int32_t>::max());
}

std::string read_input(const std::string& file) {
  if (file != "-") return read_text_file(file);
  std::string text;
  char part[4096];
  while (const size_t n = std::fread(part, 1, sizeof part, stdin)) text.append(part, n);
  check(std::ferror(stdin) == 0, "cannot read standard input");
  return text;
}

// ---- figures ----

namespace {

// What continuations that were made together took, as one. steps: each of them read the weights
// once.
struct Total {
  GenerateStats stats;
  int64_t steps = 0;
  std::string ends;

  explicit Total(std::span<const GenerateResult> results) : stats(results.front().stats) {
    stats.generated_tokens = stats.decode_steps = 0;
    for (const GenerateResult& r : results) {
      stats.generated_tokens += r.stats.generated_tokens;
      stats.decode_steps += r.stats.decode_steps;
      stats.decode_seconds = std::max(stats.decode_seconds, r.stats.decode_seconds);
      steps = std::max(steps, r.stats.decode_steps);
      ends += fmt::format("{}{}", ends.empty() ? "" : ", ", to_string(r.finish));
    }
  }
  double gbs(const OpenModel& m) const {
    if (stats.decode_seconds <= 0) return 0;
    return static_cast<double>(steps) * static_cast<double>(m.size.token_bytes) /
           stats.decode_seconds / 1e9;
  }
};

}  // namespace

nlohmann::json stats_json(std::span<const GenerateResult> results, const OpenModel& m,
                          uint64_t seed) {
  const Total total(results);
  const GenerateStats& s = total.stats;
  return {{"prompt_tokens", s.prompt_tokens},
          {"reused_tokens", s.reused_tokens},
          {"prompt_tokens_per_second", s.prompt_rate()},
          {"generated_tokens", s.generated_tokens},
          {"generated_tokens_per_second", s.decode_rate()},
          {"time_to_first_token_seconds", s.first_token_seconds},
          {"gigabytes_per_second", total.gbs(m)},
          {"peak_memory_bytes", cli::peak_memory_bytes()},
          {"load_seconds", m.seconds},
          {"finish_reason", total.ends},
          {"truncated", false},
          {"seed", seed},
          {"threads", num_threads()},
          {"kernels", packed_isa_name()}};
}

nlohmann::json stats_json(const GenerateResult& result, const OpenModel& m, uint64_t seed) {
  return stats_json({&result, 1}, m, seed);
}

void print_stats(std::span<const GenerateResult> results, const OpenModel& m, uint64_t seed) {
  const Total total(results);
  const GenerateStats& s = total.stats;
  fmt::print(
      stderr, "\nprompt     {:6} tokens  {:8.2f} t/s{}\n", s.prompt_tokens, s.prompt_rate(),
      s.reused_tokens > 0 ? fmt::format("   ({} of them from the cache)", s.reused_tokens) : "");
  fmt::print(stderr, "generated  {:6} tokens  {:8.2f} t/s   {:.2f} GB/s of weights read\n",
             s.generated_tokens, s.decode_rate(), total.gbs(m));
  fmt::print(stderr, "first token after {:.3f} s, peak memory {}, ended by: {}, seed {}{}\n",
             s.first_token_seconds, cli::human_bytes(static_cast<double>(cli::peak_memory_bytes())),
             total.ends, seed,
             results.size() > 1 ? fmt::format(" … {}", seed + results.size() - 1) : "");
}

void print_stats(const GenerateResult& result, const OpenModel& m, uint64_t seed) {
  print_stats({&result, 1}, m, seed);
}

// ---- Ctrl-C ----

namespace {

std::atomic<bool> g_interrupted{false}, g_waiting{false};
static_assert(std::atomic<bool>::is_always_lock_free, "used in a signal handler");

void on_interrupt(int) {
  if (g_interrupted.exchange(true)) {
    [[maybe_unused]] const auto written = write(STDERR_FILENO, "\n", 1);
    _exit(130);
  }
  if (g_waiting) {
    static constexpr char kHint[] = "\n(Ctrl-C again or /exit leaves)\n> ";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, kHint, sizeof kHint - 1);
  }
}

}  // namespace

Interrupt::Interrupt() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
}
Interrupt::~Interrupt() {
  std::signal(SIGINT, SIG_DFL);
  g_interrupted = false;
}
const std::atomic<bool>* Interrupt::flag() const { return &g_interrupted; }
void Interrupt::release() { g_interrupted = false; }
void Interrupt::waiting(bool yes) {
  g_waiting = yes;
  if (!yes) release();
}

}  // namespace omq::run
