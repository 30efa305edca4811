// Perplexity by windows or documents. Hidden states of a few windows at a time, logits of 256 rows
// at a time: a whole window's logits of a large vocabulary would be the largest tensor of the
// program.
#include "models/evaluate.h"

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "models/tokenizer_utf8.h"

namespace omq {
namespace {

constexpr int64_t kLogitRows = 256;
constexpr int64_t kBatchTokens = 2048;  // short windows go through the model together

// Python's str.isspace(), which decides what a blank row is.
bool python_blank(std::string_view line) {
  for (size_t i = 0; i < line.size();) {
    const Utf8Char c = utf8_at(line, i);
    const bool separator = c.code >= 0x1c && c.code <= 0x1f;
    if (c.kind != Utf8Char::Valid || (!separator && char_class(c.code) != CharClass::Space))
      return false;
    i += c.length;
  }
  return true;
}

std::string_view stripped(std::string_view s) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const size_t begin = s.find_first_not_of(kSpace);
  return begin == s.npos ? std::string_view()
                         : s.substr(begin, s.find_last_not_of(kSpace) - begin + 1);
}

// Losses [B, T − from − 1] of the tokens from + 1 … T − 1 of B windows of T tokens. ids [B·T].
std::vector<float> window_losses(const Model& model, std::span<const int32_t> ids, int64_t batch,
                                 int64_t from) {
  const NoGrad off;
  const auto T = static_cast<int64_t>(ids.size()) / batch, scored = T - 1 - from;
  const Tensor hidden = model.forward(Tensor::from<int32_t>(ids, {batch, T}, model.device()));
  std::vector<float> losses;
  losses.reserve(static_cast<size_t>(batch * scored));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t at = from; at < T - 1; at += kLogitRows) {
      const int64_t rows = std::min(kLogitRows, T - 1 - at);
      const Tensor h =
          reshape(slice(slice(hidden, 0, b, b + 1), 1, at, at + rows), {rows, hidden.dim(-1)});
      const auto targets =
          ids.subspan(static_cast<size_t>(b * T + at + 1), static_cast<size_t>(rows));
      const Tensor loss =
          cross_entropy(model.logits(h), Tensor::from<int32_t>(targets, {rows}, model.device()));
      const std::vector<float> values = loss.to_vector<float>();
      losses.insert(losses.end(), values.begin(), values.end());
    }
  return losses;
}

void add_losses(double& sum, std::span<const float> losses, std::string_view what, int64_t index) {
  double part = 0;
  for (const float loss : losses) part += loss;
  check(std::isfinite(part),
        "perplexity: the loss of {} {} is not finite; the model's weights are broken", what, index);
  sum += part;
}

void finish(PerplexityResult& r, double sum) {
  r.mean_nll = sum / static_cast<double>(r.predicted);
  r.perplexity = std::exp(r.mean_nll);
}

void check_window(const Model& model, int64_t context) {
  check(context >= 2, "perplexity: windows of {} tokens; at least 2 are needed", context);
  check(context <= model.context(),
        "perplexity: windows of {} tokens, but the model is good for {}", context, model.context());
}

PerplexityResult evaluate_documents(const Model& model, const Tokenizer& tokenizer,
                                    std::string_view text, const PerplexityOptions& options,
                                    const PerplexityProgress& progress) {
  const std::vector<std::string> all = split_documents(text, options.separator);
  const auto count = static_cast<int64_t>(all.size());
  check(count > options.skip, "perplexity: {} documents divided by \"{}\", and {} to be skipped",
        count, options.separator, options.skip);
  PerplexityResult r{.context = options.context, .protocol = Protocol::Documents};
  r.available = count - options.skip;
  const int64_t windows =
      options.max_windows > 0 ? std::min(options.max_windows, r.available) : r.available;
  r.bos = tokenizer.bos_id().has_value();
  double sum = 0;
  for (int64_t i = 0; i < windows; ++i) {
    const int64_t number = options.skip + i + 1;
    std::vector<int32_t> ids =
        tokenizer.encode(all[static_cast<size_t>(number - 1)], {.add_bos = r.bos});
    r.cut += static_cast<int64_t>(ids.size()) > options.context ? 1 : 0;
    ids.resize(std::min(ids.size(), static_cast<size_t>(options.context)));
    const auto length = static_cast<int64_t>(ids.size());
    r.tokens += length;
    ++r.windows;
    if (length < 2) continue;
    add_losses(sum, window_losses(model, ids, 1, 0), "document", number);
    r.predicted += length - 1;
    if (progress) progress(i + 1, windows, std::exp(sum / static_cast<double>(r.predicted)));
  }
  check(r.predicted > 0, "perplexity: no document has two tokens");
  finish(r, sum);
  return r;
}

}  // namespace

