// The C interface: what it gives is what the classes behind it give; two handles on two threads do
// not feel each other; every way to fail has its status and its words.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

#include "include/omq.h"
#include "models/checkpoint.h"
#include "models/generator.h"
#include "models/packed_model.h"
#include "quant/calibrate.h"
#include "tensor/parallel.h"
#include "tests/models/allocation_count.h"
#include "tests/models/files.h"
#include "tests/support/random_model.h"
#include "tests/support/shared.h"

namespace omq {
namespace {

using Ids = std::vector<int32_t>;

std::string tiny_path() { return source_path("tests/fixtures/tiny-llama").string(); }

// Closes itself.
struct Handle {
  omq_model* m = nullptr;
  omq_status status;
  explicit Handle(const std::string& path, omq_options options = {}) {
    status = omq_open(path.c_str(), &options, &m);
  }
  Handle(const std::string& bytes, size_t n, omq_options options = {}) {
    status = omq_open_memory(bytes.data(), n, &options, &m);
  }
  ~Handle() { omq_close(m); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  std::string message() const { return omq_message(m); }
};

Ids encode(omq_model* m, const std::string& text) {
  size_t n = 0;
  REQUIRE(omq_encode(m, text.data(), text.size(), nullptr, 0, &n) == OMQ_OK);
  Ids ids(n);
  REQUIRE(omq_encode(m, text.data(), text.size(), ids.data(), n, &n) == OMQ_OK);
  return ids;
}

int append(void* user, const char* text, size_t bytes) {
  static_cast<std::string*>(user)->append(text, bytes);
  return 0;
}

std::string generate(omq_model* m, const Ids& prompt, omq_sampling s, omq_status want = OMQ_OK) {
  std::string text;
  CHECK(omq_generate(m, prompt.data(), prompt.size(), &s, append, &text, nullptr) == want);
  return text;
}

// A model of omq-quant's kind: 4 bits in groups of 32, embedding and head as they are.
void write_packed(const std::filesystem::path& out) {
  TempDir dir;
  write_random_model(dir / "source", {.tied = true, .layers = 2, .seed = 3});
  const auto reader = open_checkpoint(dir / "source");
  Model model = Model::load(*reader, 0, LoadAs::F32);
  PackedModelWriter writer(*reader, {.method = "test", .weight = {4, 32, false}, .exceptions = {}},
                           out, false);
  writer.add("model.embed_tokens", model.ends.embed_tokens.table);
  writer.add_tensor("model.norm.weight", model.ends.norm.weight);
  for (size_t i = 0; i < model.blocks.size(); ++i) {
    for (auto& [name, linear] : model.blocks[i]->linears())
      linear->weight = quant::pack_nearest(linear->dense(), {.wbits = 4, .group_size = 32});
    writer.store(static_cast<int>(i), *model.blocks[i]);
  }
  writer.close();
  writer.commit();
}

}  // namespace

TEST_CASE("c api: tokens, logits and text are the library's own") {
  const auto reader = open_checkpoint(tiny_path());
  const Model model = Model::load(*reader);
  Generator generator(model, reader->tokenizer());
  const Handle h(tiny_path());
  REQUIRE(h.status == OMQ_OK);
  CHECK(h.message().empty());

  omq_info info;
  REQUIRE(omq_get_info(h.m, &info) == OMQ_OK);
  CHECK(info.vocabulary == 512);
  CHECK(info.context == 256);
  CHECK(info.layers == model.config().num_layers);
  CHECK(info.weight_bytes == model_size(model).bytes);
  CHECK(info.eos == generator.tokenizer().eos_ids().at(0));
  CHECK(info.threads >= 1);

  const std::string text = "Ella was a cheerful girl.";
  const Ids ids = encode(h.m, text);
  CHECK(ids == generator.tokenizer().encode(text));
  std::string back(100, '?');
  size_t bytes = 0;
  REQUIRE(omq_decode(h.m, ids.data(), ids.size(), back.data(), back.size(), &bytes) == OMQ_OK);
  back.resize(bytes);
  CHECK(back == generator.tokenizer().decode(ids));

  std::vector<float> logits(512);
  for (const size_t n : {ids.size(), ids.size() - 2, ids.size() - 1}) {
    REQUIRE(omq_logits(h.m, ids.data(), n, logits.data()) == OMQ_OK);
    CHECK(logits == generator.next_logits({ids.data(), n}));
  }

  GenerateOptions o;
  o.sampling.temperature = 0;
  o.max_tokens = 30;
  const std::string want = generator.generate(ids, o).text;
  omq_sampling s = {};
  s.max_tokens = 30;
  CHECK(generate(h.m, ids, s) == want);
  omq_generated made;
  REQUIRE(omq_generate(h.m, ids.data(), ids.size(), &s, nullptr, nullptr, &made) == OMQ_OK);
  CHECK(made.prompt_tokens == ids.size());
  CHECK(made.reused_tokens == ids.size() - 1);
  CHECK(made.tokens == 30);
  const std::string stop = want.substr(12, 4);
  s.stop = stop.c_str();
  CHECK(generate(h.m, ids, s) == want.substr(0, want.find(stop)));
  s.stop = nullptr;
  s.temperature = 1;
  s.seed = 4;
  const std::string sampled = generate(h.m, ids, s);
  CHECK(sampled != want);
  CHECK(generate(h.m, ids, s) == sampled);
}

TEST_CASE("c api: a model in the caller's memory is used in place, wherever it lies") {
  TempDir dir;
  write_packed(dir / "m");
  const std::string file = read_file(dir / "m" / "model.safetensors");
  const Handle mapped((dir / "m").string());
  REQUIRE(mapped.status == OMQ_OK);
  omq_sampling s = {};
  s.max_tokens = 20;
  const Ids ids = encode(mapped.m, "abc");
  const std::string want = generate(mapped.m, ids, s);
  for (const size_t shift : {0, 1, 3}) {
    std::string bytes(shift, 'x');
    bytes += file;
    omq_model* m = nullptr;
    REQUIRE(omq_open_memory(bytes.data() + shift, file.size(), nullptr, &m) == OMQ_OK);
    CHECK(generate(m, ids, s) == want);
    omq_close(m);
  }
  const std::string gguf = tiny_gguf().build();
  const Handle g(gguf, gguf.size());
  CHECK(g.status == OMQ_OK);
  const Handle again(write_file(dir / "g", gguf).string());
  std::vector<float> a(6), b(6);
  const Ids some = {1, 4, 5};
  REQUIRE(omq_logits(g.m, some.data(), 3, a.data()) == OMQ_OK);
  REQUIRE(omq_logits(again.m, some.data(), 3, b.data()) == OMQ_OK);
  CHECK(a == b);
}

TEST_CASE("c api: every length at which a file is cut short is refused in words") {
  TempDir dir;
  write_packed(dir / "m");
  const std::string file = read_file(dir / "m" / "model.safetensors"), gguf = tiny_gguf().build();
  for (const std::string* whole : {&file, &gguf})
    for (size_t i = 0; i < 60; ++i) {
      const size_t n = i < 20 ? i : whole->size() - 1 - (i - 20) * whole->size() / 45;
      CAPTURE(n);
      const std::string cut = whole->substr(0, n);  // so that a sanitizer sees what goes past it
      omq_model* m = nullptr;
      CHECK(omq_open_memory(cut.data(), n, nullptr, &m) == OMQ_BAD_MODEL);
      CHECK(contains(omq_message(m), "model in memory"));
      float logits[512];
      const int32_t id = 1;
      CHECK(omq_logits(m, &id, 1, logits) == OMQ_BAD_ARGUMENT);
      CHECK(std::string(omq_message(m)) == "this handle holds no model: opening it failed");
      omq_close(m);
    }
}

TEST_CASE("c api: what cannot be opened, and options that cannot be") {
  const Handle missing("/nowhere/model.safetensors");
  CHECK(missing.status == OMQ_NOT_FOUND);
  CHECK(missing.message() == "/nowhere/model.safetensors: no such file or folder");
  TempDir dir;
  const Handle other(write_file(dir / "x", "not a model at all").string());
  CHECK(other.status == OMQ_BAD_MODEL);
  CHECK(contains(other.message(), "neither GGUF nor safetensors"));
  omq_options bad = {};
  bad.context = 100000;
  const Handle large(tiny_path(), bad);
  CHECK(large.status == OMQ_BAD_ARGUMENT);
  CHECK(large.message() == "a context of 100000 tokens, the model was made for 256");
  bad = {};
  bad.threads = -1;
  const Handle threads(tiny_path(), bad);
  CHECK(threads.status == OMQ_BAD_ARGUMENT);
  CHECK(threads.message() == "threads is -1, 0 to 1024 wanted");
  bad = {};
  bad.allocator.alloc = [](void*, size_t, size_t) -> void* { return nullptr; };
  const Handle half(tiny_path(), bad);
  CHECK(half.status == OMQ_BAD_ARGUMENT);
  omq_model* m = nullptr;
  CHECK(omq_open(nullptr, nullptr, &m) == OMQ_BAD_ARGUMENT);
  CHECK(std::string(omq_message(m)) == "the path is null");
  omq_close(m);
  CHECK(omq_open_memory(nullptr, 5, nullptr, &m) == OMQ_BAD_ARGUMENT);
  omq_close(m);
  CHECK(omq_open("x", nullptr, nullptr) == OMQ_BAD_ARGUMENT);
  omq_close(nullptr);
  omq_cancel(nullptr);
  CHECK(omq_logits(nullptr, nullptr, 0, nullptr) == OMQ_BAD_ARGUMENT);
  CHECK(std::string(omq_message(nullptr)) == "no handle");
}

TEST_CASE("c api: wrong tokens, small buffers, a full context; the handle works on") {
  omq_options o = {};
  o.context = 16;
  const Handle h(tiny_path(), o);
  const Ids ids = encode(h.m, "Ella was");
  omq_sampling s = {};
  s.max_tokens = 5;
  const std::string want = generate(h.m, ids, s);

  std::vector<float> logits(512);
  const Ids wrong = {5, 512};
  CHECK(omq_logits(h.m, wrong.data(), 2, logits.data()) == OMQ_BAD_ARGUMENT);
  CHECK(h.message() == "token 512 at 1 is outside the model's vocabulary of 512");
  CHECK(omq_generate(h.m, wrong.data(), 2, &s, nullptr, nullptr, nullptr) == OMQ_BAD_ARGUMENT);
  CHECK(omq_generate(h.m, ids.data(), 0, &s, nullptr, nullptr, nullptr) == OMQ_BAD_ARGUMENT);
  CHECK(h.message() == "no tokens");
  const int32_t negative = -7;
  char text[8];
  size_t n = 0;
  CHECK(omq_decode(h.m, &negative, 1, text, 8, &n) == OMQ_BAD_ARGUMENT);
  CHECK(h.message() == "token -7 at 0 is outside the tokenizer's vocabulary of 512");
  int32_t one;
  CHECK(omq_encode(h.m, "Ella was a", 10, &one, 1, &n) == OMQ_BAD_ARGUMENT);
  CHECK(n > 1);
  CHECK(contains(h.message(), "do not fit into room for 1"));
  CHECK(omq_decode(h.m, ids.data(), ids.size(), text, 1, &n) == OMQ_BAD_ARGUMENT);
  CHECK(n == 8);
  s.top_k = -2;
  CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, nullptr, nullptr, nullptr) ==
        OMQ_BAD_ARGUMENT);
  CHECK(contains(h.message(), "top-k"));

