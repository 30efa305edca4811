// Pre-tokenizer patterns by PCRE2: any expression, Unicode classes, compiled to machine code where
// it can.
//
// PCRE2's \s contains U+180E, which Unicode no longer counts as white space and the engines behind
// published tokenizers do not either; \s and \S are therefore spelled \p{White_Space} and
// \P{White_Space}.

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <string>

#include "models/pretokenizer.h"
#include "tensor/error.h"

namespace omq {

namespace {

std::string unicode_spaces(std::string_view expression) {
  std::string out;
  for (size_t i = 0; i < expression.size(); ++i) {
    if (expression[i] != '\\' || i + 1 == expression.size()) {
      out += expression[i];
      continue;
    }
    const char next = expression[++i];
    if (next == 's' || next == 'S')
      out += next == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
    else
      (out += '\\') += next;
  }
  return out;
}

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  if (pcre2_get_error_message(code, text.data(), text.size()) < 0)
    return fmt::format("PCRE2 error {}", code);
  return reinterpret_cast<const char*>(text.data());
}

// What a match needs besides the code; one per thread, since a Pattern is shared by all of them.
struct Scratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);
  Scratch() {
    if (context != nullptr && stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

class Pcre2Pattern : public Pattern {
 public:
  explicit Pcre2Pattern(std::string_view expression) {
    const std::string spelled = unicode_spaces(expression);
    int error = 0;
    PCRE2_SIZE where = 0;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                          PCRE2_UTF | PCRE2_UCP, &error, &where, nullptr);
    check(code_ != nullptr, "tokenizer: pre-tokenizer pattern {} does not compile: {}", expression,
          message_of(error));
    pcre2_jit_compile(code_, PCRE2_JIT_COMPLETE);  // without JIT pcre2_match interprets
  }
  Pcre2Pattern(const Pcre2Pattern&) = delete;
  Pcre2Pattern& operator=(const Pcre2Pattern&) = delete;
  ~Pcre2Pattern() override { pcre2_code_free(code_); }

  void find_all(std::string_view text, std::vector<TextSpan>& matches) const override {
    thread_local const Scratch scratch;
    check(scratch.data != nullptr && scratch.context != nullptr, "tokenizer: out of memory");
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    for (size_t at = 0; at < text.size();) {
      const int rc =
          pcre2_match(code_, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY,
                      scratch.data, scratch.context);
      if (rc == PCRE2_ERROR_NOMATCH) return;
      check(rc >= 0, "tokenizer: pre-tokenizer pattern failed on a text of {} bytes: {}",
            text.size(), message_of(rc));
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(scratch.data);
      check(span[1] > at && span[0] >= at && span[0] < span[1],
            "tokenizer: pre-tokenizer pattern matched backwards at byte {}", at);
      matches.push_back({span[0], span[1]});
      at = span[1];
    }
  }

 private:
  pcre2_code* code_;
};

}  // namespace

std::string_view pattern_engine() { return "pcre2"; }

std::unique_ptr<const Pattern> compile_pattern(std::string_view expression) {
  return std::make_unique<Pcre2Pattern>(expression);
}

}  // namespace omq
