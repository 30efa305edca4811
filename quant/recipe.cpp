// The list of methods.
#include "quant/recipe.h"

namespace omq::quant {

const std::vector<MethodInfo>& methods() {
  static const std::vector<MethodInfo> list{
#define OMQ_METHOD(name, summary) {#name, summary, &name},
#include "quant/methods.def"
#undef OMQ_METHOD
  };
  return list;
}

Recipe make_recipe(std::string_view method, const Options& options) {
  std::string names;
  for (const MethodInfo& m : methods()) {
    if (m.name == method) return m.make(options);
    names += fmt::format("{}{}", names.empty() ? "" : ", ", m.name);
  }
  fail("unknown method \"{}\"; there are: {}", method, names);
}

}  // namespace omq::quant
