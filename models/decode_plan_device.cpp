// The DecodePlan of a GPU: the stages of tensor/decode_kernels.h, recorded once for the caches at
// hand and replayed for every token.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "models/decode_plan_impl.h"
#include "tensor/decode_kernels.h"
#include "tensor/kernels.h"
#include "tensor/step_graph.h"

namespace omq {
namespace {

struct Product {
  std::vector<RowMatrix> matrices;
  std::optional<RowQuant> quant;
  Tensor prepared = {};  // where the stage in front leaves the row, or undefined
  Product(std::initializer_list<const nn::Linear*> linears)
      : quant((*linears.begin())->input_quant) {
    for (const nn::Linear* l : linears) matrices.push_back(row_matrix(*l));
  }
  // Whether its row is plain: not quantised, and not shifted by the norm in front of it.
  bool plain(const nn::RMSNorm* norm) const { return !quant && !(norm && norm->bias.defined()); }
};

struct Layer {
  const LlamaBlock* block;
  Product qkv, o, gate_up, down;
};

// Splits of a cache: enough blocks for the device, none of them of a few tokens.
int64_t splits_of(int64_t heads, int64_t capacity) {
  constexpr int64_t kBlocks = 256;  // about two on each processor of a large card; fewer where
                                    // heads are few
  return std::clamp<int64_t>(std::min(kBlocks / heads, capacity / kDecodeSplitTokens), 1,
                             kDecodeMostSplits);
}

// What a SamplerOptions comes to here: TokenChoice in the host's memory. At first the largest
// logit.
struct DrawnBy {
  int64_t top_k = 1;
  double top_p = 1, min_p = 0, temperature = 1;
  std::map<int32_t, double> bias = {};
  bool operator==(const DrawnBy&) const = default;
};

class DevicePlan final : public DecodePlan::Impl {
 public:
  DevicePlan(const Model& model, int64_t capacity, int64_t batch);
  ~DevicePlan() override;
  void step(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches) override;
  std::span<const float> logits() override;
  void choose(std::span<const int32_t> tokens, int64_t at, std::vector<nn::KVCache>& caches,
              std::span<int32_t> chosen) override;
  bool can_choose(const SamplerOptions& sampling) const override;
  void choose_by(const SamplerOptions& sampling, int64_t at,
                 std::span<const double> numbers) override;

 private:
  void bind(std::vector<nn::KVCache>& caches);
  void run();  // a token of each sequence, for the caches bound_
  void set_state(std::span<const int32_t> tokens, int64_t at);
  int32_t told(int64_t at, int64_t sequence) const;  // waits for the token behind position `at`
  DecodeAttentionStage attention(const nn::Attention& a, const nn::KVCache& cache) const;
  void prepare_rows();
  DecodeInput behind(const nn::RMSNorm& n, const Product& p) const {
    return {x_, n.weight, n.bias, n.eps, p.quant, p.prepared};
  }
  DecodeInput plain_input(const Tensor& x, const Product& p) const {
    return {.x = x, .quant = p.quant, .prepared = p.prepared};
  }

