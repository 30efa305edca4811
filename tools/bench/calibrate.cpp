// Benchmark of calibration: milliseconds of a learning step on blocks of well-known shapes with
// random weights, seconds of a block-epoch of 128 samples (what the official loop is quoted in),
// and the share of the products' own time, measured in the same run as the floor. A table, then one
// line of JSON.
//
//   omq-bench-calibrate --device cuda --compute f16 --block 7b --setting w4a16g128,w4a4
//
// The floor counts the matrix products alone: those of the forward, of the weights' gradients, and
// of the inputs' where something that is learned stands before them.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <chrono>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <sstream>

#include "autograd/ops.h"
#include "models/llama.h"
#include "quant/learn.h"
#include "tools/cli.h"
#include "tools/device_option.h"

namespace omq {
namespace {

using Clock = std::chrono::steady_clock;

struct BlockShape {
  const char* name;
  int64_t hidden, ffn, heads, kv_heads;
};
constexpr BlockShape kShapes[] = {{"smollm2", 576, 1536, 9, 3},
                                  {"7b", 4096, 11008, 32, 32},
                                  {"8b", 4096, 14336, 32, 8},
                                  {"13b", 5120, 13824, 40, 40},
                                  {"70b", 8192, 28672, 64, 8}};

struct Bench {
  Device device;
  Compute compute = Compute::F32;
  int64_t samples = 16, tokens = 2048;
  int aug_loss = -1, token_loss = -1;
  bool samples_on_host = false;

