// Opens what is traced and puts the steps in a row.
#include "tools/trace.h"

#include <map>

#include "autograd/ops.h"
#include "models/model.h"
#include "models/packed_model.h"
#include "nn/packed_weight.h"
#include "tools/trace_steps.h"

namespace omq {
namespace {

using lesson::FilePlace;
using lesson::Group;
using lesson::Result;
using nlohmann::json;

// ---- opening ----

struct Side {
  std::unique_ptr<CheckpointReader> reader;
  std::unique_ptr<LlamaBlock> block;
  nn::NamedLinear linear;
};

nn::NamedLinear linear_of(nn::Block& block, const std::string& name) {
  std::string names;
  for (const nn::NamedLinear& l : block.linears()) {
    if (l.name == name || l.name.ends_with("." + name)) return l;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", l.name);
  }
  fail("linear \"{}\": there are {}", name, names);
}

Side open_side(const std::filesystem::path& path, const TraceOf& of, bool packed) {
  Side s{open_checkpoint(path), nullptr, {}};
  const bool is_packed = PackedConfig::of(s.reader->config()).has_value();
  check(is_packed || !packed, "{}: is not quantised; the output of omq-quant is wanted",
        path.string());
  check(!is_packed || packed, "{}: is quantised already; the original is wanted", path.string());
  const auto count = s.reader->config().num_layers;
  check(of.layer >= 0 && of.layer < count, "layer {}: {} has layers 0 to {}", of.layer,
        path.string(), count - 1);
  s.block = load_block(*s.reader, of.layer, packed ? LoadAs::Stored : LoadAs::F32);
  s.linear = linear_of(*s.block, of.linear);
  check(s.linear.linear->is_packed() == packed, "{}: {} of layer {} is not packed", path.string(),
        s.linear.name, of.layer);
  return s;
}

Group group_of(const Side& s, const TraceOf& of, const GroupSpec& spec) {
  const Group g{fmt::format("model.layers.{}.{}", of.layer, s.linear.name),
                s.linear.linear->out_features(),
                s.linear.linear->in_features(),
                of.row,
                of.group,
                spec};
  check(g.row >= 0 && g.row < g.rows, "row {}: {} has rows 0 to {}", g.row, g.module, g.rows - 1);
  check(g.group >= 0 && g.group < spec.groups(g.cols),
        "group {}: {} has groups 0 to {}, {} columns in groups of {}", g.group, g.module,
        spec.groups(g.cols) - 1, g.cols, spec.group_cols(g.cols));
  return g;
}

// The 16 rows of the group's panel.
Tensor panel_rows(const Tensor& w, const Group& g) {
  const int64_t first = g.panel() * kPanelRows;
  return contiguous(slice(w, 0, first, std::min(g.rows, first + kPanelRows)));
}

FilePlace place_in_file(const CheckpointReader& reader, const std::string& tensor) {
  for (const CheckpointFile& f : reader.files()) {
    if (f.path.filename() == "config.json") continue;
    const SafetensorsFile file(f.path);
    if (const SafetensorsEntry* e = file.find(tensor))
      return {f.path, static_cast<int64_t>(file.data_offset() + e->begin)};
  }
  fail("{}: no file holds {}", reader.path().string(), tensor);
}

// Whether norms or biases of the two blocks differ: then scales and shifts were folded into the
// block, and w of the checkpoint is not what was rounded.
bool transformed(nn::Block& model, nn::Block& packed) {
  std::map<std::string, std::vector<float>, std::less<>> before;
  model.visit([&](std::string_view name, Tensor& t) {
    if (t.ndim() == 1) before.emplace(name, t.to_vector<float>());
  });
  bool differ = false;
  packed.visit([&](std::string_view name, Tensor& t) {
    if (t.ndim() != 1) return;
    const auto it = before.find(name);
    differ = differ || it == before.end() || it->second != t.to_vector<float>();
  });
  return differ;
}

// Whether the method by this title moved the weights, or did not round them to nearest.
bool rounds_otherwise(const std::string& title) {
  for (const char* piece : {"--round gptq", "--round learned", "--train weights"})
    if (title.find(piece) != std::string::npos) return true;
  for (const auto& m : quant::methods())
    if (m.name == title.substr(0, title.find(' '))) {
      const quant::Recipe r = m.make({});
      return r.line.round != "nearest" || r.train.weights;
    }
  return false;
}

// ---- the two ways ----

void describe(json& out, const Group& g, const std::string& method) {
  out["module"] = g.module;
  out["shape"] = {g.rows, g.cols};
  out["row"] = g.row;
  out["group"] = g.group;
  out["groups"] = g.spec.groups(g.cols);
  out["columns"] = {g.begin(), g.end()};
  out["method"] = method;
  out["bits"] = g.spec.bits;
  out["group_size"] = g.spec.group_size;
  out["symmetric"] = g.spec.symmetric;
}

// As calibration would quantise it before it has learned anything.
void trace_forward(json& out, const Side& model, const TraceOf& of, const quant::Recipe& recipe) {
  check(!recipe.rotation,
        "method {} rotates the network before it rounds; trace what it wrote: --packed DIR",
        recipe.name);
  const Group g = group_of(model, of, recipe.spec.weight());
  const Tensor w = panel_rows(model.linear.linear->dense(), g);
  const auto clip = recipe.clip(w, g.spec);
  const quant::Grid grid = clip->grid(w);
  Result r;
  r.scale = to(to(grid.scale, DType::F16), DType::F32);
  r.zero = grid.zero;
  r.codes = quant::round_nearest()->codes(w, {r.scale, r.zero}, g.spec, {});
  r.panel = pack_codes(r.codes, r.scale, r.zero, stored_spec(g.spec));
  r.dequantised = nn::PackedIntWeight(r.panel).dequantize();

  json& steps = out["steps"];
  steps.push_back(lesson::weights_step(w, model.reader->path().string(), g));
  const json range = lesson::range_step(w, g), clipping = lesson::clipping_step(*clip, range, g);
  const json codes = lesson::codes_step(r, g), place = lesson::place_step(r.panel, g, nullptr),
             bytes = lesson::bytes_step(r.panel, g, place);
  for (const json& s : {range, clipping, lesson::grid_step(grid, clipping, g),
                        lesson::scale_step(lesson::at(grid.scale, g), r, g), codes, place, bytes,
                        lesson::back_step(r, g, codes, place, bytes)})
    steps.push_back(s);
  describe(out, g, recipe.name);
}

// From the bytes of a file; with `model` from both ends.
void trace_stored(json& out, const Side& packed, const Side* model, const TraceOf& of) {
  const auto config = *PackedConfig::of(packed.reader->config());
  const std::string module = fmt::format("model.layers.{}.{}", of.layer, packed.linear.name);
  const MatrixSpec& m = config.spec_of(module);
  const Group g =
      group_of(packed, of, {.bits = m.bits, .group_size = m.group_size, .symmetric = m.symmetric});
  const auto& weight = std::get<std::shared_ptr<nn::PackedWeight>>(packed.linear.linear->weight);
  Result r;
  r.panel = dynamic_cast<const nn::PackedIntWeight&>(*weight).packed();
  r.panel.data = slice(r.panel.data, 0, g.panel(), g.panel() + 1);
  r.panel.rows = std::min(kPanelRows, g.rows - g.panel() * kPanelRows);
  const Unpacked u = unpack_codes(r.panel);
  r.codes = u.codes, r.scale = u.scale, r.zero = u.zero;
  r.dequantised = panel_rows(weight->dequantize(), g);

  const FilePlace file = place_in_file(*packed.reader, module + ".packed");
  const json codes = lesson::codes_step(r, g), place = lesson::place_step(r.panel, g, &file),
             bytes = lesson::bytes_step(r.panel, g, place);
  json back = lesson::back_step(r, g, codes, place, bytes);
  json& steps = out["steps"];
  const json scale = lesson::scale_step({}, r, g);
  describe(out, g, config.method);
  if (!model) {
    for (const json& s : {place, bytes, scale, codes, back}) steps.push_back(s);
    return;
  }
  const nn::Linear& original = *model->linear.linear;
  check(original.out_features() == g.rows && original.in_features() == g.cols,
        "{}: [{}, {}] in {}, [{}, {}] in {}; they are not of one model", module,
        original.out_features(), original.in_features(), model->reader->path().string(), g.rows,
        g.cols, packed.reader->path().string());
  const Tensor w = panel_rows(original.dense(), g);
  const auto nearest = quant::round_nearest()->codes(w, {r.scale, r.zero}, g.spec, {});
  const auto mine = lesson::of_group<uint8_t>(nearest, g),
             stored = lesson::of_group<uint8_t>(r.codes, g);
  const bool folded = mine != stored && (rounds_otherwise(config.method) ||
                                         transformed(*model->block, *packed.block));
  out["transformed"] = folded;
  const json range = lesson::range_step(w, g);
  steps.push_back(lesson::weights_step(w, model->reader->path().string(), g));
  steps.push_back(range);
  if (!folded) {
    steps.push_back(lesson::clipped_step(r, range, g));
    lesson::prove(back, "w, rounded to nearest on the stored grid, gives the stored codes",
                  mine == stored);
  }
  for (const json& s : {scale, codes, place, bytes, back}) steps.push_back(s);
}

}  // namespace

json trace(const TraceOf& of, const std::filesystem::path& model,
           const std::filesystem::path& packed, const quant::Recipe& recipe) {
  NoGrad off;
  json out = {{"model", model.empty() ? json(nullptr) : json(model.string())},
              {"packed", packed.empty() ? json(nullptr) : json(packed.string())},
              {"steps", json::array()}};
  std::optional<Side> dense;
  if (!model.empty()) dense = open_side(model, of, false);
  if (packed.empty())
    trace_forward(out, *dense, of, recipe);
  else
    trace_stored(out, open_side(packed, of, true), dense ? &*dense : nullptr, of);
  bool holds = true;
  for (const json& p : out["steps"].back()["proofs"]) holds = holds && p["holds"].get<bool>();
  out["holds"] = holds;
  return out;
}

}  // namespace omq
