// Benchmark of running a model: tokens a second of decoding one sequence, or several at once (the
// recorded plan, head and choice of the token included), of a prompt, and GB/s of single products
// with one row, each as a share of what a copy on the same device reaches. Random weights of
// well-known shapes with realistic scales; nothing is read from a file. A table, then one line of
// JSON.
//
//   omq-bench-decode --device cuda --shape 7b --weights w4g128,w3g128,w2g128,f16 --batch 1,4,16
//
// The floor of a step is its bytes: the blocks' weights with their grids, and the head, once for
// all sequences. The host samples where --temp and --top-k ask for what a plan does not (--top-k
// 0).
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <sstream>

#include "autograd/ops.h"
#include "models/decode_plan.h"
#include "models/sampler.h"
#include "tensor/decode_kernels.h"
#include "tensor/kernels.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"
#include "tensor/step_graph.h"
#include "tools/cli.h"
#include "tools/device_option.h"

namespace omq {
namespace {

using Clock = std::chrono::steady_clock;

struct ModelShape {
  const char* name;
  int64_t layers, hidden, ffn, heads, kv_heads, vocab;
};
constexpr ModelShape kShapes[] = {{"smollm2", 30, 576, 1536, 9, 3, 49152},
                                  {"tinyllama", 22, 2048, 5632, 32, 4, 32000},
                                  {"7b", 32, 4096, 11008, 32, 32, 32000},
                                  {"8b", 32, 4096, 14336, 32, 8, 128256}};

struct Form {  // "w4g128", "w8a8", "f16"
  std::string name;
  int bits = 16, abits = 16;
  int64_t group = 0;
};
Form parse_form(const std::string& text) {
  Form f{.name = text};
  if (text == "f16") return f;
  int group = 0;
  if (std::sscanf(text.c_str(), "w%dg%d", &f.bits, &group) == 2 && f.bits >= 2 && f.bits <= 8) {
    f.group = group;
    return f;
  }
  if (std::sscanf(text.c_str(), "w%da%d", &f.bits, &f.abits) == 2 && f.bits >= 2 && f.bits <= 8 &&
      f.abits >= 2 && f.abits <= 8)
    return f;
  throw cli::UsageError(fmt::format("--weights {}: w4g128, w8a8 or f16 are such forms", text));
}

class Maker {  // of random weights
 public:
  explicit Maker(const Form& f) : form_(f) {}

  nn::Weight matrix(int64_t rows, int64_t cols, int bits, int64_t group) {
    const double deviation = 1 / std::sqrt(static_cast<double>(cols));
    if (bits == 16) return dense(rows, cols, deviation);
    PackedInt w{.data = {},
                .rows = rows,
                .cols = cols,
                .spec = {.bits = stored_bits(bits), .group_size = group}};
    w.data = Tensor::empty({w.panels(), w.panel_bytes()}, DType::U8);
    const int top = (1 << w.spec.bits) - 1;
    parallel_for(w.panels(), 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        auto* at = w.data.data<uint8_t>() + p * w.panel_bytes();
        fill(at, w.panel_bytes(), static_cast<uint64_t>(p));
        for (int64_t g = 0; g < w.groups(); ++g) {
          uint8_t* grid =
              at + g * w.block_bytes(0) + PackedInt::code_bytes(w.group_columns(g), w.spec.bits);
          const uint16_t scale = f32_to_f16_bits(static_cast<float>(deviation * 3.46 / top));
          for (int64_t i = 0; i < kPanelRows; ++i) {
            std::memcpy(grid + 2 * i, &scale, 2);
            uint8_t& zero = grid[2 * kPanelRows + i];
            zero = static_cast<uint8_t>(top / 2 + zero % 2);
          }
        }
      }
    });
    return std::make_shared<nn::PackedIntWeight>(std::move(w));
  }
  nn::Weight matrix(int64_t rows, int64_t cols) {
    return matrix(rows, cols, form_.bits, form_.group);
  }

 private:
  static void fill(uint8_t* p, int64_t n, uint64_t seed) {
    Xoshiro256 random(seed + 1);
    for (int64_t i = 0; i + 8 <= n; i += 8) {
      const uint64_t r = random.next();
      std::memcpy(p + i, &r, 8);
    }
  }
  static Tensor dense(int64_t rows, int64_t cols, double deviation) {
    Tensor w = Tensor::empty({rows, cols}, DType::F16);
    parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
      Xoshiro256 random(static_cast<uint64_t>(begin) + 7);
      auto* p = static_cast<uint16_t*>(w.raw());
      for (int64_t i = begin * cols; i < end * cols; ++i)
        p[i] = f32_to_f16_bits(static_cast<float>(
            (static_cast<double>(random.next() >> 40) * 0x1p-23 - 1) * 1.73 * deviation));
    });
    return w;
  }
  Form form_;
};

