// omq-run bench: llama-bench's tests (ppN: a prompt of N tokens, tgN: N tokens one by one, tgNxB:
// of each of B sequences, tokens/s in total), its fields, and beside them GB/s and the share of the
// machine's read bandwidth (on a GPU: of what a copy inside it moves), which bounds the decoding of
// one sequence.
//
// Bandwidth is measured in turn with the test, once a repetition, because shared machines drift;
// the share is the median of one over the median of the other.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <span>

#include "autograd/node.h"
#include "models/decode_plan.h"
#include "models/json_file.h"
#include "models/packed_model.h"
#include "tensor/bandwidth.h"
#include "tensor/isa.h"
#include "tensor/parallel.h"
#include "tools/device_option.h"
#include "tools/run_common.h"

namespace omq::run {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  ModelOptions model;
  std::string prompt = "512", gen = "128", parallel = "1", threads, output = "md";
  int repetitions = 5;
  int64_t batch = 512;
  bool no_warmup = false, no_bandwidth = false;
};

bool parse(const cli::Args& args, Options& o) {
  CLI::App app("Speed of a model. Lists such as -t 1,2 multiply out.", "omq-run bench");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-m,--model,model", o.model.model, "model; several with commas between them")
      ->required()
      ->type_name("MODEL");
  app.add_option("-p,--n-prompt", o.prompt, "prompt lengths (default 512); 0: no such test")
      ->type_name("N,…");
  app.add_option("-n,--n-gen", o.gen,
                 "numbers of tokens to generate (default 128); 0: no such test")
      ->type_name("N,…");
  app.add_option("--parallel", o.parallel,
                 "-np: numbers of sequences that -n is measured with, at once (default 1, at most "
                 "16); tokens/s are those of all")
      ->type_name("N,…");
  app.add_option("-t,--threads", o.threads,
                 "numbers of threads (default: the CPUs this process may use)")
      ->type_name("N,…");
  app.add_option("-r,--repetitions", o.repetitions, "of each test (default 5)")->type_name("N");
  app.add_option("-o,--output", o.output, "md (default), json, jsonl or csv")->type_name("FORM");
  app.add_option("-b,--batch-size", o.batch, "prompt tokens at a time (default 512)")
      ->type_name("N");
  add_device_options(app, o.model);
  add_cache_options(app, o.model);
  app.add_option("--isa", o.model.isa,
                 "instruction set of the packed kernels: amx, avx512, avx2, neon, scalar");
  app.add_flag("--no-warmup", o.no_warmup, "do not run each test once before measuring");
  app.add_flag("--no-bandwidth", o.no_bandwidth, "do not measure the read bandwidth");
  app.add_flag("-q,--quiet", o.model.quiet, "nothing on stderr");
  if (!cli::parse(app, args, kAliases)) return false;
  const auto& f = o.output;
  if (f != "md" && f != "json" && f != "jsonl" && f != "csv")
    throw cli::UsageError(fmt::format("--output {}: there are md, json, jsonl and csv", f));
  if (o.repetitions < 1 || o.batch < 1)
    throw cli::UsageError("--repetitions and --batch-size are at least 1");
  return true;
}

struct Test {
  int64_t prompt = 0, gen = 0;
  int threads = 1;
  int64_t batch = 1;  // sequences
  std::string name() const {
    if (prompt > 0) return fmt::format("pp{}", prompt);
    return batch == 1 ? fmt::format("tg{}", gen) : fmt::format("tg{}x{}", gen, batch);
  }
  int64_t length() const { return prompt + gen; }  // of a sequence
  int64_t tokens() const { return batch * length(); }
};

struct Samples {
  std::vector<double> seconds, bandwidth;  // per repetition; bytes/s
};

