// Where the factors start, and the fold, which is the same code in training and at the end.
#include "quant/transform_kronecker.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "quant/invertible.h"
#include "quant/orthogonal.h"
#include "quant/site_start.h"

namespace omq::quant {
namespace {

using nn::HeadLayout;
using nn::Kronecker;
using nn::Linear;

// Which random numbers a part uses: signs of one stream, of its complement what is no Hadamard
// matrix. All blocks start alike.
enum Stream : uint64_t { kNorm = 1, kValues = 8, kHeads = 10, kDown = 12, kQueryKey = 14 };

// diag(signs)·(an orthogonal matrix), in the wide type of `like` and where it is.
Tensor start_factor(int64_t n, uint64_t stream, const Tensor& like) {
  const Philox random(0, stream);
  std::vector<double> signs(static_cast<size_t>(n));
  for (size_t i = 0; i < signs.size(); ++i) signs[i] = random.sign(i);
  const Tensor q = orthogonal_factor(n, Philox(0, ~stream)) * Tensor::from<double>(signs, {n, 1});
  return to(to(q, wide_dtype(like.dtype())), like.device());
}

// L ⊗ R for rows of n numbers.
struct Factors {
  std::optional<Invertible> left, right;
  Factors() = default;
  Factors(int64_t n, uint64_t stream, const Tensor& like) {
    const FactorSizes s = factor_sizes(n);
    if (s.left > 0) left.emplace(start_factor(s.left, stream, like));
    if (s.right > 0) right.emplace(start_factor(s.right, stream + 1, like));
  }
  struct Pair {
    Kronecker forward, inverse_transposed;
  };
  Pair operator()() const {
    Pair p;
    if (left) std::tie(p.forward.left, p.inverse_transposed.left) = both(*left);
    if (right) std::tie(p.forward.right, p.inverse_transposed.right) = both(*right);
    return p;
  }

 private:
  static std::pair<Tensor, Tensor> both(const Invertible& m) {
    Invertible::Pair p = m();
    return {p.matrix, p.inverse_transposed};
  }
};

// Rows of W as inputs were transformed: in F32 whatever the stored type, since they are learned on.
void change_inputs(Linear& l, const Kronecker& by) {
  const Tensor& w = l.dense();
  l.weight = by(to(w, wide_dtype(w.dtype())));
}

class KroneckerTransform final : public Transform {
 public:
  KroneckerTransform(nn::Block& fp, const BlockStats& stats, const KroneckerOptions& options) {
    NoGrad off;
    for (const auto& [name, linear] : fp.linears())
      check(!linear->online,
            "--transform kronecker: the input of {} is rotated already; take a method that does "
            "not rotate",
            name);
    const std::vector<nn::Site> sites = fp.sites();
    for (size_t i = 0; i < sites.size(); ++i)
      sites_.push_back(std::visit(
          [&](const auto& s) {
            return start(s, i < stats.size() ? stats[i].abs_max : Tensor{}, options);
          },
          sites[i]));
  }

  void apply(nn::Block& b) const override {
    const std::vector<nn::Site> sites = b.sites();
    check(sites.size() == sites_.size(), "kronecker: a block of {} sites, made for one of {}",
          sites.size(), sites_.size());
    for (size_t i = 0; i < sites.size(); ++i)
      std::visit([&](const auto& s) { fold(s, sites_[i], b); }, sites[i]);
  }

  nn::ParamGroup params() const override {
    nn::ParamGroup g;
    g.name = "kronecker";
    const auto add = [&g](const std::string& name, const Tensor& p) {
      g.params.push_back(p);
      g.names.push_back(name);
    };
    const auto factors = [&](const std::string& site, const Factors& f) {
      if (f.left) add(site + "_left", f.left->learnable());
      if (f.right) add(site + "_right", f.right->learnable());
    };
    for (const Learned& l : sites_) {
      if (l.scale.defined()) add(l.name + "_scale", l.scale);
      factors(l.name, l.factors);
      if (l.values) add(l.name + "_values", l.values->learnable());
      if (l.heads) add(l.name + "_heads", l.heads->learnable());
      factors("qkt", l.query_key);
    }
    return g;
  }

  // s ≥ kSmallestScale: it starts positive and has no reason to change its sign.
  void project() const override {
    NoGrad off;
    for (const Learned& l : sites_) {
      if (!l.scale.defined()) continue;
      Tensor s = l.scale.detach();
      on(s).copy(s, clamp(s, kSmallestScale, 1 / kSmallestScale));
    }
  }

 private:
  static constexpr double kSmallestScale = 1e-3;
  struct Learned {
    std::string name;
    Tensor scale;  // undefined: none
    Factors factors;
    std::optional<Invertible> values, heads;
    Factors query_key;
  };

  // LET's start with a geometric mean of 1: a factor that all channels share changes no grid.
  static Tensor start_of(const Tensor& abs_max, const std::vector<const Linear*>& readers,
                         const KroneckerOptions& o) {
    const Tensor& like = readers.front()->dense();
    if (!o.diagonal) return {};
    std::vector<double> s(static_cast<size_t>(like.dim(1)), 1.0);
    if (abs_max.defined()) s = start_scale(abs_max, column_max(readers, false), o.alpha);
    double mean = 0;
    for (const double x : s) mean += std::log(x) / static_cast<double>(s.size());
    for (double& x : s) x = std::clamp(x / std::exp(mean), kSmallestScale, 1 / kSmallestScale);
    return parameter_of(s, like);
  }

