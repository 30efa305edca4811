// Benchmark of the memory-bound dense kernels: GB/s of each and its share of what a plain copy on
// the same device reaches. Sizes are those of a 7B block, several times a GPU's cache. A table,
// then one line of JSON.
//
// Bytes are those that the kernel has to move (its floor), not those that it happens to move.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tensor/kernels.h"
#include "tensor/numeric.h"

namespace omq {
namespace {

struct Entry {
  std::string name;
  double bytes;
  std::function<void()> run;
};

struct Bench {
  Device device;
  double seconds = 0.03;  // of measurement per kernel
  int64_t tokens = 8192, hidden = 4096, ffn = 11008, vocabulary = 32000, heads = 32;

  // The CPU's kernels compute from F32 to F32 alone.
  bool on_gpu() const { return device.type != DeviceType::CPU; }
  Tensor full(Shape shape, double value, DType dtype = DType::F32) const {
    return Tensor::full(shape, value, dtype, device);
  }
  // Values that differ from element to element without a long upload: one row, copied to all.
  Tensor rows(int64_t r, int64_t c, DType dtype = DType::F32) const {
    std::vector<float> row(static_cast<size_t>(c));
    uint32_t state = 12345;
    for (float& v : row) {
      state = state * 1664525u + 1013904223u;
      v = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    }
    const Tensor one = Tensor::from<float>(row, {1, c}, device);
    Tensor y = Tensor::empty({r, c}, dtype, device);
    on(y).copy(y, one.alias({r, c}, {0, 1}));
    return y;
  }
  Tensor ids(int64_t n, int64_t below) const {
    std::vector<int32_t> v(static_cast<size_t>(n));
    for (size_t i = 0; i < v.size(); ++i)
      v[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(below));
    return Tensor::from<int32_t>(v, {n}, device);
  }

  // Median seconds of a run: batches long enough for the clock, back to back on the device.
  double time(const std::function<void()>& run) const {
    const DeviceApi& api = device_api(device);
    const auto batch = [&](int n) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < n; ++i) run();
      api.sync(device.index);
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / n;
    };
    batch(1);
    const double once = batch(1);
    const int n = std::clamp(static_cast<int>(seconds / 5 / std::max(once, 1e-6)), 1, 1000);
    std::vector<double> times;
    for (int i = 0; i < 5; ++i) times.push_back(batch(n));
    std::nth_element(times.begin(), times.begin() + 2, times.end());
    return times[2];
  }
};

using Entries = std::vector<Entry>;

// ---- the kernels, by what they work on ----

Tensor spread(const Tensor& x, const Shape& shape) {  // [1,C] or [R,1] as [R,C]
  return x.alias(shape, {x.dim(0) == 1 ? 0 : x.stride(0), x.dim(1) == 1 ? 0 : x.stride(1)});
}

void add_scalar(const Bench& b, Entries& all) {
  const Tensor x = b.rows(b.hidden, b.ffn);
  Tensor y = empty_like(x), narrow = Tensor::empty(x.shape(), DType::BF16, b.device), none;
  const double n = static_cast<double>(x.numel());
  const Tensor turned = x.alias({b.ffn, b.hidden}, {1, b.ffn});
  Tensor flat = y.alias({b.ffn, b.hidden}, {b.hidden, 1});
  const Tensor column = spread(b.full({b.hidden, 1}, 2), x.shape()),
               row = spread(b.full({1, b.ffn}, 2), x.shape());
  on(x).copy(narrow, x);
  all.push_back({"copy, f32 to bf16", 6 * n, [=]() mutable { on(x).copy(narrow, x); }});
  all.push_back({"copy, bf16 to f32", 6 * n, [=]() mutable { on(x).copy(y, narrow); }});
  all.push_back({"copy, transposed", 8 * n, [=]() mutable { on(x).copy(flat, turned); }});
  all.push_back({"fill", 4 * n, [=]() mutable { on(x).fill(y, 1); }});
  all.push_back({"add", 12 * n, [=]() mutable { on(x).binary(y, x, x, Binary::Add); }});
  all.push_back(
      {"mul by a column", 8 * n, [=]() mutable { on(x).binary(y, x, column, Binary::Mul); }});
  all.push_back({"mul by a row", 8 * n, [=]() mutable { on(x).binary(y, x, row, Binary::Mul); }});
  all.push_back({"mul by a row, slope of the row", 12 * n,
                 [=]() mutable { on(x).binary_vjp(none, y, x, row, x, Binary::Mul); }});
  all.push_back({"silu", 8 * n, [=]() mutable { on(x).unary(y, x, {UnaryKind::Silu}); }});
  all.push_back(
      {"silu, slope", 12 * n, [=]() mutable { on(x).unary_vjp(y, x, x, x, {UnaryKind::Silu}); }});
  for (const auto& [name, to] :
       {std::pair{"sum of all", Shape{1, 1}}, std::pair{"sum of rows", Shape{b.hidden, 1}},
        std::pair{"sum of columns", Shape{1, b.ffn}}}) {
    Tensor out = b.full(to, 0);
    all.push_back({name, 4 * n, [=]() mutable { on(x).sum_to(out, x); }});
  }
  Tensor p = b.full(x.shape(), 1), m = b.full(x.shape(), 0), v = b.full(x.shape(), 0);
  const AdamWStep step{1e-3, 0.9, 0.999, 1e-8, 0};
  Tensor clock = Tensor::zeros({3}, b.on_gpu() ? DType::F32 : DType::F64, b.device);
  on(clock).adamw_tick(clock, {}, step);
  all.push_back({"adamw", 28 * n, [=]() mutable { on(x).adamw(p, m, v, x, clock, step); }});
}

