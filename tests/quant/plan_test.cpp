// The memory plan: what it counts, where samples go, and what it refuses.
#include "quant/plan.h"

#include <doctest/doctest.h>

#include "tests/support/devices.h"

namespace omq::quant {
namespace {

const PlanShapes kSevenB{.linears = {{4096, 4096},
                                     {4096, 4096},
                                     {4096, 4096},
                                     {4096, 4096},
                                     {11008, 4096},
                                     {11008, 4096},
                                     {4096, 11008}},
                         .hidden = 4096,
                         .windows = 128,
                         .tokens = 2048};

Recipe recipe_of(const char* setting, const char* method = "omniquant") {
  Options o;
  o.spec = QuantSpec::parse(setting);
  return make_recipe(method, o);
}

}  // namespace

TEST_CASE("plan: samples are streams of the hidden size, a block at least its weights twice") {
  const size_t stream = size_t{128} * 2048 * 4096 * 4, weights = size_t{202375168} * 4;
  const MemoryPlan w4 = plan_memory(recipe_of("w4a16g128"), kSevenB, {}, 0);
  CHECK(w4.samples == 3 * stream);
  CHECK(w4.block > 2 * weights);
  CHECK(w4.block < 5 * weights);
  CHECK(!w4.samples_on_host);
  CHECK(w4.on_device() == w4.block + w4.samples);
  // The augmented loss has a stream of its own; a transformation a third copy of the weights.
  CHECK(plan_memory(recipe_of("w2a16g128"), kSevenB, {}, 0).samples == 4 * stream);
  CHECK(plan_memory(recipe_of("w4a4"), kSevenB, {}, 0).block > w4.block + weights / 2);
  // Nothing is learned: no gradients.
  CHECK(plan_memory(recipe_of("w4a16g128", "rtn"), kSevenB, {}, 0).block < w4.block);
}

TEST_CASE("plan: what does not fit is refused before it is begun") {
  const Recipe recipe = recipe_of("w4a16g128");
  CHECK_THROWS_WITH_AS(plan_memory(recipe, kSevenB, {}, size_t{2} << 30),
                       doctest::Contains("GiB are needed"), Error);
  CHECK_NOTHROW(plan_memory(recipe, kSevenB, {}, size_t{40} << 30));
  for (Device d : test_devices()) {
    if (d.type == DeviceType::CPU) continue;
    const MemoryPlan p = plan_memory(recipe, kSevenB, d, size_t{8} << 30);
    CHECK(p.samples_on_host);
    CHECK(p.on_device() == p.block);
  }
}

TEST_CASE("devices: a memory limit is kept") {
  for (Device d : test_devices()) {
    if (d.type == DeviceType::CPU) continue;
    const DeviceApi& api = device_api(d);
    const size_t used = api.memory(d.index).now;
    api.set_memory_limit(used + (size_t{1} << 20), d.index);
    CHECK_THROWS_WITH_AS(Tensor::empty({1 << 20}, DType::F32, d),
                         doctest::Contains("the memory limit of"), Error);
    CHECK_NOTHROW(Tensor::empty({1 << 10}, DType::F32, d));
    api.set_memory_limit(SIZE_MAX, d.index);
    CHECK_NOTHROW(Tensor::empty({1 << 20}, DType::F32, d));
  }
}

}  // namespace omq::quant