  Learned start(const nn::NormToLinears& s, const Tensor& abs_max,
                const KroneckerOptions& o) const {
    const bool qkv = s.consumers.size() > 2;
    const Tensor& like = s.lead->dense();
    return {qkv ? "qkv" : "fc1",
            start_of(abs_max, {s.consumers.begin(), s.consumers.end()}, o),
            {like.dim(1), kNorm + (qkv ? 0u : 2u), like},
            {},
            {},
            {}};
  }
  Learned start(const nn::LinearToLinear& s, const Tensor&, const KroneckerOptions& o) const {
    const Tensor& like = s.consumer->dense();
    const HeadLayout& h = s.heads;
    Learned l{
        .name = "out", .scale = {}, .factors = {}, .values = {}, .heads = {}, .query_key = {}};
    l.values.emplace(start_factor(h.head_dim, kValues, like), h.kv_heads);
    if (h.heads > 1) l.heads.emplace(start_factor(h.heads, kHeads, like));
    if (o.query_key) l.query_key = {h.head_dim, kQueryKey, like};
    return l;
  }
  Learned start(const nn::QueryKey&, const Tensor&, const KroneckerOptions&) const { return {}; }
  Learned start(const nn::UpToDown& s, const Tensor& abs_max, const KroneckerOptions& o) const {
    const Tensor& like = s.down->dense();
    return {"down", start_of(abs_max, {s.down}, o), {like.dim(1), kDown, like}, {}, {}, {}};
  }

  static Tensor reciprocal(const Tensor& s) {
    return Tensor::full({1}, 1.0, s.dtype(), s.device()) / s;
  }
  static void scale_inputs(Linear& l, const Tensor& s) {
    if (s.defined()) l.weight = scale_matrix(l.dense(), {}, s);
  }

  void fold(const nn::NormToLinears& s, const Learned& l, nn::Block&) const {
    if (l.scale.defined()) {
      const Tensor by = reciprocal(l.scale);
      s.norm->weight = s.norm->weight * by;
      if (s.norm->bias.defined()) s.norm->bias = s.norm->bias * by;
    }
    const Factors::Pair p = l.factors();
    for (Linear* consumer : s.consumers) {
      scale_inputs(*consumer, l.scale);
      change_inputs(*consumer, p.inverse_transposed);
      consumer->online = p.forward;
    }
  }

  void fold(const nn::LinearToLinear& s, const Learned& l, nn::Block& b) const {
    fold_values(*s.producer, *s.consumer, s.heads, (*l.values)());
    if (l.heads) {
      const auto [matrix, undone] = (*l.heads)();
      change_inputs(*s.consumer, {undone, {}});
      s.consumer->online = Kronecker{matrix, {}};
    }
    if (!l.query_key.left && !l.query_key.right) return;
    const Factors::Pair p = l.query_key();
    b.taps().k_online = p.forward;
    b.taps().q_online = p.inverse_transposed;
  }

  // T [K,d,d]: W_v [K·d, D] and b_v as Tᵀ·W_v, W_o [D, H·d] as W_o·T⁻ᵀ.
  static void fold_values(Linear& v, Linear& o, const HeadLayout& h, const Invertible::Pair& t) {
    const int64_t K = h.kv_heads, G = h.heads / K, d = h.head_dim;
    const ComputeScope exact(Compute::F32);
    const Tensor wv = to(v.dense(), t.matrix.dtype()), wo = to(o.dense(), t.matrix.dtype());
    v.weight =
        reshape(matmul(transpose(t.matrix, 1, 2), reshape(wv, {K, d, wv.dim(1)})), wv.shape());
    if (v.bias.defined())
      v.bias = reshape(matmul(reshape(v.bias, {K, 1, d}), t.matrix), v.bias.shape());
    const int64_t D = wo.dim(0);
    const Tensor by_head = transpose(reshape(wo, {D, K, G * d}), 0, 1);
    const Tensor undone = matmul(reshape(by_head, {K, D * G, d}), t.inverse_transposed);
    o.weight = reshape(transpose(reshape(undone, {K, D, G * d}), 0, 1), wo.shape());
  }

  void fold(const nn::QueryKey&, const Learned&, nn::Block&) const {}

  void fold(const nn::UpToDown& s, const Learned& l, nn::Block&) const {
    if (l.scale.defined()) {
      const Tensor by = reciprocal(l.scale);
      s.up->weight = scale_matrix(s.up->dense(), by, {});
      if (s.up->bias.defined()) s.up->bias = s.up->bias * by;
      scale_inputs(*s.down, l.scale);
    }
    const Factors::Pair p = l.factors();
    change_inputs(*s.down, p.inverse_transposed);
    s.down->online = p.forward;
  }

  std::vector<Learned> sites_;  // in the order of Block::sites()
};

}  // namespace

std::unique_ptr<Transform> kronecker_transform(nn::Block& fp, const BlockStats& stats,
                                               const KroneckerOptions& options) {
  check(options.alpha >= 0 && options.alpha <= 1, "alpha = {}: 0 to 1 wanted", options.alpha);
  return std::make_unique<KroneckerTransform>(fp, stats, options);
}

}  // namespace omq::quant
