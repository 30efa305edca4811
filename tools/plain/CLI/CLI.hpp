// The part of CLI11's interface that our programs use, without streams and locales, which are half a
// megabyte of a static program. Stands in where OMQ_CLI11 is OFF (the tiny preset); the tests of
// tools/cli.h run against both.
//
// An option takes a value, the list options any number of them; "--name=value", "--name value",
// "-n value", "-nvalue", flags that may be joined ("-qe"), "--" before what only looks like an
// option. Names, defaults and most error texts are CLI11's. Stricter than it: numbers are decimal and
// in the range of their type, a flag's value is true or false (1, 0, on, off, yes, no), "--name=" is an
// empty value, "[a,b]" is a name.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace CLI {

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CallForHelp : ParseError {
  CallForHelp() : ParseError("This should be caught in your main function, see examples") {}
};
struct ExtrasError : ParseError {
  using ParseError::ParseError;
};

enum class MultiOptionPolicy : char { Throw, TakeLast, TakeAll };

// ---- values ----

namespace detail {

template <class T> struct IsOptional : std::false_type {};
template <class T> struct IsOptional<std::optional<T>> : std::true_type {};
template <class T> struct IsVector : std::false_type {};
template <class T> struct IsVector<std::vector<T>> : std::true_type {};

template <class T> bool read(const std::string& text, T& value) {
  if constexpr (!std::is_arithmetic_v<T>) {  // text, a path
    value = text;
    return true;
  } else {
    const char *begin = text.c_str(), *end = begin + text.size();
    if (text.size() > 1 && *begin == '+' && begin[1] != '-') ++begin;
    if constexpr (std::is_floating_point_v<T>) {  // not from_chars, which is 40 KB of a program
      if (begin == end || *begin == ' ') return false;
      char* stop = nullptr;
      const double parsed = std::strtod(begin, &stop);
      if (stop != end) return false;
      value = static_cast<T>(parsed);
    } else {
      T parsed{};
      const auto [stop, error] = std::from_chars(begin, end, parsed);
      if (error != std::errc{} || stop != end) return false;
      value = parsed;
    }
    return true;
  }
}

template <class T> std::string shown(const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    return value;
  } else if constexpr (std::is_arithmetic_v<T>) {
    return fmt::to_string(value);
  } else {
    return {};
  }
}

template <class T> constexpr const char* type_name() {
  if constexpr (IsOptional<T>::value || IsVector<T>::value) {
    return type_name<typename T::value_type>();
  } else if constexpr (std::is_floating_point_v<T>) {
    return "FLOAT";
  } else if constexpr (std::is_unsigned_v<T>) {
    return "UINT";
  } else if constexpr (std::is_integral_v<T>) {
    return "INT";
  } else {
    return "TEXT";
  }
}

