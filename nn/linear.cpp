// Linear: the differentiable product for F32 weights, the running kernels for everything stored
// smaller.
#include "nn/linear.h"

#include "autograd/ops.h"

namespace omq::nn {

Tensor dense_linear(const Tensor& x, const Tensor& w, const Tensor& bias, WriteAs write) {
  const bool history = needs_grad(x) || needs_grad(w) || (bias.defined() && needs_grad(bias));
  if (history || w.dtype() == DType::F64) return linear(x, w, bias, write);
  // A device without the running kernels multiplies as training does.
  if (x.device().type != DeviceType::CPU && !cuda_packed_kernels())
    return linear(x, to(w, x.dtype()), bias);
  check(x.dim(-1) == w.dim(1), "linear: inner dims differ: x {} · w {}ᵀ", x.shape(), w.shape());
  const Tensor rows = reshape(x, {-1, w.dim(1)});
  const bool narrow =
      !bias.defined() && w.dtype() != DType::F32 && halves_wanted(rows.dim(0), x.device(), write);
  Tensor y = Tensor::empty({rows.dim(0), w.dim(0)}, narrow ? DType::F16 : DType::F32, x.device());
  packed_on(x).dense_matmul(y, rows, contiguous(w));
  Shape shape = x.shape();
  shape[shape.n - 1] = w.dim(0);
  const Tensor out = reshape(y, shape);
  return bias.defined() ? add(out, bias) : out;
}

namespace {

Tensor multiply(const Linear& l, const LinearInput& x, WriteAs write) {
  const std::optional<RowQuant>& s = l.input_quant;
  if (!l.is_packed()) {
    const Tensor& in = !s                       ? x.tensor()
                       : l.input_clip.defined() ? x.simulated(*s, l.input_clip)
                                                : x.simulated(*s);
    const Tensor& w = l.dense();
    return dense_linear(needs_grad(w) ? x.operand(in) : in, w, l.bias, write);
  }
  const auto& w = *std::get<std::shared_ptr<PackedWeight>>(l.weight);
  if (l.bias.defined()) write = WriteAs::Wide;
  const Tensor y = s ? w.matmul(x.codes(*s), write) : w.matmul(x.tensor(), write);
  return l.bias.defined() ? add(y, l.bias) : y;
}

}  // namespace

Tensor Linear::operator()(const LinearInput& x, WriteAs write) const {
  const LinearInput& seen = online ? x.transformed(*online) : x;
  // Two calls: a conditional expression would copy `seen`, and what it makes would not be shared.
  return pre ? multiply(*this, LinearInput(pre(seen.tensor())), write)
             : multiply(*this, seen, write);
}

Tensor gated_product(const Linear& gate, const Linear& up, const LinearInput& x) {
  const auto plain = [](const Linear& l) {
    return l.is_packed() && !l.pre && !l.online && !l.bias.defined();
  };
  if (!plain(gate) || !plain(up) || !gate.input_quant || gate.input_quant != up.input_quant)
    return {};
  const Tensor& in = x.tensor();
  const int64_t rows = in.numel() / in.dim(-1);
  if (!halves_wanted(rows, in.device(), WriteAs::Operand)) return {};
  const auto int_weight = [](const Linear& l) {
    return dynamic_cast<const PackedIntWeight*>(
        std::get<std::shared_ptr<PackedWeight>>(l.weight).get());
  };
  const PackedIntWeight *left = int_weight(gate), *right = int_weight(up);
  if (!left || !right || left->rows() != right->rows()) return {};
  return left->gated(x.codes(*gate.input_quant), *right);
}

Linear Linear::product() const {
  Linear l = *this;
  l.online = {};
  l.pre = {};
  return l;
}

int64_t Linear::out_features() const {
  return is_packed() ? std::get<std::shared_ptr<PackedWeight>>(weight)->rows()
                     : std::get<Tensor>(weight).dim(0);
}

int64_t Linear::in_features() const {
  return is_packed() ? std::get<std::shared_ptr<PackedWeight>>(weight)->cols()
                     : std::get<Tensor>(weight).dim(1);
}

const Tensor& Linear::dense() const {
  check(!is_packed(), "linear: the weight is packed already; a dense one is wanted");
  return std::get<Tensor>(weight);
}

void Linear::visit(const VisitFn& v) {
  if (is_packed())
    std::get<std::shared_ptr<PackedWeight>>(weight)->visit(v);
  else
    v("weight", std::get<Tensor>(weight));
  if (bias.defined()) v("bias", bias);
  if (online)
    online->visit([&](std::string_view name, Tensor& t) { v("online." + std::string(name), t); });
  if (input_clip.defined()) v("input_clip", input_clip);
}

}  // namespace omq::nn
