// Losses that are not finite: where the loop goes back to, at which rate, what it says, when it
// gives up; and that a restored block is the block that was saved.
#include "quant/recovery.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>

#include "autograd/ops.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

Recipe small_recipe(int epochs = 3) {
  Options o;
  o.spec = {.wbits = 3, .group_size = 32};
  o.epochs = epochs;
  o.token_loss = 0;  // failing() has a loss of its own
  return make_recipe("omniquant", o);
}

// The loss of the calls counted in `when` (from 1) is not a number.
Recipe failing(std::vector<int> when, std::shared_ptr<int> calls = std::make_shared<int>(0)) {
  Recipe r = small_recipe();
  r.objective.loss = [=](const Tensor& y, const Targets& t) {
    const Tensor loss = mse(y, t.of_fp);
    ++*calls;
    return std::find(when.begin(), when.end(), *calls) != when.end()
               ? loss * std::numeric_limits<double>::quiet_NaN()
               : loss;
  };
  return r;
}

struct Result {
  std::vector<BlockReport> reports;
  std::vector<std::string> notices;
  std::string error;
};

Result run(const Recipe& recipe, BlockStore* store = nullptr, nn::BlockSink* out = nullptr) {
  Result r;
  RandomSource source(2);
  KeptBlocks sink;
  Hooks hooks;
  hooks.notice = [&](const std::string& s) { r.notices.push_back(s); };
  hooks.store = store;
  try {
    r.reports =
        quantize(source, out ? *out : sink, recipe, {random_windows(2, 8)}, {}, nullptr, hooks);
  } catch (const Error& e) {
    r.error = e.what();
  }
  return r;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

}  // namespace

TEST_CASE("recovery: one bad loss costs an epoch, and halves the rates") {
  const Result plain = run(small_recipe());
  // Two windows an epoch: call 3 is the first step of epoch 2 of block 0.
  const Result r = run(failing({3}));
  REQUIRE(r.error.empty());
  const BlockReport& b = r.reports[0];
  REQUIRE(b.recoveries.size() == 1);
  CHECK(b.recoveries[0].epoch == 2);
  CHECK(b.recoveries[0].rate_factor == 0.5);
  CHECK(b.recoveries[0].tensor == "the loss itself");
  CHECK(r.reports[1].recoveries.empty());
  REQUIRE(b.epoch_loss.size() == 3);
  CHECK(b.epoch_loss[0] == plain.reports[0].epoch_loss[0]);
  for (const double loss : b.epoch_loss) CHECK(std::isfinite(loss));
  // Epoch 2 began where epoch 1 had ended: its first loss is that of the unbroken run, the rest is
  // learned more slowly.
  CHECK(b.epoch_loss[1] != plain.reports[0].epoch_loss[1]);
  CHECK(b.epoch_loss[1] < plain.reports[0].epoch_loss[0] * 1.01);
  REQUIRE(r.notices.size() == 1);
  CHECK(r.notices[0] ==
        "model.layers.0: epoch 2: the loss is not finite (the loss itself); back to the start of "
        "the epoch, learning rates times 0.5");
}

TEST_CASE("recovery: an error after three tries") {
  CHECK(run(failing({1, 2, 3})).error.empty());
  CHECK(run(failing({1, 2, 3})).reports[0].recoveries.back().rate_factor == 0.125);
  const Result r = run(failing({1, 2, 3, 4}));
  CHECK(r.error ==
        "while calibrating model.layers.0: epoch 1: the loss is not finite, after 3 tries at lower "
        "rates still; it begins in: the loss itself; lower the learning rate");
  CHECK(r.notices.size() == 3);
}

TEST_CASE("recovery: learnables that leave the numbers are named, also after the last step") {
  Recipe r = small_recipe();
  r.train.lr["lwc"] = std::nan("");
  const Result out = run(r);
  CHECK(has(out.error, "it begins in: learnable self_attn.q_proj.lwc.gamma_logit"));
  r.train.epochs = 1;
  r.train.batch_size = 2;  // a single step: no loss follows that would show it
  CHECK(has(run(r).error, "learnable self_attn.q_proj.lwc.gamma_logit"));
}

TEST_CASE("recovery: a number too large on the way is found where it arises") {
  Rng rng(4);
  LlamaBlock fp = random_block(rng);
  const nn::Positions at = nn::positions(0, 6, small_rope(6));
  const Tensor x = normal_tensor(rng, {1, 6, kHidden}, DType::F32);
  NoGrad off;
  const Targets good{fp.forward(x, at), {}};
  const auto culprit = [&](const nn::Block& quantized, const Tensor& input, const Targets& t) {
    return first_not_finite(fp, quantized, {}, input, t, at);
  };
  CHECK(culprit(fp, x, good).tensor == "the loss itself");
  LlamaBlock loud = fp;
  loud.mlp.gate_proj.weight = loud.mlp.gate_proj.dense() * 1e30;
  loud.mlp.up_proj.weight = loud.mlp.up_proj.dense() * 1e30;
  CHECK(culprit(loud, x, good).tensor == "input of mlp.down_proj");
  loud.mlp.up_proj.weight = Tensor::full({kFfn, kHidden}, 3e38);
  CHECK(culprit(loud, x, good).tensor == "output of mlp.up_proj");
  LlamaBlock broken = fp;
  broken.self_attn.o_proj.weight = fp.self_attn.o_proj.dense() * std::nan("");
  const Culprit c = culprit(broken, x, good);
  CHECK(c.tensor == "quantised self_attn.o_proj.weight");
  CHECK_FALSE(c.hopeless);

  const Tensor bad = x * std::numeric_limits<double>::infinity();
  CHECK(culprit(fp, bad, good).tensor == "the inputs of the block");
  CHECK(culprit(fp, bad, good).hopeless);
  CHECK(culprit(fp, x, {good.of_fp, bad}).tensor ==
        "the full-precision outputs on quantised inputs");
  const std::vector<Learnable> learnables{{"a", x}, {"b", bad}};
  CHECK(first_not_finite(fp, fp, learnables, x, good, at).tensor == "learnable b");
}