inline std::vector<std::string> split(std::string_view text, char at) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(at, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace detail

// What a value must be; gives the complaint, or nothing.
struct Validator {
  std::string type_name;
  std::function<std::string(const std::string&)> complaint;
};

struct Range : Validator {
  template <class T> Range(T low, T high) {
    type_name = "[" + detail::shown<T>(low) + " - " + detail::shown<T>(high) + "]";
    complaint = [low, high, range = type_name](const std::string& text) {
      T value{};
      const bool inside = detail::read(text, value) && value >= low && value <= high;
      return inside ? std::string{} : "Value " + text + " not in range " + range;
    };
  }
};

inline const Validator PositiveNumber{"POSITIVE", [](const std::string& text) {
  double value = 0;
  return detail::read(text, value) && value > 0
             ? std::string{}
             : "Number less or equal to 0: (" + text + ")";
}};
inline const Validator NonNegativeNumber{"NONNEGATIVE", [](const std::string& text) {
  double value = 0;
  return detail::read(text, value) && value >= 0 ? std::string{}
                                                 : "Number less than 0: (" + text + ")";
}};

// ---- options ----

class App;

class Option {
 public:
  Option* type_name(std::string name) { type_ = std::move(name); return this; }
  Option* group(std::string name) { group_ = std::move(name); return this; }
  Option* required() { required_ = true; return this; }
  Option* multi_option_policy(MultiOptionPolicy policy) { policy_ = policy; return this; }
  Option* take_all() { return multi_option_policy(MultiOptionPolicy::TakeAll); }
  Option* delimiter(char c) { delimiter_ = c; return this; }
  Option* allow_extra_args(bool yes) { many_ = yes; return this; }
  Option* excludes(Option* other) {
    excluded_.push_back(other);
    other->excluded_.push_back(this);
    return this;
  }
  Option* check(Validator v) { validators_.push_back(std::move(v)); return this; }
  Option* capture_default_str() { default_ = current_(); return this; }

  size_t count() const { return values_.size(); }
  const std::vector<std::string>& get_lnames() const { return long_; }
  const std::vector<std::string>& get_snames() const { return short_; }
  // The name that errors use: long before short before positional.
  std::string get_name() const {
    return !long_.empty() ? "--" + long_[0] : !short_.empty() ? "-" + short_[0] : positional_;
  }

 private:
  friend class App;

  Option(const std::string& names, std::string description, bool flag)
      : description_(std::move(description)), flag_(flag) {
    for (std::string name : detail::split(names, ',')) {
      const bool negative = name.starts_with("!");
      if (negative) name.erase(0, 1);
      if (name.starts_with("--"))
        long_.push_back(name.substr(2));
      else if (name.starts_with("-"))
        short_.push_back(name.substr(1));
      else
        positional_ = name;
      if (negative) negative_.push_back(name);
    }
  }

  bool is_named(std::string_view name) const {  // with its dashes
    const auto among = [](const std::vector<std::string>& names, std::string_view n) {
      return std::find(names.begin(), names.end(), n) != names.end();
    };
    return name.starts_with("--") ? among(long_, name.substr(2))
                                  : name.starts_with("-") && among(short_, name.substr(1));
  }

  std::string described_names() const {  // "-n,--name TEXT REQUIRED Excludes: --other"
    std::string text;
    for (const std::string& n : short_) text += (text.empty() ? "-" : ",-") + n;
    for (const std::string& n : long_) text += (text.empty() ? "--" : ",--") + n;
    return text + details();
  }
  std::string details() const {
    std::string text;
    if (!flag_ && !type_.empty()) text += " " + type_;
    for (const Validator& v : validators_) text += (flag_ ? " " : ":") + v.type_name;
    if (!default_.empty()) text += " [" + default_ + "]";
    if (many_) text += " ...";
    if (required_) text += " REQUIRED";
    if (!excluded_.empty()) {
      text += " Excludes:";
      for (const Option* o : excluded_) text += " " + o->get_name();
    }
    return text;
  }

  void finish() {
    if (required_ && values_.empty()) throw ParseError(get_name() + " is required");
    if (values_.empty()) return;
    for (const Option* o : excluded_)
      if (o->count() > 0) throw ParseError(get_name() + " excludes " + o->get_name());
    std::vector<std::string> taken = values_;
    if (policy_ == MultiOptionPolicy::TakeLast && !list_)
      taken = {values_.back()};
    else if (!list_ && !flag_ && taken.size() > 1)
      throw ParseError(get_name() + ": 1 required " + type_ + " but received " +
                       std::to_string(taken.size()));
    for (const std::string& value : taken)
      for (const Validator& v : validators_)
        if (const std::string complaint = v.complaint(value); !complaint.empty())
          throw ParseError(get_name() + ": " + complaint);
    if (!assign_(taken)) {
      std::string all;
      for (const std::string& value : taken) all += (all.empty() ? "" : ",") + value;
      throw ParseError("Could not convert: " + get_name() + " = " + all);
    }
  }

  std::vector<std::string> short_, long_, negative_;
  std::string positional_, description_, type_, group_ = "Options", default_;
  bool flag_ = false, list_ = false, many_ = false, required_ = false;
  char delimiter_ = '\0';
  MultiOptionPolicy policy_ = MultiOptionPolicy::Throw;
  std::vector<Option*> excluded_;
  std::vector<Validator> validators_;
  std::vector<std::string> values_;
  std::function<bool(const std::vector<std::string>&)> assign_;
  std::function<std::string()> current_;
};

class App {
 public:
  explicit App(std::string description = "", std::string name = "")
      : description_(std::move(description)), name_(std::move(name)) {
    help_ = add("-h,--help", "Print this help message and exit", true);
    help_->assign_ = [](const auto&) { return true; };
  }
  App(const App&) = delete;
  App& operator=(const App&) = delete;

  template <class T> Option* add_option(const std::string& names, T& value,
                                        std::string description = "") {
    Option* const o = add(names, std::move(description), false);
    o->type_ = detail::type_name<T>();
    o->policy_ = defaults_.policy_;
    o->current_ = [&value] { return detail::shown(value); };
    if constexpr (detail::IsVector<T>::value) {
      o->list_ = o->many_ = true;
      o->assign_ = [&value](const std::vector<std::string>& texts) {
        T all(texts.size());
        for (size_t i = 0; i < texts.size(); ++i)
          if (!detail::read(texts[i], all[i])) return false;
        value = std::move(all);
        return true;
      };
    } else if constexpr (detail::IsOptional<T>::value) {
      o->assign_ = [&value](const std::vector<std::string>& texts) {
        typename T::value_type one{};
        if (!detail::read(texts.back(), one)) return false;
        value = std::move(one);
        return true;
      };
    } else {
      o->assign_ = [&value](const std::vector<std::string>& texts) {
        return detail::read(texts.back(), value);
      };
    }
    return o;
  }

  Option* add_flag(const std::string& names, bool& value, std::string description = "") {
    Option* const o = add(names, std::move(description), true);
    o->assign_ = [&value](const std::vector<std::string>& texts) {
      const std::string& last = texts.back();
      const bool yes = last == "true" || last == "1" || last == "on" || last == "yes";
      if (!yes && last != "false" && last != "0" && last != "off" && last != "no") return false;
      value = yes;
      return true;
    };
    return o;
  }

  Option* option_defaults() { return &defaults_; }
  Option* get_option(const std::string& name) const {
    for (const auto& o : options_)
      if (o->is_named(name) || o->positional_ == name) return o.get();
    throw std::out_of_range(name + " not found");
  }
  std::vector<const Option*> get_options() const {
    std::vector<const Option*> all;
    for (const auto& o : options_) all.push_back(o.get());
    return all;
  }
  const std::string& get_name() const { return name_; }
  void footer(std::string text) { footer_ = std::move(text); }
  std::vector<std::string> remaining(bool = false) const { return remaining_; }

  // The last argument first, as CLI11 wants them.
  void parse(const std::vector<std::string>& reversed) {
    const std::vector<std::string> args(reversed.rbegin(), reversed.rend());
    bool only_positional = false;
    for (size_t i = 0; i < args.size();) {
      const std::string& arg = args[i];
      if (!only_positional && arg == "--")
        only_positional = true, ++i;
      else if (!only_positional && is_option(arg))
        i = take_option(args, i);
      else
        take_positional(arg), ++i;
    }
    if (help_->count() > 0) throw CallForHelp();
    for (const auto& o : options_) o->finish();
    if (!remaining_.empty()) throw ExtrasError("The following argument was not expected: " +
                                               remaining_.front());
  }

  std::string help() const {
    std::string text = description_.empty() ? "" : description_ + "\n";
    text += "Usage:" + (name_.empty() ? "" : " " + name_) + " [OPTIONS]";
    std::string positionals;
    std::vector<std::string> groups;
    for (const auto& o : options_) {
      if (!o->positional_.empty()) {
        text += o->required_ ? " " + o->positional_ : " [" + o->positional_ + "]";
        positionals += line("  " + o->positional_ + o->details(), o->description_);
      }
      if ((!o->short_.empty() || !o->long_.empty()) && !o->group_.empty() &&
          std::find(groups.begin(), groups.end(), o->group_) == groups.end())
        groups.push_back(o->group_);
    }
    text += "\n";
    if (!positionals.empty()) text += "\nPositionals:\n" + positionals;
    for (const std::string& group : groups) {
      text += "\n" + group + ":\n";
      for (const auto& o : options_)
        if (o->group_ == group && (!o->short_.empty() || !o->long_.empty()))
          text += line("  " + o->described_names(), o->description_);
    }
    return text + (footer_.empty() ? "" : "\n" + footer_ + "\n");
  }

 private:
  Option* add(const std::string& names, std::string description, bool flag) {
    options_.push_back(std::unique_ptr<Option>(new Option(names, std::move(description), flag)));
    return options_.back().get();
  }

  // Two columns; a name that is too long for the first stands on a line of its own.
  static std::string line(std::string left, const std::string& right) {
    constexpr size_t kColumn = 30;
    if (right.empty()) return left + "\n";
    if (left.size() >= kColumn)
      left += "\n" + std::string(kColumn, ' ');
    else
      left.resize(kColumn, ' ');
    std::string text = left;
    for (const char c : right) text += c == '\n' ? "\n" + std::string(kColumn, ' ') : std::string(1, c);
    return text + "\n";
  }

  static bool is_option(const std::string& arg) {
    const auto starts_name = [](char c) { return c != '-' && c != '!' && c != ' ' && c != '\n'; };
    if (arg.starts_with("--")) return arg.size() > 2 && starts_name(arg[2]);
    return arg.size() > 1 && arg[0] == '-' && starts_name(arg[1]) && (arg[1] < '0' || arg[1] > '9');
  }

  Option* named(std::string_view name) const {
    for (const auto& o : options_)
      if (o->is_named(name)) return o.get();
    return nullptr;
  }

  // Takes the option at args[i], gives where the next argument stands.
  size_t take_option(const std::vector<std::string>& args, size_t i) {
    const std::string& arg = args[i];
    const bool is_long = arg.starts_with("--");
    const size_t equals = is_long ? arg.find('=') : 2;
    const std::string name = arg.substr(0, equals);
    std::optional<std::string> value;
    if (equals < arg.size()) value = arg.substr(is_long ? equals + 1 : 2);
    Option* const o = named(name);
    if (o == nullptr) {
      remaining_.push_back(arg);
      return i + 1;
    }
    if (o->flag_) {
      const bool negative =
          std::find(o->negative_.begin(), o->negative_.end(), name) != o->negative_.end();
      if (value && !is_long) {  // "-qe": the other letters are options too
        o->values_.emplace_back(negative ? "false" : "true");
        std::vector<std::string> rest = args;
        rest[i] = "-" + *value;
        return take_option(rest, i);
      }
      if (value && negative)  // --no-name=false is --name
        value = *value == "false" ? "true" : *value == "true" ? "false" : "!" + *value;
      o->values_.push_back(value ? *value : negative ? "false" : "true");
      return i + 1;
    }
    ++i;
    if (!value) {
      if (i >= args.size()) throw ParseError(o->get_name() + ": 1 required " + o->type_ + " missing");
      value = args[i++];
    }
    take_value(*o, *value);
    while (o->many_ && i < args.size() && args[i] != "--" && !is_option(args[i]))
      take_value(*o, args[i++]);
    return o->many_ && i < args.size() && args[i] == "--" ? i + 1 : i;  // it ends the list alone
  }

  static void take_value(Option& o, const std::string& value) {
    if (o.delimiter_ == '\0') {
      o.values_.push_back(value);
      return;
    }
    for (std::string& part : detail::split(value, o.delimiter_)) o.values_.push_back(std::move(part));
  }

  void take_positional(const std::string& arg) {
    for (const auto& o : options_)
      if (!o->positional_.empty() && (o->many_ || o->count() == 0)) {
        o->values_.push_back(arg);
        return;
      }
    remaining_.push_back(arg);
  }

  std::string description_, name_, footer_;
  std::vector<std::unique_ptr<Option>> options_;
  Option* help_;
  Option defaults_{"", "", false};
  std::vector<std::string> remaining_;
};

}  // namespace CLI
