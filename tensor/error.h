// Error and check(): how the library says no.
//
// check(ok, "matmul: inner dims differ: {} and {}", k1, k2) formats only on failure; the format
// string is checked at compile time. A message names the op or the file, what was wrong, the
// values, and (when known) what to do. Boundaries add a frame with with_context(); programs print
// the chain and exit 1.
//
// nvcc and its host compiler do not get through fmt, so CUDA files see the same two names over a
// small stand-in that turns each argument into text first.
#pragma once

#ifndef __CUDACC__
#include <fmt/format.h>
#endif

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace omq {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {
// Throws Error with the arguments in the places of the {}s.
[[noreturn]] void fail_with(const char* format, std::initializer_list<std::string> arguments);
}  // namespace detail

#ifdef __CUDACC__

namespace detail {
template <class T> std::string text_of(const T& v) {
  if constexpr (std::is_arithmetic_v<T>)
    return std::to_string(v);
  else if constexpr (std::is_convertible_v<T, std::string>)
    return v;
  else
    return to_string(v);
}
}  // namespace detail

template <class... Args> [[noreturn]] void fail(const char* format, const Args&... args) {
  detail::fail_with(format, {detail::text_of(args)...});
}
template <class... Args> void check(bool ok, const char* format, const Args&... args) {
  if (!ok) fail(format, args...);
}

#else

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

#endif

}  // namespace omq
