// The merge table of a BPE tokenizer and the merge loop, shared by both families.
//
// A vocabulary of 128k tokens has 280k merges, and every adjacent pair of symbols asks for one: the
// table is a flat open-addressing hash from (left id, right id) to (rank, result id). The loop
// keeps candidate pairs in a heap, O(n log n), since a SentencePiece text is one single piece of
// any length (spec §9).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace omq {

class MergeTable {
 public:
  struct Entry {
    uint64_t key;    // left << 32 | right
    uint32_t rank;   // lower merges first
    int32_t result;  // id, −1: empty slot
  };
  void reserve(size_t merges);
  // Keeps the first of two entries for the same pair.
  void add(int32_t left, int32_t right, uint32_t rank, int32_t result);
  const Entry* find(int32_t left, int32_t right) const;
  bool empty() const { return size_ == 0; }

 private:
  static uint64_t mix(uint64_t key);
  std::vector<Entry> slots_;
  size_t size_ = 0;
};

// Repeatedly merges the adjacent pair of lowest rank, leftmost on ties, until none has a merge.
// Negative symbols never merge. In place.
void merge_symbols(std::vector<int32_t>& symbols, const MergeTable& table);

}  // namespace omq
