// GGUF: block formats against published values, keys of every kind, and hostile containers.
#include "models/gguf.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tests/models/files.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

struct BlockVector {
  const char *type, *bytes, *values;  // hexadecimal
};
constexpr BlockVector kBlocks[] = {
#include "tests/models/gguf_blocks.inc"
};

std::string from_hex(std::string_view hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    out += static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16));
  }
  return out;
}

std::vector<float> floats_of(const std::string& bytes) {
  std::vector<float> v(bytes.size() / sizeof(float));
  std::memcpy(v.data(), bytes.data(), v.size() * sizeof(float));
  return v;
}

uint32_t type_id(std::string_view name) {
  for (uint32_t id = 0; id < 64; ++id) {
    const GgmlType* t = find_ggml_type(id);
    if (t != nullptr && name == t->name) return id;
  }
  return 64;
}

GgufFile open(const TempDir& dir, std::string_view bytes) {
  return GgufFile(write_file(dir / "m.gguf", bytes));
}

std::string refused(const TempDir& dir, const std::string& bytes) {
  return message_of([&] { (void)open(dir, bytes); });
}

}  // namespace

TEST_CASE("gguf: every block format decodes as the reference does") {
  TempDir dir;
  size_t formats = 0;
  for (const BlockVector& v : kBlocks) {
    CAPTURE(v.type);
    const std::string bytes = from_hex(v.bytes);
    const std::vector<float> want = floats_of(from_hex(v.values));
    // The block several hundred times over, so that the parallel path and its chunk borders are
    // used.
    const size_t repeats = 1 + 100'000 / want.size();
    std::string many;
    for (size_t i = 0; i < repeats; ++i) many += bytes;
    GgufBuilder b;
    b.tensor("t", {want.size(), repeats}, type_id(v.type), many);
    const Tensor t = open(dir, b.build()).get_f32("t");
    CHECK(t.shape() == Shape{static_cast<int64_t>(repeats), static_cast<int64_t>(want.size())});
    const std::vector<float> got = t.to_vector<float>();
    // d·q + m may be fused into one rounding here: a last digit of the largest term.
    const float largest = *std::max_element(
        want.begin(), want.end(), [](float a, float c) { return std::abs(a) < std::abs(c); });
    size_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      wrong += !(std::abs(got[i] - want[i % want.size()]) <= 2e-7f * std::abs(largest));
    }
    CHECK(wrong == 0);
    ++formats;
  }
  CHECK(formats == 12);
}

TEST_CASE("gguf: keys of every kind") {
  TempDir dir;
  GgufBuilder b;
  b.raw("u8", 0, bytes_of(uint8_t{200}))
      .raw("i8", 1, bytes_of(int8_t{-3}))
      .raw("u16", 2, bytes_of(uint16_t{60000}));
  b.raw("i16", 3, bytes_of(int16_t{-300}))
      .u32("u32", 4000000000u)
      .raw("i32", 5, bytes_of(int32_t{-7}));
  b.f32("f32", 0.5f)
      .boolean("yes", true)
      .text("text", "wörld")
      .raw("u64", 10, bytes_of(uint64_t{1} << 40));
  b.raw("i64", 11, bytes_of(int64_t{-1} << 40)).raw("f64", 12, bytes_of(0.1));
  b.raw("huge", 10, bytes_of(uint64_t{1} << 63))
      .texts("texts", {"a", "", "bc"})
      .ints("ints", {1, -2});
  b.floats("floats", {1.5f, -2.0f}).array("empty", 8, 0, "");
  const GgufFile f = open(dir, b.build());
  CHECK(f.integer("u8") == 200);
  CHECK(f.integer("i8") == -3);
  CHECK(f.integer("u16") == 60000);
  CHECK(f.integer("i16") == -300);
  CHECK(f.integer("u32") == 4000000000);
  CHECK(f.integer("i32") == -7);
  CHECK(f.integer("u64") == int64_t{1} << 40);
  CHECK(f.integer("i64") == -(int64_t{1} << 40));
  CHECK(f.real("f32") == 0.5);
  CHECK(f.real("f64") == 0.1);
  CHECK(f.real("i8") == -3.0);
  CHECK(f.boolean("yes") == true);
  CHECK(f.text("text") == "wörld");
  CHECK(f.texts("texts") == std::vector<std::string>{"a", "", "bc"});
  CHECK(f.integers("ints") == std::vector<int64_t>{1, -2});
  CHECK(f.reals("floats") == std::vector<float>{1.5f, -2.0f});
  CHECK(f.texts("empty")->empty());
  CHECK_FALSE(f.integer("none").has_value());
  CHECK_FALSE(f.texts("none").has_value());
  CHECK(contains(message_of([&] { (void)f.integer("f32"); }),
                 "key f32 is of kind f32, a whole number is expected"));
  CHECK(contains(message_of([&] { (void)f.text("u8"); }),
                 "key u8 is of kind u8, a string is expected"));
  CHECK(contains(message_of([&] { (void)f.boolean("u8"); }), "a truth value is expected"));
  CHECK(contains(message_of([&] { (void)f.texts("text"); }), "key text is a single value"));
  CHECK(contains(message_of([&] { (void)f.text("texts"); }), "key texts is an array"));
  CHECK(
      contains(message_of([&] { (void)f.reals("ints"); }), "an array of real numbers is expected"));
  CHECK(contains(message_of([&] { (void)f.integer("huge"); }), "too large"));
}

