// See linear_report.h.
#include "quant/linear_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "autograd/ops.h"

namespace omq::quant {
namespace {

double relative_error(const Tensor& got, const Tensor& wanted) {
  const auto difference = static_cast<double>(sum(square(got - wanted)).item<float>());
  const auto power = static_cast<double>(sum(square(wanted)).item<float>());
  return std::sqrt(difference / std::max(power, 1e-30));
}

// What round-to-nearest would store, on w's own device: fake_quant on the stored grid is the packed
// matrix bit for bit.
Tensor nearest(const Tensor& w, const QuantSpec& q) {
  const GroupSpec spec = q.weight();
  const Grid grid = rtn({.spec = q}).clip(w, spec)->grid(w);
  return fake_quant(w, to(to(grid.scale, DType::F16), DType::F32), grid.zero, spec);
}

// Error of `exact` with the weight `rounded` and the activation quantiser of `quantised`; of the
// weight where there is no input.
double error_of(const nn::Linear& exact, const Tensor& rounded, const nn::Linear& quantised,
                const Tensor& input) {
  if (!input.defined()) return relative_error(rounded, exact.dense());
  nn::Linear a = exact.product(), b = a;
  a.input_quant = {};
  b.input_quant = quantised.input_quant;
  b.weight = rounded;
  return relative_error(b(input), a(input));
}

// Calls see(i, input) for every linear of the block as it runs on x with no quantiser anywhere;
// without an input when there is no x.
void watch(const nn::Block& block, const Tensor& x, const nn::Positions& at,
           const std::function<void(size_t, const Tensor&)>& see) {
  const auto watched = block.clone();
  nn::quantize_activations(*watched, {});
  const auto linears = watched->linears();
  for (size_t i = 0; i < linears.size(); ++i)
    if (x.defined())
      linears[i].linear->pre = [&see, i](const Tensor& input) {
        see(i, input);
        return input;
      };
    else
      see(i, {});
  if (x.defined()) watched->forward(x, at);
}

std::vector<double> doubles(const Tensor& t) {
  return to(to(contiguous(t.detach()), Device{}), DType::F64).to_vector<double>();
}

// "OWNER.GROUP.NAME" of a learnable.
struct Parts {
  std::string owner, name;
};
Parts parts_of(const Learnable& l) {
  const size_t last = l.name.rfind('.'), group = l.name.rfind('.', last - 1);
  return {l.name.substr(0, group), l.name.substr(last + 1)};
}

SiteReport& site_named(const std::string& name, std::vector<SiteReport>& sites) {
  const auto it = std::find_if(sites.begin(), sites.end(), [&](auto& s) { return s.name == name; });
  if (it != sites.end()) return *it;
  sites.push_back({.name = name, .log2_scale = {}, .shift = {}});
  return sites.back();
}

// γ = σ(u) and β = σ(l) of the linear's clip; log₂|s| and δ of a transformation's site.
void describe(const Learnable& l, BlockReport& report) {
  const Parts parts = parts_of(l);
  const auto before = [&](const char* suffix) {
    return parts.name.ends_with(suffix) ? parts.name.substr(0, parts.name.rfind(suffix)) : "";
  };
  if (parts.name == "gamma_logit" || parts.name == "beta_logit") {
    std::vector<double> v = doubles(l.value);
    for (double& u : v) u = std::min(1 / (1 + std::exp(-u)), 1 - 1e-12);  // within the last bin
    for (LinearReport& linear : report.linears)
      if (linear.name == parts.owner)
        (parts.name == "gamma_logit" ? linear.gamma : linear.beta) = histogram(v, kFactorBin);
  } else if (const std::string site = before("_scale"); !site.empty()) {
    std::vector<double> v = doubles(l.value);
    for (double& s : v) s = std::log2(std::max(std::abs(s), 1e-30));
    site_named(site, report.sites).log2_scale = histogram(v, kScaleBin);
  } else if (const std::string shifted = before("_shift"); !shifted.empty()) {
    site_named(shifted, report.sites).shift = histogram(doubles(l.value), 1.0 / 1024, 64);
  }
}

}  // namespace

Histogram histogram(const std::vector<double>& values, double width, int64_t most) {
  Histogram h{.width = width, .counts = {}};
  if (values.empty()) return h;
  const auto [least, largest] = std::minmax_element(values.begin(), values.end());
  h.mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  check(std::isfinite(h.mean), "histogram: a value is not finite");
  const auto bin = [&h](double v) { return std::floor(v / h.width); };
  const auto fits = [&] {  // the second: so that bins stay exact numbers
    return bin(*largest) - bin(*least) < static_cast<double>(most) &&
           std::max(std::abs(bin(*least)), std::abs(bin(*largest))) < (1 << 29);
  };
  while (!fits()) h.width *= 2;
  h.first = static_cast<int64_t>(bin(*least));
  h.counts.resize(static_cast<size_t>(bin(*largest) - bin(*least)) + 1);
  for (const double v : values) ++h.counts[static_cast<size_t>(bin(v) - bin(*least))];
  return h;
}

void report_linears(const Recipe& recipe, const BlockMethod& method, const nn::Block& fp,
                    const nn::Block& simulated, const Tensor& x, const nn::Positions& at,
                    BlockReport& report) {
  NoGrad off;
  const auto untouched = fp.clone(), committed = simulated.clone();
  const auto transformed = method.transformed(fp);
  const Device device = x.defined() ? x.device() : Device{};
  for (nn::Block* block : {untouched.get(), committed.get(), transformed.get()})
    nn::move_to(*block, device);
  const auto exact = untouched->linears(), moved = transformed->linears(),
             stored = committed->linears();
  report.linears.clear();
  report.sites.clear();
  report.output_errors = x.defined();
  for (const auto& [name, linear] : exact)
    report.linears.push_back({.name = name, .gamma = {}, .beta = {}});
  const auto before = [&](size_t i, const Tensor& input) {
    const nn::Linear& l = *exact[i].linear;
    report.linears[i].error_nearest =
        error_of(l, nearest(l.dense(), recipe.spec), *stored[i].linear, input);
  };
  const auto after = [&](size_t i, const Tensor& input) {
    report.linears[i].error =
        error_of(*moved[i].linear, stored[i].linear->dense(), *stored[i].linear, input);
  };
  watch(*untouched, x, at, before);
  watch(*transformed, x, at, after);
  for (const Learnable& l : method.learnables()) describe(l, report);
}

}  // namespace omq::quant
