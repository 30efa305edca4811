// safetensors: round trips, determinism, alignment, and every way in which a header can be wrong.
#include "models/safetensors.h"

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <limits>

#include "tensor/numeric.h"
#include "tests/models/files.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

std::vector<float> ramp(size_t n) {
  std::vector<float> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<float>(i) * 0.5f - 3.0f;
  return v;
}

std::span<const std::byte> as_span(const std::string& s) {
  return std::as_bytes(std::span(s.data(), s.size()));
}

void write_sample(const std::filesystem::path& file, size_t n) {
  SafetensorsWriter w(file, {{"made by", "a \"test\"\n"}, {"key", "wörld"}});
  w.add("x.weight", Tensor::from<float>(ramp(n), {static_cast<int64_t>(n)}));
  w.add("codes", Tensor::from<uint8_t>({1, 2, 3, 250}, {2, 2}));
  w.add("half", "BF16", {1, 2}, as_span(bytes_of(std::vector<uint16_t>{0x3f80, 0xc000})));
  w.add("nothing", "F32", {3, 0, 2}, {});
  w.add("one", Tensor::from<int32_t>({-7}, {}));
  w.finish();
}

}  // namespace

TEST_CASE("safetensors: what is written is read back") {
  TempDir dir;
  // Below and above the size at which the room left for the header is worth giving back.
  for (const size_t n : {size_t{5}, size_t{4'000'000}}) {
    CAPTURE(n);
    write_sample(dir / "m.safetensors", n);
    const SafetensorsFile f(dir / "m.safetensors");
    CHECK(f.metadata().at("format") == "pt");
    CHECK(f.metadata().at("made by") == "a \"test\"\n");
    CHECK(f.metadata().at("key") == "wörld");
    CHECK(f.data_offset() % 64 == 0);
    CHECK(f.entries().size() == 5);
    CHECK(f.get("x.weight").to_vector<float>() == ramp(n));
    CHECK(f.get("codes").shape() == Shape{2, 2});
    CHECK(f.get("codes").to_vector<uint8_t>() == std::vector<uint8_t>{1, 2, 3, 250});
    CHECK(f.get("half").dtype() == DType::BF16);
    CHECK(static_cast<float>(f.get("half").data<bf16_t>()[1]) == -2.0f);
    CHECK(f.get("nothing").shape() == Shape{3, 0, 2});
    CHECK(f.get("one").ndim() == 0);
    CHECK(f.get("one").item<int32_t>() == -7);
    CHECK_FALSE(f.get("x.weight").storage()->writable());  // a view of the mapping
  }
  CHECK(std::filesystem::file_size(dir / "m.safetensors") > 16'000'000);
  CHECK(dir.entries() == 1);  // no partial left
}

TEST_CASE("safetensors: a small file has a small header, and the same input gives the same bytes") {
  TempDir dir;
  write_sample(dir / "a", 5);
  write_sample(dir / "b", 5);
  CHECK(read_file(dir / "a") == read_file(dir / "b"));
  CHECK(std::filesystem::file_size(dir / "a") < 1024);
}

TEST_CASE("safetensors: a header larger than the room left for it") {
  TempDir dir;
  {
    SafetensorsWriter w(dir / "many");
    for (int i = 0; i < 3000; ++i) {
      w.add(fmt::format("model.layers.{}.a_rather_long_name_of_a_tensor.weight", i),
            Tensor::from<int32_t>({i, -i}, {2}));
    }
    w.finish();
  }
  const SafetensorsFile f(dir / "many");
  CHECK(f.data_offset() > 128 << 10);
  CHECK(f.entries().size() == 3000);
  for (const int i : {0, 1, 1499, 2999}) {
    const Tensor t = f.get(fmt::format("model.layers.{}.a_rather_long_name_of_a_tensor.weight", i));
    CHECK(t.to_vector<int32_t>() == std::vector<int32_t>{i, -i});
  }
}