TEST_CASE("gguf: version 2, alignment, views and types that are not decoded") {
  TempDir dir;
  GgufBuilder b;
  b.f32_tensor("a", {2, 3}, {1, 2, 3, 4, 5, 6}).tensor("iq", {32}, 20, std::string(18, 'x'));
  const GgufFile f = open(dir, b.build(2));
  CHECK(f.version() == 2);
  CHECK(f.get_f32("a").shape() == Shape{3, 2});  // sizes turned round: row-major
  CHECK_FALSE(f.get_f32("a").storage()->writable());
  CHECK(contains(message_of([&] { (void)f.get_f32("iq"); }),
                 "tensor iq is of type IQ4_NL, which is not read"));
  CHECK(contains(message_of([&] { (void)f.get_f32("b"); }), "no tensor b"));
  for (const uint32_t alignment : {0u, 3u, 1u << 24}) {
    CHECK(contains(refused(dir, GgufBuilder().u32("general.alignment", alignment).build()),
                   fmt::format("general.alignment is {}, a power of two", alignment)));
  }
  // F32 at an odd place: copied.
  GgufBuilder odd;
  odd.u32("general.alignment", 1).tensor_at("t", {1}, 0, 1, "x" + bytes_of(2.5f));
  std::string bytes = odd.build();
  const size_t padding = bytes.size() - 5;
  const size_t header = 24 + (8 + 17 + 4 + 4) + (8 + 1 + 4 + 8 + 4 + 8);
  bytes.erase(header, padding - header);  // no padding at alignment 1
  CHECK(open(dir, bytes).get_f32("t").item<float>() == 2.5f);
}

