// The C interface (include/omq.h): handles around a Model and a Generator, and the border that
// exceptions do not pass.
//
// While a call runs, this thread's parallel_for means the handle's own pool and its tensors come
// from the handle's allocator: that is all that keeps handles apart.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <new>
#include <optional>

#include "autograd/node.h"
#include "include/omq.h"
#include "models/checkpoint.h"
#include "models/generator.h"
#include "models/model.h"
#include "tensor/allocator.h"
#include "tensor/error.h"
#include "tensor/thread_pool.h"

namespace {

using namespace omq;

constexpr size_t kMessageBytes = 1024;

void* default_alloc(void*, size_t bytes, size_t alignment) {
  return std::aligned_alloc(alignment, bytes);
}
void default_free(void*, void* memory, size_t) { std::free(memory); }

// An Error with its status.
struct Refused : Error {
  omq_status status;
  Refused(omq_status s, const std::string& what) : Error(what), status(s) {}
};

template <class... Args>
void want(bool ok, omq_status status, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) throw Refused(status, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace

struct omq_model {
  // The members up to `engine` outlive it: its tensors go back to the allocator.
  omq_allocator memory{default_alloc, default_free, nullptr};
  bool memory_refused = false;  // the allocator gave none during this call
  char message[kMessageBytes] = "";
  std::atomic<bool> busy{false}, cancel{false};
  std::optional<ThreadPool> pool;

  struct Engine {
    Model model;
    ModelSize size;
    Generator generator;
    // The generator keeps a reference to the model: both stay where they are made.
    Engine(const CheckpointReader& reader, int64_t context)
        : model(Model::load(reader, context)),
          size(model_size(model)),
          generator(model, reader.tokenizer()) {}
  };
  std::unique_ptr<Engine> engine;

  static void* alloc(void* self, size_t bytes, size_t alignment) {
    auto* m = static_cast<omq_model*>(self);
    void* p = m->memory.alloc(m->memory.user, bytes, alignment);
    if (!p) m->memory_refused = true;
    return p;
  }
  static void free(void* self, void* memory, size_t bytes) {
    auto* m = static_cast<omq_model*>(self);
    m->memory.free(m->memory.user, memory, bytes);
  }
  Allocator allocator() { return {alloc, free, this}; }

  omq_status failed(omq_status status, const char* what) {
    std::strncpy(message, what, kMessageBytes - 1);
    return memory_refused ? OMQ_NO_MEMORY : status;
  }
};

namespace {

// Runs body(model), which gives a status or throws, within the handle's pool and allocator.
template <class F> omq_status call(omq_model* m, F&& body) {
  if (!m) return OMQ_BAD_ARGUMENT;
  if (m->busy.exchange(true)) return OMQ_BUSY;
  struct Release {
    omq_model* m;
    ~Release() { m->busy.store(false); }
  } release{m};
  m->message[0] = '\0';
  m->memory_refused = false;
  try {
    const Allocator own = m->allocator();
    const AllocatorScope memory(own);
    std::optional<UsePool> threads;
    if (m->pool) threads.emplace(*m->pool);
    const NoGrad off;
    return body();
  } catch (const Refused& e) {
    return m->failed(e.status, e.what());
  } catch (const std::bad_alloc&) {
    return m->failed(OMQ_NO_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return m->failed(OMQ_FAILED, e.what());
  } catch (...) {
    return m->failed(OMQ_FAILED, "an unknown error");
  }
}

// The same for what needs an open model.
template <class F> omq_status use(omq_model* m, F&& body) {
  return call(m, [&] {
    want(m->engine != nullptr, OMQ_BAD_ARGUMENT, "this handle holds no model: opening it failed");
    return body(*m->engine);
  });
}

template <class F> omq_status open(const omq_options* options, omq_model** out, F&& reader_of) {
  if (!out) return OMQ_BAD_ARGUMENT;
  *out = new (std::nothrow) omq_model;
  if (!*out) return OMQ_NO_MEMORY;
  omq_model* m = *out;
  const omq_options o = options ? *options : omq_options{};
  const omq_status prepared = call(m, [&] {
    want(o.threads >= 0 && o.threads <= 1024, OMQ_BAD_ARGUMENT, "threads is {}, 0 to 1024 wanted",
         o.threads);
    want(o.context >= 0, OMQ_BAD_ARGUMENT, "context is {}", o.context);
    want(!o.allocator.alloc == !o.allocator.free, OMQ_BAD_ARGUMENT,
         "an allocator needs alloc and free, or neither");
    if (o.allocator.alloc) m->memory = o.allocator;
    m->pool.emplace(o.threads);
    return OMQ_OK;
  });
  if (prepared != OMQ_OK) return prepared;
  return call(m, [&] {
    try {
      const std::unique_ptr<CheckpointReader> reader = reader_of();
      const int64_t longest = reader->config().usable_context();
      want(o.context <= longest, OMQ_BAD_ARGUMENT,
           "a context of {} tokens, the model was made for {}", o.context, longest);
      m->engine = std::make_unique<omq_model::Engine>(*reader, o.context);
    } catch (const Refused&) {
      throw;
    } catch (const Error& e) {
      throw Refused(OMQ_BAD_MODEL, e.what());
    }
    return OMQ_OK;
  });
}

void check_tokens(const omq_model::Engine& e, const int32_t* ids, size_t count) {
  want(ids && count > 0, OMQ_BAD_ARGUMENT, "no tokens");
  const int64_t vocab = e.model.config().vocab_size;
  for (size_t i = 0; i < count; ++i)
    want(ids[i] >= 0 && ids[i] < vocab, OMQ_BAD_ARGUMENT,
         "token {} at {} is outside the model's vocabulary of {}", ids[i], i, vocab);
  want(static_cast<int64_t>(count) <= e.generator.context(), OMQ_CONTEXT_FULL,
       "{} tokens do not fit into the context of {}", count, e.generator.context());
}

GenerateOptions options_of(const omq_sampling& s) {
  GenerateOptions o;
  o.sampling.temperature = static_cast<double>(s.temperature);
  o.sampling.top_k = s.top_k;
  o.sampling.top_p = s.top_p == 0 ? 1.0 : static_cast<double>(s.top_p);
  o.sampling.min_p = static_cast<double>(s.min_p);
  o.sampling.repeat_penalty = s.repeat_penalty == 0 ? 1.0 : static_cast<double>(s.repeat_penalty);
  o.sampling.seed = s.seed;
  want(s.max_tokens >= 0, OMQ_BAD_ARGUMENT, "max_tokens is {}", s.max_tokens);
  o.max_tokens = s.max_tokens == 0 ? -1 : s.max_tokens;
  if (s.stop && *s.stop) o.stop = {s.stop};
  o.keep_text = false;
  return o;
}

omq_status status_of(FinishReason reason, int64_t context) {
  want(reason != FinishReason::Cancelled, OMQ_CANCELLED, "cancelled");
  want(reason != FinishReason::ContextFull, OMQ_CONTEXT_FULL,
       "the context of {} tokens is full; the text ends here", context);
  return OMQ_OK;
}

}  // namespace

extern "C" {

omq_status omq_open(const char* path, const omq_options* options, omq_model** model) {
  return open(options, model, [&] {
    want(path != nullptr, OMQ_BAD_ARGUMENT, "the path is null");
    std::error_code error;
    want(std::filesystem::exists(path, error), OMQ_NOT_FOUND, "{}: no such file or folder", path);
    return open_checkpoint(std::filesystem::path(path));
  });
}

omq_status omq_open_memory(const void* data, size_t bytes, const omq_options* options,
                           omq_model** model) {
  return open(options, model, [&] {
    want(data != nullptr, OMQ_BAD_ARGUMENT, "the data are null");
    // Nothing writes to a model's storage.
    return open_checkpoint(Storage::borrow(const_cast<void*>(data), bytes, Device{}, nullptr));
  });
}

void omq_close(omq_model* model) { delete model; }

const char* omq_message(const omq_model* model) { return model ? model->message : "no handle"; }

omq_status omq_get_info(omq_model* model, omq_info* info) {
  return use(model, [&](const omq_model::Engine& e) {
    want(info != nullptr, OMQ_BAD_ARGUMENT, "info is null");
    const Tokenizer& t = e.generator.tokenizer();
    *info = {};
    info->vocabulary = e.model.config().vocab_size;
    info->context = e.generator.context();
    info->layers = e.model.config().num_layers;
    info->weight_bytes = e.size.bytes;
    info->threads = model->pool->threads();
    info->bos = t.bos_id().value_or(-1);
    info->eos = t.eos_ids().empty() ? -1 : t.eos_ids().front();
    return OMQ_OK;
  });
}

omq_status omq_encode(omq_model* model, const char* text, size_t bytes, int32_t* ids,
                      size_t capacity, size_t* count) {
  return use(model, [&](const omq_model::Engine& e) {
    want((text || bytes == 0) && count && (ids || capacity == 0), OMQ_BAD_ARGUMENT,
         "text, ids or count is null");
    const std::vector<int32_t> all = e.generator.tokenizer().encode({text ? text : "", bytes});
    *count = all.size();
    if (!ids) return OMQ_OK;
    want(all.size() <= capacity, OMQ_BAD_ARGUMENT, "{} tokens do not fit into room for {}",
         all.size(), capacity);
    std::copy(all.begin(), all.end(), ids);
    return OMQ_OK;
  });
}

omq_status omq_decode(omq_model* model, const int32_t* ids, size_t count, char* text,
                      size_t capacity, size_t* bytes) {
  return use(model, [&](const omq_model::Engine& e) {
    want((ids || count == 0) && bytes && (text || capacity == 0), OMQ_BAD_ARGUMENT,
         "ids, text or bytes is null");
    const Tokenizer& t = e.generator.tokenizer();
    for (size_t i = 0; i < count; ++i)
      want(ids[i] >= 0 && ids[i] < t.vocab_size(), OMQ_BAD_ARGUMENT,
           "token {} at {} is outside the tokenizer's vocabulary of {}", ids[i], i, t.vocab_size());
    const std::string all = t.decode({ids, count});
    *bytes = all.size();
    if (!text) return OMQ_OK;
    want(all.size() <= capacity, OMQ_BAD_ARGUMENT, "{} bytes do not fit into room for {}",
         all.size(), capacity);
    std::copy(all.begin(), all.end(), text);
    return OMQ_OK;
  });
}

omq_status omq_logits(omq_model* model, const int32_t* ids, size_t count, float* logits) {
  return use(model, [&](omq_model::Engine& e) {
    want(logits != nullptr, OMQ_BAD_ARGUMENT, "logits is null");
    check_tokens(e, ids, count);
    model->cancel.store(false);
    const auto found = e.generator.logits_after({ids, count}, &model->cancel);
    want(!found.empty(), OMQ_CANCELLED, "cancelled");
    std::copy(found.begin(), found.end(), logits);
    return OMQ_OK;
  });
}

omq_status omq_generate(omq_model* model, const int32_t* prompt, size_t count,
                        const omq_sampling* sampling, omq_text_callback callback, void* user,
                        omq_generated* result) {
  if (result) *result = {};
  return use(model, [&](omq_model::Engine& e) {
    check_tokens(e, prompt, count);
    GenerateOptions o = options_of(sampling ? *sampling : omq_sampling{});
    try {
      o.sampling.validate(e.model.config().vocab_size);
    } catch (const Error& error) {
      throw Refused(OMQ_BAD_ARGUMENT, error.what());
    }
    model->cancel.store(false);
    o.cancel = &model->cancel;
    if (callback)
      o.on_text = [&](std::string_view text) {  // not again behind a cancel: what was held back
        if (!model->cancel.load() && callback(user, text.data(), text.size()) != 0)
          model->cancel.store(true);
      };
    const GenerateResult made = e.generator.generate({prompt, count}, o);
    if (result)
      *result = {.prompt_tokens = static_cast<size_t>(made.stats.prompt_tokens),
                 .reused_tokens = static_cast<size_t>(made.stats.reused_tokens),
                 .tokens = made.tokens.size(),
                 .prompt_seconds = made.stats.prompt_seconds,
                 .decode_seconds = made.stats.decode_seconds};
    return status_of(made.finish, e.generator.context());
  });
}

void omq_cancel(omq_model* model) {
  if (model) model->cancel.store(true);
}

}  // extern "C"
