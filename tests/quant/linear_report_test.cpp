// What the report says of matrices and transformations, against direct computations in double.
#include "quant/linear_report.h"

#include <doctest/doctest.h>

#include <cmath>
#include <numeric>

#include "autograd/ops.h"
#include "tests/quant/blocks.h"
#include "tests/support/close.h"
#include "tests/support/devices.h"

namespace omq::quant {
namespace {

constexpr int64_t kWindows = 3, kTokens = 10;

Options options(const QuantSpec& spec, int epochs) {
  Options o;
  o.spec = spec;
  o.epochs = epochs;
  return o;
}

nn::Positions at_start() { return nn::positions(0, kTokens, small_rope(kTokens)); }

// ‖x·Ŵᵀ − x·Wᵀ‖ / ‖x·Wᵀ‖, element by element.
double direct_error(const Tensor& x, const Tensor& rounded, const Tensor& exact) {
  const std::vector<double> v = values(x), a = values(rounded), b = values(exact);
  const auto rows = static_cast<size_t>(exact.dim(0)), cols = static_cast<size_t>(exact.dim(1));
  double difference = 0, power = 0;
  for (size_t t = 0; t < v.size(); t += cols)
    for (size_t r = 0; r < rows; ++r) {
      double ya = 0, yb = 0;
      for (size_t c = 0; c < cols; ++c) {
        ya += v[t + c] * a[r * cols + c];
        yb += v[t + c] * b[r * cols + c];
      }
      difference += (ya - yb) * (ya - yb);
      power += yb * yb;
    }
  return std::sqrt(difference / power);
}

// What every linear of the block is given.
std::vector<Tensor> inputs_of(const nn::Block& block, const Tensor& x) {
  NoGrad off;
  const auto watched = block.clone();
  const auto linears = watched->linears();
  std::vector<Tensor> inputs(linears.size());
  for (size_t i = 0; i < linears.size(); ++i)
    linears[i].linear->pre = [&input = inputs[i]](const Tensor& t) { return input = t; };
  watched->forward(x, at_start());
  return inputs;
}

int64_t total(const Histogram& h) {
  return std::accumulate(h.counts.begin(), h.counts.end(), int64_t{0});
}

struct Result {
  RandomSource source{1};
  KeptBlocks packed, simulated;
  BlockReport report;
  Tensor ids = random_windows(kWindows, kTokens);