  const Model& model_;
  const DecodeKernels& kernels_;
  Device device_;
  std::vector<Layer> layers_;
  Product head_;
  int64_t batch_;
  Tensor state_;           // I32 [2, B]: the tokens and their positions
  Tensor ids_, position_;  // its parts, [B]
  Tensor x_, qkv_, attended_, gated_, logits_;
  Tensor parts_, arrived_;                           // of attention
  Tensor host_;                                      // logits, page-locked
  Tensor told_;                                      // page-locked, see DecodeKernels::choose
  Tensor numbers_;                                   // [B, capacity], see TokenChoice
  const std::vector<nn::KVCache>* bound_ = nullptr;  // the caches of the recording,
  std::vector<uint64_t> bound_ids_;                  // whose id()s these are
  std::optional<StepGraph> graph_, choosing_graph_;
  TokenChoice choice_;  // as it is recorded,
  DrawnBy drawn_by_;    // and what it was made from
  // The choosing step that was begun before it was asked for: at this position, of the tokens that
  // the step before it chose. −1: none.
  int64_t ahead_ = -1;
  uint64_t ahead_changes_ = 0;  // of the caches then: nobody else may have changed them since
  std::vector<int32_t> ahead_tokens_;
};

DevicePlan::DevicePlan(const Model& m, int64_t capacity, int64_t B)
    : model_(m),
      kernels_(*decode_kernels(m.device())),
      device_(m.device()),
      head_({&m.ends.lm_head}),
      batch_(B),
      ahead_tokens_(static_cast<size_t>(B), -1) {
  for (const auto& block : m.blocks) {
    const nn::Attention& a = block->self_attn;
    const nn::MLP& mlp = block->mlp;
    layers_.push_back({block.get(),
                       {&a.q_proj, &a.k_proj, &a.v_proj},
                       {&a.o_proj},
                       {&mlp.gate_proj, &mlp.up_proj},
                       {&mlp.down_proj}});
  }
  const ModelConfig& c = m.config();
  const int64_t H = c.num_heads, K = c.num_kv_heads, d = c.head_dim, S = splits_of(B * H, capacity);
  const auto floats = [&](Shape shape) { return Tensor::zeros(shape, DType::F32, device_); };
  state_ = Tensor::zeros({2, B}, DType::I32, device_);
  ids_ = state_.alias({B}, {1}, 0);
  position_ = state_.alias({B}, {1}, B);
  x_ = floats({B, c.hidden_size});
  qkv_ = floats({B, (H + 2 * K) * d});
  attended_ = floats({B, H * d});
  gated_ = floats({B, c.intermediate_size});
  logits_ = floats({B, c.vocab_size});
  parts_ = floats({B, H, S, d + 2});
  arrived_ = Tensor::zeros({B, H}, DType::I32, device_);
  host_ = empty_pinned(logits_.shape(), DType::F32, device_);
  told_ = empty_pinned({16 * B}, DType::U8, device_);
  numbers_ = to(Tensor::zeros({B, capacity}, DType::F64), device_);
  if (B == 1) prepare_rows();
}

// Finds out which stages leave their row prepared for the next.
void DevicePlan::prepare_rows() {
  Tensor x, attended, gated;  // rows on their way; those of equal stages are the same memory
  const auto room = [&](Tensor& row, const RowStage& from, const RowStage& next) {
    const int64_t bytes = kernels_.prepared_bytes(from, next);
    if (bytes > 0 && !row.defined()) row = Tensor::zeros({bytes}, DType::U8, device_);
    return bytes > 0 ? row : Tensor{};
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = layers_[i];
    const LlamaBlock& b = *l.block;
    const RowStage o{l.o.matrices, RowOutput::Add}, gate_up{l.gate_up.matrices, RowOutput::SiluMul},
        down{l.down.matrices, RowOutput::Add};
    const bool plain_o = l.o.plain(nullptr), plain_down = l.down.plain(nullptr),
               plain_gate_up = l.gate_up.plain(&b.post_attention_layernorm);
    if (plain_o && b.self_attn.head_dim % 32 == 0) l.o.prepared = room(attended, {}, o);
    if (plain_o && plain_gate_up) l.gate_up.prepared = room(x, o, gate_up);
    if (plain_gate_up && plain_down) l.down.prepared = room(gated, gate_up, down);
    if (i + 1 == layers_.size()) break;
    Layer& behind = layers_[i + 1];
    if (plain_down && behind.qkv.plain(&behind.block->input_layernorm))
      behind.qkv.prepared = room(x, down, {behind.qkv.matrices, RowOutput::Store});
  }
}

DevicePlan::~DevicePlan() {
  try {
    device_api(device_).sync(device_.index);  // a step that was begun ahead writes into told_
  } catch (const Error&) {                    // it was reported where it arose
  }
}

DecodeAttentionStage DevicePlan::attention(const nn::Attention& a, const nn::KVCache& cache) const {
  DecodeAttentionStage s;
  s.qkv = qkv_;
  if (a.q_norm) s.q_gain = a.q_norm->weight, s.q_eps = a.q_norm->eps;
  if (a.k_norm) s.k_gain = a.k_norm->weight, s.k_eps = a.k_norm->eps;
  s.cos = model_.rope().cos;
  s.sin = model_.rope().sin;
  s.position = position_;
  // A cache of codes rounds to them; else attention's own grid does.
  const nn::CacheQuant& kept = cache.quant();
  s.q = a.taps.q, s.k = kept.k ? kept.k : a.taps.k, s.v = kept.v ? kept.v : a.taps.v;
  s.keys = {cache.keys().floats, cache.keys().codes};
  s.values = {cache.values().floats, cache.values().codes};
  s.parts = parts_;
  s.arrived = arrived_;
  s.y = attended_;
  s.heads = a.heads, s.kv_heads = a.kv_heads, s.head_dim = a.head_dim;
  return s;
}

void DevicePlan::bind(std::vector<nn::KVCache>& caches) {
  bound_ = &caches;  // they may have moved, and a graph may still be to record
  const auto same = [](const nn::KVCache& cache, uint64_t id) { return cache.id() == id; };
  if (std::equal(caches.begin(), caches.end(), bound_ids_.begin(), bound_ids_.end(), same)) return;
  check(caches.front().keys().memory().device() == device_, "decode: the caches are not on {}",
        to_string(device_));
  bound_ids_.clear();
  for (const nn::KVCache& cache : caches) bound_ids_.push_back(cache.id());
  ahead_ = -1;
  graph_.emplace(device_, [this] { run(); });
  choosing_graph_.reset();
}

void DevicePlan::run() {
  const nn::Weight& table = model_.ends.embed_tokens.table;
  if (const auto* packed = std::get_if<std::shared_ptr<nn::PackedWeight>>(&table))
    packed_on(x_).packed_embedding(x_, dynamic_cast<const nn::PackedIntWeight&>(**packed).packed(),
                                   ids_);
  else
    on(x_).embedding(x_, std::get<Tensor>(table), ids_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    const LlamaBlock& b = *l.block;
    const auto next = [](const Product& p, const Tensor& gain) {
      return DecodeNext{p.prepared, p.prepared.defined() ? gain : Tensor{}, p.matrices};
    };
    kernels_.products(qkv_, behind(b.input_layernorm, l.qkv), l.qkv.matrices, RowOutput::Store, {});
    DecodeAttentionStage stage = attention(b.self_attn, (*bound_)[i]);
    stage.prepared = l.o.prepared;
    stage.next = l.o.matrices.front().stored();
    kernels_.attention(stage);
    kernels_.products(x_, plain_input(attended_, l.o), l.o.matrices, RowOutput::Add,
                      next(l.gate_up, b.post_attention_layernorm.weight));
    kernels_.products(gated_, behind(b.post_attention_layernorm, l.gate_up), l.gate_up.matrices,
                      RowOutput::SiluMul, next(l.down, {}));
    const bool last = i + 1 == layers_.size();
    kernels_.products(x_, plain_input(gated_, l.down), l.down.matrices, RowOutput::Add,
                      last
                          ? next(head_, {})
                          : next(layers_[i + 1].qkv, layers_[i + 1].block->input_layernorm.weight));
  }
  kernels_.products(logits_, behind(model_.ends.norm, head_), head_.matrices, RowOutput::Store, {});
}

void DevicePlan::step(std::span<const int32_t> tokens, int64_t at,
                      std::vector<nn::KVCache>& caches) {
  bind(caches);
  set_state(tokens, at);
  graph_->run();
  for (nn::KVCache& cache : caches) cache.advance(1);
}

void DevicePlan::set_state(std::span<const int32_t> tokens, int64_t at) {
  ahead_ = -1;
  std::array<int32_t, 2 * DecodePlan::kMaxBatch> state;
  std::fill(std::copy(tokens.begin(), tokens.end(), state.begin()), state.end(),
            static_cast<int32_t>(at));
  device_api(device_).copy(state_.raw(), device_, state.data(), Device{}, state_.nbytes());
}

int32_t DevicePlan::told(int64_t at, int64_t sequence) const {
  // The device writes page-locked memory while the host looks; an error of the device would leave
  // it waiting, so now and then it asks.
  const std::atomic_ref<int64_t> word(
      static_cast<int64_t*>(told_.raw())[at % 2 * batch_ + sequence]);
  for (auto since = std::chrono::steady_clock::now();;) {
    const int64_t w = word.load(std::memory_order_acquire);
    if (w >> 32 == at) return static_cast<int32_t>(w);
    if (std::chrono::steady_clock::now() - since < std::chrono::seconds(1)) continue;
    device_api(device_).sync(device_.index);
    since = std::chrono::steady_clock::now();
  }
}

void DevicePlan::choose(std::span<const int32_t> tokens, int64_t at,
                        std::vector<nn::KVCache>& caches, std::span<int32_t> chosen) {
  bind(caches);
  if (!choosing_graph_)
    choosing_graph_.emplace(device_, [this] {
      run();
      kernels_.choose(state_, told_, logits_, choice_);
    });
  if (ahead_ != at || ahead_changes_ != caches.front().changes() ||
      !std::equal(tokens.begin(), tokens.end(), ahead_tokens_.begin())) {
    set_state(tokens, at);
    device_api(device_).sync(device_.index);  // nothing is on its way that would write told_
    std::fill_n(static_cast<int64_t*>(told_.raw()), 2 * batch_, int64_t{-1});
    choosing_graph_->run();
  }
  const bool room = at + 1 < std::min(caches.front().capacity(), model_.context());
  if (room) choosing_graph_->run();
  for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = told(at, static_cast<int64_t>(i));
  ahead_ = room ? at + 1 : -1;
  std::copy(chosen.begin(), chosen.end(), ahead_tokens_.begin());
  for (nn::KVCache& cache : caches) cache.advance(1);
  ahead_changes_ = caches.front().changes();
}

// Tokens that top-k keeps of V.
int64_t kept_tokens(const SamplerOptions& s, int64_t V) {
  return s.temperature == 0 ? 1 : s.top_k == 0 ? V : std::min(s.top_k, V);
}

DrawnBy drawn_by(const SamplerOptions& s, int64_t V) {
  DrawnBy by{.top_k = kept_tokens(s, V)};
  if (by.top_k > 1) by.top_p = s.top_p, by.min_p = s.min_p, by.temperature = s.temperature;
  constexpr double kLargest = 1e30;  // a float, and far beyond every logit
  for (const auto& [id, bias] : s.logit_bias) by.bias[id] += bias;
  for (auto& [id, bias] : by.bias)
    if (std::isfinite(bias)) bias = std::clamp(bias, -kLargest, kLargest);
  return by;
}

bool DevicePlan::can_choose(const SamplerOptions& sampling) const {
  return !sampling.penalises() && kept_tokens(sampling, logits_.dim(1)) <= kDecodeMostTopK;
}

void DevicePlan::choose_by(const SamplerOptions& sampling, int64_t at,
                           std::span<const double> numbers) {
  ahead_ = -1;
  device_api(device_).sync(device_.index);  // nothing that is on its way reads what is written here
  if (DrawnBy by = drawn_by(sampling, logits_.dim(1)); by != drawn_by_) {
    TokenChoice choice{.top_k = by.top_k,
                       .top_p = by.top_p,
                       .min_p = by.min_p,
                       .temperature = by.temperature,
                       .numbers = numbers_};
    if (!by.bias.empty()) {
      std::vector<int32_t> ids;
      std::vector<float> bias;
      for (const auto& [id, value] : by.bias)
        ids.push_back(id), bias.push_back(static_cast<float>(value));
      const auto n = static_cast<int64_t>(ids.size());
      choice.bias_ids = to(Tensor::from<int32_t>(ids, {n}), device_);
      choice.bias = to(Tensor::from<float>(bias, {n}), device_);
    }
    choosing_graph_.reset();
    choice_ = std::move(choice);
    drawn_by_ = std::move(by);
  }
  const int64_t capacity = numbers_.dim(1), given = static_cast<int64_t>(numbers.size()) / batch_,
                n = std::clamp<int64_t>(capacity - at, 0, given);
  if (choice_.takes_largest() || n == 0) return;
  for (int64_t b = 0; b < batch_; ++b)
    device_api(device_).copy(numbers_.data<double>() + b * capacity + at, device_,
                             numbers.data() + b * given, Device{},
                             static_cast<size_t>(n) * sizeof(double));
}

std::span<const float> DevicePlan::logits() {
  device_api(device_).copy(host_.raw(), Device{}, logits_.raw(), device_, logits_.nbytes());
  return {host_.data<float>(), static_cast<size_t>(logits_.numel())};
}

}  // namespace

std::unique_ptr<DecodePlan::Impl> device_decode_plan(const Model& model, int64_t capacity,
                                                     int64_t batch) {
  return std::make_unique<DevicePlan>(model, capacity, batch);
}

std::string device_plan_unsupported(const Model& model) {
  const DecodeKernels* kernels = decode_kernels(model.device());
  if (!kernels) return fmt::format("{} has no kernels for it", to_string(model.device()));
  const ModelConfig& c = model.config();
  if (c.head_dim > 256 || c.head_dim % decode_elements(c.head_dim) != 0)
    return fmt::format("heads of {}", c.head_dim);
  for (const auto& block : model.blocks) {
    const nn::MLP& mlp = block->mlp;
    const nn::Attention& a = block->self_attn;
    const std::pair<Product, RowOutput> products[] = {
        {{&a.q_proj, &a.k_proj, &a.v_proj}, RowOutput::Store},
        {{&a.o_proj}, RowOutput::Add},
        {{&mlp.gate_proj, &mlp.up_proj}, RowOutput::SiluMul},
        {{&mlp.down_proj}, RowOutput::Add}};
    for (const auto& [product, output] : products)
      if (const char* reason = kernels->unsupported(product.matrices, output)) return reason;
  }
  const Product head{&model.ends.lm_head};
  if (const char* reason = kernels->unsupported(head.matrices, RowOutput::Store)) return reason;
  return "";
}

}  // namespace omq
