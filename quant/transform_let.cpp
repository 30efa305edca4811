// LET: initial values, and the fold, which is the same code in training and at the end.
#include "quant/transform_let.h"

#include <algorithm>
#include <cmath>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "quant/site_start.h"

namespace omq::quant {
namespace {

using nn::HeadLayout;
using nn::Linear;

Tensor inverse(const Tensor& s) { return Tensor::full({1}, 1.0, s.dtype(), s.device()) / s; }

// The scales of each matrix, gathered from the sites that share it, so that it is read and written
// once.
class MatrixScales {
 public:
  void rows(Linear& l, const Tensor& by) {
    times(of(l).rows, by);
    if (l.bias.defined()) l.bias = l.bias * by;
  }
  void columns(Linear& l, const Tensor& by) { times(of(l).columns, by); }
  void apply() const {
    for (const Scales& s : all_)
      s.linear->weight = scale_matrix(s.linear->dense(), s.rows, s.columns);
  }

 private:
  struct Scales {
    Linear* linear;
    Tensor rows, columns;
  };
  Scales& of(Linear& l) {
    const auto at = std::find_if(all_.begin(), all_.end(), [&](auto& s) { return s.linear == &l; });
    return at != all_.end() ? *at : all_.emplace_back(Scales{&l, {}, {}});
  }
  static void times(Tensor& all, const Tensor& by) { all = all.defined() ? all * by : by; }
  std::vector<Scales> all_;  // in the order of the sites, on which sums of gradients depend
};

// b + W·δ, with the weight as it is now.
void absorb_shift(Linear& l, const Tensor& shift) {
  const ComputeScope exact(Compute::F32);  // one row: nothing to gain from fewer bits
  const Tensor moved = linear(shift, to(l.dense(), shift.dtype()));
  l.bias = l.bias.defined() ? l.bias + moved : moved;
}

// The entries of each key/value head, once for every query head that reads it: [K·d] → [H·d].
Tensor expand_heads(const Tensor& s, const HeadLayout& h) {
  if (h.heads == h.kv_heads) return s;
  const Shape shared{h.kv_heads, 1, h.head_dim}, each{h.kv_heads, h.heads / h.kv_heads, h.head_dim};
  return reshape(expand(reshape(s, shared), each), {h.heads * h.head_dim});
}
// One entry a rotary pair: [K·d/2] → [K·d].
Tensor expand_pairs(const Tensor& s, const HeadLayout& h) {
  const int64_t half = h.head_dim / 2;
  return reshape(expand(reshape(s, {h.kv_heads, 1, half}), {h.kv_heads, 2, half}),
                 {h.kv_heads * h.head_dim});
}

// [H·d] → [K·d]: `pick` folds the values of the query heads that share an entry, first to last.
template <class F>
std::vector<double> fold_heads(const std::vector<double>& v, const HeadLayout& h, F&& pick) {
  const auto d = static_cast<size_t>(h.head_dim);
  const auto group = static_cast<size_t>(h.heads / h.kv_heads);
  std::vector<double> out(static_cast<size_t>(h.kv_heads) * d);
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t first = i / d * group * d + i % d;
    out[i] = v[first];
    for (size_t q = 1; q < group; ++q) out[i] = pick(out[i], v[first + q * d]);
  }
  return out;
}

class LearnedTransform final : public Transform {
 public:
  LearnedTransform(nn::Block& fp, const BlockStats& stats, const LetOptions& options)
      : options_(options) {
    NoGrad off;
    const std::vector<nn::Site> sites = fp.sites();
    for (size_t i = 0; i < sites.size(); ++i)
      sites_.push_back(std::visit(
          [&](const auto& s) { return start(s, i < stats.size() ? stats[i] : ChannelStats{}); },
          sites[i]));
  }

  void apply(nn::Block& b) const override {
    const std::vector<nn::Site> sites = b.sites();
    check(sites.size() == sites_.size(), "let: a block of {} sites, made for one of {}",
          sites.size(), sites_.size());
    // Shifts pass through the weights as they were before any scale (spec omniquant §4.4): matrices
    // are scaled last. Biases are changed site by site: norm first, then v → o, then q – k.
    MatrixScales matrices;
    for (size_t i = 0; i < sites.size(); ++i)
      if (sites_[i].scale.defined())
        std::visit([&](const auto& s) { fold(s, sites_[i], matrices); }, sites[i]);
    matrices.apply();
  }

  nn::ParamGroup params() const override {
    nn::ParamGroup g;
    g.name = "let";
    for (const Learned& l : sites_)
      if (l.scale.defined()) {
        g.params.push_back(l.scale);
        g.names.push_back(l.name + "_scale");
      }
    for (const Learned& l : sites_)
      if (l.shift.defined()) {
        g.params.push_back(l.shift);
        g.names.push_back(l.name + "_shift");
      }
    return g;
  }

