// See compose.h.
#include "quant/compose.h"

#include <vector>

namespace omq::quant {
namespace {

struct Piece {
  const char* flag;
  std::string Line::*name;
  std::vector<std::string> known;
};
const std::vector<Piece>& pieces() {
  static const std::vector<Piece> list = {
      {"--transform", &Line::transform, {"none", "let", "kronecker"}},
      {"--clip", &Line::clip, {"minmax", "mse", "lwc", "scaled", "free"}},
      {"--round", &Line::round, {"nearest", "gptq", "learned"}},
      {"--train", &Line::train, {"none", "clip", "weights", "norms"}}};
  return list;
}

void check_known(const Line& line) {
  for (const Piece& p : pieces()) {
    std::string names;
    bool known = false;
    for (const std::string& name : p.known) {
      names += (names.empty() ? "" : ", ") + name;
      known = known || name == line.*p.name;
    }
    check(known, "{} {}: there are: {}", p.flag, line.*p.name, names);
  }
}

// What can be named together but not do anything together.
void check_sense(const Line& l, const std::string& method) {
  const bool learned_clip = l.clip != "minmax" && l.clip != "mse",
             learned_round = l.round == "learned";
  check(!learned_clip || l.train == "clip" || l.train == "weights",
        "--clip {}: it is learned, but method {} has --train {}; add --train clip", l.clip, method,
        l.train);
  check(l.clip != "mse" || l.train == "none" || l.train == "norms",
        "--clip mse: it is searched once, and --train {} would search at every step", l.train);
  check(!learned_round || l.train == "clip",
        "--round learned: offsets learn with --train clip, not with --train {}{}", l.train,
        l.train == "weights" ? "; weights that learn round themselves" : "");
  check(l.transform != "kronecker" || l.train != "norms",
        "--transform kronecker: norms that learn after rounding do not see it; add --train clip");
  check(l.train != "clip" || learned_clip || learned_round || l.transform != "none",
        "--train clip: --transform {} --clip {} --round {} have nothing to learn", l.transform,
        l.clip, l.round);
}

Plan plan_of(const Line& l, const Options& o) {
  if (l.train == "none") return {{.clips = false}, block_mse()};
  if (l.train == "weights") return weights_plan(o);
  if (l.train == "norms") return norms_plan(o);
  if (l.round == "learned") return rounding_plan(o);
  return l.transform == "kronecker" ? kronecker_plan(o) : clip_plan(o);
}

std::function<std::unique_ptr<Clip>(const Tensor&, GroupSpec)> clip_of(const std::string& name,
                                                                       const Options& o) {
  const GridRule rule =
      o.spec.symmetric && o.spec.official_symmetric ? official_symmetric_grid : affine_grid;
  check(rule == affine_grid || name == "minmax" || name == "mse" || name == "lwc",
        "--clip {}: the official symmetric grid is one of minmax, mse and lwc alone", name);
  if (name == "free") return free_grid;
  if (name == "scaled") return scaled_range;
  if (name == "lwc")
    return [rule, search = o.clip_search](const Tensor& w, GroupSpec s) {
      return learned_clip(w, s, {.logit = 4.0, .rule = rule, .search = search});
    };
  const auto fixed = name == "mse" ? searched_clip : minmax_clip;
  return [rule, fixed](const Tensor& w, GroupSpec s) { return fixed(w, s, rule); };
}

std::string title_of(const std::string& method, const Line& usual, const Line& line) {
  std::string title = method;
  for (const Piece& p : pieces())
    if (line.*p.name != usual.*p.name) title += fmt::format(" {} {}", p.flag, line.*p.name);
  return title;
}

}  // namespace

std::string Line::to_string() const {
  std::string text;
  for (const Piece& p : pieces())
    text += fmt::format("{}{} {}", text.empty() ? "" : " ", p.flag, this->*p.name);
  return text;
}

Recipe compose(const std::string& method, const Line& usual, const Options& o) {
  Line line = usual;
  // The transformation of another method is asked for, or forbidden, by its piece's name alone.
  if (o.let == 1 && line.transform == "none") line.transform = "let";
  if (o.let == 0 && line.transform == "let") line.transform = "none";
  for (const Piece& p : pieces())
    if (!(o.line.*p.name).empty()) line.*p.name = o.line.*p.name;
  check_known(line);
  check_sense(line, method);
  Plan plan = plan_of(line, o);
  for (const auto& [group, rate] : o.rates) plan.train.lr[group] = rate;
  if (o.learn_act_clip == 1) {
    check(line.train == "clip" || line.train == "weights",
          "--learn-act-clip: method {} has --train {}; add --train clip", method, line.train);
    check(o.spec.activations().linear < 16,
          "--learn-act-clip: inputs of matrices are not quantised; add --abits");
    plan.train.act_clips = true;
  }
  if (o.learn_act_clip == 0) plan.train.act_clips = false;
  if (o.full_inputs >= 0) plan.train.full_inputs = o.full_inputs != 0;
  if (o.rate_shape) plan.train.rate_shape = *o.rate_shape;
  plan.train.keep_best = o.keep_best.value_or(plan.train.keep_best);
  const bool augmented = plan.objective.wants_of_quant;
  GptqOptions solver{.act_order = o.act_order};
  if (o.damping >= 0) solver.damping = o.damping;
  Recipe r{.name = method,
           .line = line,
           .title = title_of(method, usual, line),
           .spec = o.spec,
           .transforms = {},
           .clip = clip_of(line.clip, o),
           .rounder = line.round == "gptq" ? round_gptq(solver) : round_nearest(),
           .objective = std::move(plan.objective),
           .augmented = augmented,
           .aug_weight = o.aug_weight,
           .clip_search = o.clip_search,
           .let = {},
           .kronecker = {},
           .train = std::move(plan.train)};
  if (o.act_clip > 0) r.spec.act_clip = o.act_clip;
  if (o.qkv_clip > 0) r.spec.qkv_clip = o.qkv_clip;
  if (line.transform == "let") {
    r.let = let_options(o);
    r.transforms.push_back([options = *r.let](nn::Block& fp, const BlockStats& stats) {
      return learned_transform(fp, stats, options);
    });
  }
  if (line.transform == "kronecker") {
    const ActivationBits bits = o.spec.activations();
    r.kronecker = KroneckerOptions{.query_key = bits.q < 16 || bits.k < 16};
    if (o.alpha >= 0) r.kronecker->alpha = o.alpha;
    r.transforms.push_back([options = *r.kronecker](nn::Block& fp, const BlockStats& stats) {
      return kronecker_transform(fp, stats, options);
    });
  }
  return r;
}

}  // namespace omq::quant