// Every layer has memory of its own: nothing may be served by a cache.
Model make_model(const ModelShape& s, const Form& f, int64_t context, Device device) {
  ModelConfig c;
  c.model_type = "llama";
  c.hidden_size = s.hidden, c.intermediate_size = s.ffn, c.num_layers = s.layers;
  c.num_heads = s.heads, c.num_kv_heads = s.kv_heads, c.head_dim = s.hidden / s.heads;
  c.vocab_size = s.vocab, c.max_position_embeddings = context;
  Maker make(f);
  const auto moved = [&](const nn::Weight& w) -> nn::Weight {
    if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&w)) {
      if (device.type != DeviceType::CPU) return (*packed)->on_device(device);
      PackedInt copy = dynamic_cast<const nn::PackedIntWeight&>(**packed).packed();
      const Tensor own = Tensor::empty(copy.data.shape(), DType::U8);
      std::memcpy(own.raw(), copy.data.raw(), own.nbytes());
      copy.data = own;
      return std::make_shared<nn::PackedIntWeight>(std::move(copy));
    }
    Tensor own = Tensor::empty(std::get<Tensor>(w).shape(), DType::F16, device);
    device_api(device).copy(own.raw(), device, std::get<Tensor>(w).raw(), Device{}, own.nbytes());
    return own;
  };
  const int64_t kv = s.kv_heads * c.head_dim;
  const nn::Weight square = make.matrix(s.hidden, s.hidden), keys = make.matrix(kv, s.hidden),
                   wide = make.matrix(s.ffn, s.hidden), down = make.matrix(s.hidden, s.ffn);
  const Tensor gain = Tensor::full({s.hidden}, 1, DType::F32, device);
  std::vector<std::unique_ptr<LlamaBlock>> blocks;
  for (int64_t i = 0; i < s.layers; ++i) {
    auto b = std::make_unique<LlamaBlock>();
    b->self_attn.heads = s.heads, b->self_attn.kv_heads = s.kv_heads;
    b->self_attn.head_dim = c.head_dim;
    b->self_attn.q_proj.weight = moved(square), b->self_attn.k_proj.weight = moved(keys);
    b->self_attn.v_proj.weight = moved(keys), b->self_attn.o_proj.weight = moved(square);
    b->mlp.gate_proj.weight = moved(wide), b->mlp.up_proj.weight = moved(wide);
    b->mlp.down_proj.weight = moved(down);
    b->input_layernorm.weight = b->post_attention_layernorm.weight = gain;
    if (f.abits < 16) {
      nn::ActivationQuant a;
      a.linear = RowQuant{.bits = f.abits};
      nn::quantize_activations(*b, a);
    }
    blocks.push_back(std::move(b));
  }
  ModelEnds ends;
  ends.embed_tokens.table = moved(make.matrix(s.vocab, s.hidden, 8, 128));
  ends.lm_head.weight = f.bits == 16 ? moved(make.matrix(s.vocab, s.hidden, 16, 0))
                                     : moved(make.matrix(s.vocab, s.hidden, 8, 128));
  ends.norm.weight = gain;
  Model m = Model::assemble(c, std::move(ends), std::move(blocks), context);
  m.move_to(device);  // the rotary tables
  return m;
}

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<int64_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

struct Bench {
  Device device;
  int64_t prompt = 128, gen = 128, long_prompt = 2048;
  int repetitions = 5;
  SamplerOptions sampling;
  double copy_rate = 0;  // bytes/s, read and written

  void sync() const { device_api(device).sync(device.index); }
  double seconds(const std::function<void()>& run) const {
    sync();
    const auto start = Clock::now();
    run();
    sync();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  double measure_copy() const {
    const int64_t n = int64_t{256} << 20;
    Tensor a = Tensor::zeros({n}, DType::U8, device), b = Tensor::zeros({n}, DType::U8, device);
    std::vector<double> all;
    for (int i = 0; i < 9; ++i)
      all.push_back(seconds([&] {
                      for (int j = 0; j < 4; ++j)
                        device_api(device).copy(b.raw(), device, a.raw(), device, a.nbytes());
                    }) /
                    4);
    return 2 * static_cast<double>(n) / median(all);
  }
};

// The next token of each sequence where the plan leaves it to the host: its logits, and a sampler.
std::vector<int32_t> sampled_step(DecodePlan& plan, std::vector<Sampler>& samplers,
                                  std::span<const int32_t> tokens,
                                  std::vector<nn::KVCache>& caches) {
  plan.step(tokens, caches);
  const auto logits = plan.logits();
  const size_t V = logits.size() / samplers.size();
  std::vector<int32_t> next(samplers.size());
  parallel_for(static_cast<int64_t>(next.size()), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
      next[i] = samplers[i].sample(logits.subspan(i * V, V), {});
  });
  return next;
}

