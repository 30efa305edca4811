// Error and check(): how the library says no.
//
// check(ok, "matmul: inner dims differ: {} and {}", k1, k2) formats only on failure; the format
// string is checked at compile time. A message names the op or the file, what was wrong, the
// values, and (when known) what to do. Boundaries add a frame with with_context(); programs print
// the chain and exit 1.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace omq {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
inline void check(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) [[unlikely]]
    fail(format, std::forward<Args>(args)...);
}

// Runs f; an Error that escapes it is thrown again with "while <frame>: " in front.
template <class F> decltype(auto) with_context(std::string_view frame, F&& f) {
  try {
    return std::forward<F>(f)();
  } catch (const Error& e) {
    throw Error(fmt::format("while {}: {}", frame, e.what()));
  }
}

}  // namespace omq
