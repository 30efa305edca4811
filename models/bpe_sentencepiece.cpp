// SentencePiece-style BPE: spaces become U+2581, characters merge by score or rank, unknown ones
// turn to bytes.
//
// There is no pre-tokenizer: merges run over the whole text. Where no piece contains a word mark
// after another character (every LLaMA vocabulary), no merge can cross into a word mark, so cutting
// there and remembering the words gives the same ids faster. Reference: spec/interop-formats.md §9
// (tokenizer.model; LLaMA-1/2 json).

#include <algorithm>

#include "models/tokenizer_data.h"

namespace omq {

std::optional<uint8_t> byte_of_piece(std::string_view piece) {
  if (piece.size() != 6 || piece.substr(0, 3) != "<0x" || piece[5] != '>') return {};
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  const int high = digit(piece[3]), low = digit(piece[4]);
  if (high < 0 || low < 0) return {};
  return static_cast<uint8_t>(high * 16 + low);
}

namespace {

std::string mark_spaces(std::string_view text) {
  std::string out;
  out.reserve(text.size() * 3 / 2);
  for (const char c : text) {
    if (c == ' ')
      out += kWordMark;
    else
      out += c;
  }
  return out;
}

// End of the word that starts at begin: the next mark that starts a piece of its own. In a run of
// marks the last belongs to the word after it when `split_runs`, else all do.
size_t word_end(std::string_view text, size_t begin, bool split_runs) {
  size_t i = begin;
  if (!split_runs)
    while (text.substr(i, kWordMark.size()) == kWordMark) i += kWordMark.size();
  return std::min(text.size(), text.find(kWordMark, std::max(i, begin + 1)));
}

void characters_to_symbols(const TokenizerData& data, std::string_view word,
                           std::vector<int32_t>& symbols) {
  for (size_t i = 0; i < word.size();) {
    const std::string_view c = word.substr(i, utf8_at(word, i).length);
    i += c.size();
    if (const auto known = data.ids.find(c); known != data.ids.end()) {
      symbols.push_back(known->second);
      continue;
    }
    const bool as_bytes = data.byte_fallback && std::all_of(c.begin(), c.end(), [&](char b) {
                            return data.byte_ids[static_cast<unsigned char>(b)] >= 0;
                          });
    if (as_bytes) {
      for (const char b : c) symbols.push_back(data.byte_ids[static_cast<unsigned char>(b)]);
    } else if (data.unk && !(data.fuse_unk && !symbols.empty() && symbols.back() == *data.unk)) {
      symbols.push_back(*data.unk);
    }
  }
}

}  // namespace

void TokenizerData::encode_marked(std::string_view text, bool first,
                                  std::vector<int32_t>& out) const {
  if (text.empty()) return;
  std::string composed;
  if (normalize_nfc) text = composed = to_nfc(text);
  std::string marked = mark_spaces(text);
  const bool present = marked.starts_with(kWordMark);
  if (word_mark == WordMark::Always || (word_mark == WordMark::UnlessPresent && !present) ||
      (word_mark == WordMark::FirstUnlessPresent && !present && first))
    marked.insert(0, kWordMark);

  std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen;  // word → its ids in out
  std::vector<int32_t> symbols;
  const std::string_view all = marked;
  for (size_t begin = 0; begin < all.size();) {
    const bool cut = split_words || words_independent;
    const size_t end = cut ? word_end(all, begin, split_words) : all.size();
    const std::string_view word = all.substr(begin, end - begin);
    begin = end;
    const size_t at = out.size();
    if (const auto known = seen.find(word); known != seen.end()) {
      for (size_t k = known->second.first; k < known->second.second; ++k) out.push_back(out[k]);
      continue;
    }
    if (const auto whole = whole_pieces.find(word); whole != whole_pieces.end()) {
      symbols.assign(1, whole->second);
    } else {
      symbols.clear();
      characters_to_symbols(*this, word, symbols);
      merge_symbols(symbols, merge_table);
    }
    out.insert(out.end(), symbols.begin(), symbols.end());
    seen.emplace(word, std::pair{at, out.size()});
  }
}

void derive_merges(TokenizerData& data) {
  struct Scored {
    float score;
    Merge merge;
  };
  std::vector<Scored> found;
  const auto operand = [&](std::string_view part) {
    const auto id = data.ids.find(part);
    return id != data.ids.end() && data.types[id->second] == TokenType::Normal ? id->second : -1;
  };
  std::vector<Merge> splits;
  for (size_t id = 0; id < data.pieces.size(); ++id) {
    if (data.types[id] != TokenType::Normal) continue;
    const std::string_view piece = data.pieces[id];
    splits.clear();
    for (size_t i = 0; i < piece.size();) {
      i += utf8_at(piece, i).length;
      if (i >= piece.size()) break;
      const int32_t left = operand(piece.substr(0, i)), right = operand(piece.substr(i));
      if (left >= 0 && right >= 0) splits.push_back({left, right, static_cast<int32_t>(id)});
    }
    std::sort(splits.begin(), splits.end(), [](const Merge& a, const Merge& b) {
      return std::pair(a.left, a.right) < std::pair(b.left, b.right);
    });
    for (const Merge& m : splits) found.push_back({data.scores[id], m});
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Scored& a, const Scored& b) { return a.score > b.score; });
  // Equal scores share a rank: SentencePiece decides such ties by position in the text alone.
  for (size_t i = 0; i < found.size(); ++i) {
    const bool tie = i > 0 && found[i].score == found[i - 1].score;
    data.ranks.push_back(tie ? data.ranks.back() : static_cast<uint32_t>(i));
    data.merges.push_back(found[i].merge);
  }
}

}  // namespace omq
