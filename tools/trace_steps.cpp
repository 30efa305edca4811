// Takes the numbers. Nothing is computed here that the library computes.
#include "tools/trace_steps.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <memory>

#include "autograd/ops.h"
#include "tensor/numeric.h"

namespace omq::lesson {

using nlohmann::json;

template <class T> std::vector<T> of_group(const Tensor& rows, const Group& g) {
  const Tensor row = slice(rows, 0, g.in_panel(), g.in_panel() + 1);
  return contiguous(slice(row, 1, g.begin(), g.end())).template to_vector<T>();
}
template std::vector<float> of_group(const Tensor&, const Group&);
template std::vector<uint8_t> of_group(const Tensor&, const Group&);

float at(const Tensor& grid, const Group& g) {
  const Tensor row = slice(grid, 0, g.in_panel(), g.in_panel() + 1);
  return slice(row, 1, g.group, g.group + 1).item<float>();
}

namespace {

std::string hex(const uint8_t* bytes, int64_t n) {
  std::string text;
  for (int64_t i = 0; i < n; ++i) text += fmt::format("{:02x}", bytes[i]);
  return text;
}

// What a page tells of a step beside its numbers.
json step(const char* name, const char* title, const std::string& equation, const char* function,
          const char* file, const char* test) {
  return {{"step", name},         {"title", title}, {"equation", equation},
          {"function", function}, {"source", file}, {"test", test}};
}

}  // namespace

json weights_step(const Tensor& w, const std::string& source, const Group& g) {
  json j = step("weights", "The weights", "w, in float32", "load_weight", "models/llama.cpp",
                "tests/models/checkpoint_test.cpp");
  j["from"] = source;
  j["w"] = of_group<float>(w, g);
  return j;
}

json range_step(const Tensor& w, const Group& g) {
  const Range r = group_range(w, g.spec);
  const std::vector<float> values = of_group<float>(w, g);
  const auto hi = std::max_element(values.begin(), values.end()),
             lo = std::min_element(values.begin(), values.end());
  json j = step("range", "Their range", "max w and min w, 0 among them (spec omniquant §2.2)",
                "group_range", "autograd/ops/reduce.cpp", "tests/autograd/ste_test.cpp");
  j["max"] = at(r.hi, g);
  j["min"] = at(r.lo, g);
  j["largest"] = {{"w", *hi}, {"column", g.begin() + (hi - values.begin())}};
  j["smallest"] = {{"w", *lo}, {"column", g.begin() + (lo - values.begin())}};
  return j;
}

json clipping_step(const quant::Clip& clip, const json& range, const Group& g) {
  const nn::ParamGroup p = clip.params();
  const bool clips = p.name == "lwc";
  json j = !clips ? step("clipping", "Clipping", "none: γ = β = 1", "minmax_clip",
                         "quant/clip_minmax.cpp", "tests/quant/clip_test.cpp")
                  : step("clipping", "Clipping", "Eq. 2: γ = σ(u), β = σ(l)", "LearnedClip",
                         "quant/clip_lwc.cpp", "tests/quant/clip_test.cpp");
  j["gamma"] = j["beta"] = 1.0;
  for (size_t i = 0; clips && i < p.params.size(); ++i) {
    const bool upper = p.names.at(i) == "gamma_logit";
    j[upper ? "u" : "l"] = at(p.params[i].detach(), g);
    j[upper ? "gamma" : "beta"] = at(sigmoid(p.params[i].detach()), g);
  }
  j["hi"] = j["gamma"].get<double>() * range["max"].get<double>();
  j["lo"] = j["beta"].get<double>() * range["min"].get<double>();
  return j;
}

json clipped_step(const Result& r, const json& range, const Group& g) {
  json j =
      step("clipped", "Clipping, as the stored grid tells", "Eq. 2: (2ᵇ − 1)·h = γ·max w − β·min w",
           "LearnedClip", "quant/clip_lwc.cpp", "tests/quant/clip_test.cpp");
  const double h = at(r.scale, g), top = g.spec.max_code();
  const double whole = range["max"].get<double>() - range["min"].get<double>();
  j["span"] = g.spec.symmetric ? 2 * h * ((1 << (g.spec.bits - 1)) - 0.5) : h * top;
  j["range"] = g.spec.symmetric
                   ? 2 * std::max(range["max"].get<double>(), -range["min"].get<double>())
                   : whole;
  return j;
}

json grid_step(const quant::Grid& grid, const json& clipping, const Group& g) {
  const char* equation = g.spec.symmetric
                             ? "h = max(|γ·max w|, |β·min w|) / (2ᵇ⁻¹ − ½),  z = 2ᵇ⁻¹"
                             : "Eq. 2: h = (γ·max w − β·min w) / (2ᵇ − 1),  z = −⌊β·min w / h⌉";
  json j = step("grid", "The grid", equation, "affine_grid", "quant/clip_minmax.cpp",
                "tests/quant/clip_test.cpp");
  j["hi"] = clipping["hi"];
  j["lo"] = clipping["lo"];
  j["symmetric"] = g.spec.symmetric;
  j["bits"] = g.spec.bits;
  j["h"] = at(grid.scale, g);
  j["z"] = at(grid.zero, g);
  return j;
}

json scale_step(std::optional<float> exact, const Result& r, const Group& g) {
  json j =
      step("scale", "The scale that is stored", "h in float16, rounded before any code is chosen",
           "f32_to_f16_bits", "tensor/numeric.h", "tests/tensor/numeric_test.cpp");
  if (exact) j["before"] = *exact;
  j["h"] = at(r.scale, g);
  j["z"] = at(r.zero, g);
  j["f16"] = fmt::format("{:04x}", f32_to_f16_bits(at(r.scale, g)));
  return j;
}

json codes_step(const Result& r, const Group& g) {
  json j = step("codes", "Codes, and what they stand for",
                "Eq. 2: q = clamp(⌊w/h⌉ + z, 0, 2ᵇ − 1),  ŵ = (q − z)·h", "quantize_codes",
                "quant/round_nearest.cpp", "tests/quant/pack_test.cpp");
  j["h"] = at(r.scale, g);
  j["z"] = at(r.zero, g);
  j["bits"] = g.spec.bits;
  j["q"] = of_group<uint8_t>(r.codes, g);
  j["dequantised"] = of_group<float>(r.dequantised, g);
  return j;
}

json place_step(const PackedInt& panel, const Group& g, const FilePlace* stored) {
  json j =
      step("place", "The place in the panel", "panel16: 16 rows × one group of columns a block",
           "PackedInt", "tensor/packed.h", "tests/tensor/packed_test.cpp");
  const int64_t columns = panel.group_columns(g.group);
  const int64_t codes = PackedInt::code_bytes(columns, panel.spec.bits);
  j["panel"] = g.panel();
  j["row_in_panel"] = g.in_panel();
  j["stored_bits"] = panel.spec.bits;
  j["columns"] = columns;
  j["padded_columns"] = PackedInt::padded_columns(columns, panel.spec.bits);
  j["code_bytes"] = codes;
  j["block_bytes"] = panel.block_bytes(g.group);
  j["panel_at"] = g.panel() * panel.panel_bytes();  // in the tensor
  j["block_at"] = g.group * panel.block_bytes(0);   // in the panel
  j["scale_at"] = codes + 2 * g.in_panel();         // in the block
  if (!panel.spec.symmetric) j["zero_at"] = codes + 2 * kPanelRows + g.in_panel();
  if (!stored) return j;
  j["file"] = stored->file.string();
  j["tensor_at"] = stored->tensor_at;
  j["file_at"] = stored->tensor_at + g.panel() * panel.panel_bytes() + j["block_at"].get<int64_t>();
  return j;
}

namespace {

// Where the bits of one row's codes lie in a block: byte and bit, lowest first, for each column.
// Asked of pack_codes itself: for each bit of a code, one block in which it is set in all columns
// tells the places, and one block for each binary digit of the column's number tells whose each is.
std::vector<std::vector<std::pair<int64_t, int>>> bit_places(int64_t columns, int bits,
                                                             int64_t row) {
  const Tensor none = Tensor::zeros({kPanelRows, 1});
  const auto block = [&](int bit, int digit) {  // digit −1: all columns
    Tensor codes = Tensor::zeros({kPanelRows, columns}, DType::U8);
    for (int64_t c = 0; c < columns; ++c)
      if (digit < 0 || (c >> digit & 1))
        codes.data<uint8_t>()[row * columns + c] = static_cast<uint8_t>(1 << bit);
    return pack_codes(codes, none, none, {.bits = bits}).data.to_vector<uint8_t>();
  };
  std::vector<std::vector<std::pair<int64_t, int>>> places(static_cast<size_t>(columns));
  const int digits = std::bit_width(static_cast<uint64_t>(columns - 1));
  for (int bit = 0; bit < bits; ++bit) {
    const std::vector<uint8_t> all = block(bit, -1);
    std::vector<std::vector<uint8_t>> by_digit;
    for (int d = 0; d < digits; ++d) by_digit.push_back(block(bit, d));
    for (size_t byte = 0; byte < all.size(); ++byte)
      for (int b = 0; b < 8; ++b) {
        if (!(all[byte] >> b & 1)) continue;
        size_t column = 0;
        for (size_t d = 0; d < by_digit.size(); ++d)
          column |= static_cast<size_t>(by_digit[d][byte] >> b & 1) << d;
        places[column].emplace_back(static_cast<int64_t>(byte), b);
      }
  }
  return places;
}

}  // namespace

json bytes_step(const PackedInt& panel, const Group& g, const json& place) {
  json j =
      step("bytes", "The bytes", "where each bit of a code lies: the drawing in tensor/packed.h",
           "pack_codes", "tensor/packed.cpp", "tests/tensor/packed_test.cpp");
  const uint8_t* block = panel.data.data<uint8_t>() + place["block_at"].get<int64_t>();
  const auto places = bit_places(panel.group_columns(g.group), panel.spec.bits, g.in_panel());
  std::vector<int64_t> bytes;
  j["bits"] = json::array();
  for (const auto& code : places) {
    json one = json::array();
    for (const auto& [byte, bit] : code) {
      one.push_back({byte, bit});
      bytes.push_back(byte);
    }
    j["bits"].push_back(one);
  }
  std::sort(bytes.begin(), bytes.end());
  bytes.erase(std::unique(bytes.begin(), bytes.end()), bytes.end());
  j["codes"] = json::array();  // runs of bytes that hold codes of this row
  for (size_t i = 0; i < bytes.size();) {
    size_t n = 1;
    while (i + n < bytes.size() && bytes[i + n] == bytes[i] + static_cast<int64_t>(n)) ++n;
    j["codes"].push_back(
        {{"at", bytes[i]}, {"hex", hex(block + bytes[i], static_cast<int64_t>(n))}});
    i += n;
  }
  j["scale"] = hex(block + place["scale_at"].get<int64_t>(), 2);
  if (place.contains("zero_at")) j["zero"] = hex(block + place["zero_at"].get<int64_t>(), 1);
  return j;
}

namespace {

// The file, read by plain means.
std::string read_bytes(const std::filesystem::path& file, int64_t from, int64_t n) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> in(std::fopen(file.c_str(), "rb"),
                                                           &std::fclose);
  std::string bytes(static_cast<size_t>(n), '\0');
  check(in && fseeko(in.get(), from, SEEK_SET) == 0 &&
            std::fread(bytes.data(), 1, bytes.size(), in.get()) == bytes.size(),
        "{}: cannot be read at byte {}", file.string(), from);
  return bytes;
}

int code_by_bits(const uint8_t* block, const json& places) {
  int code = 0, k = 0;
  for (const json& p : places) code |= (block[p[0].get<int64_t>()] >> p[1].get<int>() & 1) << k++;
  return code;
}

}  // namespace

