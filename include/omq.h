/* omq: run a packed language model inside a C program.
 *
 *   omq_model *m;
 *   if (omq_open("model.safetensors", NULL, &m) != OMQ_OK) puts(omq_message(m));
 *   ...
 *   omq_close(m);
 *
 * A handle is one model and one conversation: weights (mapped, not copied, where they are packed),
 * tokenizer, key/value cache, its own threads. All memory for running is taken in omq_open; a
 * generated token takes none. The library prints nothing, ends no process, lets no C++ exception
 * out and keeps no state outside its handles, so two handles may be used by two threads at the same
 * time, and give what they give alone. One handle serves one call at a time; only omq_cancel may be
 * called beside it, by another thread or by a callback.
 *
 * Every function that can fail gives a status; omq_message has the reason in words. After
 * OMQ_CANCELLED, OMQ_CONTEXT_FULL and OMQ_BAD_ARGUMENT a handle works on. C99 and C++. */
#ifndef OMQ_H
#define OMQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OMQ_API_VERSION 1

typedef struct omq_model omq_model;

typedef enum omq_status {
  OMQ_OK = 0,
  OMQ_BAD_ARGUMENT = 1, /* a null pointer, a token that there is not, a buffer too small, ... */
  OMQ_NOT_FOUND = 2,    /* no such file, or it cannot be read */
  OMQ_BAD_MODEL = 3,    /* the file is damaged, cut short, or not a model that this version reads */
  OMQ_NO_MEMORY = 4,
  OMQ_CONTEXT_FULL = 5, /* prompt and text do not fit into the context */
  OMQ_CANCELLED = 6,    /* by omq_cancel or by the callback */
  OMQ_BUSY = 7,  /* the handle is in another call; nothing was done, omq_message is as it was */
  OMQ_FAILED = 8 /* anything else */
} omq_status;

/* Memory for tensors: cache, buffers, weights that are not used as they lie in the file. Tables of
 * the tokenizer come from malloc. `alignment` is a power of two; alloc gives NULL when there is
 * none. Called by the thread that is in an omq_ function. */
typedef struct omq_allocator {
  void* (*alloc)(void* user, size_t bytes, size_t alignment);
  void (*free)(void* user, void* memory, size_t bytes);
  void* user;
} omq_allocator;

/* Zero means the default everywhere: `omq_options o = {0};`. */
typedef struct omq_options {
  int32_t threads; /* the caller's included; 0: the CPUs that the process may use */
  int64_t context; /* tokens of prompt and text together; 0: the model's own, at most 8192 */
  omq_allocator allocator; /* both functions or neither */
} omq_options;

/* Opens a model: a file of omq-quant or its folder, a GGUF file, a Hugging Face folder. options may
 * be NULL. *model is set whatever the status, so that omq_message can tell the reason, and must go
 * to omq_close; it is NULL only when there is no memory for a handle, or when `model` itself is
 * NULL. */
omq_status omq_open(const char* path, const omq_options* options, omq_model** model);

/* The same of a file (of omq-quant, or GGUF) that is in memory. `data` stays the caller's, is used
 * in place, and must neither change nor go before omq_close. */
omq_status omq_open_memory(const void* data, size_t bytes, const omq_options* options,
                           omq_model** model);

/* Gives back everything; NULL is allowed. */
void omq_close(omq_model* model);

/* Why the last call on this handle did not give OMQ_OK; "" when it did. Valid until the next call.
 */
const char* omq_message(const omq_model* model);

typedef struct omq_info {
  int64_t vocabulary; /* logits of a token: as many floats */
  int64_t context;    /* tokens of prompt and text together */
  int64_t layers;
  uint64_t weight_bytes; /* as stored, scales and zero points included */
  int32_t threads;
  int32_t bos, eos; /* token ids, -1: none */
} omq_info;
omq_status omq_get_info(omq_model* model, omq_info* info);

/* Text (UTF-8, `bytes` long) as tokens, with the beginning-of-text token where the model wants one;
 * special tokens may be spelled out. *count is the number of tokens, also when `capacity` is less
 * and the status OMQ_BAD_ARGUMENT; ids may be NULL with capacity 0 to ask for it. */
omq_status omq_encode(omq_model* model, const char* text, size_t bytes, int32_t* ids,
                      size_t capacity, size_t* count);

/* The text of tokens, without special ones, not ended by 0. *bytes as *count above. */
omq_status omq_decode(omq_model* model, const int32_t* ids, size_t count, char* text,
                      size_t capacity, size_t* bytes);

/* logits [vocabulary]: of the token behind ids[0..count-1]. What the handle's cache holds of their
 * beginning is not computed again, so calling it with one token more each time costs one step each
 * time. */
omq_status omq_logits(omq_model* model, const int32_t* ids, size_t count, float* logits);

/* Zero means the default: greedy, to the end of text or of the context. */
typedef struct omq_sampling {
  float temperature;    /* 0: always the most probable token */
  int32_t top_k;        /* of the k most probable; 0: of all */
  float top_p;          /* of the fewest that hold this share of the probability; 0: of all */
  float min_p;          /* of those at least this share as probable as the first; 0: of all */
  float repeat_penalty; /* of the last 64 tokens; 0 or 1: none */
  uint64_t seed;
  int64_t max_tokens; /* 0: as many as fit */
  const char* stop;   /* text ends before this; NULL: nothing */
} omq_sampling;

/* A piece of text, whole characters, as soon as it is certain. Anything but 0 cancels. Must return
 * (no longjmp, no exception) and may call nothing but omq_cancel on this handle. */
typedef int (*omq_text_callback)(void* user, const char* text, size_t bytes);

typedef struct omq_generated {
  size_t prompt_tokens, reused_tokens; /* given, and of these found in the cache */
  size_t tokens;                       /* made; the one that ended the text counts */
  double prompt_seconds, decode_seconds;
} omq_generated;

/* Text behind a prompt. sampling, callback and result may be NULL. OMQ_OK: the model ended the
 * text, or max_tokens or `stop` did. OMQ_CANCELLED, OMQ_CONTEXT_FULL: it ended earlier; what came
 * is good. */
omq_status omq_generate(omq_model* model, const int32_t* prompt, size_t count,
                        const omq_sampling* sampling, omq_text_callback callback, void* user,
                        omq_generated* result);

/* Ends the omq_generate or omq_logits that runs on this handle at its next token or batch of the
 * prompt; when none runs, nothing happens. From any thread. */
void omq_cancel(omq_model* model);

#ifdef __cplusplus
}
#endif

#endif