TEST_CASE("gguf: hostile containers") {
  TempDir dir;
  const auto tensor = [](std::vector<uint64_t> sizes, uint32_t type, uint64_t offset,
                         size_t data = 64) {
    return GgufBuilder().tensor_at("t", sizes, type, offset, std::string(data, '\0')).build();
  };
  const uint64_t huge = std::numeric_limits<uint64_t>::max(), half = uint64_t{1} << 63;
  const std::string head = "GGUF" + bytes_of(uint32_t{3});
  struct Case {
    std::string bytes, message;
  };
  const std::vector<Case> cases = {
      {"", "empty"},
      {"GG", "the magic needs 4 bytes"},
      {"GGML1234", "does not begin with \"GGUF\""},
      {"GGUF" + bytes_of(uint32_t{1}) + std::string(16, '\0'), "version 1 is not read"},
      {"GGUF" + bytes_of(uint32_t{0x03000000}), "big-endian"},
      {head + bytes_of(uint64_t{1}), "the number of keys needs 8 bytes"},
      {head + bytes_of(huge) + bytes_of(uint64_t{0}), "it claims 0 keys"},
      {head + bytes_of(uint64_t{0}) + bytes_of(half), "it claims 9223372036854775808 keys"},
      {GgufBuilder().raw("k", 99, std::string(32, 'x')).build(), "key k: unknown kind of value 99"},
      {GgufBuilder().raw("k", 8, bytes_of(huge)).build(),
       "a string needs 18446744073709551615 bytes"},
      {GgufBuilder().array("k", 5, half, "").build(),
       "9223372036854775808 elements of kind i32 do not fit"},
      {GgufBuilder().array("k", 8, uint64_t{1} << 40, "").build(),
       "elements of kind string do not fit"},
      {GgufBuilder().array("k", 9, 1, std::string(16, '\0')).build(), "arrays of arrays"},
      {GgufBuilder().u32("k", 1).u32("k", 2).build(), "key k is given twice"},
      {GgufBuilder().f32_tensor("t", {1}, {1}).f32_tensor("t", {1}, {1}).build(),
       "tensor t is given twice"},
      {GgufBuilder().f32_tensor("", {1}, {1}).build(), "a name of 0 bytes"},
      {tensor({}, 0, 0), "tensor t: 0 dims"},
      {tensor({1, 1, 1, 1, 1}, 0, 0), "tensor t: 5 dims"},
      {tensor({0}, 0, 0), "tensor t: size 0 is absurd"},
      {tensor({half}, 0, 0), "tensor t: size 9223372036854775808 is absurd"},
      {tensor({1u << 20, 1u << 20, 1u << 20}, 0, 0), "is absurd"},
      {tensor({4}, 4, 0), "unknown type number 4"},
      {tensor({48}, 2, 0), "rows of 48 values are no whole blocks of 32 (Q4_0)"},
      {tensor({16}, 0, 16), "offset 16 is not a multiple of 32"},
      {tensor({16}, 0, 64), "64 bytes at offset 64 are not inside the 64 bytes of data"},
      {tensor({16}, 0, huge - 31), "are not inside"},
      {tensor({17}, 0, 0), "are not inside"},
      {GgufBuilder()
           .f32_tensor("a", {16}, std::vector<float>(16))
           .tensor_at("b", {8}, 0, 32)
           .build(),
       "overlap"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.message);
    const std::string message = refused(dir, c.bytes);
    CAPTURE(message);
    CHECK(contains(message, c.message));
    if (!c.bytes.empty()) CHECK(contains(message, (dir / "m.gguf").string()));
  }
  CHECK(contains(message_of([&] { GgufFile f(dir / "none"); }), "no such file"));
}

TEST_CASE("gguf: truncation at every byte") {
  TempDir dir;
  const std::string good = tiny_gguf().build();
  CHECK(refused(dir, good) == "");
  size_t accepted = 0;
  for (size_t n = 0; n < good.size(); ++n) accepted += refused(dir, good.substr(0, n)).empty();
  CHECK(accepted == 0);
}

TEST_CASE("gguf: stories260K holds the numbers of its llama2.c original") {
  const auto gguf = shared_path("data/model-stories260k/stories260K.gguf");
  const auto bin = shared_path("data/model-stories260k/stories260K.bin");
  if (!gguf || !bin) {
    MESSAGE("skipped: no shared/data/model-stories260k");
    return;
  }
  // 7 numbers, then the tensors of all layers one kind after the other, F32 (llama2.c, version 0).
  const std::string raw = read_file(*bin);
  constexpr int64_t kDim = 64, kFfn = 172, kLayers = 5, kKv = 32, kVocab = 512;
  size_t at = 28;
  const GgufFile f(*gguf);
  CHECK(f.tensors().size() == 48);
  const auto compare = [&](const std::string& name, int64_t n) {
    const auto bytes = static_cast<size_t>(n) * sizeof(float);
    const GgufTensor* t = f.find(name);
    REQUIRE(t != nullptr);
    REQUIRE(t->bytes.size() == bytes);
    CHECK_MESSAGE(std::memcmp(t->bytes.data(), raw.data() + at, bytes) == 0, name);
    at += bytes;
  };
  const auto layers = [&](const char* part, int64_t n) {
    for (int64_t i = 0; i < kLayers; ++i) compare(fmt::format("blk.{}.{}.weight", i, part), n);
  };
  compare("token_embd.weight", kVocab * kDim);
  layers("attn_norm", kDim);
  layers("attn_q", kDim * kDim);
  layers("attn_k", kKv * kDim);
  layers("attn_v", kKv * kDim);
  layers("attn_output", kDim * kDim);
  layers("ffn_norm", kDim);
  layers("ffn_gate", kFfn * kDim);
  layers("ffn_down", kFfn * kDim);
  layers("ffn_up", kFfn * kDim);
  compare("output_norm.weight", kDim);
}

}  // namespace omq