void add_layers(const Bench& b, Entries& all) {
  const Tensor x = b.rows(b.tokens, b.hidden), w = b.full({b.hidden}, 1);
  Tensor y = empty_like(x), narrow = Tensor::empty(x.shape(), DType::BF16, b.device), none;
  Tensor dw = empty_like(w), db = empty_like(w);
  const double n = static_cast<double>(x.numel());
  all.push_back({"softmax", 8 * n, [=]() mutable { on(x).softmax(y, x); }});
  all.push_back({"softmax, gradient", 12 * n, [=]() mutable { on(x).softmax_vjp(y, x, x); }});
  all.push_back({"rms_norm", 8 * n, [=]() mutable { on(x).rms_norm(y, x, w, none, 1e-5); }});
  if (b.on_gpu())
    all.push_back(
        {"rms_norm to bf16", 6 * n, [=]() mutable { on(x).rms_norm(narrow, x, w, none, 1e-5); }});
  all.push_back({"rms_norm, gradient of x", 12 * n,
                 [=]() mutable { on(x).rms_norm_vjp(y, none, none, x, w, x, 1e-5); }});
  all.push_back({"rms_norm, all gradients", 12 * n,
                 [=]() mutable { on(x).rms_norm_vjp(y, dw, db, x, w, x, 1e-5); }});
  const int64_t d = b.hidden / b.heads;
  const Tensor heads = x.alias({1, b.tokens, b.heads, d}, {x.numel(), b.hidden, d, 1}),
               table = b.rows(b.tokens, d / 2), at = b.ids(b.tokens, b.tokens);
  Tensor turned = y.alias(heads.shape(), heads.strides());
  all.push_back(
      {"rope", 8 * n, [=]() mutable { on(x).rope(turned, heads, table, table, at, false); }});
  all.push_back(
      {"fake_quant_rows", 8 * n, [=]() mutable { on(x).fake_quant_rows(y, x, {.bits = 4}); }});
  if (b.on_gpu())
    all.push_back({"fake_quant_rows to bf16", 6 * n,
                   [=]() mutable { on(x).fake_quant_rows(narrow, x, {.bits = 4}); }});
  all.push_back({"fake_quant_rows, gradient", 12 * n,
                 [=]() mutable { on(x).fake_quant_rows_vjp(y, x, x, {.bits = 4}); }});
  const Tensor words = b.rows(b.vocabulary, b.hidden), ids = b.ids(b.tokens, b.vocabulary);
  all.push_back({"embedding", 8 * n, [=]() mutable { on(x).embedding(y, words, ids); }});
  const Tensor logits = b.rows(2048, b.vocabulary), targets = b.ids(2048, b.vocabulary);
  Tensor loss = b.full({2048}, 1), lse = b.full({2048}, 1), dlogits = empty_like(logits);
  const double c = static_cast<double>(logits.numel());
  all.push_back(
      {"cross_entropy", 4 * c, [=]() mutable { on(x).cross_entropy(loss, lse, logits, targets); }});
  all.push_back({"cross_entropy, gradient", 8 * c,
                 [=]() mutable { on(x).cross_entropy_vjp(dlogits, logits, lse, targets, loss); }});
}

// The MLP's elementwise half in two types.
void add_mlp(const Bench& b, Entries& all) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    if (dtype != DType::F32 && !b.on_gpu()) continue;
    const Tensor gate = b.rows(b.tokens, b.ffn, dtype), up = b.rows(b.tokens, b.ffn, dtype);
    Tensor y = empty_like(gate), dg = empty_like(gate), du = empty_like(gate);
    const double n = static_cast<double>(gate.nbytes());
    const std::string name = dtype == DType::F32 ? "silu_mul" : "silu_mul in bf16";
    all.push_back({name, 3 * n, [=]() mutable { on(gate).silu_mul(y, gate, up); }});
    all.push_back({name + ", gradients", 5 * n,
                   [=]() mutable { on(gate).silu_mul_vjp(dg, du, gate, up, up); }});
  }
}

