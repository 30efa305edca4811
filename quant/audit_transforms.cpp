// Transforms leave the output of a block as it is (audit.h).
#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "quant/audit_parts.h"

namespace omq::quant::detail {

Worst worst_token(const Tensor& a, const Tensor& y, const Tensor& x) {
  const std::vector<double> va = doubles(a), vy = doubles(y), vx = doubles(x);
  const auto d = static_cast<size_t>(x.dim(-1));
  Worst worst;
  for (size_t t = 0; t < va.size(); t += d) {
    double change = 0, update = 0;
    for (size_t i = t; i < t + d; ++i) {
      change += (va[i] - vy[i]) * (va[i] - vy[i]);
      update += (vy[i] - vx[i]) * (vy[i] - vx[i]);
    }
    const double error = std::sqrt(change / std::max(update, 1e-60));
    if (!(error <= worst.error)) worst = {error, static_cast<int64_t>(t / d)};
  }
  return worst;
}

namespace {

// "qkv" of "qkv_scale": learnables of one site share what stands before the last '_'.
std::string site_of(const std::string& learnable) {
  return learnable.substr(0, learnable.rfind('_'));
}

struct Sites {
  std::vector<std::string> names;  // each once; the last, empty, stands for all together
  explicit Sites(const nn::ParamGroup& g) {
    for (const std::string& learnable : g.names) {
      const std::string site = site_of(learnable);
      if (std::find(names.begin(), names.end(), site) == names.end()) names.push_back(site);
    }
    names.emplace_back();
  }
};

}  // namespace

void audit_transforms(const Subject& s, const Found& found) {
  NoGrad off;
  if (s.recipe.transforms.empty()) return;
  const bool wide = s.recipe.rotation || s.recipe.kronecker;
  const WideBlock w = wide ? in_f64(s.fp, s.in) : WideBlock{s.fp.clone(), s.in.x, s.in.at};
  const Tensor y = w.block->forward(w.x, w.at);
  Random random(s.options.seed);
  for (const auto& make : s.recipe.transforms) {
    const auto t = make(*w.block, s.stats);
    const nn::ParamGroup g = t->params();
    std::vector<std::vector<double>> start;
    for (const Tensor& p : g.params) start.push_back(doubles(p));
    for (const std::string& site : Sites(g).names)
      attempt(
          {site.empty() ? "equivalence of all sites" : "equivalence of " + site,
           fmt::format("output with quantisers off, {}{} tokens", wide ? "F64, " : "", w.x.dim(1)),
           1e-5},
          found, [&](AuditCheck& c) {
            for (size_t i = 0; i < g.params.size(); ++i) {
              const Kind kind = kind_of(g.names.at(i));
              fill(g.params[i], start[i]);
              if (site.empty() || site_of(g.names[i]) == site)
                randomise(g.params[i], kind, s.size, random);
              else if (kind != Kind::Other)  // a scale of 1, a shift of 0
                fill(g.params[i], std::vector<double>(start[i].size(), kind == Kind::Scale));
            }
            const auto b = w.block->clone();
            t->project();
            t->apply(*b);
            const Worst at = worst_token(b->forward(w.x, w.at), y, w.x);
            worse(c, at.error, fmt::format("token {}", at.token));
          });
  }
}

}  // namespace omq::quant::detail