// Seconds of a step behind a prompt, a token of each of `batch` sequences; median of whole runs.
double decode_seconds(const Bench& b, const Model& m, int64_t batch) {
  const NoGrad off;
  const int64_t all = b.prompt + b.gen;
  DecodePlan plan(m, all, batch);
  auto caches = m.new_caches(batch, all);
  std::vector<int32_t> ids(static_cast<size_t>(batch * b.prompt));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<int32_t>((i * i * 31 + 7) % static_cast<size_t>(m.config().vocab_size));
  std::vector<double> times, numbers(static_cast<size_t>(batch * b.gen));
  const bool chosen = plan.can_choose(b.sampling);
  std::vector<Sampler> samplers(static_cast<size_t>(batch), Sampler(b.sampling));
  if (chosen) {
    Sampler(b.sampling).take_numbers(numbers);
    plan.choose_by(b.sampling, b.prompt, numbers);
  }
  for (int r = 0; r <= b.repetitions; ++r) {
    for (nn::KVCache& cache : caches) cache.truncate(0);
    m.forward(Tensor::from<int32_t>(ids, {batch, b.prompt}), 0, &caches);
    std::vector<int32_t> sampled(static_cast<size_t>(batch), 1);
    std::span<const int32_t> tokens = sampled;
    const double s = b.seconds([&] {
      for (int64_t i = 0; i < b.gen; ++i)
        tokens = chosen ? plan.choose(tokens, caches)
                        : sampled = sampled_step(plan, samplers, tokens, caches);
    });
    if (r > 0) times.push_back(s / static_cast<double>(b.gen));
  }
  return median(times);
}

double prompt_seconds(const Bench& b, const Model& m) {
  const NoGrad off;
  std::vector<int32_t> ids(static_cast<size_t>(b.long_prompt), 5);
  const Tensor at = Tensor::from<int32_t>(ids, {1, b.long_prompt});
  auto caches = m.new_caches(1, b.long_prompt);
  std::vector<double> times;
  for (int r = 0; r <= b.repetitions; ++r) {
    for (nn::KVCache& cache : caches) cache.truncate(0);
    const double s = b.seconds([&] {
      const Tensor h = m.forward(at, 0, &caches);
      m.logits(slice(h, 1, b.long_prompt - 1, b.long_prompt)).to_vector<float>();
    });
    if (r > 0) times.push_back(s);
  }
  return median(times);
}

// Copies of one matrix, more than any cache holds.
struct Matrices {
  std::vector<nn::Weight> all;
  size_t bytes = 0;  // of one

  Matrices(const Bench& b, const Form& f, int64_t rows, int64_t cols) {
    const nn::Weight w = Maker(f).matrix(rows, cols);
    const bool host = b.device.type == DeviceType::CPU;
    do {
      if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&w)) {
        bytes = (*packed)->nbytes();
        all.emplace_back(host ? *packed : (*packed)->on_device(b.device));
      } else {
        bytes = std::get<Tensor>(w).nbytes();
        all.emplace_back(to(std::get<Tensor>(w), b.device));
      }
    } while (all.size() * bytes < (size_t{400} << 20) && !host);
  }
};

// Bytes a second of the weights that `product` reads, called with each of them. On a GPU the
// products are recorded, so that the host's time for a launch is not measured.
template <class F> double bytes_per_second(const Bench& b, const Matrices& w, F&& product) {
  StepGraph products(b.device, [&] {
    for (const nn::Weight& each : w.all) product(each);
  });
  products.run();
  products.run();
  std::vector<double> times;
  for (int r = 0; r < b.repetitions; ++r) {
    const double s = b.seconds([&] {
      for (int i = 0; i < 4; ++i) products.run();
    });
    times.push_back(s / (4 * static_cast<double>(w.all.size())));
  }
  return static_cast<double>(w.bytes) / median(times);
}

