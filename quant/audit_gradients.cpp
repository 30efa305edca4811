// Gradients of a block's loss in everything that is learned (audit.h).
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "autograd/backward.h"
#include "autograd/frozen.h"
#include "autograd/ops.h"
#include "quant/audit_parts.h"
#include "quant/calibrate.h"

namespace omq::quant::detail {
namespace {

// x in F64, every element off by half of F32's last place, up or down.
Tensor nudged(const Tensor& x, Random& random) {
  std::vector<double> v = doubles(x);
  for (double& e : v) e *= 1 + random.sign() * 0x1p-24;
  return Tensor::from<double>(v, x.shape());
}

// The loss of one block as a function of its learnables, in one float type. With `nudge`, F64, of a
// block and inputs that are off by what rounding to F32 does.
class BlockLoss {
 public:
  BlockLoss(const Subject& s, const Tensor& x, const Tensor& x_quant, DType type,
            Random* nudge = nullptr)
      : recipe_(s.recipe), fp_(s.fp.clone()) {
    NoGrad off;
    const auto in_type = [&](const Tensor& t) { return nudge ? nudged(t, *nudge) : to(t, type); };
    fp_->visit([&](std::string_view, Tensor& t) { t = in_type(t); });
    x_ = in_type(x_quant);
    at_ = {slice(s.in.at.index, 0, 0, x.dim(1)),
           {to(s.in.at.tables.cos, type), to(s.in.at.tables.sin, type)}};
    targets_.of_fp = fp_->forward(in_type(x), at_);
    if (recipe_.objective.wants_of_quant) targets_.of_quant = fp_->forward(x_, at_);
    method_ = std::make_unique<BlockMethod>(recipe_, *fp_, s.stats);
  }
  Tensor operator()() const {
    return recipe_.objective.loss(method_->quantized(*fp_)->forward(x_, at_), targets_);
  }
  std::vector<Learnable> learnables() const { return method_->learnables(); }

