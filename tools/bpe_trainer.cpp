// BPE training: words with their counts, then one merge after another (Sennrich et al. 2016, arXiv
// 1508.07909 §3.2).

#include "tools/bpe_trainer.h"

#include <map>
#include <utility>
#include <vector>

#include "models/pretokenizer.h"
#include "tensor/error.h"

namespace omq {

namespace {

// The printable character that stands for a byte in vocabulary files: itself where Latin-1 prints
// it, else the next one from U+0100 on.
std::string byte_piece(int byte) {
  const auto printable = [](int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD); };
  int code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

struct Word {
  std::vector<int32_t> ids;
  int64_t count = 0;
};

std::vector<Word> count_words(std::string_view text, int32_t first_byte_id) {
  std::vector<TextSpan> spans;
  compile_pattern(kGpt2Pattern)->find_all(text, spans);
  std::map<std::string_view, int64_t> counts;  // ordered: the result must not depend on a hash
  for (const TextSpan& s : spans) ++counts[text.substr(s.begin, s.end - s.begin)];
  std::vector<Word> words;
  for (const auto& [word, count] : counts) {
    Word& w = words.emplace_back();
    w.count = count;
    for (const char c : word) w.ids.push_back(first_byte_id + static_cast<unsigned char>(c));
  }
  return words;
}

using Pair = std::pair<int32_t, int32_t>;

// The most frequent pair, of equals the first by the text of its tokens; count 0: no pair is left.
std::pair<Pair, int64_t> best_pair(const std::vector<Word>& words,
                                   const std::vector<std::string>& tokens) {
  std::map<Pair, int64_t> counts;
  for (const Word& w : words)
    for (size_t i = 0; i + 1 < w.ids.size(); ++i) counts[{w.ids[i], w.ids[i + 1]}] += w.count;
  const auto text = [&](const Pair& p) {
    return std::pair<const std::string&, const std::string&>(tokens[static_cast<size_t>(p.first)],
                                                             tokens[static_cast<size_t>(p.second)]);
  };
  std::pair<Pair, int64_t> best{};
  for (const auto& [pair, count] : counts)
    if (count > best.second || (count == best.second && text(pair) < text(best.first)))
      best = {pair, count};
  return best;
}

void merge(std::vector<Word>& words, Pair pair, int32_t id) {
  for (Word& w : words) {
    size_t to = 0;
    for (size_t from = 0; from < w.ids.size(); ++to) {
      const bool here = from + 1 < w.ids.size() && Pair{w.ids[from], w.ids[from + 1]} == pair;
      w.ids[to] = here ? id : w.ids[from];
      from += here ? 2 : 1;
    }
    w.ids.resize(to);
  }
}

}  // namespace

TokenizerSpec train_bpe(std::string_view text, int64_t vocab_size, std::string_view end_of_text) {
  check(vocab_size >= 257, "train_bpe: {} tokens do not hold the 256 bytes and {}", vocab_size,
        end_of_text);
  TokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = "gpt-2";
  spec.tokens.emplace_back(end_of_text);
  for (int b = 0; b < 256; ++b) spec.tokens.push_back(byte_piece(b));
  std::vector<Word> words = count_words(text, 1);
  while (static_cast<int64_t>(spec.tokens.size()) < vocab_size) {
    const auto [pair, count] = best_pair(words, spec.tokens);
    check(count > 0,
          "train_bpe: the text gives {} tokens, {} are wanted: use more text or fewer tokens",
          spec.tokens.size(), vocab_size);
    const std::string left = spec.tokens[static_cast<size_t>(pair.first)];
    const std::string right = spec.tokens[static_cast<size_t>(pair.second)];
    merge(words, pair, static_cast<int32_t>(spec.tokens.size()));
    spec.merges.push_back(left + " " + right);
    spec.tokens.push_back(left + right);
  }
  spec.types.assign(spec.tokens.size(), static_cast<int32_t>(TokenType::Normal));
  spec.types[0] = static_cast<int32_t>(TokenType::Control);
  spec.bos_id = spec.eos_id = 0;
  spec.add_bos = false;
  return spec;
}

}  // namespace omq