  const Ids long_prompt(17, 5);
  CHECK(omq_logits(h.m, long_prompt.data(), 17, logits.data()) == OMQ_CONTEXT_FULL);
  CHECK(h.message() == "17 tokens do not fit into the context of 16");
  s = {};
  omq_generated made;
  CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, nullptr, nullptr, &made) == OMQ_CONTEXT_FULL);
  CHECK(h.message() == "the context of 16 tokens is full; the text ends here");
  CHECK(made.prompt_tokens + made.tokens == 17);
  s.max_tokens = 5;
  CHECK(generate(h.m, ids, s) == want);
  CHECK(h.message().empty());
}

TEST_CASE("c api: cancelled by the callback, by another thread, and a call inside a call") {
  const Handle h(tiny_path());
  const Ids ids = encode(h.m, "Ella was a cheerful girl.");
  omq_sampling s = {};
  s.max_tokens = 40;
  const std::string want = generate(h.m, ids, s);

  struct Seen {
    omq_model* m;
    int calls = 0;
    omq_status inner = OMQ_OK;
  } seen{h.m};
  const auto stop_at_three = [](void* user, const char*, size_t) {
    auto* x = static_cast<Seen*>(user);
    size_t n;
    x->inner = omq_encode(x->m, "a", 1, nullptr, 0, &n);
    return ++x->calls == 3 ? 1 : 0;
  };
  omq_generated made;
  CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, stop_at_three, &seen, &made) ==
        OMQ_CANCELLED);
  CHECK(seen.calls == 3);
  CHECK(seen.inner == OMQ_BUSY);
  CHECK(made.tokens >= 3);
  CHECK(h.message() == "cancelled");
  CHECK(generate(h.m, ids, s) == want);

  // Another thread cancels while the callback holds the generation up.
  struct Gate {
    omq_model* m;
    std::atomic<bool> inside{false}, cancelled{false};
  } gate{h.m};
  const auto wait = [](void* user, const char*, size_t) {
    auto* g = static_cast<Gate*>(user);
    g->inside = true;
    while (!g->cancelled) std::this_thread::yield();
    return 0;
  };
  std::thread other([&] {
    while (!gate.inside) std::this_thread::yield();
    omq_cancel(gate.m);
    gate.cancelled = true;
  });
  CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, wait, &gate, &made) == OMQ_CANCELLED);
  other.join();
  CHECK(made.tokens < 40);
  CHECK(generate(h.m, ids, s) == want);
}