  void sync() const { device_api(device).sync(device.index); }
  double seconds(const std::function<void()>& run) const {
    sync();
    const auto start = Clock::now();
    run();
    sync();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  // Normal values: a million of them drawn once, laid down again and again.
  Tensor random(Shape shape, double deviation) const {
    static std::vector<float> values;
    if (values.empty()) {
      std::mt19937 generator(1);
      std::normal_distribution<float> normal;
      for (int i = 0; i < (1 << 20) + 7; ++i) values.push_back(normal(generator));
    }
    const auto n = static_cast<int64_t>(values.size());
    const Tensor source = Tensor::from<float>(values, {n}, device) * deviation;
    Tensor y = Tensor::empty({shape.product()}, DType::F32, device);
    for (int64_t at = 0; at < y.numel(); at += n) {
      const int64_t count = std::min(n, y.numel() - at);
      Tensor part = slice(y, 0, at, at + count);
      on(part).copy(part, slice(source, 0, 0, count));
    }
    return reshape(y, shape);
  }
};

LlamaBlock make_block(const Bench& b, const BlockShape& s) {
  LlamaBlock block;
  const int64_t d = s.hidden / s.heads;
  block.self_attn.heads = s.heads;
  block.self_attn.kv_heads = s.kv_heads;
  block.self_attn.head_dim = d;
  // As a checkpoint holds them: in 16 bits.
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return to(to(b.random({rows, cols}, 1 / std::sqrt(static_cast<double>(cols))), DType::BF16),
              DType::F32);
  };
  block.self_attn.q_proj.weight = matrix(s.hidden, s.hidden);
  block.self_attn.k_proj.weight = matrix(s.kv_heads * d, s.hidden);
  block.self_attn.v_proj.weight = matrix(s.kv_heads * d, s.hidden);
  block.self_attn.o_proj.weight = matrix(s.hidden, s.hidden);
  block.mlp.gate_proj.weight = matrix(s.ffn, s.hidden);
  block.mlp.up_proj.weight = matrix(s.ffn, s.hidden);
  block.mlp.down_proj.weight = matrix(s.hidden, s.ffn);
  for (nn::RMSNorm* norm : {&block.input_layernorm, &block.post_attention_layernorm})
    norm->weight = Tensor::full({s.hidden}, 1, DType::F32, b.device);
  return block;
}

// Seconds of the matrix products of one step, each of them alone.
double products_floor(const Bench& b, LlamaBlock& block, bool transformed) {
  NoGrad off;
  double total = 0;
  const DType type = b.compute == Compute::F32    ? DType::F32
                     : b.compute == Compute::BF16 ? DType::BF16
                                                  : DType::F16;
  for (const auto& [name, linear] : block.linears()) {
    const int64_t out = linear->out_features(), in = linear->in_features();
    const Tensor x = to(b.random({b.tokens, in}, 1), type), w = to(linear->dense(), type),
                 dy = to(b.random({b.tokens, out}, 1), type);
    const bool narrow = type == DType::BF16 && b.device.type != DeviceType::CPU;
    const DType gradients = narrow ? type : DType::F32;
    Tensor y = Tensor::empty({b.tokens, out}, DType::F32, b.device),
           dw = Tensor::empty({out, in}, gradients, b.device),
           dx = Tensor::empty({b.tokens, in}, gradients, b.device);
    const auto turned = [](const Tensor& t) { return transpose(t, 0, 1); };
    // q, k and v read what nothing before them learns to change, unless there is a transformation.
    const bool first =
        name == "self_attn.q_proj" || name == "self_attn.k_proj" || name == "self_attn.v_proj";
    const auto products = [&] {
      on(x).matmul(y, x, turned(w));
      on(x).matmul(dw, turned(dy), x);
      if (!first || transformed) on(x).matmul(dx, dy, w);
    };
    products();
    std::vector<double> times;
    for (int i = 0; i < 5; ++i) times.push_back(b.seconds(products));
    std::nth_element(times.begin(), times.begin() + 2, times.end());
    total += times[2];
  }
  return total;
}

nlohmann::json measure(const Bench& b, const BlockShape& shape, const std::string& setting) {
  quant::Options options;
  options.spec = quant::QuantSpec::parse(setting);
  options.compute = b.compute;
  options.aug_loss = b.aug_loss;
  options.token_loss = b.token_loss;
  const quant::Recipe recipe = quant::make_recipe("omniquant", options);
  LlamaBlock block = make_block(b, shape);
  if (b.device.type != DeviceType::CPU) narrow_exact(block);
  const std::vector<double> f = nn::rope_frequencies(block.self_attn.head_dim, 10000, {});
  const nn::RopeTables tables = nn::rope_tables(f, b.tokens);
  const nn::Positions at =
      nn::positions(0, b.tokens, {to(tables.cos, b.device), to(tables.sin, b.device)});
  Tensor x = b.random({b.samples, b.tokens, shape.hidden}, 1);
  quant::Targets targets;
  quant::BlockStats stats;
  {
    NoGrad off;
    const auto watched = block.clone();
    quant::StatsCollector collector(*watched);
    targets.of_fp = empty_like(x);
    for (int64_t i = 0; i < b.samples; ++i) {
      Tensor window = slice(targets.of_fp, 0, i, i + 1);
      on(window).copy(window, watched->forward(slice(x, 0, i, i + 1), at));
    }
    stats = collector.take();
  }
  if (b.samples_on_host)
    for (Tensor* t : {&x, &targets.of_fp}) {
      const Tensor host = empty_pinned(t->shape(), t->dtype(), b.device);
      transfer(host, *t);
      *t = host;
    }
  if (recipe.objective.wants_of_quant) targets.of_quant = targets.of_fp;
  const quant::BlockMethod method(recipe, block, stats);
  nn::AdamW optimizer(method.param_groups());
  const auto batch = [&](const Tensor& t, int64_t i) {
    return t.defined() ? slice(t, 0, i, i + 1) : Tensor{};
  };
  const ComputeScope compute(b.compute);
  const auto sample = [&](int64_t i) {
    i %= b.samples;
    return quant::Batch{batch(x, i), {batch(targets.of_fp, i), batch(targets.of_quant, i)}};
  };
  quant::LearningStep step(recipe, method, block, optimizer, at, sample(0),
                           quant::loss_scale(b.compute, b.tokens * shape.hidden));
  const auto epoch = [&] {
    for (int64_t i = 0; i < b.samples; ++i) {
      const quant::Batch next = sample(i + 1);
      step(sample(i), &next);
    }
  };
  const DeviceApi& api = device_api(b.device);
  api.reset_memory_peak(b.device.index);
  epoch();
  const MemoryUse memory = api.memory(b.device.index);
  std::vector<double> times;
  for (int i = 0; i < 3; ++i) times.push_back(b.seconds(epoch) / static_cast<double>(b.samples));
  std::sort(times.begin(), times.end());
  // Samples are counted apart: their number is the user's.
  size_t samples = 0;
  for (const Tensor* t : std::array<const Tensor*, 2>{&x, &targets.of_fp})
    if (t->device() == b.device) samples += t->nbytes();
  const double floor = products_floor(b, block, recipe.let.has_value());
  const auto without_samples = [&](size_t bytes) {
    return static_cast<double>(bytes - std::min(bytes, samples));
  };
  const double peak = without_samples(memory.peak),
               reserved = without_samples(memory.reserved_peak);
  const double loss = static_cast<double>(step(sample(0)).item<float>());
  fmt::print(
      "{:8} {:10}{:4} {:9.2f} ms a step {:8.3f} s a block-epoch {:8.2f} ms of products "
      "{:5.1f} %  peak {} (reserved {})\n",
      shape.name, setting, recipe.augmented ? " aug" : "", 1e3 * times[1], 128 * times[1],
      1e3 * floor, 100 * floor / times[1], cli::human_bytes(peak), cli::human_bytes(reserved));
  std::fflush(stdout);
  return {{"block", shape.name},
          {"setting", setting},
          {"augmented", recipe.augmented},
          {"compute", compute_name(b.compute)},
          {"ms_per_step", 1e3 * times[1]},
          {"s_per_block_epoch_of_128", 128 * times[1]},
          {"ms_of_products", 1e3 * floor},
          {"peak_bytes", peak},
          {"reserved_bytes", reserved},
          {"samples_on_host", b.samples_on_host},
          {"tokens", b.tokens},
          {"loss", loss}};
}

std::vector<std::string> parts(const std::string& list) {
  std::vector<std::string> all;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');) all.push_back(part);
  return all;
}

int run(const cli::Args& args) {
  Bench b;
  std::string device = "auto", compute = "f32", blocks = "smollm2", settings = "w4a16g128";
  CLI::App app("Milliseconds of a learning step on blocks of random weights",
               "omq-bench-calibrate");
  app.add_option("--device", device, "cpu, cuda, cuda:N or auto");
  app.add_option("--compute", compute, "f32, bf16 or f16");
  app.add_option("--block", blocks, "smollm2, 7b, 8b, 13b, 70b; a list");
  app.add_option("--setting", settings, "as omq-quant's --preset; a list");
  app.add_option("--samples", b.samples, "windows of an epoch (default 16)");
  app.add_option("--tokens", b.tokens, "of a window (default 2048)");
  app.add_flag("--samples-on-host", b.samples_on_host, "samples come to the device step by step");
  app.add_option("--aug-loss", b.aug_loss, "1 with, 0 without, -1 as the preset (default)");
  app.add_option("--token-loss", b.token_loss, "the same; 0: the loss of the official loop");
  if (!cli::parse(app, args)) return 0;
  b.device = cli::device_from(device);
  b.compute = compute == "bf16" ? Compute::BF16 : compute == "f16" ? Compute::F16 : Compute::F32;
  fmt::print("{}, {} tokens a step, products in {}\n", cli::device_text(b.device), b.tokens,
             compute_name(b.compute));
  nlohmann::json results = nlohmann::json::array();
  for (const std::string& block : parts(blocks)) {
    const auto* shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                     [&](auto& s) { return s.name == block; });
    if (shape == std::end(kShapes)) throw cli::UsageError("--block " + block + ": not known");
    for (const std::string& setting : parts(settings))
      results.push_back(measure(b, *shape, setting));
  }
  fmt::print("{}\n",
             nlohmann::json{{"device", cli::device_text(b.device)}, {"runs", results}}.dump());
  return 0;
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) {
  return omq::cli::run_program("omq-bench-calibrate", argc, argv, omq::run);
}
