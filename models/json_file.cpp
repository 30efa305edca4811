// Reading text and JSON; see the header for what is refused.
#include "models/json_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <system_error>
#include <vector>

#include "tensor/error.h"

namespace omq {

namespace fs = std::filesystem;
using nlohmann::json;

std::string read_text_file(const fs::path& file, size_t max_bytes) {
  std::error_code error;
  const fs::file_status status = fs::status(file, error);
  check(fs::exists(status), "{}: no such file", file.string());
  check(fs::is_regular_file(status), "{}: not a regular file", file.string());
  const uintmax_t size = fs::file_size(file, error);
  check(!error, "{}: cannot read: {}", file.string(), error.message());
  check(size <= max_bytes, "{}: {} bytes are too many for this kind of file (at most {})",
        file.string(), size, max_bytes);
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> f(std::fopen(file.c_str(), "rb"), &std::fclose);
  check(f != nullptr, "{}: cannot open: {}", file.string(), std::strerror(errno));
  std::string text(static_cast<size_t>(size), '\0');
  const size_t n = std::fread(text.data(), 1, text.size(), f.get());
  check(std::ferror(f.get()) == 0 && n == text.size(), "{}: cannot read: {} of {} bytes came",
        file.string(), n, text.size());
  return text;
}

json parse_json(std::string_view text, std::string_view name) {
  constexpr int kMaxDepth = 64;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto callback = [&](int depth, json::parse_event_t event, json& value) {
    using Event = json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      check(depth < kMaxDepth, "{}: nested more than {} deep", name, kMaxDepth);
    }
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const auto& key = value.get_ref<const std::string&>();
      check(keys.back().insert(key).second, "{}: key \"{}\" is given twice", name, shown(key));
    }
    return true;
  };
  try {
    return json::parse(text, callback);
  } catch (const json::exception& e) {
    // "[json.exception.parse_error.101] parse error at line 1, …": the tag in brackets says nothing
    // to a reader.
    const std::string_view what = e.what();
    const size_t tag = what.find("] ");
    fail("{}: not valid JSON: {}", name,
         shown(tag == what.npos ? what : what.substr(tag + 2), 200));
  }
}

json read_json_object(const fs::path& file) {
  json value = parse_json(read_text_file(file), file.string());
  check(value.is_object(), "{}: a JSON object is expected, not {}", file.string(),
        value.type_name());
  return value;
}

std::string json_text(const json& j, int indent) {
  return j.dump(indent, ' ', false, json::error_handler_t::replace);
}

std::string shown(std::string_view text, size_t n) {
  std::string out;
  for (const char c : text.substr(0, n)) {
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  // A cut must not split a UTF-8 character.
  if (text.size() > n) {
    while (!out.empty() && (static_cast<unsigned char>(out.back()) & 0xc0) == 0x80) out.pop_back();
    if (!out.empty() && (static_cast<unsigned char>(out.back()) & 0x80)) out.pop_back();
    out += "…";
  }
  return out;
}

}  // namespace omq
