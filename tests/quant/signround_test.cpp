// SignRound: offsets before rounding, moved by signs.
#include <doctest/doctest.h>

#include <cmath>
#include <optional>

#include "tests/quant/runs.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

TEST_CASE("signround: an offset moves by half a step at most") {
  const Recipe recipe = quick_recipe("signround", 3, 5);
  std::vector<Learnable> learned;
  struct Store final : BlockStore {
    std::vector<Learnable>* into;
    std::optional<FinishedBlock> load(int) override { return std::nullopt; }
    void save(int, const FinishedBlock& b, nn::Block&) override { *into = b.learnables; }
    bool confirms(int, nn::Block&) override { return false; }
  } store;
  store.into = &learned;
  const Run run(recipe, {}, {{}, {}, &store});
  int moved = 0;
  for (const Learnable& l : learned)
    for (const double v : values(l.value)) {
      if (!l.name.ends_with("rounding.offset")) continue;
      CHECK(std::abs(v) <= 0.5 + 0.5 / 20 + 1e-6);  // Σ (1 − t/20)/20 over 20 steps
      moved += v != 0;
    }
  CHECK(moved > 1000);
}

}  // namespace
}  // namespace omq::quant