const PackedInt* packed_of(const nn::Weight& w) {
  const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&w);
  return packed ? &dynamic_cast<const nn::PackedIntWeight&>(**packed).packed() : nullptr;
}

// Of products of `batch` rows of F32 x with weights [rows, cols].
double product_rate(const Bench& b, const Matrices& w, int64_t batch, int64_t rows, int64_t cols) {
  const Tensor x = Tensor::full({batch, cols}, 0.5, DType::F32, b.device);
  Tensor y = Tensor::empty({batch, rows}, DType::F32, b.device);
  return bytes_per_second(b, w, [&](const nn::Weight& each) {
    if (const PackedInt* packed = packed_of(each))
      packed_on(x).packed_matmul(y, x, *packed);
    else
      packed_on(x).dense_matmul(y, x, std::get<Tensor>(each));
  });
}

// The same of a row that the stage in front has left prepared, as most are in a model on a GPU; as
// there, each product knows the next one's weights, and asks for some. NaN where none is prepared.
double prepared_rate(const Bench& b, const Form& f, const Matrices& w, int64_t rows, int64_t cols) {
  const DecodeKernels* kernels = decode_kernels(b.device);
  if (!kernels || !packed_of(w.all[0]) || f.abits < 16) return NAN;
  constexpr int64_t kInFront = 256;  // columns
  const auto stage = [](const nn::Weight& weight) { return RowMatrix{*packed_of(weight), {}}; };
  const nn::Weight front =
      std::get<std::shared_ptr<nn::PackedWeight>>(Maker(f).matrix(cols, kInFront))
          ->on_device(b.device);
  const RowMatrix in_front = stage(front), first = stage(w.all[0]);
  const int64_t bytes =
      kernels->prepared_bytes({{&in_front, 1}, RowOutput::Add}, {{&first, 1}, RowOutput::Store});
  if (bytes == 0) return NAN;
  const Tensor row = Tensor::zeros({bytes}, DType::U8, b.device),
               x = Tensor::full({1, kInFront}, 0.5, DType::F32, b.device);
  Tensor y = Tensor::empty({1, rows}, DType::F32, b.device),
         between = Tensor::zeros({1, cols}, DType::F32, b.device);
  kernels->products(between, {.x = x}, {&in_front, 1}, RowOutput::Add, {row, {}});
  return bytes_per_second(b, w, [&](const nn::Weight& each) {
    const size_t i = static_cast<size_t>(&each - w.all.data());
    const RowMatrix m = stage(each), behind = stage(w.all[(i + 1) % w.all.size()]);
    kernels->products(y, {.x = between, .prepared = row}, {&m, 1}, RowOutput::Store,
                      {{}, {}, {&behind, 1}});
  });
}

