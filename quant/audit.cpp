// The audit of one block, and what its parts share.
#include "quant/audit.h"

#include <cmath>
#include <numbers>

#include "autograd/ops.h"
#include "quant/audit_parts.h"

namespace omq::quant {
namespace detail {

double Random::normal() {
  return std::sqrt(-2 * std::log(uniform(1e-12, 1))) *
         std::cos(2 * std::numbers::pi * uniform(0, 1));
}

std::vector<double> doubles(const Tensor& t) {
  return to(contiguous(t.detach()), DType::F64).to_vector<double>();
}

void fill(const Tensor& p, const std::vector<double>& values) {
  Tensor data = p.detach();
  on(data).copy(data, Tensor::from<double>(values, p.shape()));
}

namespace {
bool is_factor(const std::string& learnable) {
  for (const char* end : {"_left", "_right", "_values", "_heads"})
    if (learnable.ends_with(end)) return true;
  return false;
}
}  // namespace

Kind kind_of(const std::string& learnable) {
  return learnable.ends_with("_scale")    ? Kind::Scale
         : learnable.ends_with("_shift")  ? Kind::Shift
         : learnable.ends_with("step")    ? Kind::Step
         : learnable.ends_with("_share")  ? Kind::Share
         : learnable.ends_with(".weight") ? Kind::Weight
         : is_factor(learnable)           ? Kind::Factor
                                          : Kind::Other;
}

void randomise(const Tensor& p, Kind kind, double size, Random& random) {
  std::vector<double> v = doubles(p);
  const double spread = 0.3 / std::sqrt(static_cast<double>(p.dim(-1)));
  for (double& x : v)
    x = kind == Kind::Scale    ? std::exp2(random.uniform(-2, 2))
        : kind == Kind::Shift  ? size * random.normal()
        : kind == Kind::Step   ? x * std::exp2(random.uniform(-1, 1))
        : kind == Kind::Share  ? random.uniform(0.3, 0.95)
        : kind == Kind::Weight ? x * (1 + 0.3 * random.normal())
        : kind == Kind::Factor ? x + spread * random.normal()
                               : x + random.normal();
  fill(p, v);
}

void randomise(const std::vector<Learnable>& learnables, double size, Random& random) {
  for (const Learnable& l : learnables) randomise(l.value, kind_of(l.name), size, random);
}

void attempt(const Aim& aim, const Found& found, const std::function<void(AuditCheck&)>& body) {
  AuditCheck check{aim.name, aim.compared, 0, aim.bound, "", ""};
  try {
    body(check);
  } catch (const Error& e) {
    check.fault = e.what();
  }
  found(check);
}

void worse(AuditCheck& check, double error, const std::string& where) {
  if (std::isnan(check.worst) || error <= check.worst) return;
  check.worst = error;
  check.where = where;
}

namespace {

// The root mean square of what goes into the block's first matrix.
double activation_size(const nn::Block& fp, const AuditInputs& in) {
  const auto watched = fp.clone();
  double size = 1;
  watched->linears().front().linear->pre = [&size](const Tensor& x) {
    size = std::sqrt(static_cast<double>(mean(square(x)).item<float>()));
    return x;
  };
  watched->forward(in.x, in.at);
  return size;
}

BlockStats stats_of(const nn::Block& fp, const AuditInputs& in) {
  const auto watched = fp.clone();
  StatsCollector collector(*watched);
  watched->forward(in.x, in.at);
  return collector.take();
}

}  // namespace
}  // namespace detail

std::vector<AuditedRecipe> audited_recipes(const Options& options, std::string_view only) {
  std::vector<AuditedRecipe> all;
  Options whole = options;
  if (whole.let != 0) {
    whole.let = 1;
    if (whole.let_shift < 0) whole.let_shift = 1;
    whole.let_up_to_down = true;
  }
  for (const MethodInfo& m : methods()) {
    const std::string& name = m.name;
    if (!only.empty() && name != only) continue;
    if (only.empty() && name == "best") continue;  // one of the others
    Recipe plain = m.make(options), full = m.make(whole);
    const bool more = full.transforms.size() > plain.transforms.size();
    if (plain.transforms.empty()) all.push_back({name, std::move(plain)});
    if (!full.transforms.empty()) all.push_back({more ? name + " + let" : name, std::move(full)});
  }
  return all;
}

bool audit_block(const Recipe& recipe, nn::Block& fp, const AuditInputs& inputs,
                 const AuditOptions& options, const std::function<void(const AuditCheck&)>& found) {
  const detail::RotatedSubject rotated = detail::rotated(recipe, fp, inputs);
  detail::Subject s{recipe, *rotated.fp, rotated.in, options, {}, 1};
  {
    NoGrad off;
    s.stats = detail::stats_of(s.fp, s.in);
    s.size = detail::activation_size(s.fp, s.in);
  }
  bool passed = true;
  const detail::Found count = [&](const AuditCheck& c) {
    passed = passed && c.ok();
    found(c);
  };
  if (recipe.rotation) detail::audit_rotations(fp, 0, inputs, recipe.rotation->seed, count);
  detail::audit_gradients(s, count);
  detail::audit_transforms(s, count);
  detail::audit_packing(s, count);
  return passed;
}

}  // namespace omq::quant