TEST_CASE("c api: two models, two threads, each as alone, with its own number of threads") {
  TempDir dir;
  write_packed(dir / "m");
  const std::string paths[] = {tiny_path(), (dir / "m").string()};
  omq_sampling s = {};
  s.max_tokens = 60;
  s.temperature = 0.9f;
  s.seed = 7;
  std::string alone[2];
  for (int i = 0; i < 2; ++i) {
    omq_options o = {};
    o.threads = 1;
    o.context = 128;
    const Handle h(paths[i], o);
    REQUIRE(h.status == OMQ_OK);
    alone[i] = generate(h.m, encode(h.m, "Ella was"), s);
    CHECK(alone[i].size() > 20);
  }
  const int before = num_threads();
  std::atomic<int> wrong{0};
  const auto work = [&](int i) {
    for (int round = 0; round < 6; ++round) {
      omq_options o = {};
      o.threads = 1 + (round + i) % 3;
      o.context = 128;
      omq_model* m = nullptr;
      omq_info info = {};
      std::string text;
      if (omq_open(paths[i].c_str(), &o, &m) != OMQ_OK) wrong++;
      if (omq_get_info(m, &info) != OMQ_OK || info.threads != o.threads) wrong++;
      int32_t ids[32];
      size_t n = 0;
      if (omq_encode(m, "Ella was", 8, ids, 32, &n) != OMQ_OK) wrong++;
      if (omq_generate(m, ids, n, &s, append, &text, nullptr) != OMQ_OK) wrong++;
      if (text != alone[i]) wrong++;
      omq_close(m);
    }
  };
  std::thread a([&] { work(0); }), b([&] { work(1); });
  a.join();
  b.join();
  CHECK(wrong == 0);
  CHECK(num_threads() == before);  // the process's own pool was not touched
}

