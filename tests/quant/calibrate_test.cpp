// The block loop: it learns, its two streams are the right ones, it repeats to the last bit, and it
// fails with a message that says where.
#include "quant/calibrate.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/ops.h"
#include "tensor/parallel.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

constexpr int64_t kWindows = 6, kTokens = 12;

Options options(int bits, int epochs, int64_t group = 0) {
  Options o;
  o.spec = {.wbits = bits, .group_size = group};
  o.epochs = epochs;
  return o;
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

// Quantises random blocks and keeps everything.
struct Run {
  RandomSource source;
  KeptBlocks packed, simulated;
  std::vector<BlockReport> reports;

  Run(const Recipe& recipe, const Tensor& ids, int blocks = 2, const Progress& progress = {})
      : source(blocks) {
    reports = quantize(source, packed, recipe, {ids}, progress, &simulated);
  }
};

Tensor run_block(const nn::Block& block, const Tensor& stream) {
  NoGrad off;
  const nn::Positions at = nn::positions(0, stream.dim(1), small_rope(stream.dim(1)));
  Tensor out = empty_like(stream);
  for (int64_t i = 0; i < stream.dim(0); ++i) {
    Tensor window = slice(out, 0, i, i + 1);
    on(out).copy(window, block.forward(slice(stream, 0, i, i + 1), at));
  }
  return out;
}

TEST_CASE("calibration: what is learned beats round-to-nearest in every block") {
  const Tensor ids = random_windows(kWindows, kTokens);
  for (const Options& o : {options(3, 8), options(2, 8, 32)}) {
    CAPTURE(o.spec.to_string());
    const Run learned(make_recipe("omniquant", o), ids), nearest(make_recipe("rtn", o), ids);
    for (size_t i = 0; i < 2; ++i) {
      const BlockReport &l = learned.reports[i], &n = nearest.reports[i];
      CHECK(l.committed_loss < n.committed_loss);
      REQUIRE(l.epoch_loss.size() == 8);
      CHECK(l.epoch_loss.back() < l.epoch_loss.front());
      CHECK(n.epoch_loss.empty());
      CHECK(l.target_mean_square == n.target_mean_square);  // full precision knows of no method
      CHECK(l.packed_error < 1e-4);
      CHECK(l.name == fmt::format("model.layers.{}", i));
      CHECK(l.index == static_cast<int>(i));
      CHECK(l.seconds > 0);
      CHECK(l.peak_bytes > 0);
    }
  }
}

TEST_CASE("calibration: the streams are those of the full-precision and of the committed blocks") {
  const Tensor ids = random_windows(kWindows, kTokens);
  Run r(make_recipe("omniquant", options(3, 2)), ids);
  Tensor fp = r.source.embed(ids), quant = fp;
  for (size_t i = 0; i < 2; ++i) {
    // Its inputs as the block saw them: targets, then two epochs, then (behind two passes for the
    // report) the committed blocks.
    Seen seen = *r.source.seen[i];
    REQUIRE(seen.size() == 4 * kWindows + 3);
    seen.erase(seen.begin() + 3 * kWindows, seen.begin() + 3 * kWindows + 2);
    for (int64_t w = 0; w < kWindows; ++w) {
      const Tensor x = contiguous(slice(fp, 0, w, w + 1)),
                   xq = contiguous(slice(quant, 0, w, w + 1));
      CHECK(bit_equal(seen[static_cast<size_t>(w)], x));
      for (int64_t pass = 1; pass <= 3; ++pass)
        CHECK(bit_equal(seen[static_cast<size_t>(pass * kWindows + w)], xq));
    }
    fp = run_block(r.source.blocks[i], fp);
    quant = run_block(*r.simulated.blocks[i], quant);
    CHECK(r.reports[i].committed_loss ==
          doctest::Approx(static_cast<double>(mse(quant, fp).item<float>())).epsilon(1e-6));
    CHECK(r.reports[i].target_mean_square ==
          doctest::Approx(static_cast<double>(mean(square(fp)).item<float>())).epsilon(1e-6));
  }
}

TEST_CASE("calibration: the simulated blocks are the packed ones") {
  Run r(make_recipe("omniquant", options(4, 1, 40)), random_windows(2, 5));
  for (size_t i = 0; i < 2; ++i) {
    const auto dense = r.simulated.blocks[i]->linears(), packed = r.packed.blocks[i]->linears();
    for (size_t j = 0; j < dense.size(); ++j)
      CHECK(bit_equal(nn::PackedIntWeight(packed_of(*packed[j].linear)).dequantize(),
                      dense[j].linear->dense()));
  }
}

TEST_CASE("calibration: one or two threads, the same bits") {
  const Tensor ids = random_windows(3, kTokens);
  const int before = num_threads();
  for (const int bits : {2, 4}) {
    set_num_threads(1);
    Run one(make_recipe("omniquant", options(bits, 3, 32)), ids);
    set_num_threads(2);
    Run two(make_recipe("omniquant", options(bits, 3, 32)), ids);
    Run again(make_recipe("omniquant", options(bits, 3, 32)), ids);
    set_num_threads(before);
    for (size_t i = 0; i < 2; ++i) {
      CHECK(one.reports[i].epoch_loss == two.reports[i].epoch_loss);
      CHECK(two.reports[i].epoch_loss == again.reports[i].epoch_loss);
      const auto a = one.packed.blocks[i]->linears(), b = two.packed.blocks[i]->linears();
      for (size_t j = 0; j < a.size(); ++j)
        CHECK(bit_equal(packed_of(*a[j].linear).data, packed_of(*b[j].linear).data));
    }
  }
}

TEST_CASE("calibration: the augmented loss adds the block on its quantised inputs") {
  const Tensor ids = random_windows(1, kTokens);
  for (const double weight : {0.0, 1.0, 0.25}) {
    CAPTURE(weight);
    const bool augmented = weight > 0;
    Options o = options(3, 1);
    o.aug_loss = augmented;
    o.token_loss = 0;
    if (augmented) o.aug_weight = weight;
    const Recipe recipe = make_recipe("omniquant", o);
    Run r(recipe, ids);
    // One window, one epoch: the loss of the epoch is the loss of the first step.
    Tensor fp = r.source.embed(ids), quant = fp;
    const nn::Positions at = nn::positions(0, kTokens, small_rope(kTokens));
    for (size_t i = 0; i < 2; ++i) {
      LlamaBlock& block = r.source.blocks[i];
      NoGrad off;
      const Tensor target = run_block(block, fp), of_quant = run_block(block, quant);
      const Tensor y = BlockMethod(recipe, block).quantized(block)->forward(quant, at);
      double want = static_cast<double>(mse(y, target).item<float>());
      if (augmented) want += weight * static_cast<double>(mse(y, of_quant).item<float>());
      CHECK(r.reports[i].epoch_loss.at(0) == doctest::Approx(want).epsilon(1e-5));
      if (i == 1) CHECK_FALSE(bit_equal(target, of_quant));  // in block 0 both terms are the same
      fp = target;
      quant = run_block(*r.simulated.blocks[i], quant);
    }
  }
}

TEST_CASE("calibration: a searched start sees what the transformed matrices are multiplied with") {
  const Tensor ids = random_windows(2, kTokens);
  Options o = options(3, 0, 16);
  o.let = 1;
  o.let_shift = 1;
  o.spec.abits = 8;
  o.clip_search = true;
  const Recipe recipe = make_recipe("omniquant", o);
  Run r(recipe, ids, 1);
  LlamaBlock& block = r.source.blocks[0];
  const nn::Positions at = nn::positions(0, kTokens, small_rope(kTokens));
  NoGrad off;
  const Tensor all = r.source.embed(ids), window = slice(all, 0, 0, 1);
  const auto watched = block.clone();
  StatsCollector collector(*watched);
  run_block(*watched, all);
  const BlockMethod method(recipe, block, collector.take());
  const auto transformed = method.transformed(block);
  const std::vector<Tensor> inputs = linear_inputs(*transformed, window, at);
  method.start(block, window, at);
  const auto linears = transformed->linears();
  const auto learnables = method.learnables();
  for (size_t i = 0; i < linears.size(); ++i) {
    CAPTURE(linears[i].name);
    const Tensor w = linears[i].linear->dense();
    const auto clip = learned_clip(w, recipe.spec.weight(), {.search = true});
    clip->start(w, reshape(inputs[i], {-1, w.dim(1)}));
    const auto found = std::find_if(learnables.begin(), learnables.end(), [&](const Learnable& l) {
      return l.name == linears[i].name + ".lwc.gamma_logit";
    });
    REQUIRE(found != learnables.end());
    CHECK(bit_equal(found->value, clip->params().params[0]));
    CHECK_FALSE(bit_equal(found->value, Tensor::full(found->value.shape(), 4)));
  }
  // And that is what the run committed.
  const BlockMethod::Committed committed = method.commit(block);
  const auto got = r.packed.blocks[0]->linears(), want = committed.packed->linears();
  for (size_t i = 0; i < got.size(); ++i)
    CHECK(bit_equal(packed_of(*got[i].linear).data, packed_of(*want[i].linear).data));

  RandomSource source(1);
  KeptBlocks sink;
  CHECK(has(message_of([&] { quantize(source, sink, recipe, {}); }), "needs calibration text"));
}

TEST_CASE("calibration: batches take several windows, the remainder is left out") {
  const Tensor ids = random_windows(5, kTokens);
  Options o = options(3, 1);
  o.batch_size = 2;
  o.lwc_lr = 1e-30;  // nothing moves, so that the losses are those of the start
  o.token_loss = 0;
  const Recipe recipe = make_recipe("omniquant", o);
  Run r(recipe, ids, 1);
  LlamaBlock& block = r.source.blocks[0];
  const Tensor x = r.source.embed(ids);
  const nn::Positions at = nn::positions(0, kTokens, small_rope(kTokens));
  NoGrad off;
  const auto start = BlockMethod(recipe, block).quantized(block);
  const Tensor four = contiguous(slice(x, 0, 0, 4));
  const double want =
      static_cast<double>(mse(start->forward(four, at), run_block(block, four)).item<float>());
  CHECK(r.reports[0].epoch_loss.at(0) == doctest::Approx(want).epsilon(1e-5));

  o.batch_size = 6;
  CHECK(has(message_of([&] { Run(make_recipe("omniquant", o), ids); }),
            "5 calibration windows, a step takes 6"));
}

TEST_CASE("calibration: progress after every epoch, and once when a block is done") {
  std::vector<std::string> calls;
  Run r(make_recipe("omniquant", options(4, 2)), random_windows(2, 4), 2,
        [&](const BlockReport& b, int epoch, int epochs) {
          calls.push_back(fmt::format("{}:{}/{}:{}", b.index, epoch, epochs, b.epoch_loss.size()));
        });
  CHECK(calls == std::vector<std::string>{"0:1/2:1", "0:2/2:2", "0:-1/2:2", "1:1/2:1", "1:2/2:2",
                                          "1:-1/2:2"});
}

TEST_CASE("calibration: round-to-nearest needs no text, and text does not change it") {
  const Recipe rtn = make_recipe("rtn", options(3, -1));
  Run blind(rtn, {}), seeing(rtn, random_windows(2, 4));
  CHECK(blind.source.seen[0]->empty());  // no block was run
  CHECK(blind.reports[1].committed_loss == 0);
  CHECK(seeing.reports[1].committed_loss > 0);
  for (size_t i = 0; i < 2; ++i) {
    const auto a = blind.packed.blocks[i]->linears(), b = seeing.packed.blocks[i]->linears();
    for (size_t j = 0; j < a.size(); ++j)
      CHECK(bit_equal(packed_of(*a[j].linear).data, packed_of(*b[j].linear).data));
  }
  CHECK(message_of([] { Run(make_recipe("omniquant", options(4, 1)), {}); }) ==
        "method omniquant: learning needs calibration text");
}

TEST_CASE("calibration: a number that is none is an error that says where") {
  const Tensor ids = random_windows(2, 4);
  const auto spoilt = [&](float value, const char* method) {
    RandomSource source(2);
    KeptBlocks sink;
    Tensor w = converted(source.blocks[1].mlp.up_proj.dense(), DType::F32);
    w.data<float>()[77] = value;
    source.blocks[1].mlp.up_proj.weight = w;
    return message_of([&] { quantize(source, sink, make_recipe(method, options(4, 2)), {ids}); });
  };
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    CAPTURE(value);
    CHECK(has(spoilt(value, "omniquant"),
              "calibrating model.layers.1: epoch 1: the loss is not finite"));
    const std::string message = spoilt(value, "rtn");
    CAPTURE(message);
    CHECK(has(message, "calibrating model.layers.1: "));
    CHECK(has(message, "mlp.up_proj"));
  }
  // Weights that are fine, and outputs that overflow.
  RandomSource loud(1);
  KeptBlocks sink;
  loud.blocks[0].mlp.down_proj.weight = loud.blocks[0].mlp.down_proj.dense() * 1e30;
  loud.blocks[0].mlp.up_proj.weight = loud.blocks[0].mlp.up_proj.dense() * 1e30;
  const std::string message =
      message_of([&] { quantize(loud, sink, make_recipe("rtn", options(8, 0)), {ids}); });
  CAPTURE(message);
  CHECK(has(message, "calibrating model.layers.0: "));
  CHECK(has(message, "not finite"));
}