  explicit Result(const Recipe& recipe, bool text = true) {
    report = quantize(source, packed, recipe, {text ? ids : Tensor{}}, {}, &simulated).front();
  }
};

TEST_CASE("linear report: errors of outputs are those of a direct computation") {
  for (const QuantSpec& spec : {QuantSpec{.wbits = 3, .group_size = 40}, QuantSpec{.wbits = 2}}) {
    CAPTURE(spec.to_string());
    Result learned(make_recipe("omniquant", options(spec, 4)));
    const Result nearest(make_recipe("rtn", options(spec, 0)));
    LlamaBlock fp = learned.source.blocks[0];
    const Tensor x = slice(learned.source.embed(learned.ids), 0, 0, 1);
    const auto inputs = inputs_of(fp, x);
    const auto exact = fp.linears();
    REQUIRE(learned.report.output_errors);
    REQUIRE(learned.report.linears.size() == exact.size());
    for (size_t i = 0; i < exact.size(); ++i) {
      const LinearReport &l = learned.report.linears[i], &n = nearest.report.linears[i];
      CAPTURE(l.name);
      CHECK(l.name == exact[i].name);
      const Tensor& w = exact[i].linear->dense();
      const auto stored = [&](const Result& r) {
        return nn::PackedIntWeight(packed_of(*r.packed.blocks[0]->linears()[i].linear))
            .dequantize();
      };
      CHECK(l.error == doctest::Approx(direct_error(inputs[i], stored(learned), w)).epsilon(1e-4));
      CHECK(l.error_nearest ==
            doctest::Approx(direct_error(inputs[i], stored(nearest), w)).epsilon(1e-4));
      CHECK(n.error == n.error_nearest);
      CHECK(n.error == l.error_nearest);
    }
  }
}

TEST_CASE("linear report: without text, errors of weights") {
  const Result r(make_recipe("rtn", options({.wbits = 3, .group_size = 32}, 0)), false);
  CHECK_FALSE(r.report.output_errors);
  LlamaBlock fp = r.source.blocks[0];
  const auto exact = fp.linears(), stored = r.simulated.blocks[0]->linears();
  REQUIRE(r.report.linears.size() == exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    const std::vector<double> a = values(stored[i].linear->dense()),
                              b = values(exact[i].linear->dense());
    double difference = 0, power = 0;
    for (size_t k = 0; k < a.size(); ++k) {
      difference += (a[k] - b[k]) * (a[k] - b[k]);
      power += b[k] * b[k];
    }
    CHECK(r.report.linears[i].error ==
          doctest::Approx(std::sqrt(difference / power)).epsilon(1e-5));
    CHECK(r.report.linears[i].error == r.report.linears[i].error_nearest);
    CHECK(r.report.linears[i].gamma.counts.empty());
  }
  CHECK(r.report.sites.empty());
}

TEST_CASE("linear report: a factor for each row and group, a scale for each channel") {
  QuantSpec spec{.wbits = 4, .abits = 8, .group_size = 32};
  const Result r(make_recipe("omniquant", options(spec, 2)));
  for (const LinearReport& l : r.report.linears) {
    CAPTURE(l.name);
    const auto linears = r.simulated.blocks[0]->linears();
    const auto it = std::find_if(linears.begin(), linears.end(),
                                 [&](const auto& n) { return n.name == l.name; });
    REQUIRE(it != linears.end());
    const int64_t factors = it->linear->out_features() * ((it->linear->in_features() + 31) / 32);
    for (const Histogram* h : {&l.gamma, &l.beta}) {
      CHECK(total(*h) == factors);
      CHECK(h->width == kFactorBin);
      CHECK(h->first >= 0);
      CHECK(h->first + static_cast<int64_t>(h->counts.size()) <= 256);
      CHECK(h->counts.front() > 0);
      CHECK(h->counts.back() > 0);
      CHECK(h->mean > h->width * static_cast<double>(h->first));
      CHECK(h->mean <
            h->width * (static_cast<double>(h->first) + static_cast<double>(h->counts.size())));
    }
  }
  struct Site {
    const char* name;
    int64_t scales, shifts;
  };
  const Site sites[] = {{"qkv", kHidden, kHidden},
                        {"out", kHidden / 2, kHidden / 2},
                        {"qkt", kHidden / 4, 0},
                        {"fc1", kHidden, kHidden}};
  REQUIRE(r.report.sites.size() == std::size(sites));
  for (const Site& s : sites) {
    CAPTURE(s.name);
    const auto it = std::find_if(r.report.sites.begin(), r.report.sites.end(),
                                 [&](const SiteReport& x) { return x.name == s.name; });
    REQUIRE(it != r.report.sites.end());
    CHECK(total(it->log2_scale) == s.scales);
    CHECK(total(it->shift) == s.shifts);
  }
}

TEST_CASE("linear report: a transformation is judged where it put the matrices") {
  // Eight bits a weight leave little error; had the transformed matrix been compared with the
  // untouched one, or been given the untouched inputs, the scales would show as errors of order 1.
  Options o = options({.wbits = 8}, 1);
  o.let = 1;
  o.let_shift = 1;
  for (const int abits : {16, 8}) {
    o.spec.abits = abits;
    const Result r(make_recipe("omniquant", o));
    for (const LinearReport& l : r.report.linears) {
      CAPTURE(l.name);
      CHECK(l.error > 0);
      CHECK(l.error < (abits == 8 ? 0.05 : 0.02));
    }
  }
  // Quantised activations count: with them the same weights are further off.
  o.spec = {.wbits = 8, .abits = 16};
  const Result plain(make_recipe("rtn", o));
  o.spec.abits = 4;
  const Result quantised(make_recipe("rtn", o));
  for (size_t i = 0; i < plain.report.linears.size(); ++i)
    CHECK(quantised.report.linears[i].error > 3 * plain.report.linears[i].error);
}

TEST_CASE("linear report: tensors on any device") {
  RandomSource source(1);
  const Tensor stream = slice(source.embed(random_windows(1, kTokens)), 0, 0, 1);
  const Recipe recipe = make_recipe("omniquant", options({.wbits = 3}, 1));
  BlockReport first;
  for (const Device d : test_devices()) {
    CAPTURE(d);
    NoGrad off;
    LlamaBlock fp = source.blocks[0];
    fp.visit([&](std::string_view, Tensor& t) { t = to(t, d); });
    nn::Positions at = at_start();
    at.index = to(at.index, d);
    at.tables.cos = to(at.tables.cos, d);
    at.tables.sin = to(at.tables.sin, d);
    const BlockMethod method(recipe, fp);
    BlockReport report;
    report_linears(recipe, method, fp, *method.quantized(fp), to(stream, d), at, report);
    if (first.linears.empty()) first = report;
    REQUIRE(report.linears.size() == 7);
    for (size_t i = 0; i < report.linears.size(); ++i) {
      CHECK(report.linears[i].error == doctest::Approx(first.linears[i].error).epsilon(1e-3));
      CHECK(report.linears[i].gamma.counts == first.linears[i].gamma.counts);
    }
  }
}

TEST_CASE("histogram: edges, a grid that is fixed, and widths that double") {
  const Histogram h = histogram({0.25, 0.4999, 0.5, -0.1, 1.3}, 0.25);
  CHECK(h.width == 0.25);
  CHECK(h.first == -1);
  CHECK(h.counts == std::vector<int64_t>{1, 0, 2, 1, 0, 0, 1});
  CHECK(h.mean == doctest::Approx(2.4499 / 5));
  const Histogram wide = histogram({0.25, 0.4999, 0.5, -0.1, 1.3}, 0.25, 4);
  CHECK(wide.width == 0.5);
  CHECK(wide.first == -1);
  CHECK(wide.counts == std::vector<int64_t>{1, 2, 1, 1});
  CHECK(histogram({7, 7}, 1, 1).counts == std::vector<int64_t>{2});
  CHECK(histogram({}, 1).counts.empty());
  CHECK_THROWS_WITH_AS(histogram({1, INFINITY}, 1), "histogram: a value is not finite", Error);
}

}  // namespace
}  // namespace omq::quant
