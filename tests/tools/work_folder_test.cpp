// A run that was cut short: by a signal, by a full disk, by kill -9 (resume_kill_test.sh does that
// many times), and how --work goes on from there.
#include "tools/work_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "tests/tools/workshop.h"

namespace omq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string model_of(const Workshop& w, std::string_view out = "out") {
  return read_file(w.dir / out / "model.safetensors");
}

// report.json without what differs from run to run.
json lasting(const Workshop& w, std::string_view out = "out") {
  json r = json::parse(read_file(w.dir / out / "report.json"));
  for (const char* key : {"calibration_seconds", "peak_memory_bytes"}) r.erase(key);
  for (json& b : r["blocks"])
    for (const char* key : {"seconds", "peak_tensor_bytes"}) b.erase(key);
  return r;
}

std::string with_work(const Workshop& w, const std::string& more = "") {
  return w.quick(fmt::format("--force --work {} {}", w.path("work"), more));
}

void flip_byte(const fs::path& file, size_t from_end) {
  std::string bytes = read_file(file);
  bytes[bytes.size() - from_end] ^= 1;
  write_file(file, bytes);
}

}  // namespace

TEST_CASE("work folder: with it or without it, begun anew or taken over, the same bytes") {
  const Workshop w;
  REQUIRE(w.quant(w.quick()).code == 0);
  const std::string model = model_of(w);
  const json report = lasting(w);
  const Outcome first = w.quant(with_work(w));
  CAPTURE(first.err);
  REQUIRE(first.code == 0);
  CHECK(model_of(w) == model);
  CHECK(lasting(w) == report);
  CHECK(contains(first.err, "block 2/2"));

  const Outcome second = w.quant(with_work(w, "--threads 2 --eval sim:" + w.path("test.txt")));
  CAPTURE(second.err);
  REQUIRE(second.code == 0);
  CHECK(contains(second.err, "2 of 2 blocks are finished"));
  CHECK_FALSE(contains(second.err, "block 2/2"));
  CHECK(contains(second.out, "simulated perplexity"));
  CHECK(model_of(w) == model);
}

TEST_CASE("work folder: a block file that is damaged, cut off or missing is made again") {
  const Workshop w({.layers = 3});
  REQUIRE(w.quant(with_work(w)).code == 0);
  const std::string model = model_of(w);
  const json report = lasting(w);
  const fs::path middle = w.dir / "work/block-0001.safetensors";
  const std::string whole = read_file(middle);
  struct Case {
    const char* what;
    std::function<void()> damage;
  };
  const Case cases[] = {
      {"its bytes are damaged", [&] { flip_byte(middle, 5); }},
      {"block-0001.safetensors", [&] { write_file(middle, whole.substr(0, whole.size() / 2)); }},
      {"block-0001.safetensors", [&] { write_file(middle, ""); }},
      {"1 of 3 blocks are finished", [&] { fs::remove(middle); }},
      // A block of another run, put here by hand.
      {"it belongs to another run", [&] {
         Outcome o =
             w.quant(w.quick(fmt::format("--lwc-lr 0.02 --force --work {}", w.path("other"))));
         REQUIRE(o.code == 0);
         fs::copy_file(w.dir / "other/block-0001.safetensors", middle,
                       fs::copy_options::overwrite_existing);
       }}};
  for (const Case& c : cases) {
    CAPTURE(c.what);
    c.damage();
    const Outcome o = w.quant(with_work(w));
    CAPTURE(o.err);
    CHECK(o.code == 0);
    CHECK(contains(o.err, c.what));
    CHECK_FALSE(contains(o.err, "block 1/3"));
    CHECK(contains(o.err, "block 2/3"));
    CHECK(contains(o.err, "block 3/3"));
    CHECK(model_of(w) == model);
    CHECK(lasting(w) == report);
    CHECK(read_file(middle).size() == whole.size());
  }
}