TEST_CASE("safetensors: the writer refuses wrong tensors and leaves nothing behind") {
  TempDir dir;
  {
    SafetensorsWriter w(dir / "m");
    w.add("a", Tensor::from<float>({1, 2}, {2}));
    CHECK(contains(message_of([&] {
                     w.add("a", Tensor::from<float>({1, 2}, {2}));
                   }),
                   "tensor a is given twice"));
    CHECK(contains(message_of([&] { w.add("b", "F32", {3}, as_span("12345678")); }),
                   "tensor b: 8 bytes given for F32 [3]"));
    CHECK(contains(message_of([&] { w.add("__metadata__", "F32", {0}, {}); }), "cannot be called"));
    CHECK(contains(message_of([&] { w.add("c", "F12", {0}, {}); }), "F12"));
    CHECK(std::filesystem::exists(dir / "m.partial"));
  }
  CHECK(dir.entries() == 0);
}

TEST_CASE("safetensors: missing folder and names that are no UTF-8") {
  TempDir dir;
  CHECK(contains(message_of([&] { SafetensorsWriter w(dir / "no/such/m"); }), "No such file"));
  SafetensorsWriter w(dir / "m");
  w.add("\xff", Tensor::from<float>({1}, {1}));
  CHECK(contains(message_of([&] { w.finish(); }), "not valid UTF-8"));
}

TEST_CASE(
    "safetensors: a write that fails is an error that names the file, and the partial goes away") {
  TempDir dir;
  rlimit old{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto old_handler =
      std::signal(SIGXFSZ, SIG_IGN);  // the write fails instead, as on a full disk
  const rlimit small{.rlim_cur = 256 << 10, .rlim_max = old.rlim_max};
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string message = message_of([&] {
    SafetensorsWriter w(dir / "m.safetensors");
    w.add("big", Tensor::from<float>(ramp(100'000), {100'000}));
    w.finish();
  });
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, old_handler);
  CHECK(contains(message, "m.safetensors: cannot write"));
  CHECK(contains(message, "File too large"));
  CHECK(dir.entries() == 0);
}

TEST_CASE("safetensors: values that lie askew are copied, not misread") {
  TempDir dir;
  const std::string header =
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  write_file(dir / "m", safetensors_bytes_of(header, "x" + bytes_of(2.5f)));
  CHECK(SafetensorsFile(dir / "m").get("b").item<float>() == 2.5f);
}