TEST_CASE("c api: the caller's allocator gives and gets back every byte, and may refuse") {
  struct Heap {
    std::mutex mutex;
    std::map<void*, size_t> live;
    size_t calls = 0, refuse_at = SIZE_MAX;
  } heap;
  omq_options o = {};
  o.context = 64;
  o.allocator.user = &heap;
  o.allocator.alloc = [](void* user, size_t bytes, size_t alignment) -> void* {
    auto* h = static_cast<Heap*>(user);
    const std::lock_guard lock(h->mutex);
    if (h->calls++ >= h->refuse_at) return nullptr;
    void* p = std::aligned_alloc(alignment, bytes);
    h->live[p] = bytes;
    return p;
  };
  o.allocator.free = [](void* user, void* p, size_t bytes) {
    auto* h = static_cast<Heap*>(user);
    const std::lock_guard lock(h->mutex);
    const auto found = h->live.find(p);
    if (found == h->live.end() || found->second != bytes) std::abort();
    h->live.erase(found);
    std::free(p);
  };
  omq_sampling s = {};
  s.max_tokens = 20;
  {
    const Handle h(tiny_path(), o);
    REQUIRE(h.status == OMQ_OK);
    CHECK(heap.live.size() > 10);
    const Ids ids = encode(h.m, "Ella was");
    generate(h.m, ids, s);
    // Nothing more while it writes: caches and buffers are there since the start.
    std::vector<size_t> calls;
    calls.reserve(64);
    struct Seen {
      Heap& heap;
      std::vector<size_t>& calls;
    } seen{heap, calls};
    const auto note = [](void* user, const char*, size_t) {
      auto* x = static_cast<Seen*>(user);
      x->calls.push_back(x->heap.calls);
      return 0;
    };
    CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, note, &seen, nullptr) == OMQ_OK);
    REQUIRE(calls.size() > 5);
    CHECK(calls.front() == calls.back());
  }
  CHECK(heap.live.empty());
  const size_t needed = heap.calls;
  REQUIRE(needed > 20);
  for (size_t at = 0; at < needed; at += 1 + needed / 25) {
    heap.calls = 0;
    heap.refuse_at = at;
    omq_model* m = nullptr;
    omq_status status = omq_open(tiny_path().c_str(), &o, &m);
    if (status == OMQ_OK) {
      const Ids ids = encode(m, "Ella was");
      omq_sampling one = {};
      one.max_tokens = 20;
      status = omq_generate(m, ids.data(), ids.size(), &one, nullptr, nullptr, nullptr);
      if (status != OMQ_OK) {  // and when there is memory again it works
        heap.refuse_at = SIZE_MAX;
        CHECK(omq_generate(m, ids.data(), ids.size(), &one, nullptr, nullptr, nullptr) == OMQ_OK);
      }
    } else {
      CHECK(status == OMQ_NO_MEMORY);
      CHECK(contains(omq_message(m), "out of memory"));
    }
    CHECK((status == OMQ_OK || status == OMQ_NO_MEMORY));
    omq_close(m);
    CHECK(heap.live.empty());
  }
}

TEST_CASE("c api: a generated token takes no memory") {
  if (!counts_allocations()) {
    MESSAGE("skipped: this build does not count allocations");
    return;
  }
  TempDir dir;
  write_packed(dir / "m");
  for (const int threads : {1, 2}) {
    omq_options o = {};
    o.threads = threads;
    const Handle h((dir / "m").string(), o);
    const Ids ids = encode(h.m, "abc");
    std::vector<int64_t> counts;
    counts.reserve(128);
    const auto note = [](void* user, const char*, size_t) {
      static_cast<std::vector<int64_t>*>(user)->push_back(allocation_count());
      return 0;
    };
    for (const float temperature : {0.0f, 0.8f}) {
      omq_sampling s = {};
      s.max_tokens = 40;
      s.temperature = temperature;
      s.repeat_penalty = 1.1f;
      counts.clear();
      CHECK(omq_generate(h.m, ids.data(), ids.size(), &s, note, &counts, nullptr) == OMQ_OK);
      REQUIRE(counts.size() >= 3);
      CHECK(counts.back() == counts[1]);
      MESSAGE("allocations while ", counts.size() - 2, " pieces of text came, ", threads,
              " threads: ", counts.back() - counts[1]);
    }
  }
}

}  // namespace omq