std::string_view to_string(Protocol protocol) {
  switch (protocol) {
    case Protocol::Gptq:
      return "gptq";
    case Protocol::LlamaCpp:
      return "llama.cpp";
    case Protocol::Documents:
      return "documents";
  }
  return "?";
}

Protocol protocol_from(std::string_view name) {
  for (const Protocol p : {Protocol::Gptq, Protocol::LlamaCpp, Protocol::Documents})
    if (name == to_string(p)) return p;
  fail("perplexity protocol \"{}\" is not known; there are gptq, llama.cpp and documents", name);
}

std::string gptq_text(std::string_view file) {
  std::string out;
  out.reserve(file.size() + file.size() / 16);
  for (size_t at = 0; at < file.size();) {
    const size_t end = std::min(file.find('\n', at), file.size() - 1) + 1;
    const std::string_view line = file.substr(at, end - at);
    if (at > 0) out += "\n\n";
    if (!python_blank(line)) out += line;
    at = end;
  }
  return out;
}

std::vector<std::string> split_documents(std::string_view file, std::string_view separator) {
  std::vector<std::string> documents;
  size_t begin = 0;
  auto add = [&](size_t end) {
    const std::string_view text = stripped(file.substr(begin, end - begin));
    if (!text.empty()) documents.emplace_back(text);
  };
  for (size_t at = 0; at < file.size();) {
    const size_t end = std::min(file.find('\n', at), file.size());
    if (stripped(file.substr(at, end - at)) == separator) {
      add(at);
      begin = std::min(end + 1, file.size());
    }
    at = end + 1;
  }
  add(file.size());
  return documents;
}

std::vector<double> token_losses(const Model& model, std::span<const int32_t> ids) {
  if (ids.size() < 2) return {};
  check(static_cast<int64_t>(ids.size()) <= model.context(),
        "losses: {} tokens, but the model is good for {}", ids.size(), model.context());
  const std::vector<float> losses = window_losses(model, ids, 1, 0);
  return {losses.begin(), losses.end()};
}

PerplexityResult evaluate_windows(const Model& model, std::span<const int32_t> ids,
                                  const PerplexityOptions& options, int32_t bos,
                                  const PerplexityProgress& progress) {
  check(options.protocol != Protocol::Documents,
        "perplexity: the documents protocol needs text, not token ids");
  const int64_t c = options.context;
  check_window(model, c);
  PerplexityResult r{.context = c, .protocol = options.protocol};
  r.tokens = static_cast<int64_t>(ids.size());
  r.available = r.tokens / c;
  check(r.available > 0, "perplexity: the text has {} tokens, less than one window of {}", r.tokens,
        c);
  r.windows = options.max_windows > 0 ? std::min(options.max_windows, r.available) : r.available;
  const bool second_half = options.protocol == Protocol::LlamaCpp;
  const int64_t from = second_half ? c / 2 : 0, scored = c - 1 - from;
  const int64_t batch = std::max<int64_t>(1, kBatchTokens / c);
  double sum = 0;
  for (int64_t w = 0; w < r.windows; w += batch) {
    const int64_t n = std::min(batch, r.windows - w);
    std::vector<int32_t> window(ids.begin() + w * c, ids.begin() + (w + n) * c);
    if (second_half && bos >= 0)
      for (int64_t i = 0; i < n; ++i) window[static_cast<size_t>(i * c)] = bos;
    const std::vector<float> losses = window_losses(model, window, n, from);
    for (int64_t i = 0; i < n; ++i)
      add_losses(
          sum,
          std::span(losses).subspan(static_cast<size_t>(i * scored), static_cast<size_t>(scored)),
          "window", w + i);
    r.predicted += n * scored;
    if (progress) progress(w + n, r.windows, std::exp(sum / static_cast<double>(r.predicted)));
  }
  finish(r, sum);
  return r;
}

PerplexityResult evaluate_perplexity(const Model& model, const Tokenizer& tokenizer,
                                     std::string_view text, const PerplexityOptions& options,
                                     const PerplexityProgress& progress) {
  check_window(model, options.context);
  if (options.protocol == Protocol::Documents)
    return evaluate_documents(model, tokenizer, text, options, progress);
  const bool gptq = options.protocol == Protocol::Gptq;
  const std::vector<int32_t> ids = tokenizer.encode(gptq ? gptq_text(text) : std::string(text));
  const bool bos = tokenizer.adds_bos() && tokenizer.bos_id().has_value();
  PerplexityResult r =
      evaluate_windows(model, ids, options, bos ? *tokenizer.bos_id() : -1, progress);
  r.bos = bos;
  return r;
}

}  // namespace omq