 private:
  const Recipe& recipe_;
  std::unique_ptr<nn::Block> fp_;
  std::unique_ptr<BlockMethod> method_;
  Tensor x_;
  Targets targets_;
  nn::Positions at_;
};

using Gradient = std::vector<double>;  // of one learnable

std::vector<Gradient> gradients(const Tensor& loss, const std::vector<Learnable>& learnables) {
  const Gradients g = backward(loss);
  std::vector<Gradient> all;
  for (const Learnable& l : learnables)
    all.push_back(g.contains(l.value) ? doubles(g[l.value])
                                      : Gradient(static_cast<size_t>(l.value.numel())));
  return all;
}

// (L(θ + εv) − L(θ − εv)) / 2ε of the frozen loss, v being a change of one F64 learnable.
double quotient(const BlockLoss& loss, FrozenRounding& frozen, const Tensor& p,
                const std::vector<double>& v, double step) {
  NoGrad off;
  const std::vector<double> kept = doubles(p);
  double value[2];
  for (const int side : {0, 1}) {
    std::vector<double> moved = kept;
    for (size_t i = 0; i < v.size(); ++i) moved[i] += (side ? step : -step) * v[i];
    fill(p, moved);
    const auto scope = frozen.replay();
    value[side] = loss().item<double>();
  }
  fill(p, kept);
  return (value[1] - value[0]) / (2 * step);
}

// How far the gradient g is from the quotient along v, as a share of the whole gradient. A step may
// jump over a kink (another element becomes the largest of its group), so smaller ones are tried
// before a difference counts: a wrong gradient is wrong at every step.
double along(const BlockLoss& loss, FrozenRounding& frozen, const Tensor& p, const Gradient& g,
             const std::vector<double>& v, double scale, double bound) {
  double want = 0, least = INFINITY;
  for (size_t i = 0; i < v.size(); ++i) want += g[i] * v[i];
  for (const double step : {1e-4, 1e-3, 1e-5, 1e-6, 1e-7}) {
    least = std::min(least, std::abs(quotient(loss, frozen, p, v, step) - want) / scale);
    if (least <= bound) break;
  }
  return least;
}

// Directions that test a gradient: all entries at once, each with a random sign; the entry where
// the gradient is largest; and further ones at random. All of them when there are few.
std::vector<std::vector<double>> directions(const Gradient& g, int entries, Random& random) {
  const size_t n = g.size();
  std::vector<std::vector<double>> all(1, std::vector<double>(n));
  for (double& x : all[0]) x = random.sign();
  const auto only = [&](size_t i) {
    all.emplace_back(n);
    all.back()[i] = 1;
  };
  size_t largest = 0;
  for (size_t i = 0; i < n; ++i)
    if (std::abs(g[i]) > std::abs(g[largest])) largest = i;
  if (n <= static_cast<size_t>(8 * entries)) {
    for (size_t i = 0; i < n; ++i) only(i);
  } else if (entries > 0) {
    only(largest);
    for (int k = 1; k < entries; ++k) only(random.below(n));
  }
  return all;
}

// "self_attn.q_proj.lwc.gamma_logit" → "lwc.gamma_logit"
std::string short_name(const std::string& learnable) {
  const size_t last = learnable.rfind('.');
  return learnable.substr(learnable.rfind('.', last - 1) + 1);
}

// "lwc"
std::string group_of(const std::string& learnable) {
  const std::string name = short_name(learnable);
  return name.substr(0, name.find('.'));
}

struct Family {
  std::string name;
  std::vector<size_t> members;
  int64_t entries = 0;
};

// Learnables by name, in the order of their first; `group` takes "lwc" of "lwc.gamma_logit".
std::vector<Family> families(const std::vector<Learnable>& learnables, bool group) {
  std::vector<Family> all;
  for (size_t i = 0; i < learnables.size(); ++i) {
    const std::string name = group ? group_of(learnables[i].name) : short_name(learnables[i].name);
    auto it = std::find_if(all.begin(), all.end(), [&](auto& f) { return f.name == name; });
    if (it == all.end()) it = all.insert(all.end(), {name, {}, 0});
    it->members.push_back(i);
    it->entries += learnables[i].value.numel();
  }
  return all;
}

std::string counted(const char* what, const Family& f) {
  return fmt::format("{}: {} entries of {} {}", what, f.entries, f.members.size(),
                     f.members.size() == 1 ? "tensor" : "tensors");
}

double norm(const std::vector<double>& v) {
  double square = 0;
  for (const double x : v) square += x * x;
  return std::sqrt(square);
}

// What errors of gradient i are measured by: its size, but never less than `share` of the largest
// of its group, where rounding begins to show. (Scales of q and k, say, learn from a difference of
// large terms, which is all but zero.)
double scale_of(const std::vector<Gradient>& g, const std::vector<Learnable>& learnables, size_t i,
                double share) {
  double largest = 0;
  for (size_t k = 0; k < g.size(); ++k)
    if (group_of(learnables[k].name) == group_of(learnables[i].name))
      largest = std::max(largest, norm(g[k]));
  return std::max({norm(g[i]), share * largest, 1e-300});
}

// The same loss in both types, with the same random learnables.
struct Losses {
  const Subject& s;
  Tensor x, x_quant;  // F32
  BlockLoss narrow, wide;
  std::vector<Learnable> in_f32, in_f64;
};

void set_alike(const std::vector<Learnable>& to, const std::vector<Learnable>& from) {
  for (size_t i = 0; i < to.size(); ++i) fill(to[i].value, doubles(from[i].value));
}

Gradient difference(Gradient a, const Gradient& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return a;
}

Losses make_losses(const Subject& s, Random& random) {
  const Tensor x = slice(s.in.x, 1, 0, std::min(s.options.gradient_tokens, s.in.x.dim(1)));
  std::vector<double> noisy = doubles(x);  // X_quant: X with errors of 1 %
  for (double& v : noisy) v *= 1 + 0.01 * random.normal();
  const Tensor x_quant = to(Tensor::from<double>(noisy, x.shape()), DType::F32);
  Losses l{s, x, x_quant, {s, x, x_quant, DType::F32}, {s, x, x_quant, DType::F64}, {}, {}};
  l.in_f32 = l.narrow.learnables(), l.in_f64 = l.wide.learnables();
  randomise(l.in_f32, s.size, random);
  set_alike(l.in_f64, l.in_f32);
  return l;
}

// F64: the real loss and its gradient, every decision noted; then differences of the frozen loss.
void against_differences(const Subject& s, const Losses& l, Random& random, const Found& found) {
  FrozenRounding frozen;
  std::vector<Gradient> g;
  attempt({"loss with roundings frozen", "the real loss, F64", 1e-12}, found, [&](AuditCheck& c) {
    double real = 0;
    {
      const auto scope = frozen.record();
      const Tensor loss = l.wide();
      real = loss.item<double>();
      g = gradients(loss, l.in_f64);
    }
    NoGrad off;
    const auto scope = frozen.replay();
    worse(c, std::abs(l.wide().item<double>() - real) / real, "");
  });
  if (g.empty()) return;
  for (const Family& f : families(l.in_f64, false))
    attempt({"gradient of " + f.name, counted("differences", f), 1e-5}, found, [&](AuditCheck& c) {
      for (const size_t i : f.members)
        for (const auto& v : directions(g[i], s.options.entries, random))
          worse(c,
                along(l.wide, frozen, l.in_f64[i].value, g[i], v, scale_of(g, l.in_f64, i, 1e-5),
                      c.bound),
                l.in_f64[i].name);
    });
}

// Gradients in F32, in F64 with the codes that F32 chose, and how far the latter move when block
// and inputs are rounded to F32 once more.
struct Narrowed {
  std::vector<Gradient> narrow, wide;
  std::vector<double> moved;  // ‖·‖ of each learnable
};

Narrowed narrowed(const Losses& l) {
  Narrowed n;
  FrozenRounding codes;
  {
    const auto scope = codes.record();
    n.narrow = gradients(l.narrow(), l.in_f32);
  }
  {
    const auto scope = codes.replay();
    n.wide = gradients(l.wide(), l.in_f64);
  }
  Random random(l.s.options.seed + 1);
  const BlockLoss other(l.s, l.x, l.x_quant, DType::F64, &random);
  const auto learnables = other.learnables();
  set_alike(learnables, l.in_f64);
  const auto scope = codes.replay();
  const std::vector<Gradient> g = gradients(other(), learnables);
  for (size_t i = 0; i < g.size(); ++i) n.moved.push_back(norm(difference(g[i], n.wide[i])));
  return n;
}

// F32 as calibration runs it, and F64 of plain ops with the codes that F32 chose: the kernels'
// rounding, and nothing else, lies between them. A gradient that is a difference of large terms
// cannot be had exactly: it may be off by ten times what one rounding of the inputs does, and by
// four roundings of the largest gradient of its group.
void against_f64(const Losses& l, const Found& found) {
  constexpr double kRoundings = 4 * 0x1p-24;
  std::optional<Narrowed> n;
  for (const Family& f : families(l.in_f64, true))
    attempt({"gradient in F32, " + f.name, counted("F64, same codes", f), 1e-3}, found,
            [&](AuditCheck& c) {
              if (!n) n = narrowed(l);
              for (const size_t i : f.members) {
                const double scale = std::max(scale_of(n->wide, l.in_f64, i, kRoundings / c.bound),
                                              10 / c.bound * n->moved[i]);
                worse(c, norm(difference(n->narrow[i], n->wide[i])) / scale, l.in_f64[i].name);
              }
            });
}

// At one point, random learnables.
std::vector<AuditCheck> checks_at(const Subject& s, uint64_t seed) {
  std::vector<AuditCheck> checks;
  const auto found = [&](const AuditCheck& c) { checks.push_back(c); };
  Random random(seed);
  const Losses l = make_losses(s, random);
  if (l.in_f64.empty()) return checks;
  against_differences(s, l, random, found);
  against_f64(l, found);
  return checks;
}

}  // namespace

void at_two_points(const ChecksAt& checks_at, uint64_t seed, const Found& found) {
  std::vector<AuditCheck> checks = checks_at(seed), second;
  for (AuditCheck& c : checks) {
    if (!c.ok() && c.fault.empty()) {
      if (second.empty()) second = checks_at(seed + 2);
      const auto same = std::find_if(second.begin(), second.end(),
                                     [&](const AuditCheck& o) { return o.name == c.name; });
      if (same != second.end() && same->ok()) {
        c = *same;
        c.compared += "; 2nd point";
      }
    }
    found(c);
  }
}

void audit_gradients(const Subject& s, const Found& found) {
  at_two_points([&](uint64_t seed) { return checks_at(s, seed); }, s.options.seed, found);
}

}  // namespace omq::quant::detail
