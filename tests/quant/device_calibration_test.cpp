// Calibration on every device present against the CPU: the same losses on the way, and codes that
// are chosen on the CPU from what was learned.
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "quant/learn.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

struct Run {
  std::vector<BlockReport> reports;
  KeptBlocks packed;
};

Run calibrated(const Recipe& recipe, Device device, bool samples_on_host) {
  Run r;
  PlainSource source;
  r.reports = quantize(source, r.packed, recipe,
                       {random_windows(all_or_few(4, 3), 16), device, samples_on_host});
  return r;
}

// The largest relative difference of losses on the way and of committed blocks.
double distance(const Run& a, const Run& b) {
  double worst = 0;
  for (size_t i = 0; i < b.reports.size(); ++i) {
    const BlockReport &x = a.reports[i], &y = b.reports[i];
    for (size_t e = 0; e < y.epoch_loss.size(); ++e)
      worst = std::max(worst, std::abs(x.epoch_loss[e] / y.epoch_loss[e] - 1));
    worst = std::max(worst, std::abs(x.committed_loss / y.committed_loss - 1));
  }
  return worst;
}

Recipe recipe_of(const char* setting, bool official_loss = false) {
  Options o;
  o.spec = QuantSpec::parse(setting);
  o.epochs = static_cast<int>(all_or_few(4, 1));
  if (official_loss) o.aug_loss = o.spec.abits <= 4, o.token_loss = 0;
  return make_recipe("omniquant", o);
}

}  // namespace

TEST_CASE("devices: calibration learns what the CPU learns") {
  // Rounding is chaotic: sums in another order move a code here and there, and where codes are few
  // a whole trajectory. So the CPU is first held against itself, learning at rates that differ by a
  // millionth; a device may differ by a few times as much. The kernels are held to rounding in
  // tests/tensor; this holds the loop.
  for (const std::string setting : {"w3a16g32", "w2a16", "w4a4", "w8a8"}) {
    SUBCASE(setting.c_str()) {
      const Recipe recipe = recipe_of(setting.c_str());
      const Run cpu = calibrated(recipe, {}, false);
      double spread = 0.01;
      for (const double factor : {1 - 1e-6, 1 + 1e-6, 1 + 2e-6}) {
        Recipe other = recipe;
        for (auto& [name, rate] : other.train.lr) rate *= factor;
        spread = std::max(spread, distance(calibrated(other, {}, false), cpu));
      }
      CAPTURE(spread);
      CHECK(spread < 0.3);
      for (Device d : test_devices())
        for (const bool samples_on_host : {false, true}) {
          CAPTURE(setting);
          CAPTURE(d);
          CAPTURE(samples_on_host);
          const Run there = calibrated(recipe, d, samples_on_host);
          CHECK(distance(there, cpu) <= (d.type == DeviceType::CPU ? 0 : 4 * spread));
          for (size_t i = 0; i < there.reports.size(); ++i) {
            CHECK(there.reports[i].packed_error < 1e-4);
            for (const auto& [name, linear] : there.packed.blocks[i]->linears())
              CHECK(packed_of(*linear).data.device() == Device{});
          }
        }
    }
  }
}

TEST_CASE("devices: products in 16 bits learn nearly the same") {
  for (const std::string setting : {"w3a16g32", "w4a4"}) {
    SUBCASE(setting.c_str()) {
      const Run exact = calibrated(recipe_of(setting.c_str(), true), {}, false);
      for (Device d : test_devices())
        for (const Compute c : {Compute::BF16, Compute::F16}) {
          if (d.type == DeviceType::CPU) continue;
          CAPTURE(setting);
          CAPTURE(compute_name(c));
          Recipe recipe = recipe_of(setting.c_str(), true);
          recipe.train.compute = c;
          const Run there = calibrated(recipe, d, true);
          CHECK(distance(there, exact) < 0.2);
          const auto &first = there.reports[0].epoch_loss, &want = exact.reports[0].epoch_loss;
          CHECK((first.back() < first.front()) == (want.back() < want.front()));  // it does learn
        }
    }
  }
}

TEST_CASE("a mean's loss is scaled for F16 alone, by powers of two") {
  CHECK(loss_scale(Compute::F32, 1 << 20) == 1);
  CHECK(loss_scale(Compute::BF16, 1 << 20) == 1);
  CHECK(loss_scale(Compute::F16, 1 << 20) == 1 << 14);
  CHECK(loss_scale(Compute::F16, (1 << 20) + 7) == 1 << 14);
}

TEST_CASE("narrow_exact keeps every value, and narrows only where it can") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    Rng rng(3);
    const auto matrix = [&](DType through) {
      return converted(converted(normal_tensor(rng, {8, 8}), through), DType::F32, d);
    };
    LlamaBlock b;
    b.self_attn.q_proj.weight = matrix(DType::BF16);
    b.self_attn.k_proj.weight = matrix(DType::F16);
    b.self_attn.v_proj.weight = matrix(DType::F32);
    b.self_attn.o_proj.weight = converted(matrix(DType::BF16), DType::F16);  // is narrow already
    b.mlp.gate_proj.weight = b.mlp.up_proj.weight = b.mlp.down_proj.weight =
        Tensor::full({8, 8}, 1e-30, DType::F32, d);  // F16 has no such number, BF16 only near it
    LlamaBlock narrow = b;
    nn::narrow_exact(narrow);
    CHECK(narrow.self_attn.q_proj.dense().dtype() == DType::BF16);
    CHECK(narrow.self_attn.k_proj.dense().dtype() == DType::F16);
    CHECK(narrow.self_attn.v_proj.dense().dtype() == DType::F32);
    CHECK(narrow.self_attn.o_proj.dense().dtype() == DType::F16);
    CHECK(narrow.mlp.up_proj.dense().dtype() == DType::F32);
    const auto was = b.linears(), is = narrow.linears();
    for (size_t i = 0; i < was.size(); ++i)
      CHECK(
          bit_equal(to(was[i].linear->dense(), DType::F32), to(is[i].linear->dense(), DType::F32)));
  }
}

TEST_CASE("devices: a loss that is no number changes nothing, and is found") {
  for (Device d : test_devices()) {
    CAPTURE(d);
    Recipe recipe = recipe_of("w4a16");
    recipe.train.lr["lwc"] = std::nan("");
    try {
      calibrated(recipe, d, false);
      FAIL("no error");
    } catch (const Error& e) {
      CHECK(std::string(e.what()).find("learnable self_attn.q_proj.lwc.gamma_logit") !=
            std::string::npos);
    }
  }
}

}  // namespace omq::quant