TEST_CASE("calibration: factors that leave the numbers are an error that says what to do") {
  const auto message = [](int64_t windows) {
    Options o = options(4, 1);
    o.lwc_lr = std::nan("");
    return message_of([&] { Run(make_recipe("omniquant", o), random_windows(windows, 4)); });
  };
  for (const int64_t windows : {2, 1})  // with one, no loss follows the step that would show it
    CHECK(message(windows) ==
          "while calibrating model.layers.0: epoch 1: the loss is not finite, after 3 tries at "
          "lower rates still; it begins in: learnable self_attn.q_proj.lwc.gamma_logit; lower the "
          "learning rate");
}

TEST_CASE("calibration: a rate far too high stays within numbers") {
  Options o = options(4, 3);
  o.lwc_lr = 1e30;
  const Run r(make_recipe("omniquant", o), random_windows(2, 4));
  CHECK(std::isfinite(r.reports[1].committed_loss));
}

// A transform with one learnable: the norm's output times s, its consumers' columns divided by s.
struct Rescale final : Transform {
  Tensor s = parameter(Tensor::full({1}, 1.5));
  void apply(nn::Block& b) const override {
    const auto site = std::get<nn::NormToLinears>(b.sites().at(0));
    site.norm->weight = site.norm->weight * s;
    for (nn::Linear* l : site.consumers) l->weight = l->dense() / s;
  }
  nn::ParamGroup params() const override { return {.name = "rescale", .params = {s}}; }
};

