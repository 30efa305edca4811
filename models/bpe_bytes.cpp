// Byte-level BPE: pre-tokenizer steps cut the text into words, every word's bytes are merged by
// rank.
//
// The vocabulary spells bytes in the GPT-2 alphabet (a printable character for each of the 256). A
// byte whose token is missing becomes the unknown token, or nothing when there is none, as in
// Hugging Face's library. Reference: spec/interop-formats.md §9 (tokenizer.json, LLaMA-3).

#include <deque>

#include "models/tokenizer_data.h"

namespace omq {

const std::array<std::string, 256>& byte_alphabet() {
  static const auto table = [] {
    std::array<std::string, 256> t;
    char32_t spare = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
      utf8_append(t[b], printable ? static_cast<char32_t>(b) : spare++);
    }
    return t;
  }();
  return table;
}

void append_bytes_of_alphabet(std::string_view piece, std::string& out) {
  static const auto byte_of = [] {
    StringMap<char> map;
    for (int b = 0; b < 256; ++b) map.emplace(byte_alphabet()[b], static_cast<char>(b));
    return map;
  }();
  for (size_t i = 0; i < piece.size();) {
    const std::string_view c = piece.substr(i, utf8_at(piece, i).length);
    const auto found = byte_of.find(c);
    if (found != byte_of.end())
      out.push_back(found->second);
    else
      out += c;
    i += c.size();
  }
}

std::string bytes_of_alphabet(std::string_view piece) {
  std::string out;
  append_bytes_of_alphabet(piece, out);
  return out;
}

namespace {

// Applies one step to every piece. Pieces view either the text or a string of `storage`.
void split_pieces(const SplitStep& step, std::vector<std::string_view>& pieces,
                  std::deque<std::string>& storage) {
  std::vector<std::string_view> result;
  std::vector<TextSpan> matches;
  for (std::string_view piece : pieces) {
    if (step.prefix_space && !piece.empty() && piece[0] != ' ')
      piece = storage.emplace_back(" " + std::string(piece));
    if (!step.pattern) {
      result.push_back(piece);
      continue;
    }
    matches.clear();
    step.pattern->find_all(piece, matches);
    size_t done = 0;
    for (const TextSpan& m : matches) {
      if (m.begin > done && step.keep_gaps) result.push_back(piece.substr(done, m.begin - done));
      if (m.end > m.begin) result.push_back(piece.substr(m.begin, m.end - m.begin));
      done = m.end;
    }
    if (done < piece.size() && step.keep_gaps) result.push_back(piece.substr(done));
  }
  pieces = std::move(result);
}

}  // namespace

void TokenizerData::encode_bytes(std::string_view text, std::vector<int32_t>& out) const {
  std::string composed;
  if (normalize_nfc) text = composed = to_nfc(text);
  std::deque<std::string> storage;
  std::vector<std::string_view> words{text};
  for (const SplitStep& step : steps) split_pieces(step, words, storage);

  struct Run {
    size_t begin, end;  // in out
  };
  std::unordered_map<std::string_view, Run> seen;  // natural text repeats its words
  std::vector<int32_t> symbols;
  for (std::string_view word : words) {
    const size_t begin = out.size();
    if (const auto known = seen.find(word); known != seen.end()) {
      for (size_t k = known->second.begin; k < known->second.end; ++k) out.push_back(out[k]);
      continue;
    }
    const auto whole = whole_pieces.find(word);
    if (whole != whole_pieces.end()) {
      out.push_back(whole->second);
    } else {
      symbols.clear();
      for (const char c : word) {
        const int32_t id = byte_ids[static_cast<unsigned char>(c)];
        if (id >= 0) {
          symbols.push_back(id);
        } else if (unk && !(fuse_unk && !symbols.empty() && symbols.back() == *unk)) {
          symbols.push_back(*unk);
        }
      }
      merge_symbols(symbols, merge_table);
      out.insert(out.end(), symbols.begin(), symbols.end());
    }
    seen.emplace(word, Run{begin, out.size()});
  }
}

}  // namespace omq
