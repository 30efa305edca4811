// Calibration on every device present against the CPU: the same losses on the way, and codes that
// are chosen on the CPU from what was learned.
#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

// RandomSource with plain blocks: what watches its inputs cannot be recorded.
struct PlainSource final : nn::BlockSource {
  RandomSource random{2};
  int size() const override { return random.size(); }
  std::unique_ptr<nn::Block> load(int i) override {
    return random.blocks[static_cast<size_t>(i)].clone();
  }
  std::string name(int i) const override { return random.name(i); }
  Tensor embed(const Tensor& ids) override { return random.embed(ids); }
  nn::RopeTables rope(int64_t positions) override { return random.rope(positions); }
};

struct Run {
  std::vector<BlockReport> reports;
  KeptBlocks packed;
};

Run calibrated(const Recipe& recipe, Device device, bool samples_on_host) {
  Run r;
  PlainSource source;
  r.reports = quantize(source, r.packed, recipe, {random_windows(4, 16), device, samples_on_host});
  return r;
}

Recipe recipe_of(const char* setting) {
  Options o;
  o.spec = QuantSpec::parse(setting);
  o.epochs = 4;
  return make_recipe("omniquant", o);
}

}  // namespace

TEST_CASE("devices: calibration learns what the CPU learns") {
  // Rounding is chaotic: sums in another order move a code here and there, and where codes are few
  // a whole trajectory. The kernels are held to rounding in tests/tensor; this holds the loop.
  struct Case {
    std::string setting;
    double bound;
  };
  for (const auto& [setting, bound_there] :
       {Case{"w3a16g32", 0.03}, Case{"w2a16", 0.15}, Case{"w4a4", 0.15}, Case{"w8a8", 0.03}}) {
    const Recipe recipe = recipe_of(setting.c_str());
    const Run cpu = calibrated(recipe, {}, false);
    for (Device d : test_devices())
      for (const bool samples_on_host : {false, true}) {
        CAPTURE(setting);
        CAPTURE(d);
        CAPTURE(samples_on_host);
        const Run there = calibrated(recipe, d, samples_on_host);
        const double bound = d.type == DeviceType::CPU ? 0 : bound_there;
        for (size_t i = 0; i < cpu.reports.size(); ++i) {
          CAPTURE(i);
          for (size_t e = 0; e < cpu.reports[i].epoch_loss.size(); ++e)
            CHECK(std::abs(there.reports[i].epoch_loss[e] / cpu.reports[i].epoch_loss[e] - 1) <=
                  bound);
          CHECK(std::abs(there.reports[i].committed_loss / cpu.reports[i].committed_loss - 1) <=
                bound);
          CHECK(there.reports[i].packed_error < 1e-4);
          for (const auto& [name, linear] : there.packed.blocks[i]->linears())
            CHECK(packed_of(*linear).data.device() == Device{});
        }
      }
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
