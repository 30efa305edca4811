// omq-quant trace: the numbers of a group against plain arithmetic, its bytes against the drawing
// in tensor/packed.h and the file read by plain means, what it says of itself, what it refuses.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {
namespace {

using nlohmann::json;

const json& step(const json& trace, const std::string& name) {
  for (const json& s : trace["steps"])
    if (s["step"] == name) return s;
  FAIL("no step " << name);
  return trace;
}

bool has_step(const json& trace, const std::string& name) {
  return std::any_of(trace["steps"].begin(), trace["steps"].end(),
                     [&](const json& s) { return s["step"] == name; });
}

json traced(const std::string& arguments) {
  CAPTURE(arguments);
  const Outcome o = run_program("omq-quant", "trace --json " + arguments);
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  return json::parse(o.out);
}

size_t columns_of(std::string_view line) {
  return static_cast<size_t>(
      std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

// ---- a packed file, read without the library ----

double half(const std::string& bytes, size_t at) {
  const int v = static_cast<unsigned char>(bytes[at]) | static_cast<unsigned char>(bytes[at + 1])
                                                            << 8;
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  const double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return v >> 15 ? -size : size;
}

// Where a tensor's data begins in a safetensors file.
size_t data_of(const std::string& file, const std::string& tensor) {
  uint64_t header = 0;
  for (size_t i = 8; i-- > 0;) header = header << 8 | static_cast<unsigned char>(file[i]);
  const json j = json::parse(file.substr(8, header));
  return 8 + header + j[tensor]["data_offsets"][0].get<size_t>();
}

// The code of column c and row r (of 16), as packed.h draws it.
int drawn_code(const std::string& file, size_t block, int bits, size_t r, size_t c) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(file[block + i]); };
  const size_t j = c % 4;
  if (bits == 8) return byte(c / 4 * 64 + 4 * r + j);
  if (bits == 4) return byte(c / 8 * 64 + 4 * r + j) >> (c % 8 / 4 * 4) & 15;
  if (bits == 2) return byte(c / 16 * 64 + 4 * r + j) >> (c % 16 / 4 * 2) & 3;
  const size_t at = c / 32 * 192 + 4 * r + j, quad = c % 32 / 4;
  if (quad < 6) return byte(at + quad / 2 * 64) >> (quad % 2 * 3) & 7;
  return byte(at + (quad - 6) * 64) >> 6 | (byte(at + 128) >> quad & 1) << 2;
}

// Bytes of the trace at its places in the file, and the codes that the drawing finds there.
void check_file(const json& t, const std::filesystem::path& model) {
  const std::string file = read_file(model / "model.safetensors");
  const json &place = step(t, "place"), &bytes = step(t, "bytes"), &codes = step(t, "codes");
  const auto number = [&](const char* key) { return place[key].get<size_t>(); };
  CHECK(place["file"] == (model / "model.safetensors").string());
  const size_t tensor = data_of(file, t["module"].get<std::string>() + ".packed");
  CHECK(number("tensor_at") == tensor);
  const size_t block = tensor + number("panel_at") + number("block_at");
  CHECK(number("file_at") == block);
  const auto at = [&](size_t from, size_t n) {
    std::string hex;
    for (size_t i = 0; i < n; ++i)
      hex += fmt::format("{:02x}", static_cast<unsigned char>(file[block + from + i]));
    return hex;
  };
  size_t of_codes = 0;
  for (const json& run : bytes["codes"]) {
    const std::string hex = run["hex"].get<std::string>();
    CHECK(at(run["at"].get<size_t>(), hex.size() / 2) == hex);
    of_codes += hex.size() / 2;
  }
  CHECK(of_codes > 0);
  CHECK(at(number("scale_at"), 2) == bytes["scale"].get<std::string>());
  CHECK(half(file, block + number("scale_at")) == codes["h"].get<double>());
  if (place.contains("zero_at")) {
    CHECK(at(number("zero_at"), 1) == bytes["zero"].get<std::string>());
    CHECK(std::stoi(bytes["zero"].get<std::string>(), nullptr, 16) == codes["z"].get<int>());
  }
  const auto bits = place["stored_bits"].get<int>();
  for (size_t c = 0; c < codes["q"].size(); ++c) {
    CAPTURE(c);
    const int code = codes["q"][c].get<int>();
    CHECK(drawn_code(file, block, bits, number("row_in_panel"), c) == code);
    int by_bits = 0;
    for (size_t k = 0; k < bytes["bits"][c].size(); ++k) {
      const json& p = bytes["bits"][c][k];
      const int byte = static_cast<unsigned char>(file[block + p[0].get<size_t>()]);
      by_bits |= (byte >> p[1].get<int>() & 1) << k;
    }
    CHECK(by_bits == code);
  }
}

}  // namespace

