// A Jinja template in one spelling, so that formats can be recognised whatever their layout.
//
// Private to chat.cpp.
#pragma once

#include <string>
#include <string_view>

namespace omq {

// The template with white space as transformers renders it (trim_blocks, lstrip_blocks, the -
// markers), comments gone, and inside tags: no white space, string literals unescaped between back
// quotes, adjacent literals joined ('a' + 'b' → `ab`), attributes as items (message.role →
// message[`role`]), the filter trim as .strip(). Throws on a tag that does not end.
std::string canonical_jinja(std::string_view source);

}  // namespace omq
