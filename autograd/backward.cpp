// The reverse sweep: nodes leave a priority queue by creation number, newest first, which is a
// topological order.
#include "autograd/backward.h"

#include <atomic>
#include <queue>

#include "autograd/compute.h"
#include "tensor/kernels.h"

namespace omq {
namespace {

thread_local bool recording = true;

uint64_t next_id() {
  static std::atomic<uint64_t> counter{0};
  return ++counter;
}

// a + b, into a fresh tensor (gradients may be shared by several nodes, so never in place).
Tensor sum(const Tensor& a, const Tensor& b) {
  Tensor y = Tensor::empty(a.shape(), wide_dtype(a.dtype()), a.device());
  on(a).binary(y, a, b, Binary::Add);
  return y;
}

// Views hand strided gradients down; what leaves backward() is row-major, so that optimisers may
// walk it.
Tensor dense(Tensor g) {
  if (g.is_contiguous()) return g;
  Tensor y = Tensor::empty(g.shape(), g.dtype(), g.device());
  on(g).copy(y, g);
  return y;
}

}  // namespace

// Histories are long chains: members of a dying node are released one by one, not by recursion.
GradNode::~GradNode() {
  std::vector<std::shared_ptr<GradNode>> dying = std::move(inputs);
  while (!dying.empty()) {
    const std::shared_ptr<GradNode> node = std::move(dying.back());
    dying.pop_back();
    if (!node || node.use_count() > 1) continue;
    for (auto& input : node->inputs) dying.push_back(std::move(input));
    node->inputs.clear();
  }
}

NoGrad::NoGrad() : before_(recording) { recording = false; }
NoGrad::~NoGrad() { recording = before_; }

bool needs_grad(const Tensor& t) { return recording && t.node() != nullptr; }

Tensor record(std::string_view op, Tensor y, std::initializer_list<Tensor> inputs, Vjp vjp) {
  bool wanted = false;
  for (const Tensor& x : inputs) wanted = wanted || needs_grad(x);
  if (!wanted) return y;
  auto node = std::make_shared<GradNode>();
  node->id = next_id();
  node->op = op;
  node->shape = y.shape();
  node->vjp = std::move(vjp);
  for (const Tensor& x : inputs) node->inputs.push_back(x.node());
  y.set_node(std::move(node));
  return y;
}

Tensor parameter(const Tensor& t) {
  check(t.dtype() == DType::F32 || t.dtype() == DType::F64,
        "parameter: learnables are F32 (or F64), got {}", dtype_name(t.dtype()));
  Tensor p = t.detach();
  auto node = std::make_shared<GradNode>();
  node->id = next_id();
  node->op = "parameter";
  node->shape = t.shape();
  p.set_node(std::move(node));
  return p;
}

const Tensor& Gradients::operator[](const Tensor& parameter) const {
  auto it = of_.find(parameter.node().get());
  check(it != of_.end(), "gradient: the loss does not depend on this parameter of shape {}",
        parameter.shape());
  return it->second;
}

void Gradients::scale(double factor) {
  for (auto& [leaf, g] : of_) {
    Tensor y = Tensor::empty(g.shape(), g.dtype(), g.device());
    on(g).unary(y, g, {UnaryKind::Affine, factor, 0});
    g = y;
  }
}

bool Gradients::contains(const Tensor& parameter) const {
  return of_.contains(parameter.node().get());
}

void Gradients::add(const Gradients& h) {
  for (const auto& leaf : h.keep_) {
    auto [it, inserted] = of_.try_emplace(leaf.get(), h.of_.at(leaf.get()));
    if (inserted)
      keep_.push_back(leaf);
    else
      it->second = sum(it->second, h.of_.at(leaf.get()));
  }
}

Gradients backward(const Tensor& loss) {
  check(loss.numel() == 1, "backward: the loss has shape {}, not one element", loss.shape());
  check(loss.node() != nullptr,
        "backward: the loss has no history (no parameter was used, or NoGrad was on)");
  NoGrad off;
  Gradients result;
  auto older = [](const std::shared_ptr<GradNode>& a, const std::shared_ptr<GradNode>& b) {
    return a->id < b->id;
  };
  std::priority_queue<std::shared_ptr<GradNode>, std::vector<std::shared_ptr<GradNode>>,
                      decltype(older)>
      queue(older);
  std::unordered_map<const GradNode*, Tensor> pending;
  pending.emplace(loss.node().get(), Tensor::full(loss.shape(), 1.0, loss.dtype(), loss.device()));
  queue.push(loss.node());
  while (!queue.empty()) {
    const std::shared_ptr<GradNode> node = queue.top();
    queue.pop();
    Tensor dy = std::move(pending.at(node.get()));
    pending.erase(node.get());
    if (node->op == "parameter") {
      result.of_.emplace(node.get(), dense(std::move(dy)));
      result.keep_.push_back(node);
      continue;
    }
    check(static_cast<bool>(node->vjp), "backward: the history of '{}' was already used", node->op);
    Grads grads = node->vjp(dy);
    node->vjp = nullptr;
    check(grads.size() == node->inputs.size(), "backward: '{}' gave {} gradients for {} inputs",
          node->op, grads.size(), node->inputs.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const auto& input = node->inputs[i];
      if (!input || !grads[i].defined()) continue;
      check(grads[i].shape() == input->shape,
            "backward: '{}' gave a gradient of shape {} for input {} of shape {}", node->op,
            grads[i].shape(), i, input->shape);
      auto [it, inserted] = pending.try_emplace(input.get(), grads[i]);
      if (inserted)
        queue.push(input);
      else
        it->second = sum(it->second, grads[i]);
    }
    node->inputs.clear();
  }
  return result;
}

}  // namespace omq