TEST_CASE("trace: the way from w to codes is the paper's, by plain arithmetic") {
  const Workshop w;
  const std::string model = "-m " + w.path("model") + " --linear mlp.down_proj --layer 1 --row 19 ";
  for (const int bits : {2, 3, 4, 8})
    for (const std::string method : {"omniquant", "rtn"}) {
      CAPTURE(bits);
      CAPTURE(method);
      const json t = traced(
          fmt::format("{} --group 2 --wbits {} --group-size 32 --method {}", model, bits, method));
      CHECK(t["columns"] == json{64, 72});  // the last group is short
      CHECK(t["holds"] == true);
      const auto weights = step(t, "weights")["w"].get<std::vector<double>>();
      REQUIRE(weights.size() == 8);
      double hi = 0, lo = 0;
      for (const double v : weights) hi = std::max(hi, v), lo = std::min(lo, v);
      CHECK(step(t, "range")["max"].get<double>() == hi);
      CHECK(step(t, "range")["min"].get<double>() == lo);
      const double factor = method == "rtn" ? 1 : 1 / (1 + std::exp(-4.0));
      CHECK(step(t, "clipping")["gamma"].get<double>() == doctest::Approx(factor).epsilon(1e-6));
      CHECK(step(t, "clipping")["beta"].get<double>() == doctest::Approx(factor).epsilon(1e-6));
      CHECK(step(t, "clipping").contains("u") == (method == "omniquant"));
      const double top = (1 << bits) - 1, h = factor * (hi - lo) / top;
      CHECK(step(t, "grid")["h"].get<double>() == doctest::Approx(h).epsilon(1e-6));
      const double z = std::nearbyint(-factor * lo / h);
      CHECK(step(t, "grid")["z"].get<double>() == z);
      const double stored = step(t, "scale")["h"].get<double>();
      CHECK(std::abs(stored / h - 1) <= 0x1p-11 + 1e-6);
      for (size_t i = 0; i < weights.size(); ++i) {
        const double q = std::clamp(std::nearbyint(weights[i] / stored) + z, 0.0, top);
        CHECK(step(t, "codes")["q"][i].get<double>() == q);
        CHECK(step(t, "codes")["dequantised"][i].get<double>() ==
              doctest::Approx((q - z) * stored).epsilon(1e-6));
      }
      CHECK(step(t, "back")["q"] == step(t, "codes")["q"]);
    }
}

TEST_CASE("trace: a packed model's group is the bytes of its file") {
  const Workshop w;
  for (const std::string setting : {"--wbits 2 --group-size 32", "--wbits 3 --group-size 40",
                                    "--wbits 4", "--wbits 4 --group-size 32 --symmetric",
                                    "--wbits 6 --group-size 32", "--wbits 8 --symmetric"}) {
    CAPTURE(setting);
    REQUIRE(w.quant(fmt::format("--method rtn -m {} -o {} --force {}", w.path("model"),
                                w.path("out"), setting))
                .code == 0);
    for (const std::string where :
         {"--linear q_proj --row 0", "--linear down_proj --layer 1 --row 31",
          "--linear up_proj --row 71"}) {
      const json alone = traced("-m " + w.path("out") + " " + where);
      check_file(alone, w.dir / "out");
      CHECK_FALSE(has_step(alone, "weights"));
      const json both =
          traced(fmt::format("-m {} --packed {} {}", w.path("model"), w.path("out"), where));
      check_file(both, w.dir / "out");
      CHECK(step(both, "codes") == step(alone, "codes"));
      CHECK(both["transformed"] == false);
      CHECK(step(both, "back")["proofs"].size() == 5);
      // Without the file the same numbers come out of the weights alone: rtn learns nothing.
      const json start =
          traced(fmt::format("-m {} --method rtn {} {}", w.path("model"), setting, where));
      CHECK(step(start, "codes") == step(alone, "codes"));
      CHECK(step(start, "bytes") == step(alone, "bytes"));
    }
  }
}

