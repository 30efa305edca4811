// Folding rotations into the matrices around them. y = x·Wᵀ with x = x'·M⁻¹, M orthogonal: W
// becomes W·M (its rows are transformed as x is); with y' = y·M it becomes Mᵀ·W (its columns are).
#include "quant/rotation.h"

#include <algorithm>

#include "autograd/ops.h"
#include "quant/orthogonal.h"

namespace omq::quant {
namespace {

using nn::Linear;

// Which random numbers a part uses, so that parts do not depend on which others there are. Of a
// stream come signs, of its complement the factors.
enum Stream : uint64_t { kResidual = 1, kQueryKey = 2, kHeads = 3, kPerBlock = 16 };
uint64_t down_stream(int block) { return kPerBlock + 2 * static_cast<uint64_t>(block); }
uint64_t values_stream(int block) { return down_stream(block) + 1; }
uint64_t norm_stream(int block, int site) {
  return (uint64_t{1} << 32) + 2 * static_cast<uint64_t>(block) + static_cast<uint64_t>(site);
}

Tensor random_signs(int64_t n, const Philox& random) {
  std::vector<double> s(static_cast<size_t>(n));
  for (size_t i = 0; i < s.size(); ++i) s[i] = random.sign(i);
  return Tensor::from<double>(s, {n});
}

nn::Kronecker transposed(const nn::Kronecker& k) {
  const auto turn = [](const Tensor& t) {
    return t.defined() ? contiguous(transpose(t, 0, 1)) : Tensor{};
  };
  return {turn(k.left), turn(k.right)};
}

void to_type(nn::Block& block, DType type) {
  nn::change_tensors(block, [type](const Tensor& t) { return to(t, type); });
}

// Every row of the matrix as an input.
template <class F> void change_inputs(Linear& l, const F& f) { l.weight = f(l.dense()); }
// Every column of it, and the bias, as an output.
template <class F> void change_outputs(Linear& l, const F& f) {
  l.weight = contiguous(transpose(f(contiguous(transpose(l.dense(), 0, 1))), 0, 1));
  if (l.bias.defined()) l.bias = f(l.bias);
}

auto scaled_by(const Tensor& by) {
  return [by](const Tensor& x) { return x * by; };
}

// γ and β of the norm into the linears that read it.
void fold_gain(const nn::NormToLinears& site) {
  nn::RMSNorm& norm = *site.norm;
  for (Linear* l : site.consumers) {
    if (norm.bias.defined()) {
      const Tensor moved = linear(norm.bias, l->dense());
      l->bias = l->bias.defined() ? l->bias + moved : moved;
    }
    change_inputs(*l, scaled_by(norm.weight));
  }
  norm.weight = Tensor::full(norm.weight.shape(), 1.0, norm.weight.dtype());
  norm.bias = {};
}

class BlockRotation {
 public:
  BlockRotation(nn::Block& block, int index, const Rotation& residual,
                const RotationOptions& options)
      : block_(block), index_(index), residual_(residual), options_(options) {}

  void operator()(const nn::NormToLinears& site) {
    if (options_.residual) {
      fold_gain(site);
      for (Linear* l : site.consumers) change_inputs(*l, residual_);
    }
    const int number = norm_sites_++;
    if (!options_.norms) return;
    nn::RMSNorm& norm = *site.norm;
    const Rotation r(norm.weight.numel(), options_.seed, norm_stream(index_, number));
    norm.weight = norm.weight * r.signs();
    if (norm.bias.defined()) norm.bias = norm.bias * r.signs();
    for (Linear* l : site.consumers) {
      change_inputs(*l, r);
      l->online = r.factors();
    }
  }
  void operator()(const nn::LinearToLinear& site) const {
    Linear &v = *site.producer, &o = *site.consumer;
    if (options_.values) rotate_values(v, o, site.heads);
    if (options_.heads && site.heads.heads > 1) {
      o.online = {orthogonal_factor(site.heads.heads, Philox(options_.seed, ~uint64_t{kHeads})),
                  {}};
      change_inputs(o, *o.online);
    }
    if (options_.residual) change_outputs(o, residual_);
    if (options_.query_key) rotate_query_key(site.heads.head_dim);
  }
  void operator()(const nn::QueryKey&) const {}
  void operator()(const nn::UpToDown& site) const {
    Linear &up = *site.up, &down = *site.down;
    if (options_.down) {
      const Rotation r(down.in_features(), options_.seed, down_stream(index_));
      change_outputs(up, scaled_by(r.signs()));
      change_inputs(down, r);
      down.online = r.factors();
    }
    if (options_.residual) change_outputs(down, residual_);
  }