  // |s| ≥ kSmallestScale, sign kept; 0 counts as positive, so that nothing is divided by it.
  void project() const override {
    NoGrad off;
    for (const Learned& l : sites_) {
      if (!l.scale.defined()) continue;
      const Tensor s = l.scale.detach();
      const Tensor floor = Tensor::full({1}, kSmallestScale, s.dtype(), s.device());
      const Tensor positive = clamp(s * 1e30 * 1e15 + 1.0, 0, 1);  // 1 where s ≥ 0, else 0
      Tensor now = s;
      on(s).copy(now, maximum(s, floor) * positive - maximum(-s, floor) * affine(positive, -1, 1));
    }
  }

 private:
  struct Learned {
    std::string name;
    Tensor scale, shift;  // undefined: not learned
  };

  Tensor start_shift(const std::vector<double>& middle, size_t n, const Tensor& like) const {
    if (!options_.shift) return {};
    return parameter_of(options_.shift_from_middle ? middle : std::vector<double>(n), like);
  }
  std::vector<double> middle_of(const ChannelStats& c) const {
    return options_.shift && options_.shift_from_middle ? doubles(c.middle) : std::vector<double>{};
  }

  Learned start(const nn::NormToLinears& s, const ChannelStats& c) const {
    std::vector<const Linear*> readers{s.lead};
    if (options_.all_consumers) readers.assign(s.consumers.begin(), s.consumers.end());
    const auto scale =
        start_scale(c.abs_max, column_max(readers, options_.signed_max), options_.alpha);
    const Tensor& like = s.lead->dense();
    return {s.consumers.size() > 2 ? "qkv" : "fc1", parameter_of(scale, like),
            start_shift(middle_of(c), scale.size(), like)};
  }
  Learned start(const nn::LinearToLinear& s, const ChannelStats& c) const {
    const auto each = start_scale(c.abs_max, column_max({s.consumer}, options_.signed_max),
                                  options_.alpha);  // of each query head
    const auto scale = fold_heads(each, s.heads, [](double a, double b) { return std::max(a, b); });
    std::vector<double> middle = middle_of(c);
    if (!middle.empty()) {
      middle = fold_heads(middle, s.heads, [](double a, double b) { return a + b; });
      for (double& m : middle)
        m *= static_cast<double>(s.heads.kv_heads) / static_cast<double>(s.heads.heads);
    }
    const Tensor& like = s.consumer->dense();
    return {"out", parameter_of(scale, like), start_shift(middle, scale.size(), like)};
  }
  Learned start(const nn::QueryKey& s, const ChannelStats&) const {
    const int64_t entries = s.heads.kv_heads * s.heads.head_dim / (options_.tied_pairs ? 2 : 1);
    const std::vector<double> ones(static_cast<size_t>(entries), 1.0);
    return {"qkt", parameter_of(ones, s.k->dense()), {}};
  }
  Learned start(const nn::UpToDown& s, const ChannelStats& c) const {
    if (!options_.up_to_down) return {};
    return {"down",
            parameter_of(
                start_scale(c.abs_max, column_max({s.down}, options_.signed_max), options_.alpha),
                s.down->dense()),
            {}};
  }

  void fold(const nn::NormToLinears& s, const Learned& l, MatrixScales& m) const {
    const Tensor by = inverse(l.scale);
    nn::RMSNorm& norm = *s.norm;
    norm.weight = norm.weight * by;
    if (l.shift.defined())
      norm.bias = (norm.bias.defined() ? norm.bias - l.shift : -l.shift) * by;
    else if (norm.bias.defined())
      norm.bias = norm.bias * by;
    for (Linear* consumer : s.consumers) {
      if (l.shift.defined()) absorb_shift(*consumer, l.shift);
      m.columns(*consumer, l.scale);
    }
  }
  void fold(const nn::LinearToLinear& s, const Learned& l, MatrixScales& m) const {
    if (l.shift.defined()) {
      s.producer->bias = s.producer->bias.defined() ? s.producer->bias - l.shift : -l.shift;
      absorb_shift(*s.consumer, expand_heads(l.shift, s.heads));
    }
    m.rows(*s.producer, inverse(l.scale));
    m.columns(*s.consumer, expand_heads(l.scale, s.heads));
  }
  void fold(const nn::QueryKey& s, const Learned& l, MatrixScales& m) const {
    const Tensor k = options_.tied_pairs ? expand_pairs(l.scale, s.heads) : l.scale;
    m.rows(*s.q, inverse(expand_heads(k, s.heads)));
    m.rows(*s.k, k);
  }
  void fold(const nn::UpToDown& s, const Learned& l, MatrixScales& m) const {
    m.rows(*s.up, inverse(l.scale));
    m.columns(*s.down, l.scale);
  }

  LetOptions options_;
  std::vector<Learned> sites_;  // in the order of Block::sites()
};

}  // namespace

std::unique_ptr<Transform> learned_transform(nn::Block& fp, const BlockStats& stats,
                                             const LetOptions& options) {
  check(options.alpha >= 0 && options.alpha <= 1, "alpha = {}: 0 to 1 wanted", options.alpha);
  return std::make_unique<LearnedTransform>(fp, stats, options);
}

}  // namespace omq::quant
