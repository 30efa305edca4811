// The side of fail() that CUDA files call; see error.h.
#include "tensor/error.h"

namespace omq::detail {

void fail_with(const char* format, std::initializer_list<std::string> arguments) {
  std::string text;
  auto argument = arguments.begin();
  for (std::string_view rest = format; !rest.empty();) {
    const size_t at = rest.find("{}");
    text += rest.substr(0, at);
    if (at == std::string_view::npos) break;
    if (argument != arguments.end()) text += *argument++;
    rest.remove_prefix(at + 2);
  }
  throw Error(text);
}

}  // namespace omq::detail