double mean(const std::vector<double>& v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}
double deviation(const std::vector<double>& v) {  // of the sample, as llama-bench
  if (v.size() < 2) return 0;
  const double m = mean(v);
  double sum = 0;
  for (const double x : v) sum += (x - m) * (x - m);
  return std::sqrt(sum / static_cast<double>(v.size() - 1));
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

// Token ids that have no meaning but are the same in every run.
class Tokens {
 public:
  explicit Tokens(int64_t vocab) : vocab_(static_cast<uint64_t>(vocab)), random_(1) {}
  void next(std::span<int32_t> ids) {
    for (int32_t& id : ids) id = static_cast<int32_t>(random_.next() % vocab_);
  }
  Tensor next(int64_t sequences, int64_t n) {
    std::vector<int32_t> ids(static_cast<size_t>(sequences * n));
    next(ids);
    return Tensor::from<int32_t>(ids, {sequences, n});
  }

 private:
  uint64_t vocab_;
  Xoshiro256 random_;
};

// What a test uses again in every repetition.
struct Prepared {
  std::vector<nn::KVCache> caches;
  std::optional<DecodePlan> plan;
  Prepared(const Model& model, const Test& test)
      : caches(model.new_caches(test.batch, test.length())) {
    if (test.prompt == 0 && DecodePlan::supports(model))
      plan.emplace(model, test.length(), test.batch);
  }
};

// Seconds of `test`, whose tokens are at most those that `p` was made for.
double run_once(const Model& model, Prepared& p, const Test& test, int64_t batch) {
  const NoGrad off;
  Tokens tokens(model.config().vocab_size);
  std::vector<nn::KVCache>& caches = p.caches;
  for (nn::KVCache& cache : caches) cache.truncate(0);
  const auto start = Clock::now();
  const auto seconds = [&] {
    device_api(model.device()).sync(model.device().index);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  if (p.plan) {
    std::vector<int32_t> ids(static_cast<size_t>(test.batch));
    for (int64_t at = 0; at < test.length(); ++at) {
      tokens.next(ids);
      p.plan->step(ids, caches);
      p.plan->logits();
    }
    return seconds();
  }
  const int64_t step = test.prompt > 0 ? batch : 1;
  for (int64_t at = 0; at < test.length(); at += step) {
    const int64_t n = std::min(step, test.length() - at);
    const Tensor hidden = model.forward(tokens.next(test.batch, n), at, &caches);
    // A prompt's logits are wanted after its last token only.
    if (test.prompt == 0 || at + n == test.length())
      model.logits(hidden.alias({test.batch, hidden.dim(2)}, {hidden.stride(0), 1},
                                (n - 1) * hidden.stride(1)));
  }
  return seconds();
}

using Bandwidth = std::function<double()>;  // bytes/s, measured anew

// Of a copy inside a GPU, larger than its caches: what is read and what is written.
double copy_rate(Device device) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  constexpr int kCopies = 8;
  const Tensor from = Tensor::zeros({kBytes}, DType::U8, device),
               to = Tensor::zeros({kBytes}, DType::U8, device);
  const DeviceApi& api = device_api(device);
  api.sync(device.index);
  const auto start = Clock::now();
  for (int i = 0; i < kCopies; ++i) api.copy(to.raw(), device, from.raw(), device, kBytes);
  api.sync(device.index);
  return 2.0 * kCopies * kBytes / std::chrono::duration<double>(Clock::now() - start).count();
}

Bandwidth bandwidth_of(Device device) {
  if (device.type != DeviceType::CPU) return [device] { return copy_rate(device); };
  return [read = std::make_shared<ReadBandwidth>()] { return read->pass(); };
}

Samples measure(const Model& model, const Test& test, const Options& o,
                const Bandwidth& bandwidth) {
  Samples s;
  set_num_threads(test.threads);
  Prepared prepared(model, test);
  if (!o.no_warmup) {
    run_once(model, prepared,
             {.prompt = test.prompt,
              .gen = std::min<int64_t>(test.gen, 4),
              .threads = test.threads,
              .batch = test.batch},
             o.batch);
    if (bandwidth) bandwidth();
  }
  for (int i = 0; i < o.repetitions; ++i) {
    s.seconds.push_back(run_once(model, prepared, test, o.batch));
    if (bandwidth) s.bandwidth.push_back(bandwidth());
  }
  return s;
}

std::string decode_path(const Model& model) {
  const std::string reason = DecodePlan::unsupported(model);
  return reason.empty() ? "plan" : "blocks: " + reason;
}

json row(const OpenModel& m, const Options& o, const Test& test, const Samples& s,
         const std::string& time) {
  std::vector<double> rates, ns;
  for (const double seconds : s.seconds) {
    rates.push_back(static_cast<double>(test.tokens()) / seconds);
    ns.push_back(seconds * 1e9);
  }
  const nn::CacheQuant& kept = m.model->kept;
  const bool gpu = m.model->device().type != DeviceType::CPU;
  json j = {{"build_version", OMQ_VERSION},
            {"cpu_info", cli::cpu_name()},
            {"backends", gpu ? "CUDA" : "CPU"},
            {"device", cli::device_text(m.model->device())},
            {"kernels", gpu ? "cuda" : packed_isa_name()},
            {"model_filename", m.reader->path().string()},
            {"model_type", model_name(m)},
            {"model_size", m.size.bytes},
            {"model_n_params", parameter_count(m)},
            {"bits_per_weight", m.size.bits_per_weight()},
            {"n_batch", o.batch},
            {"n_threads", test.threads},
            {"type_k", cache_type(kept.k, kept.floats)},
            {"type_v", cache_type(kept.v, kept.floats)},
            {"n_gpu_layers", gpu ? m.model->config().num_layers : 0},
            {"n_prompt", test.prompt},
            {"n_gen", test.gen},
            {"n_parallel", test.batch},
            {"test_time", time},
            {"avg_ns", std::llround(mean(ns))},
            {"stddev_ns", std::llround(deviation(ns))},
            {"avg_ts", mean(rates)},
            {"stddev_ts", deviation(rates)},
            {"samples_ts", rates}};
  if (test.gen > 0) {
    j["decode"] = decode_path(*m.model);
    const double steps = median(rates) / static_cast<double>(test.batch);  // a second
    const double gbs = steps * static_cast<double>(m.size.token_bytes) / 1e9;
    j["bytes_per_step"] = m.size.token_bytes;  // a token of each sequence
    j["gigabytes_per_second"] = gbs;
    if (!s.bandwidth.empty()) {
      j["read_bandwidth_gigabytes_per_second"] = median(s.bandwidth) / 1e9;
      j["bandwidth_share"] = gbs / (median(s.bandwidth) / 1e9);
    }
  }
  return j;
}

void print_md(const json& j, const std::string& name, bool first) {
  if (first) {
    fmt::print("| {:20} | {:>10} | {:>8} | {:>5} | {:>7} | {:>9} | {:>18} | {:>7} | {:>13} |\n",
               "model", "size", "params", "bits", "threads", "test", "t/s", "GB/s", "of read peak");
    fmt::print(
        "| -------------------- | ---------: | -------: | ----: | ------: | --------: | "
        "-----------------: | ------: "
        "| ------------: |\n");
  }
  std::string gbs, share;
  if (j.contains("gigabytes_per_second"))
    gbs = fmt::format("{:.2f}", j["gigabytes_per_second"].get<double>());
  if (j.contains("bandwidth_share"))
    share = fmt::format("{:.0f}% of {:.1f}", 100 * j["bandwidth_share"].get<double>(),
                        j["read_bandwidth_gigabytes_per_second"].get<double>());
  fmt::print(
      "| {:20} | {:>10} | {:>8} | {:5.2f} | {:7} | {:>9} | {:9.2f} ± {:6.2f} | {:>7} | {:>13} |\n",
      j["model_type"].get<std::string>(), cli::human_bytes(j["model_size"].get<double>()),
      human_count(j["model_n_params"].get<int64_t>()), j["bits_per_weight"].get<double>(),
      j["n_threads"].get<int>(), name, j["avg_ts"].get<double>(), j["stddev_ts"].get<double>(), gbs,
      share);
}

void print_csv(const json& j, bool first) {
  static const std::vector<std::string> kColumns = {
      "build_version",  "cpu_info",        "kernels",
      "model_filename", "model_type",      "model_size",
      "model_n_params", "bits_per_weight", "n_batch",
      "n_threads",      "type_k",          "type_v",
      "n_prompt",       "n_gen",           "n_parallel",
      "test_time",      "avg_ns",          "stddev_ns",
      "avg_ts",         "stddev_ts",       "gigabytes_per_second",
      "bandwidth_share"};
  std::string names, values;
  for (const std::string& column : kColumns) {
    const std::string comma = names.empty() ? "" : ",";
    names += comma + column;
    values += comma + (j.contains(column) ? json_text(j[column]) : "");
  }
  if (first) fmt::print("{}\n", names);
  fmt::print("{}\n", values);
}

void show(const json& j, const std::string& name, const std::string& form, bool first) {
  if (form == "md") print_md(j, name, first);
  if (form == "csv") print_csv(j, first);
  if (form == "jsonl") fmt::print("{}\n", json_text(j));
  if (form == "json") {
    std::string text = "  " + json_text(j, 2);
    for (size_t at = 0; (at = text.find('\n', at)) != text.npos; at += 3)
      text.replace(at, 1, "\n  ");
    fmt::print("{}{}", first ? "[\n" : ",\n", text);
  }
  check(std::fflush(stdout) == 0, "cannot write to standard output");
}

std::vector<Test> tests_of(const Options& o) {
  std::vector<int64_t> threads = {num_threads()};
  if (!o.threads.empty()) threads = cli::parse_int_list(o.threads, "--threads", 1);
  std::vector<Test> tests;
  for (const int64_t t : threads) {
    for (const int64_t n : cli::parse_int_list(o.prompt, "--n-prompt", 0))
      if (n > 0) tests.push_back({.prompt = n, .gen = 0, .threads = static_cast<int>(t)});
    for (const int64_t n : cli::parse_int_list(o.gen, "--n-gen", 0))
      for (const int64_t batch : cli::parse_int_list(o.parallel, "--parallel", 1)) {
        if (batch > DecodePlan::kMaxBatch)
          throw cli::UsageError(
              fmt::format("--parallel {}: 1 to {}", batch, DecodePlan::kMaxBatch));
        if (n > 0) tests.push_back({.gen = n, .threads = static_cast<int>(t), .batch = batch});
      }
  }
  if (tests.empty()) throw cli::UsageError("-p 0 -n 0 leave nothing to measure");
  return tests;
}

std::string utc_now() {
  using namespace std::chrono;
  const auto now = system_clock::now();
  const auto day = floor<days>(now);
  const year_month_day date{day};
  const hh_mm_ss time{floor<seconds>(now - day)};
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", static_cast<int>(date.year()),
                     static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()),
                     time.hours().count(), time.minutes().count(), time.seconds().count());
}

}  // namespace

int bench(const cli::Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  apply(o.model);
  const std::vector<Test> tests = tests_of(o);
  int64_t context = 0;
  for (const Test& t : tests) context = std::max(context, t.length());
  Bandwidth bandwidth;
  if (!o.no_bandwidth) bandwidth = bandwidth_of(device_of(o.model));
  bool first = true;
  const std::string models = o.model.model + ",";
  for (size_t at = 0, comma; (comma = models.find(',', at)) != models.npos; at = comma + 1) {
    o.model.model = models.substr(at, comma - at);
    if (o.model.model.empty()) continue;
    const OpenModel m = open_model(o.model, context);
    for (const Test& test : tests) {
      const std::string time = utc_now();
      const Samples samples = measure(*m.model, test, o, test.gen > 0 ? bandwidth : Bandwidth{});
      show(row(m, o, test, samples, time), test.name(), o.output, first);
      first = false;
    }
  }
  if (o.output == "json") fmt::print("\n]\n");
  return 0;
}

}  // namespace omq::run