TEST_CASE("recovery: snapshots and assignment are in place") {
  const Tensor p = parameter(Tensor::from<float>({1, 2}, {2}));
  const std::vector<Learnable> learnables{{"p", p}};
  const Snapshot before(learnables);
  CHECK(assign(learnables, {{"p", Tensor::from<float>({3, 4}, {2})}}));
  CHECK(p.to_vector<float>() == std::vector<float>{3, 4});
  before.restore();
  CHECK(p.to_vector<float>() == std::vector<float>{1, 2});
  CHECK_FALSE(assign(learnables, {{"q", Tensor::from<float>({3, 4}, {2})}}));
  CHECK_FALSE(assign(learnables, {{"p", Tensor::from<float>({3}, {1})}}));
  CHECK_FALSE(assign(learnables, {}));
  CHECK(p.to_vector<float>() == std::vector<float>{1, 2});
}

// Finished blocks in memory.
struct MemoryStore final : BlockStore {
  std::map<int, FinishedBlock> blocks;
  std::map<int, std::vector<uint8_t>> packed;
  int saved = 0, loaded = 0;

  static std::vector<uint8_t> bytes(nn::Block& b) {
    std::vector<uint8_t> all;
    b.visit([&](std::string_view, Tensor& t) {
      const auto* p = static_cast<const uint8_t*>(t.raw());
      all.insert(all.end(), p, p + t.nbytes());
    });
    return all;
  }
  std::optional<FinishedBlock> load(int i) override {
    ++loaded;
    const auto it = blocks.find(i);
    return it == blocks.end() ? std::nullopt : std::optional(it->second);
  }
  void save(int i, const FinishedBlock& b, nn::Block& p) override {
    ++saved;
    FinishedBlock copy{b.report, {}};
    for (const Learnable& l : b.learnables)
      copy.learnables.push_back({l.name, converted(l.value.detach(), DType::F32)});
    blocks[i] = std::move(copy);
    packed[i] = bytes(p);
  }
  bool confirms(int i, nn::Block& p) override { return packed.at(i) == bytes(p); }
};

TEST_CASE("resume: restored blocks are the saved ones, and the rest learns as if never stopped") {
  const Recipe recipe = failing({3});  // the report of a recovery is kept as well
  MemoryStore all;
  KeptBlocks first;
  const Result whole = run(recipe, &all, &first);
  REQUIRE(all.saved == 2);
  for (const int kept : {0, 1, 2}) {
    CAPTURE(kept);
    MemoryStore store;
    for (int i = 0; i < kept; ++i) store.blocks[i] = all.blocks[i], store.packed[i] = all.packed[i];
    KeptBlocks again;
    auto calls = std::make_shared<int>(kept > 0 ? 3 : 0);  // the fault was in block 0
    const Result r = run(failing({3}, calls), &store, &again);
    REQUIRE(r.error.empty());
    CHECK(store.saved == 2 - kept);
    for (size_t i = 0; i < 2; ++i) {
      CHECK(r.reports[i].restored == (static_cast<int>(i) < kept));
      CHECK(r.reports[i].epoch_loss == whole.reports[i].epoch_loss);
      CHECK(r.reports[i].committed_loss == whole.reports[i].committed_loss);
      CHECK(r.reports[i].packed_error == whole.reports[i].packed_error);
      CHECK(r.reports[i].recoveries.size() == whole.reports[i].recoveries.size());
      CHECK(MemoryStore::bytes(*again.blocks[i]) == MemoryStore::bytes(*first.blocks[i]));
    }
  }
}

TEST_CASE("resume: a block that does not come out as it was is calibrated again") {
  const Recipe recipe = small_recipe();
  MemoryStore good;
  run(recipe, &good);
  struct Case {
    const char* name;
    std::function<void(MemoryStore&)> damage;
  };
  const Case cases[] = {{"bytes", [](MemoryStore& s) { s.packed[0][40] ^= 1; }},
                        {"name", [](MemoryStore& s) { s.blocks[0].learnables[1].name = "other"; }},
                        {"count", [](MemoryStore& s) { s.blocks[0].learnables.pop_back(); }}};
  for (const Case& c : cases) {
    CAPTURE(c.name);
    MemoryStore store = good;
    store.saved = store.loaded = 0;
    c.damage(store);
    const Result r = run(recipe, &store);
    CHECK(r.error.empty());
    REQUIRE(r.notices.size() == 1);
    CHECK(has(r.notices[0], "calibrated again"));
    CHECK(store.saved == 2);   // and what came after it
    CHECK(store.loaded == 1);  // was not even asked for
    CHECK(store.packed[0] == good.packed[0]);
  }
}

TEST_CASE("hooks: poll ends a run between steps") {
  RandomSource source(1);
  KeptBlocks sink;
  int polls = 0;
  struct Stop {};
  Hooks hooks;
  hooks.poll = [&] {
    if (++polls == 7) throw Stop{};
  };
  CHECK_THROWS_AS(
      quantize(source, sink, small_recipe(), {random_windows(2, 8)}, {}, nullptr, hooks), Stop);
  CHECK(sink.blocks.empty());
}

}  // namespace omq::quant
