// Training from nothing: proves tensor, autograd, nn and models together, on a model small enough
// for seconds.

#include <sys/wait.h>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "models/checkpoint.h"
#include "models/json_file.h"
#include "models/model.h"
#include "tensor/parallel.h"
#include "tests/support/shared.h"
#include "tools/tiny_training.h"

using namespace omq;
namespace fs = std::filesystem;

namespace {

TinyOptions small_options() {
  TinyOptions o;
  o.steps = 200;
  o.batch = 8;
  o.window = 64;
  o.hidden = 48;
  o.layers = 2;
  o.heads = 4;
  o.ffn = 112;
  o.lr = 1e-2;
  return o;
}

// The loss of every step.
std::vector<double> losses(const TinyOptions& o, TinyModel* trained = nullptr) {
  std::vector<double> all;
  TinyModel m = train_tiny(o, tiny_tokenizer(o),
                           [&](const TinyStep& s, const TinyModel&) { all.push_back(s.loss); });
  if (trained) *trained = std::move(m);
  return all;
}

double mean_of(const std::vector<double>& v, size_t begin, size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += v[i];
  return sum / static_cast<double>(end - begin);
}

// A folder that goes away at the end.
struct TempDir {
  TempDir() {
    std::string name = (fs::temp_directory_path() / "omq-tiny-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~TempDir() { fs::remove_all(path); }
  fs::path path;
};

#ifdef OMQ_BIN_DIR
int run(const std::string& arguments, const fs::path& log) {
  const std::string program = (fs::path(OMQ_BIN_DIR) / "train-tiny").string();
  const int status =
      std::system((program + " " + arguments + " >" + log.string() + " 2>&1").c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
#endif

}  // namespace

TEST_CASE("training from nothing: 200 steps cut the loss to less than half") {
  const TinyOptions o = small_options();
  const std::vector<double> loss = losses(o);
  REQUIRE(loss.size() == 200);
  const double first = loss.front(), last = mean_of(loss, 180, 200);
  MESSAGE("loss " << first << " -> " << last << " nats per token");
  CHECK(first == doctest::Approx(std::log(512.0)).epsilon(0.05));  // nothing is known yet
  CHECK(last < first / 2);
}

TEST_CASE("the same seed gives the same bits on one thread and on two") {
  TinyOptions o = small_options();
  o.steps = 4;
  const int before = num_threads();
  TinyModel one, two;
  set_num_threads(1);
  const auto a = losses(o, &one);
  set_num_threads(2);
  const auto b = losses(o, &two);
  set_num_threads(before);
  CHECK(a == b);
  std::vector<float> x, y;
  one.visit([&](const std::string&, Tensor& t) {
    for (float v : t.to_vector<float>()) x.push_back(v);
  });
  two.visit([&](const std::string&, Tensor& t) {
    for (float v : t.to_vector<float>()) y.push_back(v);
  });
  CHECK(x == y);
  o.seed = 2;
  CHECK(losses(o) != a);
}

TEST_CASE("sizes that do not fit are refused") {
  TinyOptions o = small_options();
  o.heads = 5;
  CHECK_THROWS_WITH_AS(tiny_config(o),
                       "train-tiny: hidden size 48 does not give 5 heads of an even size", Error);
  o = small_options();
  o.kv_heads = 3;
  CHECK_THROWS_WITH_AS(tiny_config(o), "train-tiny: 4 heads are no multiple of 3 key/value heads",
                       Error);
}

#ifdef OMQ_BIN_DIR
TEST_CASE("the program writes a folder that the library opens; wrong usage exits with 2") {
  const TempDir dir;
  const fs::path out = dir.path / "model", log = dir.path / "log";
  const std::string small =
      "--steps 3 --batch 2 --window 32 --hidden 32 --heads 2 --layers 2 --ffn 80 --vocab 300 "
      "--threads 1 --calib-bytes 500 --test-bytes 500 ";
  REQUIRE(run(small + "--out " + out.string(), log) == 0);
  const auto reader = open_checkpoint(out);
  const Model model = Model::load(*reader);
  CHECK(model.config().hidden_size == 32);
  CHECK(model.config().tie_word_embeddings);
  const Tokenizer tokenizer = Tokenizer::from_folder(out);
  CHECK(tokenizer.vocab_size() == 300);
  CHECK(fs::file_size(out / "calib.txt") >= 500);
  CHECK(read_text_file(out / "test.txt") != read_text_file(out / "calib.txt"));
  CHECK(read_text_file(out / "README.md").find("--hidden 32") != std::string::npos);

  CHECK(run(small + "--out " + out.string(), log) == 1);  // exists
  CHECK(read_text_file(log).find("exists") != std::string::npos);
  CHECK(run(small + "--force --out " + out.string(), log) == 0);
  CHECK(run("--steps 3", log) == 2);
  CHECK(read_text_file(log).find("--out") != std::string::npos);
  CHECK(run("--out x --steps none", log) == 2);
  CHECK(run("--out x --stepz 3", log) == 2);
  CHECK(read_text_file(log).find("--steps") != std::string::npos);
  CHECK(run("--heads 5 --out " + (dir.path / "y").string(), log) == 1);
  CHECK_FALSE(fs::exists(dir.path / "y"));
  CHECK(run("--help", log) == 0);
}
#endif

TEST_CASE("the bundled model is what its README says") {
  const fs::path folder = source_path("tests/fixtures/tiny-llama");
  const auto reader = open_checkpoint(folder);
  const Model model = Model::load(*reader);
  const Tokenizer tokenizer = Tokenizer::from_folder(folder);
  uintmax_t bytes = 0;
  for (const auto& f : fs::directory_iterator(folder)) bytes += f.file_size();
  CHECK(bytes < (2u << 20));
  const std::vector<int32_t> ids = tokenizer.encode(read_text_file(folder / "test.txt"));
  const NoGrad off;
  const int64_t window = model.context();
  const auto n = static_cast<size_t>(window);
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i + n + 1 <= ids.size(); i += n, count += window) {
    const std::span<const int32_t> all(ids);
    const Tensor hidden = model.forward(Tensor::from(all.subspan(i, n), {1, window}));
    const Tensor logits = reshape(model.logits(hidden), {window, model.config().vocab_size});
    for (const float loss :
         cross_entropy(logits, Tensor::from(all.subspan(i + 1, n), {window})).to_vector<float>())
      sum += static_cast<double>(loss);
  }
  const std::string readme = read_text_file(folder / "README.md");
  const std::string key = "a perplexity of ";
  const size_t at = readme.find(key);
  REQUIRE(at != std::string::npos);
  CHECK(std::exp(sum / static_cast<double>(count)) ==
        doctest::Approx(std::stod(readme.substr(at + key.size()))).epsilon(1e-4));
}
