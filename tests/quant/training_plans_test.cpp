// Plans beyond clipping: free weights and grids (efficientqat), gains of norms behind fixed codes
// (norm_tweaking), offsets by signs (signround). They learn, what they commit is what they learned,
// and a run that was cut short goes on with the same bytes.
#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/calibrate.h"
#include "quant/compose.h"
#include "quant/recovery.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

Options options(int bits, int epochs = -1) {
  Options o;
  o.spec = {.wbits = bits, .group_size = 32};
  o.epochs = epochs;
  return o;
}

struct Run {
  RandomSource source;
  KeptBlocks packed, simulated;
  std::vector<BlockReport> reports;
  explicit Run(const Recipe& recipe, Device device = {}, const Hooks& hooks = {}) : source(2) {
    reports =
        quantize(source, packed, recipe, {random_windows(8, 12), device}, {}, &simulated, hooks);
  }
  std::vector<uint8_t> bytes(size_t block) const {
    std::vector<uint8_t> all;
    packed.blocks[block]->visit([&](std::string_view, Tensor& t) {
      const auto* p = static_cast<const uint8_t*>(t.raw());
      all.insert(all.end(), p, p + t.nbytes());
    });
    return all;
  }
};

// On these small blocks with few windows higher rates show in few epochs what the plans are for.
Recipe quick(const char* method, int bits = 2, int epochs = 12) {
  Options o = options(bits, epochs);
  o.batch_size = 2;
  o.rates = {{"weights", 1e-3}, {"grid", 1e-3}, {"norms", 2e-3}};
  return make_recipe(method, o);
}