TEST_CASE("work folder: another run's folder is refused, with what differs") {
  const Workshop w;
  REQUIRE(w.quant(with_work(w)).code == 0);
  const auto refused = [&](const std::string& arguments, std::string_view message) {
    const std::string before = model_of(w);
    w.check_refused(arguments, 1, message);
    CHECK(model_of(w) == before);
  };
  refused(with_work(w, "--lwc-lr 0.02"), "settings.learning_rates.lwc: 0.01 there, 0.02 here");
  refused(with_work(w, "--symmetric"), "settings.symmetric: false there, true here");
  refused(with_work(w, "--seed 3"), "calibration_ids: ");
  refused(with_work(w, "--keep lm_head=f16"),
          "settings.kept.model.embed_tokens: w8g128 there, f16");
  flip_byte(w.dir / "model/model.safetensors", 3);
  refused(with_work(w), "model.model.safetensors: ");

  const auto folder = [&](const char* name) {
    return w.quick(fmt::format("--force --work {}", w.path(name)));
  };
  refused(folder("calib.txt"), "a file of this name exists");
  refused(folder("model"), "not empty and not of an earlier run");
  refused(folder("nowhere/work"), "does its parent exist?");
  write_file(w.dir / "work/manifest.json", "{");
  refused(with_work(w), "manifest.json cannot be read");
}

TEST_CASE("work folder: two runs in one folder") {
  const Workshop w({.layers = 1});
  REQUIRE(w.quant(with_work(w)).code == 0);
  const int fd = ::open((w.dir / "work/lock").c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(::flock(fd, LOCK_EX | LOCK_NB) == 0);
  w.check_refused(with_work(w), 1, "is at work in this folder");
  ::close(fd);
  CHECK(w.quant(with_work(w)).code == 0);
}

TEST_CASE("work folder: differences of two manifests") {
  const json a = {{"x", 1}, {"deep", {{"list", {1, 2}}, {"gone", true}}}};
  const json b = {{"x", 1}, {"deep", {{"list", {1, 3}}, {"new", "text"}}}};
  CHECK(differences(a, a).empty());
  CHECK(differences(a, b) ==
        "deep.gone: true there, null here; deep.list: [1,2] there, [1,3] here; deep.new: null "
        "there, text here");
}

TEST_CASE("work folder: a full disk says what to do, and what is done is kept") {
  const Workshop w;
  // The learnables of a block take about 10 KiB; the header's room makes more of it while writing.
  const Outcome o = w.quant(with_work(w), "ulimit -f 16;");
  CAPTURE(o.err);
  CHECK(o.code == 1);
  CHECK(w.quant(with_work(w)).code == 0);
}

TEST_CASE("omq-quant: a signal leaves nothing behind but finished blocks") {
  // As long as the program would take for minutes, so that the signal comes in the middle.
  const Workshop w;
  REQUIRE(w.quant(w.quick()).code == 0);
  fs::remove_all(w.dir / "out");
  struct Case {
    const char* name;
    int code;
  };
  for (const Case& c : {Case{"INT", 130}, Case{"TERM", 143}}) {
    CAPTURE(c.name);
    const size_t entries = w.dir.entries();
    const std::string command =
        fmt::format("-m {} -o {} --calib {} --nsamples 3 --seqlen 24 --epochs 1000000 --wbits 3",
                    w.path("model"), w.path("out"), w.path("calib.txt"));
    // In the background a shell ignores SIGINT for its children; `timeout` does not.
    const Outcome o = w.quant(command, fmt::format("timeout -s {} 0.4", c.name));
    CAPTURE(o.err);
    CHECK((o.code == 124 || o.code == c.code));  // timeout's own code, or ours
    CHECK(contains(o.err, "omq-quant: interrupted"));
    CHECK(w.dir.entries() == entries);
    const Outcome kept =
        w.quant(command, fmt::format("timeout --preserve-status -s {} 0.4", c.name));
    CHECK(kept.code == c.code);
    CHECK(w.dir.entries() == entries);
  }
}

TEST_CASE("omq-quant: what a killed run left beside the output goes away with the next") {
  const Workshop w({.layers = 1});
  fs::create_directories(w.dir / "out.partial-999999999");
  write_file(w.dir / "out.partial-999999999/model.safetensors.partial", "half");
  fs::create_directories(w.dir / fmt::format("out.partial-{}", ::getpid()));  // it lives
  fs::create_directories(w.dir / "out.partial-notes");                        // not ours
  REQUIRE(w.quant(w.quick()).code == 0);
  CHECK_FALSE(fs::exists(w.dir / "out.partial-999999999"));
  CHECK(fs::exists(w.dir / fmt::format("out.partial-{}", ::getpid())));
  CHECK(fs::exists(w.dir / "out.partial-notes"));
}

}  // namespace omq