void add_weights(const Bench& b, Entries& all) {
  const Tensor x = b.rows(b.hidden, b.ffn);
  Tensor y = empty_like(x), narrow = Tensor::empty(x.shape(), DType::BF16, b.device), none;
  Tensor codes = Tensor::empty(x.shape(), DType::U8, b.device);
  const double n = static_cast<double>(x.numel());
  for (int64_t group : {128, 64, 0}) {
    const GroupSpec s{.bits = 4, .group_size = group};
    const Shape grid{b.hidden, s.groups(b.ffn)};
    const Tensor h = b.full(grid, 0.1), z = b.full(grid, 8);
    Tensor hi = b.full(grid, 0), lo = b.full(grid, 0), ds = b.full(grid, 0);
    const std::string of = group ? fmt::format(", groups of {}", group) : ", rows";
    all.push_back({"group_range" + of, 4 * n, [=]() mutable { on(x).group_range(hi, lo, x, s); }});
    all.push_back({"group_range" + of + ", gradient", 8 * n,
                   [=]() mutable { on(x).group_range_vjp(y, x, hi, lo, h, h, s); }});
    all.push_back({"fake_quant" + of, 8 * n, [=]() mutable { on(x).fake_quant(y, x, h, z, s); }});
    if (b.on_gpu())
      all.push_back({"fake_quant to bf16" + of, 6 * n,
                     [=]() mutable { on(x).fake_quant(narrow, x, h, z, s); }});
    all.push_back({"fake_quant" + of + ", gradient of the scale", 8 * n,
                   [=]() mutable { on(x).fake_quant_vjp(none, ds, x, h, z, x, s); }});
    all.push_back({"fake_quant" + of + ", both gradients", 12 * n,
                   [=]() mutable { on(x).fake_quant_vjp(y, ds, x, h, z, x, s); }});
    all.push_back(
        {"quantize_codes" + of, 5 * n, [=]() mutable { on(x).quantize_codes(codes, x, h, z, s); }});
  }
}

int run(int argc, char** argv) {
  Bench b;
  std::string device = "auto";
  CLI::App app("Memory-bound kernels against a plain copy");
  app.add_option("--device", device, "auto, cpu or cuda");
  app.add_option("--seconds", b.seconds, "of measurement per kernel");
  app.add_option("--tokens", b.tokens, "rows of activations");
  app.add_option("--hidden", b.hidden);
  app.add_option("--ffn", b.ffn);
  app.add_option("--vocabulary", b.vocabulary);
  CLI11_PARSE(app, argc, argv);
  if (device != "cpu") {
    try {
      b.device = {DeviceType::CUDA, 0};
      b.full({1}, 0);
    } catch (const Error& e) {
      fmt::print("skipped: {}\n", e.what());
      return device == "auto" ? 0 : 1;
    }
  }
  nlohmann::json results;
  const Tensor source = b.rows(b.hidden, b.ffn);
  Tensor target = empty_like(source);
  const double copied = 2 * static_cast<double>(source.nbytes());
  const auto copy_rate = [&] { return copied / b.time([&] { on(source).copy(target, source); }); };
  fmt::print("plain copy: {:.0f} GB/s (bytes read and written)\n", 1e-9 * copy_rate());
  for (auto add : {add_scalar, add_layers, add_mlp, add_weights}) {
    Entries entries;  // of one kind at a time: memory
    add(b, entries);
    const double peak = copy_rate();
    for (const Entry& e : entries) {
      const double seconds = b.time(e.run), rate = e.bytes / seconds;
      fmt::print("{:48} {:9.1f} us {:8.1f} GB/s {:5.1f} % of copy\n", e.name, 1e6 * seconds,
                 1e-9 * rate, 100 * rate / peak);
      results.push_back({{"kernel", e.name},
                         {"us", 1e6 * seconds},
                         {"gb_per_s", 1e-9 * rate},
                         {"of_copy", rate / peak}});
    }
  }
  fmt::print("{}\n", nlohmann::json{{"device", to_string(b.device)}, {"kernels", results}}.dump());
  return 0;
}

}  // namespace
}  // namespace omq

int main(int argc, char** argv) {
  try {
    return omq::run(argc, argv);
  } catch (const omq::Error& e) {
    fmt::print(stderr, "omq-bench-device: {}\n", e.what());
    return 1;
  }
}
