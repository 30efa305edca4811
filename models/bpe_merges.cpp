// Merge table and merge loop of BPE; see bpe_merges.h.

#include "models/bpe_merges.h"

#include <algorithm>
#include <bit>
#include <queue>

namespace omq {

namespace {

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

struct Candidate {
  uint64_t order;  // rank << 32 | position of the left symbol: lowest first, leftmost on ties
  uint64_t key;    // the pair when it was queued; stale when the symbols there have changed since
  int32_t result;
  bool operator>(const Candidate& other) const { return order > other.order; }
};

}  // namespace

uint64_t MergeTable::mix(uint64_t key) {
  key ^= key >> 31;
  key *= 0x9E3779B97F4A7C15ull;
  return key ^ key >> 29;
}

void MergeTable::reserve(size_t merges) {
  std::vector<Entry> old = std::move(slots_);
  slots_.assign(std::bit_ceil(std::max<size_t>(16, merges * 2)), Entry{0, 0, -1});
  size_ = 0;
  for (const Entry& e : old)
    if (e.result >= 0)
      add(static_cast<int32_t>(e.key >> 32), static_cast<int32_t>(e.key & 0xFFFFFFFFu), e.rank,
          e.result);
}

void MergeTable::add(int32_t left, int32_t right, uint32_t rank, int32_t result) {
  if (slots_.size() < 2 * (size_ + 1)) reserve(size_ + 1);
  const uint64_t key = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  size_t i = mix(key) & mask;
  for (; slots_[i].result >= 0; i = (i + 1) & mask)
    if (slots_[i].key == key) return;
  slots_[i] = {key, rank, result};
  ++size_;
}

const MergeTable::Entry* MergeTable::find(int32_t left, int32_t right) const {
  if (size_ == 0 || left < 0 || right < 0) return nullptr;
  const uint64_t key = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  for (size_t i = mix(key) & mask; slots_[i].result >= 0; i = (i + 1) & mask)
    if (slots_[i].key == key) return &slots_[i];
  return nullptr;
}

void merge_symbols(std::vector<int32_t>& symbols, const MergeTable& table) {
  const auto n = static_cast<int32_t>(symbols.size());
  if (n < 2) return;
  constexpr int32_t kGone = -1;  // in next: the symbol was merged into the one on its left
  std::vector<int32_t> next(symbols.size()), previous(symbols.size());
  for (int32_t i = 0; i < n; ++i) next[i] = i + 1, previous[i] = i - 1;
  std::vector<Candidate> storage;
  storage.reserve(symbols.size());
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue({},
                                                                               std::move(storage));
  const auto offer = [&](int32_t left) {
    if (left < 0 || next[left] >= n) return;
    const int32_t right = next[left];
    if (const auto* e = table.find(symbols[left], symbols[right]))
      queue.push(
          {static_cast<uint64_t>(e->rank) << 32 | static_cast<uint32_t>(left), e->key, e->result});
  };
  for (int32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    const auto left = static_cast<int32_t>(c.order & 0xFFFFFFFFu);
    if (next[left] == kGone || next[left] >= n) continue;
    const int32_t right = next[left];
    if (pair_key(symbols[left], symbols[right]) != c.key) continue;
    symbols[left] = c.result;
    next[left] = next[right];
    if (next[right] < n) previous[next[right]] = left;
    next[right] = kGone;
    offer(left);
    offer(previous[left]);
  }
  size_t kept = 0;
  for (int32_t i = 0; i < n; i = next[i]) symbols[kept++] = symbols[i];
  symbols.resize(kept);
}

}  // namespace omq