int run(int argc, char** argv) {
  Bench b;
  std::string device = "auto", path = "auto", shape = "7b", weights = "w4g128,w3g128,w2g128,f16",
              batch = "1";
  int threads = 0, cache_bits = 0;
  CLI::App app("Tokens a second of running models of well-known shapes with random weights");
  app.add_option("--device", device, "cpu, cuda, cuda:N or auto");
  app.add_option("--cuda-path", path, "auto or sm80");
  app.add_option("--shape", shape, "smollm2, tinyllama, 7b, 8b");
  app.add_option("--weights", weights, "such as w4g128,w8a8,f16");
  app.add_option("-p,--prompt", b.prompt, "tokens in front of those generated");
  app.add_option("-n,--gen", b.gen, "tokens generated");
  app.add_option("--batch", batch, "sequences at once, such as 1,4,16; tokens/s are those of all");
  app.add_option("--long-prompt", b.long_prompt, "tokens of the prompt that is timed; 0: none");
  app.add_option("-r,--repetitions", b.repetitions, "of each measurement");
  app.add_option("--cache-bits", cache_bits, "of codes of keys and values, 2 to 8; 0: floats");
  app.add_option("-t,--threads", threads, "on the CPU");
  b.sampling.temperature = 0;
  app.add_option("--temp", b.sampling.temperature, "of sampling; 0: the largest logit");
  app.add_option("--top-k", b.sampling.top_k, "tokens sampled from; 0: all, by the host");
  CLI11_PARSE(app, argc, argv);
  b.device = cli::device_from(device);
  cli::choose_cuda_path(path, b.device);
  if (threads > 0) set_num_threads(threads);
  const auto* s = std::find_if(std::begin(kShapes), std::end(kShapes),
                               [&](const ModelShape& m) { return shape == m.name; });
  if (s == std::end(kShapes)) throw cli::UsageError(fmt::format("--shape {} is not known", shape));
  const std::vector<int64_t> batches = cli::parse_int_list(batch, "--batch", 1);
  for (const int64_t n : batches)
    if (n > DecodePlan::kMaxBatch)
      throw cli::UsageError(fmt::format("--batch {}: 1 to {}", n, DecodePlan::kMaxBatch));
  if (cache_bits != 0 && (cache_bits < 2 || cache_bits > 8))
    throw cli::UsageError(fmt::format("--cache-bits {}: 2 to 8, or 0", cache_bits));
  b.sampling.validate(s->vocab);
  b.copy_rate = b.measure_copy();
  fmt::print("{}: copy {:.0f} GB/s\n", cli::device_text(b.device), b.copy_rate / 1e9);
  // down: a product of the batch's rows with 4096 × 11008 weights by itself; up: with 11008 × 4096;
  // row: of one row that was prepared by the stage in front, as in a model.
  fmt::print("{:10} {:>5} {:>10} {:>9} {:>8} {:>8} {:>12} {:>11} {:>8} {:>11} {:>8} {:>9} {:>9}\n",
             "weights", "batch", "decode t/s", "ms/step", "GB/s", "of copy", "prompt t/s",
             "down GB/s", "of copy", "up GB/s", "of copy", "down row", "up row");
  const auto share = [&](double rate) {  // NaN: was not measured
    return std::isnan(rate) ? "–" : fmt::format("{:.0f}%", 100 * rate / b.copy_rate);
  };
  nlohmann::json rows = nlohmann::json::array();
  std::stringstream list(weights);
  for (std::string text; std::getline(list, text, ',');) {
    const Form f = parse_form(text);
    constexpr int64_t kHidden = 4096, kWide = 11008;
    const Matrices for_down(b, f, kHidden, kWide), for_up(b, f, kWide, kHidden);
    Model m = make_model(*s, f, std::max(b.prompt + b.gen, b.long_prompt), b.device);
    if (cache_bits > 0) m.kept.k = m.kept.v = RowQuant{.bits = cache_bits};
    const ModelSize size = model_size(m);
    const double prompt = b.long_prompt > 0 ? prompt_seconds(b, m) : NAN;
    const double prompt_rate = static_cast<double>(b.long_prompt) / prompt;
    for (const int64_t n : batches) {
      const double step = decode_seconds(b, m, n);
      const double down = product_rate(b, for_down, n, kHidden, kWide),
                   up = product_rate(b, for_up, n, kWide, kHidden),
                   down_row = n == 1 ? prepared_rate(b, f, for_down, kHidden, kWide) : NAN,
                   up_row = n == 1 ? prepared_rate(b, f, for_up, kWide, kHidden) : NAN;
      const double tokens = static_cast<double>(n) / step,
                   rate = static_cast<double>(size.token_bytes) / step;
      fmt::print(
          "{:10} {:5} {:10.1f} {:9.3f} {:8.0f} {:>8} {:>12} {:11.0f} {:>8} {:11.0f} {:>8} {:>9} "
          "{:>9}\n",
          f.name, n, tokens, step * 1e3, rate / 1e9, share(rate),
          std::isnan(prompt_rate) ? "–" : fmt::format("{:.0f}", prompt_rate), down / 1e9,
          share(down), up / 1e9, share(up), share(down_row), share(up_row));
      rows.push_back({{"shape", s->name},
                      {"weights", f.name},
                      {"batch", n},
                      {"cache_bits", cache_bits},
                      {"temperature", b.sampling.temperature},
                      {"top_k", b.sampling.top_k},
                      {"decode_ts", tokens},
                      {"bytes_per_step", size.token_bytes},
                      {"decode_share", rate / b.copy_rate},
                      {"prompt_ts", prompt_rate},
                      {"down_share", down / b.copy_rate},
                      {"up_share", up / b.copy_rate},
                      {"down_row_share", down_row / b.copy_rate},
                      {"up_row_share", up_row / b.copy_rate}});
      std::fflush(stdout);
    }
  }
  fmt::print("{}\n", nlohmann::json{{"device", cli::device_text(b.device)},
                                    {"copy_bytes_per_second", b.copy_rate},
                                    {"rows", rows}}
                         .dump());
  return 0;
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) {
  try {
    return omq::run(argc, argv);
  } catch (const omq::cli::UsageError& e) {
    fmt::print(stderr, "omq-bench-decode: {}\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    fmt::print(stderr, "omq-bench-decode: {}\n", e.what());
    return 1;
  }
}
