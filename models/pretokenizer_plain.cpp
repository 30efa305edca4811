// Pre-tokenizer patterns without PCRE2: only the expressions that tokenizer_patterns.cpp matches by
// hand.
//
// Linked in place of pretokenizer_pcre2.cpp when the library is absent.

#include "models/pretokenizer.h"
#include "tensor/error.h"

namespace omq {

std::string_view pattern_engine() { return "plain"; }

std::unique_ptr<const Pattern> compile_pattern(std::string_view expression) {
  auto pattern = known_pattern(expression);
  check(pattern != nullptr,
        "tokenizer: this build has no PCRE2 and knows no matcher for the pre-tokenizer pattern {}; "
        "install libpcre2-dev and configure again",
        expression);
  return pattern;
}

}  // namespace omq
