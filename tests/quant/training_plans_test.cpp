// Plans beyond clipping, side by side: each learns, what it commits is packed as simulated, a run
// that was cut short goes on with the same bytes, and devices agree.
#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "tests/quant/runs.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

TEST_CASE("plans: each learns, and commits less error than what it starts from") {
  const std::pair<const char*, const char*> cases[] = {
      {"efficientqat", "rtn"}, {"signround", "rtn"}, {"norm-tweaking", "gptq"}, {"gptq", "rtn"}};
  for (const auto& [method, start] : cases) {
    CAPTURE(method);
    const Run learned(quick_recipe(method)), plain(quick_recipe(start));
    for (size_t i = 0; i < 2; ++i) {
      CAPTURE(i);
      const BlockReport& r = learned.reports[i];
      if (!r.epoch_loss.empty()) CHECK(r.epoch_loss.back() < r.epoch_loss.front());
      if (std::string(method) != "norm-tweaking")
        CHECK(r.committed_loss < plain.reports[i].committed_loss);
      CHECK(r.packed_error < 1e-4);
      const auto dense = learned.simulated.blocks[i]->linears(),
                 packed = learned.packed.blocks[i]->linears();
      for (size_t j = 0; j < dense.size(); ++j)
        CHECK(bit_equal(nn::PackedIntWeight(packed_of(*packed[j].linear)).dequantize(),
                        dense[j].linear->dense()));
    }
  }
}

TEST_CASE("plans: solving after clipping was learned beats clipping alone") {
  Options o;
  o.spec = {.wbits = 3, .group_size = 32};
  o.epochs = 6;
  const Run clipped(make_recipe("omniquant", o));
  o.line.round = "gptq";
  const Run solved(make_recipe("omniquant", o));
  CHECK(solved.reports[0].epoch_loss == clipped.reports[0].epoch_loss);
  CHECK(solved.reports[0].committed_loss < clipped.reports[0].committed_loss);
}

TEST_CASE("plans: a run that was cut short goes on with the same bytes") {
  struct Store final : BlockStore {
    std::map<int, FinishedBlock> blocks;
    int confirmed = 0;
    std::optional<FinishedBlock> load(int i) override {
      return blocks.contains(i) ? std::optional(blocks[i]) : std::nullopt;
    }
    void save(int i, const FinishedBlock& b, nn::Block&) override {
      FinishedBlock copy{b.report, {}};
      for (const Learnable& l : b.learnables)
        copy.learnables.push_back({l.name, converted(l.value.detach(), DType::F32)});
      blocks[i] = std::move(copy);
    }
    bool confirms(int, nn::Block&) override { return ++confirmed > 0; }
  };
  for (const char* method : {"efficientqat", "norm-tweaking", "signround", "gptq"}) {
    CAPTURE(method);
    const Recipe r = quick_recipe(method, 3, 2);
    Store store;
    const Run whole(r, {}, {{}, {}, &store});
    store.blocks.erase(1);
    const Run again(r, {}, {{}, {}, &store});
    CHECK(store.confirmed == 1);
    CHECK(again.reports[0].restored);
    CHECK_FALSE(again.reports[1].restored);
    for (const size_t i : {0, 1}) CHECK(again.bytes(i) == whole.bytes(i));
  }
}

TEST_CASE("plans: on every device, near what the CPU learns") {
  for (const char* method : {"efficientqat", "norm-tweaking", "signround", "gptq"}) {
    CAPTURE(method);
    const Recipe r = quick_recipe(method, 4, 3);
    const Run cpu(r);
    for (Device d : test_devices()) {
      CAPTURE(d);
      const Run there(r, d);
      const double bound = d.type == DeviceType::CPU ? 0 : 0.1;
      for (size_t i = 0; i < 2; ++i) {
        CHECK(std::abs(there.reports[i].committed_loss / cpu.reports[i].committed_loss - 1) <=
              bound);
        CHECK(there.reports[i].packed_error < 1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace omq::quant