void prove(json& step, const std::string& what, bool holds) {
  step["proofs"].push_back({{"what", what}, {"holds", holds}});
}

json back_step(const Result& r, const Group& g, const json& codes, const json& place,
               const json& bytes) {
  json j = step("back", "And back", "ŵ = (q − z)·h", "unpack_codes", "tensor/packed.cpp",
                "tests/tensor/packed_test.cpp");
  const Unpacked u = unpack_codes(r.panel);
  const std::vector<uint8_t> q = of_group<uint8_t>(r.codes, g);
  const std::vector<float> weights = of_group<float>(r.dequantised, g);
  const uint8_t* block = r.panel.data.data<uint8_t>() + place["block_at"].get<int64_t>();
  const float h = at(u.scale, g), z = at(u.zero, g);
  j["h"] = h;
  j["z"] = z;
  j["q"] = of_group<uint8_t>(u.codes, g);
  bool by_bits = true, by_formula = true;
  for (size_t i = 0; i < q.size(); ++i) {
    by_bits = by_bits && code_by_bits(block, bytes["bits"][i]) == q[i];
    by_formula = by_formula && (static_cast<float>(q[i]) - z) * h == weights[i];
  }
  prove(j, "unpack_codes gives the codes, the scale and the zero point above",
        j["q"] == codes["q"] && j["h"] == codes["h"] && j["z"] == codes["z"]);
  prove(j, "the bits at the places above, put together, are the codes", by_bits);
  prove(j, "(q − z)·h is, bit for bit, what the kernels make of the bytes", by_formula);
  if (place.contains("file_at")) {
    const std::string read =
        read_bytes(place["file"].get<std::string>(), place["file_at"].get<int64_t>(),
                   place["block_bytes"].get<int64_t>());
    prove(j, "the block, read from the file at its place, holds these bytes",
          std::equal(read.begin(), read.end(), reinterpret_cast<const char*>(block)));
  }
  return j;
}

}  // namespace omq::lesson