TEST_CASE("calibration: transforms learn with the clips and are folded before codes are chosen") {
  Recipe recipe = make_recipe("omniquant", options(3, 2));
  std::vector<Tensor> learned;
  recipe.transforms.push_back([&](nn::Block&, const BlockStats&) {
    auto t = std::make_unique<Rescale>();
    learned.push_back(t->s);
    return t;
  });
  const Tensor ids = random_windows(2, 4);
  CHECK(has(message_of([&] { Run(recipe, ids); }),
            "recipe omniquant: no learning rate for \"rescale\""));
  recipe.train.lr["rescale"] = 1e-2;
  learned.clear();
  Run r(recipe, ids, 1);
  REQUIRE(learned.size() == 1);
  const float s = learned[0].item<float>();
  CHECK(s != 1.5f);  // it moved
  const auto& norm = dynamic_cast<WatchedBlock&>(*r.packed.blocks[0]).inner.input_layernorm.weight;
  CHECK(close(norm, r.source.blocks[0].input_layernorm.weight * static_cast<double>(s), 1e-13));
  const Tensor q =
      nn::PackedIntWeight(packed_of(*r.packed.blocks[0]->linears()[0].linear)).dequantize();
  CHECK(close(q * static_cast<double>(s), r.source.blocks[0].self_attn.q_proj.dense(), 0.1));
}

}  // namespace
}  // namespace omq::quant