TEST_CASE("plans: each learns, and commits less error than what it starts from") {
  const std::pair<const char*, const char*> cases[] = {
      {"efficientqat", "rtn"}, {"signround", "rtn"}, {"norm-tweaking", "gptq"}, {"gptq", "rtn"}};
  for (const auto& [method, start] : cases) {
    CAPTURE(method);
    const Run learned(quick(method)), plain(quick(start));
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
  Options o = options(3, 6);
  const Run clipped(make_recipe("omniquant", o));
  o.line.round = "gptq";
  const Run solved(make_recipe("omniquant", o));
  CHECK(solved.reports[0].epoch_loss == clipped.reports[0].epoch_loss);
  CHECK(solved.reports[0].committed_loss < clipped.reports[0].committed_loss);
}

TEST_CASE("efficientqat: everything learns, and the loss of the last step is what is committed") {
  const Recipe recipe = quick("efficientqat");
  Rng rng(3);
  LlamaBlock fp = random_block(rng);
  const BlockMethod method(recipe, fp);
  std::map<std::string, int> groups;
  for (const nn::ParamGroup& g : method.param_groups())
    groups[g.name] += static_cast<int>(g.params.size());
  CHECK(groups == std::map<std::string, int>{{"weights", 7}, {"grid", 14}, {"norms", 2}});
  CHECK(method.learnables().front().name == "self_attn.q_proj.grid.step");
  CHECK(method.learnables().back().name == "post_attention_layernorm.norms.gain");

  // One step by hand moves all of them, and none of the block's own tensors.
  const nn::Positions at = nn::positions(0, 6, small_rope(6));
  const Tensor x = normal_tensor(rng, {1, 6, kHidden}, DType::F32);
  Targets target;
  {
    NoGrad off;
    target.of_fp = fp.forward(x, at, nullptr);
  }
  const Snapshot before(method.learnables());
  std::vector<std::vector<float>> then;
  for (const Learnable& l : method.learnables()) then.push_back(l.value.to_vector<float>());
  nn::AdamW optimizer(method.param_groups());
  optimizer.step(backward(recipe.objective.loss(method.quantized(fp)->forward(x, at), target)));
  size_t i = 0;
  for (const Learnable& l : method.learnables()) {
    CAPTURE(l.name);
    CHECK(l.value.to_vector<float>() != then[i++]);
  }
  Rng again(3);
  LlamaBlock same = random_block(again);
  CHECK(bit_equal(fp.mlp.up_proj.dense(), same.mlp.up_proj.dense()));
  CHECK(bit_equal(fp.input_layernorm.weight, same.input_layernorm.weight));

  // Trained and committed differ by the rounding of the scales alone.
  NoGrad off;
  const auto trained = method.quantized(fp);
  const auto committed = method.commit(fp);
  CHECK(close(committed.simulated->forward(x, at), trained->forward(x, at), 1e-2));
  CHECK(bit_equal(dynamic_cast<const LlamaBlock&>(*committed.packed).input_layernorm.weight,
                  dynamic_cast<const LlamaBlock&>(*trained).input_layernorm.weight));
}

TEST_CASE("norm tweaking: codes are gptq's, norms are not") {
  const Run tweaked(quick("norm-tweaking")), solved(quick("gptq"));
  const auto a = tweaked.packed.blocks[0]->linears(), b = solved.packed.blocks[0]->linears();
  for (size_t i = 0; i < a.size(); ++i)
    CHECK(bit_equal(packed_of(*a[i].linear).data, packed_of(*b[i].linear).data));
  const auto norm = [](const KeptBlocks& k) {
    return dynamic_cast<const WatchedBlock&>(*k.blocks[0]).inner.post_attention_layernorm.weight;
  };
  CHECK_FALSE(bit_equal(norm(tweaked.packed), norm(solved.packed)));
  CHECK(bit_equal(norm(tweaked.packed), norm(tweaked.simulated)));
}

TEST_CASE("norm tweaking: the loss is that of channel means and variances") {
  const Tensor y = Tensor::from<float>({1, 2, 3, 4, 5, 9}, {1, 3, 2}),
               t = Tensor::from<float>({0, 2, 0, 2, 3, 2}, {1, 3, 2});
  // Means 3, 5 and 1, 2; variances 8/3, 26/3 and 2, 0.
  const double want = (2 + 8.0 / 3 - 2 + 3 + 26.0 / 3) / 2;
  const Tensor loss = channel_statistics().loss(y, {t, {}});
  CHECK(loss.item<float>() == doctest::Approx(want).epsilon(1e-6));
}

TEST_CASE("norm tweaking: deeper blocks learn faster") {
  Recipe r = quick("norm-tweaking", 2, 1);
  r.train.batch_size = 8;  // one step, which moves every gain by its rate
  r.train.lr["norms"] = 1e-2;
  r.train.depth_slope = 3;
  const Run run(r), plain(quick("gptq"));
  for (const size_t i : {0, 1}) {
    const auto norm = [&](const KeptBlocks& k) {
      return dynamic_cast<const WatchedBlock&>(*k.blocks[i]).inner.input_layernorm.weight;
    };
    const std::vector<double> share = values(norm(run.packed) / norm(plain.packed));
    for (const double s : share)
      CHECK(std::abs(s - 1) == doctest::Approx(i == 0 ? 0.01 : 0.025).epsilon(1e-2));
  }
}

TEST_CASE("signround: an offset moves by half a step at most") {
  const Recipe recipe = quick("signround", 3, 5);
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

TEST_CASE("plans: the epoch with the smallest loss is kept") {
  Recipe r = quick("efficientqat", 2, 4);
  const auto calls = std::make_shared<int>(0);
  r.objective.loss = [calls](const Tensor& y, const Targets& t) {
    const int epoch = (*calls)++ / 4 % 4;  // 8 windows by twos, 4 epochs a block
    return mse(y, t.of_fp) * (epoch >= 2 ? 100.0 : 1.0);
  };
  const Run kept(r);
  for (const BlockReport& b : kept.reports) {
    CHECK(b.epoch_loss.size() == 4);
    CHECK((b.kept_epoch == 1 || b.kept_epoch == 2));
  }
  r.train.keep_best = false;
  *calls = 0;
  const Run last(r);
  CHECK(last.reports[0].kept_epoch == 0);
  CHECK(last.reports[0].epoch_loss == kept.reports[0].epoch_loss);
  CHECK(kept.bytes(0) != last.bytes(0));
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
    const Recipe r = quick(method, 3, 2);
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
    const Recipe r = quick(method, 4, 3);
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

TEST_CASE("plans: a rate that is missing is named") {
  Rng rng(6);
  LlamaBlock fp = random_block(rng);
  Recipe r = quick("efficientqat");
  r.train.lr.erase("grid");
  const BlockMethod method(r, fp);
  CHECK_THROWS_WITH_AS(method.param_groups(),
                       doctest::Contains("recipe efficientqat: no learning rate for \"grid\""),
                       Error);
}

}  // namespace
}  // namespace omq::quant
