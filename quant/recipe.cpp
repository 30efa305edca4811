// The list of methods.
#include "quant/recipe.h"

#include <algorithm>

namespace omq::quant {
namespace {

// As people write it: norm-tweaking, where C++ says norm_tweaking.
std::string spelt(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

}  // namespace

const std::vector<MethodInfo>& methods() {
  static const std::vector<MethodInfo> list{
#define OMQ_METHOD(name, summary) {spelt(#name), summary, &name},
#include "quant/methods.def"
#undef OMQ_METHOD
  };
  return list;
}

Recipe make_recipe(std::string_view method, const Options& options) {
  std::string names;
  for (const MethodInfo& m : methods()) {
    if (m.name == spelt(std::string(method))) return m.make(options);
    names += fmt::format("{}{}", names.empty() ? "" : ", ", m.name);
  }
  fail("unknown method \"{}\"; there are: {}", method, names);
}

}  // namespace omq::quant
