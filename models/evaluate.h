// Perplexity, by protocols that have names: figures can only be compared when they were made the
// same way.
//
//   gptq       what quantisation papers print (GPTQ, OmniQuant). The file as Hugging Face's rows (a
//   blank line is "",
//              others keep their newline) joined by two newlines and tokenised once; windows of
//              `context`, the rest dropped; all context − 1 predictions of a window count.
//   llama.cpp  its llama-perplexity. The file as it is, tokenised once; windows of `context` whose
//   first token is
//              replaced by BOS where the tokenizer adds one; only predictions from the middle of a
//              window on count.
//   documents  texts divided by a separator, each with BOS in front; of each the first `context`
//   tokens are scored,
//              all predictions count alike.
//
// exp of the mean loss in nats. Losses are added in double, in the order of the text.
// spec/command-line.md §3.10.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/model.h"
#include "models/tokenizer.h"

namespace omq {

enum class Protocol { Gptq, LlamaCpp, Documents };
std::string_view to_string(Protocol protocol);  // "gptq", "llama.cpp", "documents"
Protocol protocol_from(std::string_view name);  // throws Error on another name

struct PerplexityOptions {
  int64_t context = 2048;  // tokens of a window; of a document at most
  Protocol protocol = Protocol::Gptq;
  int64_t max_windows = 0;                  // windows or documents; 0: all
  std::string separator = "<|endoftext|>";  // documents: a line of its own
  int64_t skip = 0;                         // documents: leave out the first ones
};

struct PerplexityResult {
  double perplexity = 0, mean_nll = 0;  // nats a token
  int64_t tokens = 0;     // of the whole text (documents: of those scored, BOS counted)
  int64_t predicted = 0;  // predictions that counted
  int64_t windows = 0;    // or documents
  int64_t available = 0;  // windows that the text has
  int64_t cut = 0;        // documents longer than the context
  int64_t context = 0;
  Protocol protocol = Protocol::Gptq;
  bool bos = false;  // a BOS token was put in front: of the text (gptq), of each window (llama.cpp)
                     // or document
};

// Windows done, of how many, and the perplexity so far.
using PerplexityProgress = std::function<void(int64_t done, int64_t total, double perplexity)>;

// text: the content of a file. Throws Error when it is shorter than one window, or the model is not
// loaded for windows of that size.
PerplexityResult evaluate_perplexity(const Model& model, const Tokenizer& tokenizer,
                                     std::string_view text, const PerplexityOptions& options,
                                     const PerplexityProgress& progress = {});

// The same on token ids, by the gptq or the llama.cpp protocol. bos: replaces the first token of
// each llama.cpp window (−1: nothing does).
PerplexityResult evaluate_windows(const Model& model, std::span<const int32_t> ids,
                                  const PerplexityOptions& options, int32_t bos = -1,
                                  const PerplexityProgress& progress = {});

// Loss in nats of ids[1], ids[2], … each after all before it: [ids.size() − 1].
std::vector<double> token_losses(const Model& model, std::span<const int32_t> ids);

// The text as the gptq protocol joins it.
std::string gptq_text(std::string_view file);

// Texts between lines that are `separator`, without white space at both ends; empty ones are left
// out.
std::vector<std::string> split_documents(std::string_view file, std::string_view separator);

}  // namespace omq
