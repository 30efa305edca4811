// QuantSpec: the notation of the papers, read and written, and what it refuses.
#include "quant/spec.h"

#include <doctest/doctest.h>

#include <string>

#include "quant/recipe.h"

namespace omq::quant {
namespace {

std::string refused(std::string_view text) {
  try {
    QuantSpec::parse(text);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

TEST_CASE("spec: every setting is printed as it is read") {
  for (int bits = 2; bits <= 8; ++bits)
    for (const int64_t group : {0, 1, 40, 64, 128, 1 << 20})
      for (const bool symmetric : {false, true}) {
        const QuantSpec s{.wbits = bits, .group_size = group, .symmetric = symmetric};
        CAPTURE(s.to_string());
        const QuantSpec back = QuantSpec::parse(s.to_string());
        CHECK(back.wbits == bits);
        CHECK(back.abits == 16);
        CHECK(back.group_size == group);
        CHECK(back.symmetric == symmetric);
      }
  CHECK(QuantSpec{}.to_string() == "w4a16");
  CHECK(QuantSpec::parse("w3a16g64sym").to_string() == "w3a16g64sym");
  CHECK(QuantSpec::parse("w2a16g0").to_string() == "w2a16");
  const GroupSpec g = QuantSpec::parse("w3a16g64sym").weight();
  CHECK(g == GroupSpec{.bits = 3, .group_size = 64, .symmetric = true});
}

TEST_CASE("spec: what is not a setting says what one looks like") {
  for (const std::string text :
       {"", "w", "w4", "4a16", "w4a", "W4A16", "w4a16g", "w4a16 ", " w4a16", "w4a16g64x",
        "w4a16g64g64", "w4a16symg64", "w4a16symsym", "w4.5a16", "w+4a16",
        "w99999999999999999999a16", "w4a16g99999999999999999999"}) {
    CAPTURE(text);
    CHECK(refused(text) ==
          fmt::format("quantisation setting \"{}\": wanted something like w4a16 or "
                      "w3a16g64",
                      text));
  }
  CHECK(has(refused("w1a16"), "weights of 1 bits, 2 to 8 wanted"));
  CHECK(has(refused("w9a16"), "weights of 9 bits, 2 to 8 wanted"));
  CHECK(has(refused("w-4a16"), "weights of -4 bits, 2 to 8 wanted"));
  CHECK(has(refused("w4a17"), "activations of 17 bits, 2 to 8 or 16 wanted"));
  CHECK(has(refused("w4a1"), "activations of 1 bits, 2 to 8 or 16 wanted"));
  CHECK(has(refused("w4a12"), "activations of 12 bits, 2 to 8 or 16 wanted"));
  CHECK(has(refused("w4a16g-1"), "group size -1"));
  CHECK(has(refused("w4a16g1048577"), "group size 1048577"));
}

TEST_CASE("spec: fields that are set one by one are checked too") {
  const auto message = [](const QuantSpec& s) -> std::string {
    try {
      validate(s);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  CHECK(message({}) == "");
  CHECK(message({.wbits = 1}) == "wbits = 1: 2 to 8 are supported");
  CHECK(message({.wbits = 16}) == "wbits = 16: 2 to 8 are supported");
  CHECK(message({.abits = 8}) == "");
  CHECK(message({.abits = 9}) == "abits = 9: 2 to 8, or 16 for activations as they are");
  CHECK(message({.q_bits = 1}) == "q_bits = 1: 2 to 8, or 16 for activations as they are");
  CHECK(message({.k_bits = 17}) == "k_bits = 17: 2 to 8, or 16 for activations as they are");
  CHECK(message({.v_bits = 10}) == "v_bits = 10: 2 to 8, or 16 for activations as they are");
  CHECK(message({.p_bits = 0}) == "p_bits = 0: 2 to 8, or 16 for activations as they are");
  CHECK(has(message({.group_size = -5}), "group size -5"));
}

TEST_CASE("spec: activations, and bits of q, k, v and p of their own") {
  for (const int bits : {2, 4, 6, 8}) {
    const QuantSpec s = QuantSpec::parse(fmt::format("w4a{}g64sym", bits));
    CHECK(s.activations() == ActivationBits{bits, bits, bits, bits, 16});
    CHECK(s.to_string() == fmt::format("w4a{}g64sym", bits));
  }
  CHECK_FALSE(QuantSpec{}.activations().any());
  const QuantSpec s{.abits = 4, .q_bits = 16, .k_bits = 8, .v_bits = 4, .p_bits = 6};
  CHECK(s.activations() == ActivationBits{4, 16, 8, 4, 6});
  CHECK(s.to_string() == "w4a4-q16k8p6");
  CHECK(QuantSpec{.k_bits = 8}.activations().any());
  CHECK(QuantSpec{.k_bits = 8}.to_string() == "w4a16-k8");
}

TEST_CASE("recipes: the transformation comes with quantised activations, or when asked for") {
  const auto recipe = [](const char* setting, int let = -1, int shift = -1) {
    return make_recipe("omniquant",
                       {.spec = QuantSpec::parse(setting), .let = let, .let_shift = shift});
  };
  CHECK_FALSE(recipe("w4a16").let);
  CHECK(recipe("w4a16").transforms.empty());
  CHECK_FALSE(recipe("w4a4", 0).let);
  REQUIRE(recipe("w4a16", 1).let);
  CHECK_FALSE(recipe("w4a16", 1).let->shift);
  CHECK(recipe("w4a16", 1, 1).let->shift);
  CHECK_FALSE(recipe("w4a4", -1, 0).let->shift);
  CHECK(recipe("w4a4", -1, 1).let->shift);
  for (const std::string setting : {"w4a4", "w6a6", "w8a8", "w4a8"}) {
    CAPTURE(setting);
    const Recipe r = recipe(setting.c_str());
    REQUIRE(r.let);
    CHECK(r.let->shift == (setting != "w4a4"));
    CHECK(r.let->tied_pairs);
    CHECK(r.let->alpha == 0.5);
    CHECK(r.transforms.size() == 1);
    CHECK(r.train.lr.at("let") == (setting == "w4a4" ? 1e-3 : 5e-3));
    CHECK(r.train.epochs == 20);
  }
  CHECK(make_recipe("omniquant", {.spec = {}, .compute = Compute::BF16}).train.compute ==
        Compute::BF16);
  CHECK(
      make_recipe("omniquant", {.spec = {}, .let = 1, .let_lr = 1e-3, .alpha = 0.75}).let->alpha ==
      0.75);
  for (const char* method : {"omniquant", "signround"})
    CHECK(make_recipe(method, {.spec = {}, .let = 1, .let_lr = 1e-3}).train.lr.at("let") == 1e-3);
  for (const auto& [method, usual] :
       {std::pair("omniquant", 1e-2), {"flatquant", 5e-2}, {"signround", 1.0}}) {
    CAPTURE(method);
    CHECK(make_recipe(method, {.spec = {}}).train.lr.at("lwc") == usual);
    CHECK(make_recipe(method, {.spec = {}, .lwc_lr = 0.5}).train.lr.at("lwc") == 0.5);
  }
}

TEST_CASE("recipes: methods by name, settings of the papers as defaults") {
  REQUIRE(methods().size() >= 2);
  for (const MethodInfo& m : methods()) {
    CAPTURE(m.name);
    const Recipe r = make_recipe(m.name, {.spec = {.wbits = 3, .group_size = 64}});
    if (m.name != "best") CHECK(r.name == m.name);
    CHECK(r.spec.to_string() == "w3a16g64");
    CHECK(r.clip);
    CHECK(r.rounder);
    CHECK(r.objective.loss);
    CHECK_FALSE(m.summary.empty());
  }
  const auto omni = [](int bits, int epochs = -1, int aug = -1) {
    return make_recipe("omniquant", {.spec = {.wbits = bits}, .epochs = epochs, .aug_loss = aug});
  };
  CHECK(omni(4).train.epochs == 20);
  CHECK_FALSE(omni(4).augmented);
  CHECK(omni(2).train.epochs == 40);
  CHECK(omni(2).augmented);
  CHECK(omni(2).objective.wants_of_quant);
  CHECK(omni(2, 3, 0).train.epochs == 3);
  CHECK_FALSE(omni(2, 3, 0).objective.wants_of_quant);
  CHECK(omni(4, 0, 1).augmented);
  CHECK_FALSE(make_recipe("omniquant", {.spec = {.wbits = 4, .abits = 4}}).augmented);
  CHECK(omni(4).objective.weight == TokenWeight::InverseSize);
  CHECK(make_recipe("omniquant", {.spec = {}, .token_loss = 0}).objective.weight ==
        TokenWeight::Equal);
  CHECK(make_recipe("efficientqat", {}).objective.weight == TokenWeight::Equal);
  CHECK(make_recipe("efficientqat", {.spec = {}, .token_loss = 1}).objective.weight ==
        TokenWeight::InverseSize);
  CHECK(omni(4, 0).train.epochs == 0);
  CHECK(omni(4).train.lr.at("lwc") == 1e-2);
  CHECK(make_recipe("rtn", {}).train.epochs == 0);
  CHECK_THROWS_WITH_AS(
      make_recipe("awq", {}),
      doctest::Contains("unknown method \"awq\"; there are: omniquant, quarot, flatquant, rtn"),
      Error);
}

}  // namespace
}  // namespace omq::quant