TEST_CASE("trace: a model that was transformed is called that") {
  const Workshop w;
  REQUIRE(w.quant(w.quick("--abits 8")).code == 0);
  const std::string both = fmt::format("-m {} --packed {} ", w.path("model"), w.path("out"));
  const json t = traced(both + "--linear gate_proj --row 5");
  CHECK(t["transformed"] == true);
  check_file(t, w.dir / "out");
  CHECK_FALSE(has_step(t, "clipped"));
  const Outcome o = w.quant("trace " + both + "--linear gate_proj --row 5");
  CHECK(contains(o.out, "is not what was rounded"));
  // Nothing is folded into down_proj unless it is asked for.
  CHECK(traced(both + "--linear down_proj --row 5")["transformed"] == false);
}

TEST_CASE("trace: bytes of another model fail the proof") {
  const Workshop w;
  write_random_model(w.dir / "other", {.seed = 4});
  REQUIRE(w.quant(fmt::format("--method rtn --wbits 4 -m {} -o {}", w.path("other"), w.path("out")))
              .code == 0);
  // Norms differ too, which alone would look like a transformation; so they are made the same.
  write_random_model(w.dir / "mixed",
                     {.seed = 3, .edit = [&](const std::string& name, Tensor& t) {
                        if (name.ends_with("layernorm.weight"))
                          t = SafetensorsFile(w.dir / "other/model.safetensors").get(name);
                        return true;
                      }});
  const Outcome o = w.quant(fmt::format("trace -m {} --packed {}", w.path("mixed"), w.path("out")));
  CHECK(o.code == 1);
  CHECK(contains(o.out, "✗ FAILED:  w, rounded to nearest on the stored grid"));
}

TEST_CASE("trace: the page fits 100 columns and leads to code and tests that exist") {
  const Workshop w;
  REQUIRE(w.quant(fmt::format("--method rtn --wbits 3 --group-size 32 -m {} -o {}", w.path("model"),
                              w.path("out")))
              .code == 0);
  const std::string both = fmt::format("-m {} --packed {}", w.path("model"), w.path("out"));
  for (const std::string& arguments :
       {"-m " + w.path("model"), "-m " + w.path("model") + " --wbits 8 --symmetric --show 0",
        "-m " + w.path("model") + " --method rtn --linear down_proj", "-m " + w.path("out"),
        both}) {
    CAPTURE(arguments);
    const Outcome o = w.quant("trace " + arguments);
    CHECK(o.code == 0);
    CHECK(o.err.empty());
    CHECK_FALSE(contains(o.out, "FAILED"));
    for (size_t at = 0; at < o.out.size();) {
      const size_t end = o.out.find('\n', at);
      const std::string line = o.out.substr(at, end - at);
      CAPTURE(line);
      CHECK(columns_of(line) <= 100);
      CHECK_FALSE(line.ends_with(" "));
      at = end + 1;
    }
    const json t = traced(arguments);
    CHECK(t["steps"].size() >= 5);
    for (const json& s : t["steps"]) {
      const auto text = [&](const char* key) { return s[key].get<std::string>(); };
      CAPTURE(text("title"));
      CHECK(contains(o.out, text("title")));
      CHECK(contains(read_file(source_path(text("source"))), text("function")));
      CHECK(std::filesystem::exists(source_path(text("test"))));
    }
  }
  CHECK(contains(w.quant("trace -m " + w.path("model")).out, "nothing is calibrated here"));
}

