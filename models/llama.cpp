// LlamaBlock: names, sites, forward; and its reading.
#include "models/llama.h"

#include <cstring>

#include "autograd/ops.h"
#include "models/packed_model.h"

namespace omq {

Tensor LlamaBlock::forward(const Tensor& x, const nn::Positions& at, nn::KVCache* cache) const {
  const Tensor h = x + self_attn(input_layernorm(x), at, cache);
  return h + mlp(post_attention_layernorm(h));
}

std::vector<nn::NamedLinear> LlamaBlock::linears() {
  return {{"self_attn.q_proj", &self_attn.q_proj}, {"self_attn.k_proj", &self_attn.k_proj},
          {"self_attn.v_proj", &self_attn.v_proj}, {"self_attn.o_proj", &self_attn.o_proj},
          {"mlp.gate_proj", &mlp.gate_proj},       {"mlp.up_proj", &mlp.up_proj},
          {"mlp.down_proj", &mlp.down_proj}};
}

void LlamaBlock::visit(const nn::VisitFn& v) {
  auto part = [&v](std::string prefix, auto& module) {
    module.visit([&](std::string_view name, Tensor& t) { v(prefix + "." + std::string(name), t); });
  };
  part("input_layernorm", input_layernorm);
  if (self_attn.q_norm) part("self_attn.q_norm", *self_attn.q_norm);
  if (self_attn.k_norm) part("self_attn.k_norm", *self_attn.k_norm);
  part("post_attention_layernorm", post_attention_layernorm);
  for (auto& [name, linear] : linears()) part(name, *linear);
  if (taps().q_online) part("self_attn.q.online", *taps().q_online);
  if (taps().k_online) part("self_attn.k.online", *taps().k_online);
}

std::vector<nn::Site> LlamaBlock::sites() {
  const nn::HeadLayout heads{self_attn.heads, self_attn.kv_heads, self_attn.head_dim};
  std::vector<nn::Site> sites;
  // Rows and columns cannot be rescaled through an online transform that stands between them.
  if (!self_attn.q_proj.online)
    sites.push_back(nn::NormToLinears{&input_layernorm,
                                      {&self_attn.q_proj, &self_attn.k_proj, &self_attn.v_proj},
                                      &self_attn.q_proj});
  if (!mlp.up_proj.online)
    sites.push_back(
        nn::NormToLinears{&post_attention_layernorm, {&mlp.gate_proj, &mlp.up_proj}, &mlp.up_proj});
  if (!self_attn.o_proj.online)
    sites.push_back(nn::LinearToLinear{&self_attn.v_proj, &self_attn.o_proj, heads});
  // A norm on q and k stands between the projection and the product: rows cannot be rescaled
  // through it.
  if (!self_attn.q_norm) sites.push_back(nn::QueryKey{&self_attn.q_proj, &self_attn.k_proj, heads});
  if (!mlp.down_proj.online) sites.push_back(nn::UpToDown{&mlp.up_proj, &mlp.down_proj});
  return sites;
}

LlamaBlock empty_block(const ModelConfig& c) {
  LlamaBlock b;
  b.input_layernorm.eps = b.post_attention_layernorm.eps = c.rms_norm_eps;
  b.self_attn.heads = c.num_heads;
  b.self_attn.kv_heads = c.num_kv_heads;
  b.self_attn.head_dim = c.head_dim;
  if (c.qk_norm) {
    b.self_attn.q_norm = nn::RMSNorm{{}, {}, c.rms_norm_eps};
    b.self_attn.k_norm = nn::RMSNorm{{}, {}, c.rms_norm_eps};
  }
  return b;
}

namespace {

// A scale that is no number would spread, a zero point that is no code overflow the kernels' sums.
void check_grid(const PackedInt& w) {
  for (int64_t p = 0; p < w.panels(); ++p)
    for (int64_t g = 0; g < w.groups(); ++g) {
      const uint8_t* grid = w.data.data<uint8_t>() + p * w.panel_bytes() + g * w.block_bytes(0) +
                            PackedInt::code_bytes(w.group_columns(g), w.spec.bits);
      for (int64_t r = 0; r < kPanelRows; ++r) {
        check((grid[2 * r + 1] & 0x7c) != 0x7c,
              "the scale of row {}, group {} is not a finite number", p * kPanelRows + r, g);
        check(w.spec.symmetric || grid[2 * kPanelRows + r] <= w.spec.max_code(),
              "the zero point of row {}, group {} is {}, which is no code of {} bits",
              p * kPanelRows + r, g, grid[2 * kPanelRows + r], w.spec.bits);
      }
    }
}

}  // namespace

nn::Weight load_weight(const CheckpointReader& reader, const PackedConfig* packed,
                       const std::string& module, int64_t rows, int64_t cols, LoadAs as) {
  const std::string stored = module + ".packed";
  if (packed && reader.has(stored))
    return with_context(fmt::format("reading {} of {}", stored, reader.path().string()), [&] {
      const GroupSpec spec = packed->spec_of(module).stored();
      const Tensor data = reader.get(stored);
      nn::Weight weight = nn::packed_int_weight(data, rows, cols, spec);  // checks the size
      check_grid({.data = data, .rows = rows, .cols = cols, .spec = spec});
      return weight;
    });
  const Tensor w = reader.get(module + ".weight", {rows, cols});
  return as == LoadAs::F32 ? to(w, DType::F32) : w;
}

namespace {

// The transform called `name` in the configuration, into its place in the block.
void load_online(const CheckpointReader& reader, const std::string& prefix, const std::string& name,
                 const OnlineSpec& spec, LlamaBlock& block) {
  std::optional<nn::Kronecker>* place = nullptr;
  int64_t row = block.self_attn.head_dim;
  if (name == "self_attn.q") place = &block.taps().q_online;
  if (name == "self_attn.k") place = &block.taps().k_online;
  for (const auto& [linear_name, linear] : block.linears())
    if (linear_name == name) {
      place = &linear->online;
      row = linear->in_features();
    }
  check(place != nullptr,
        "quantization_config: online_transforms: a block has nothing that is called \"{}\"", name);
  check(nn::Kronecker::sizes_fit(spec.left, spec.right, row),
        "quantization_config: online_transforms: {}: factors of {} and {} (0: none) do not fit "
        "rows of {}",
        name, spec.left, spec.right, row);
  const auto factor = [&](const char* side, int64_t n) {
    if (n == 0) return Tensor{};
    return to(reader.get(fmt::format("{}{}.online.{}", prefix, name, side), {n, n}), DType::F32);
  };
  const Tensor left = factor("left", spec.left);
  *place = nn::Kronecker{left, factor("right", spec.right)};
}

bool same_values(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return a.shape() == b.shape() && std::memcmp(a.raw(), b.raw(), a.nbytes()) == 0;
}

// Matrices of equal factors share them, so that their common input is transformed once.
void share_online(LlamaBlock& block) {
  const auto linears = block.linears();
  for (size_t i = 1; i < linears.size(); ++i)
    for (size_t j = 0; j < i; ++j) {
      auto &k = linears[i].linear->online, &earlier = linears[j].linear->online;
      if (k && earlier && same_values(k->left, earlier->left) &&
          same_values(k->right, earlier->right))
        k = earlier;
    }
}

}  // namespace

std::unique_ptr<LlamaBlock> load_block(const CheckpointReader& reader, int i, LoadAs as) {
  const ModelConfig& c = reader.config();
  const std::optional<PackedConfig> packed = PackedConfig::of(c);
  const std::string prefix = fmt::format("model.layers.{}.", i);
  auto block = std::make_unique<LlamaBlock>(empty_block(c));
  auto vector = [&](const std::string& name, int64_t n) {
    return to(reader.get(prefix + name, {n}), DType::F32);
  };
  auto norm = [&](nn::RMSNorm& layer, const std::string& name, int64_t n) {
    layer.weight = vector(name + ".weight", n);
    if (reader.has(prefix + name + ".bias")) layer.bias = vector(name + ".bias", n);
  };
  norm(block->input_layernorm, "input_layernorm", c.hidden_size);
  norm(block->post_attention_layernorm, "post_attention_layernorm", c.hidden_size);
  if (c.qk_norm) {
    norm(*block->self_attn.q_norm, "self_attn.q_norm", c.head_dim);
    norm(*block->self_attn.k_norm, "self_attn.k_norm", c.head_dim);
  }
  auto linear = [&](nn::Linear& layer, const std::string& name, int64_t rows, int64_t cols,
                    bool bias) {
    layer.weight = load_weight(reader, packed ? &*packed : nullptr, prefix + name, rows, cols, as);
    if (bias || reader.has(prefix + name + ".bias")) layer.bias = vector(name + ".bias", rows);
  };
  nn::Attention& a = block->self_attn;
  linear(a.q_proj, "self_attn.q_proj", c.q_size(), c.hidden_size, c.attention_bias);
  linear(a.k_proj, "self_attn.k_proj", c.kv_size(), c.hidden_size, c.attention_bias);
  linear(a.v_proj, "self_attn.v_proj", c.kv_size(), c.hidden_size, c.attention_bias);
  linear(a.o_proj, "self_attn.o_proj", c.hidden_size, c.q_size(), c.attention_out_bias);
  linear(block->mlp.gate_proj, "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  linear(block->mlp.up_proj, "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  linear(block->mlp.down_proj, "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  if (packed) {
    nn::quantize_activations(*block, packed->activations.quant());
    for (const auto& [name, spec] : packed->online) load_online(reader, prefix, name, spec, *block);
    share_online(*block);
    if (packed->activations.learned_clips)
      for (auto& [name, layer] : block->linears()) {
        const std::string stored = prefix + name + ".input_clip";
        const double share = to(reader.get(stored, {1}), DType::F64).item<double>();
        check(share > 0 && share <= 1, "{} = {}, above 0 and at most 1 wanted", stored, share);
        layer->input_quant->clip = share;
      }
  }
  return block;
}

}  // namespace omq