TEST_CASE("safetensors: every fault of a header has its message") {
  TempDir dir;
  struct Case {
    std::string header, data, message;
  };
  const auto entry = [](std::string dtype, std::string shape, std::string offsets) {
    return fmt::format(R"({{"a":{{"dtype":{},"shape":{},"data_offsets":{}}}}})", dtype, shape,
                       offsets);
  };
  const std::string f = "\"F32\"", ok = "\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":";
  const std::string far = "18446744073709551615", half = "4611686018427387904";
  const std::vector<Case> cases = {
      {"[]", "", "does not begin with"},
      {"{} x", "", "not valid JSON"},
      {"{\"a\":", "", "not valid JSON"},
      {"{\"a\":1}", "", "tensor a: its header entry is not an object"},
      {"{\"a\":{}}", "", "tensor a: its header entry has no \"dtype\""},
      {entry("1", "[1]", "[0,4]"), "1234", "its dtype is not a string"},
      {entry("\"F33\"", "[1]", "[0,4]"), "1234", "unknown dtype \"F33\""},
      {entry(f, "1", "[0,4]"), "1234", "its shape is not a list"},
      {entry(f, "[1,1,1,1,1,1,1]", "[0,4]"), "1234", "its shape is not a list of at most 6"},
      {entry(f, "[-1]", "[0,4]"), "1234", "a size in its shape is -1"},
      {entry(f, "[1.5]", "[0,4]"), "1234", "a size in its shape is 1.5"},
      {entry(f, "[" + far + "]", "[0,4]"), "1234", "is absurd"},
      {entry(f, "[2147483648,2147483648,4]", "[0,4]"), "1234", "does not fill its 4 bytes"},
      {entry(f, "[2305843009213693952,8,0]", "[0,4]"), "1234", "does not fill its 4 bytes"},
      {entry(f, "[2]", "[0,4]"), "1234", "F32 [2] does not fill its 4 bytes"},
      {entry(f, "[1]", "[0]"), "1234", "not two whole numbers"},
      {entry(f, "[1]", "[-4,0]"), "1234", "data_offsets[0] is -4"},
      {entry(f, "[1]", "[4,0]"), "1234", "bytes 4 to 0 are not inside the 4 bytes"},
      {entry(f, "[1]", "[4,8]"), "1234", "bytes 4 to 8 are not inside the 4 bytes"},
      {entry(f, "[" + half + "]", "[0," + far + "]"), "1234", "absurd"},
      {entry(f, "[1]", "[0,4]"), "12345", "end at byte 4 of 5 bytes"},
      {"{\"a\":{" + ok + "[0,1]},\"b\":{" + ok + "[2,3]}}", "123", "there is a gap"},
      {"{\"a\":{" + ok + "[0,1]},\"b\":{" + ok + "[0,1]}}", "1", "they overlap"},
      {"{\"a\":{" + ok + "[0,1]},\"a\":{" + ok + "[0,1]}}", "1", "key \"a\" is given twice"},
      {"{\"__metadata__\":{\"a\":1}}", "", "__metadata__ \"a\" is not a string"},
      {"{\"__metadata__\":[]}", "", "__metadata__ is not an object"},
      {"{\"\xff\":1}", "", "not valid JSON"},
      {"{\"a\":" + std::string(100, '[') + std::string(100, ']') + "}", "", "nested more than 64"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.header);
    write_file(dir / "m", safetensors_bytes_of(c.header, c.data));
    const std::string message = message_of([&] { SafetensorsFile file(dir / "m"); });
    CAPTURE(message);
    CHECK(contains(message, c.message));
    CHECK(contains(message, (dir / "m").string()));
  }
}

TEST_CASE("safetensors: wrong lengths, truncation at every byte, other files") {
  TempDir dir;
  const auto refused = [&](std::string_view bytes) {
    write_file(dir / "m", bytes);
    return message_of([&] { SafetensorsFile file(dir / "m"); });
  };
  CHECK(contains(refused(""), "too few"));
  CHECK(contains(refused(bytes_of(uint64_t{1000}) + "{}"), "the header claims 1000 bytes"));
  CHECK(contains(refused(bytes_of(std::numeric_limits<uint64_t>::max()) + "{}"), "is refused"));
  CHECK(contains(refused("some text of no kind"), "is this safetensors?"));
  CHECK(contains(message_of([&] { SafetensorsFile file(dir / "none"); }), "no such file"));
  CHECK(contains(message_of([&] { SafetensorsFile file(dir.path()); }), "not a regular"));
  write_sample(dir / "good", 5);
  const std::string good = read_file(dir / "good");
  for (size_t n = 0; n < good.size(); ++n) {
    CAPTURE(n);
    CHECK(refused(std::string_view(good).substr(0, n)) != "");
  }
  const SafetensorsFile f(dir / "good");
  CHECK(contains(message_of([&] { (void)f.get("y"); }), "no tensor y"));
}

TEST_CASE("safetensors: dtypes that Tensor lacks are listed but not given") {
  TempDir dir;
  const std::string header = R"({"ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})";
  write_file(dir / "m", safetensors_bytes_of(header, "12345678"));
  const SafetensorsFile f(dir / "m");
  CHECK(f.find("ids")->shape == Shape{1});
  CHECK(contains(message_of([&] { (void)f.get("ids"); }), "tensor ids has dtype I64"));
}

TEST_CASE("safetensors: files that PyTorch wrote") {
  for (const char* name :
       {"tests/golden/mistral/model.safetensors", "tests/golden/ops.safetensors"}) {
    const SafetensorsFile f(source_path(name));
    CAPTURE(name);
    CHECK(f.entries().size() > 3);
    for (const SafetensorsEntry& e : f.entries()) {
      if (e.type) CHECK(f.get(e.name).nbytes() == e.end - e.begin);
    }
  }
}

}  // namespace omq
