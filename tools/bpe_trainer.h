// Trains the bundled model's tokenizer: byte-level BPE as GPT-2 defines it, from a text.
//
// The result is plain data; models/tokenizer.h turns it into a Tokenizer and writes it as a
// tokenizer.json. Meant for small texts of few different words: every merge counts all pairs anew.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "models/tokenizer.h"

namespace omq {

// Vocabulary: `end_of_text` (id 0; both bos and eos, not added by itself), the 256 bytes, then
// merges until there are vocab_size tokens. The most frequent pair merges first, of equals the one
// that sorts first. Throws Error when vocab_size is below 257 or the text has too few pairs for it.
TokenizerSpec train_bpe(std::string_view text, int64_t vocab_size,
                        std::string_view end_of_text = "<|endoftext|>");

}  // namespace omq