 private:
  // One matrix a key/value head: signs of its own, then a factor that all share.
  void rotate_values(Linear& v, Linear& o, const nn::HeadLayout& h) const {
    const uint64_t stream = values_stream(index_);
    const Tensor signs = random_signs(h.kv_heads * h.head_dim, Philox(options_.seed, stream));
    const nn::Kronecker factors{{}, orthogonal_factor(h.head_dim, Philox(options_.seed, ~stream))};
    change_outputs(v, scaled_by(signs));
    change_outputs(v, factors);
    const Shape shared{h.kv_heads, 1, h.head_dim},
        each{h.kv_heads, h.heads / h.kv_heads, h.head_dim};
    const Tensor expanded = reshape(expand(reshape(signs, shared), each), {h.heads * h.head_dim});
    change_inputs(o, scaled_by(expanded));
    change_inputs(o, factors);
  }
  void rotate_query_key(int64_t head_dim) const {
    const nn::Kronecker k =
        orthogonal_kronecker(head_dim, Philox(options_.seed, ~uint64_t{kQueryKey}));
    block_.taps().q_online = k;
    block_.taps().k_online = k;
  }

  nn::Block& block_;
  int index_;
  const Rotation& residual_;
  const RotationOptions& options_;
  int norm_sites_ = 0;
};

}  // namespace

Rotation::Rotation(int64_t n, uint64_t seed, uint64_t stream)
    : signs_(random_signs(n, Philox(seed, stream))),
      factors_(orthogonal_kronecker(n, Philox(seed, ~stream))),
      transposed_(transposed(factors_)) {}

Tensor Rotation::operator()(const Tensor& x) const { return factors_(x * signs_); }
Tensor Rotation::inverse(const Tensor& x) const { return transposed_(x) * signs_; }

RotationOptions rotations_for(const QuantSpec& spec, uint64_t seed, bool behind_norms) {
  const ActivationBits a = spec.activations();
  return {.seed = seed,
          .residual = !behind_norms,
          .norms = behind_norms && a.linear < 16,
          .heads = a.linear < 16,
          .down = a.linear < 16,
          .query_key = a.q < 16 || a.k < 16};
}

Rotation residual_rotation(int64_t hidden, uint64_t seed) { return {hidden, seed, kResidual}; }

void rotate_block(nn::Block& block, int index, const Rotation& residual,
                  const RotationOptions& options) {
  NoGrad off;
  const DType type = block.linears().front().linear->dense().dtype();
  to_type(block, DType::F64);
  BlockRotation rotation(block, index, residual, options);
  for (const nn::Site& site : block.sites()) std::visit(rotation, site);
  to_type(block, type);
}

Tensor rotate_rows(const Tensor& rows, const Tensor& gain, const Rotation& residual) {
  NoGrad off;
  constexpr int64_t kRows = 4096;  // at a time: a whole vocabulary in F64 is large
  Tensor out = Tensor::empty(rows.shape(), DType::F32);
  const Tensor by = gain.defined() ? to(gain, DType::F64) : Tensor{};
  for (int64_t begin = 0; begin < rows.dim(0); begin += kRows) {
    const int64_t end = std::min(rows.dim(0), begin + kRows);
    const Tensor some = to(slice(rows, 0, begin, end), DType::F64);
    Tensor window = slice(out, 0, begin, end);
    on(out).copy(window, residual(by.defined() ? some * by : some));
  }
  return out;
}

RotatedSource::RotatedSource(nn::BlockSource& plain, int64_t hidden, const RotationOptions& options)
    : plain_(plain), options_(options), residual_(residual_rotation(hidden, options.seed)) {}

std::unique_ptr<nn::Block> RotatedSource::load(int i) {
  auto block = plain_.load(i);
  rotate_block(*block, i, residual_, options_);
  return block;
}

Tensor RotatedSource::embed(const Tensor& ids) {
  const Tensor x = plain_.embed(ids);
  if (!options_.residual) return x;
  return reshape(rotate_rows(reshape(x, {-1, x.dim(-1)}), {}, residual_), x.shape());
}

}  // namespace omq::quant
