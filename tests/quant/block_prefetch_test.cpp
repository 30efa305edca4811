// Reading ahead gives the same blocks, and errors where they belong.
#include "quant/block_prefetch.h"

#include <doctest/doctest.h>

#include <atomic>

#include "tests/quant/blocks.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

struct CountedSource final : nn::BlockSource {
  PlainSource plain;
  int broken = -1;
  std::atomic<int> loads{0}, inside{0};
  std::atomic<bool> overlapped{false};

  int size() const override { return plain.size(); }
  std::unique_ptr<nn::Block> load(int i) override {
    ++loads;
    if (++inside > 1) overlapped = true;
    auto block = plain.load(i);
    --inside;
    check(i != broken, "block {} cannot be read", i);
    return block;
  }
  std::string name(int i) const override { return plain.name(i); }
  Tensor embed(const Tensor& ids) override { return plain.embed(ids); }
  nn::RopeTables rope(int64_t positions) override { return plain.rope(positions); }
};

const Tensor& first_weight(nn::Block& b) { return b.linears().front().linear->dense(); }

}  // namespace

TEST_CASE("blocks read ahead are the blocks, in any order and no more of them") {
  CountedSource source;
  const std::vector<Tensor> want{first_weight(*source.plain.load(0)),
                                 first_weight(*source.plain.load(1))};
  {
    PrefetchedSource ahead(source);
    REQUIRE(ahead.size() == 2);
    CHECK(ahead.name(1) == source.name(1));
    for (const int i : {0, 1, 0, 0, 1}) {
      CAPTURE(i);
      CHECK(bit_equal(first_weight(*ahead.load(i)), want[static_cast<size_t>(i)]));
    }
    // 0; 1 was on its way; 0 again, with 1 behind it; 0 again, with 1 again; 1 was on its way.
    CHECK(source.loads == 6);
    CHECK(ahead.rope(4).cos.dim(0) == 4);
  }
  CHECK_FALSE(source.overlapped);
}

TEST_CASE("a block that cannot be read is an error when it is asked for") {
  CountedSource source;
  source.broken = 1;
  PrefetchedSource ahead(source);
  CHECK(ahead.load(0) != nullptr);
  CHECK_THROWS_WITH_AS(ahead.load(1), "block 1 cannot be read", Error);
  CHECK_THROWS_WITH_AS(ahead.load(1), "block 1 cannot be read", Error);
}

TEST_CASE("a run over blocks read ahead ends as one over blocks read in turn") {
  Options o;
  o.spec.wbits = 4, o.spec.group_size = 16, o.epochs = 1;
  const Recipe recipe = make_recipe("omniquant", o);
  const auto run = [&](nn::BlockSource& source) {
    KeptBlocks kept;
    quantize(source, kept, recipe, {random_windows(2, 8)});
    std::vector<std::vector<uint8_t>> bytes;
    for (const auto& block : kept.blocks)
      for (const auto& [name, linear] : block->linears())
        bytes.push_back(packed_of(*linear).data.to_vector<uint8_t>());
    return bytes;
  };
  PlainSource plain;
  const auto want = run(plain);
  PrefetchedSource ahead(plain);
  CHECK(run(ahead) == want);
}

}  // namespace omq::quant