TEST_CASE("trace: a path of any length has a line to itself") {
  const Workshop w;
  const std::filesystem::path deep = w.dir / std::string(120, 'd');
  std::filesystem::create_directory(deep);
  std::filesystem::copy(w.dir / "model", deep / "model", std::filesystem::copy_options::recursive);
  const std::string model = (deep / "model").string(), out = (deep / "out").string();
  REQUIRE(w.quant(fmt::format("--method rtn -m {} -o {}", model, out)).code == 0);
  const Outcome o = w.quant(fmt::format("trace -m {} --packed {}", model, out));
  REQUIRE(o.code == 0);
  std::vector<std::string> wide;
  for (size_t at = 0; at < o.out.size();) {
    const size_t end = o.out.find('\n', at);
    const std::string line = o.out.substr(at, end - at);
    if (columns_of(line) > 100) wide.push_back(line);
    at = end + 1;
  }
  CHECK(wide == std::vector<std::string>{"   from " + model, "   " + out + "/model.safetensors"});
}

TEST_CASE("trace: what cannot be traced is refused by name") {
  const Workshop w;
  REQUIRE(w.quant(fmt::format("--method rtn -m {} -o {}", w.path("model"), w.path("out"))).code ==
          0);
  const std::string model = "trace -m " + w.path("model"), packed = "trace -m " + w.path("out");
  w.check_refused(model + " --layer 2", 1, "has layers 0 to 1");
  w.check_refused(model + " --layer -1", 1, "layer -1");
  w.check_refused(model + " --linear qproj", 1,
                  "linear \"qproj\": there are self_attn.q_proj, self_attn.k_proj");
  w.check_refused(model + " --row 32", 1,
                  "row 32: model.layers.0.self_attn.q_proj has rows 0 to 31");
  w.check_refused(model + " --group 3 --group-size 16", 1,
                  "group 3: model.layers.0.self_attn.q_proj has groups 0 to 1, 32 columns");
  w.check_refused("trace -m " + w.path("nowhere"), 1, "no such file or folder");
  w.check_refused(model + " --packed " + w.path("model"), 1, "is not quantised");
  w.check_refused(packed + " --packed " + w.path("out"), 1, "is quantised already");
  w.check_refused(packed + " --wbits 3", 2, "says itself how it is quantised");
  w.check_refused("trace", 2, "-m MODEL is missing");
  w.check_refused(model + " --grup 1", 2, "unknown option --grup, did you mean --group?");
  w.check_refused(model + " --wbits 9", 2, "wbits = 9");
  w.check_refused(model + " --show -1", 2, "--show: 0 or more");

  write_random_model(w.dir / "small", {.layers = 1});
  w.check_refused(fmt::format("trace -m {} --packed {} --layer 1", w.path("small"), w.path("out")),
                  1, "has layers 0 to 0");
  const std::string whole = read_file(w.dir / "out/model.safetensors");
  write_file(w.dir / "out/model.safetensors", whole.substr(0, whole.size() - 100));
  w.check_refused(packed, 1, "model.safetensors");
}

TEST_CASE("trace: help") {
  const Workshop w;
  CHECK(contains(w.quant("--help").out, "omq-quant trace"));
  const Outcome o = w.quant("trace --help");
  CHECK(o.code == 0);
  CHECK(contains(o.out, "--packed"));
}

TEST_CASE("slow: trace: SmolLM2, packed, ends in the bytes of its file") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: no SmolLM2; make smollm2 fetches it");
    return;
  }
  const Workshop w({.layers = 1});
  const std::string model = "'" + file->string() + "'";
  REQUIRE(w.quant(fmt::format("-q --method rtn --wbits 3 --group-size 64 -m {} -o {}", model,
                              w.path("out")))
              .code == 0);
  for (const std::string where :
       {"--layer 0 --row 0", "--layer 29 --linear down_proj --row 575 --group 23",
        "--layer 13 --linear k_proj --row 100 --group 4"}) {
    CAPTURE(where);
    const json t = traced(fmt::format("-m {} --packed {} {}", model, w.path("out"), where));
    CHECK(step(t, "codes")["q"].size() == 64);
    check_file(t, w.dir / "out");
  }
}

}  // namespace omq
