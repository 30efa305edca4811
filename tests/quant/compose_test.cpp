// A method is a name for a line of pieces; pieces given win; what cannot work together says so.
#include "quant/compose.h"

#include <doctest/doctest.h>

#include "nn/packed_weight.h"
#include "quant/calibrate.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

Options with(Line line, const char* setting = "w4a16") {
  Options o;
  o.spec = QuantSpec::parse(setting);
  o.line = std::move(line);
  return o;
}

std::string refused(const char* method, Line line) {
  try {
    make_recipe(method, with(std::move(line)));
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("compose: every method is a line") {
  const std::pair<const char*, const char*> lines[] = {
      {"omniquant", "--transform none --clip lwc --round nearest --train clip"},
      {"rtn", "--transform none --clip minmax --round nearest --train none"},
      {"quarot", "--transform none --clip mse --round nearest --train none"},
      {"flatquant", "--transform kronecker --clip lwc --round nearest --train clip"},
      {"gptq", "--transform none --clip minmax --round gptq --train none"},
      {"efficientqat", "--transform none --clip free --round nearest --train weights"},
      {"norm-tweaking", "--transform none --clip minmax --round gptq --train norms"},
      {"signround", "--transform none --clip scaled --round learned --train clip"},
  };
  CHECK(methods().size() == std::size(lines) + 1);  // and best
  for (const auto& [method, line] : lines) {
    const Recipe r = make_recipe(method, {});
    CHECK(r.line.to_string() == line);
    CHECK(r.title == method);
    CHECK(r.train.batch_size >= 1);
  }
  CHECK(make_recipe("omniquant", with({}, "w4a4")).line.transform == "let");
  CHECK(make_recipe("gptq", with({}, "w4a4")).line.transform == "none");
  CHECK(norm_tweaking({}).name == make_recipe("norm_tweaking", {}).name);  // either spelling
}

TEST_CASE("compose: best is one of the others, by bits") {
  const auto name = [](const char* bits) { return make_recipe("best", with({}, bits)).title; };
  CHECK(name("w2a16g64") == "efficientqat");
  CHECK(name("w3a16") == "efficientqat");
  CHECK(name("w4a16g128") == "omniquant");
  CHECK(name("w4a4") == "flatquant");
  CHECK(name("w6a6") == "quarot --round gptq");
  CHECK(make_recipe("best", with({}, "w6a6")).rotation->norms);
  CHECK(make_recipe("best", with({"", "mse", "nearest", ""}, "w6a6")).title == "quarot");
  Options cache = with({}, "w2a16g64");
  cache.spec.k_bits = cache.spec.v_bits = 4;  // inputs of matrices stay as they are
  CHECK(make_recipe("best", cache).title == "efficientqat");
}

TEST_CASE("compose: pieces that are given win, and bring their plan") {
  const Recipe lwc = make_recipe("gptq", with({"", "lwc", "", "clip"}));
  CHECK(lwc.title == "gptq --clip lwc --train clip");
  CHECK(lwc.train.epochs == 20);
  CHECK(lwc.rounder->wants_hessian());
  // The same recipe from the other side.
  const Recipe solved = make_recipe("omniquant", with({"", "", "gptq", ""}));
  CHECK(solved.title == "omniquant --round gptq");
  CHECK(solved.line == lwc.line);

  const Recipe smooth = make_recipe("rtn", with({"let", "", "", ""}));
  CHECK(smooth.let);
  CHECK(smooth.train.epochs == 0);
  CHECK(smooth.needs_text());  // for the transformation's start
  Options o = with({});
  o.let = 1;
  CHECK(make_recipe("rtn", o).line == smooth.line);

  const Recipe both = make_recipe("efficientqat", with({"let", "lwc", "", ""}, "w2a16"));
  CHECK(both.train.weights);
  CHECK(both.train.lr.at("weights") == 2e-4);
  CHECK(make_recipe("efficientqat", with({}, "w3a16")).train.lr.at("weights") == 1e-4);
  CHECK_FALSE(make_recipe("efficientqat", with({}, "w2a16")).augmented);
  CHECK(make_recipe("omniquant", with({}, "w2a16")).augmented);

  o = with({});
  o.rates = {{"weights", 3e-4}};
  o.epochs = 7;
  o.batch_size = 3;
  const Recipe r = make_recipe("efficientqat", o);
  CHECK(r.train.lr.at("weights") == 3e-4);
  CHECK(r.train.lr.at("grid") == 5e-4);
  CHECK(r.train.epochs == 7);
  CHECK(r.train.batch_size == 3);
}

TEST_CASE("compose: what is unknown or cannot work is one clear sentence") {
  CHECK(refused("rtn", {"rotor", "", "", ""}) ==
        "--transform rotor: there are: none, let, kronecker");
  CHECK(refused("rtn", {"", "max", "", ""}) ==
        "--clip max: there are: minmax, mse, lwc, scaled, free");
  CHECK(refused("rtn", {"", "", "up", ""}) == "--round up: there are: nearest, gptq, learned");
  CHECK(refused("rtn", {"", "", "", "all"}) ==
        "--train all: there are: none, clip, weights, norms");
  CHECK(refused("rtn", {"", "lwc", "", ""}) ==
        "--clip lwc: it is learned, but method rtn has --train none; add --train clip");
  CHECK(refused("omniquant", {"", "", "", "norms"}) ==
        "--clip lwc: it is learned, but method omniquant has --train norms; add --train clip");
  CHECK(refused("gptq", {"", "", "learned", ""}) ==
        "--round learned: offsets learn with --train clip, not with --train none");
  CHECK(refused("signround", {"", "", "", "weights"}) ==
        "--round learned: offsets learn with --train clip, not with --train weights; weights that "
        "learn round themselves");
  CHECK(refused("gptq", {"", "", "", "clip"}) ==
        "--train clip: --transform none --clip minmax --round gptq have nothing to learn");
  Options o = with({"", "free", "", "weights"});
  o.spec.symmetric = o.spec.official_symmetric = true;
  CHECK_THROWS_WITH_AS(make_recipe("rtn", o),
                       doctest::Contains("--clip free: the official symmetric grid"), Error);
}

TEST_CASE("compose: every line that is accepted quantises a block, packed as simulated") {
  const Tensor ids = random_windows(2, 6);
  int accepted = 0;
  for (const char* transform : {"none", "let", "kronecker"})
    for (const char* clip : {"minmax", "lwc", "scaled", "free"})
      for (const char* round : {"nearest", "gptq", "learned"})
        for (const char* train : {"none", "clip", "weights", "norms"}) {
          Options o = with({transform, clip, round, train}, "w3a16g32");
          o.epochs = 1;
          o.batch_size = 1;
          Recipe recipe;
          try {
            recipe = make_recipe("rtn", o);
          } catch (const Error&) {
            continue;
          }
          CAPTURE(recipe.line.to_string());
          ++accepted;
          RandomSource source(1);
          KeptBlocks packed, simulated;
          const auto reports = quantize(source, packed, recipe, {ids}, {}, &simulated);
          CHECK(reports[0].packed_error < 1e-4);
          CHECK(reports[0].epoch_loss.size() == (std::string(train) == "none" ? 0 : 1));
          const auto dense = simulated.blocks[0]->linears(), codes = packed.blocks[0]->linears();
          for (size_t i = 0; i < dense.size(); ++i)
            CHECK(bit_equal(nn::PackedIntWeight(packed_of(*codes[i].linear)).dequantize(),
                            dense[i].linear->dense()));
        }
  CHECK(accepted == 68);
}

}  // namespace
}  // namespace omq::quant
