// The rules of the house, checked on the source text: who may include whom, how long a file may
// grow, and that every entry of the three lists (kernels, ops, methods) is written and tested.
//
// A checker takes a Tree (path → text) and returns violations as "file:line: what", so that it is
// itself tested on made-up trees below.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Tree = std::map<std::string, std::string>;  // path from the root, "nn/linear.h" → text
using Violations = std::vector<std::string>;

// folder → folders that its files may include, besides itself.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"tensor", {}},
    {"autograd", {"tensor"}},
    {"nn", {"autograd", "tensor"}},
    {"quant", {"nn", "autograd", "tensor"}},
    {"models", {"nn", "autograd", "tensor", "include"}},
    {"cuda", {"tensor"}},
    {"include", {}},
    {"tools", {"tensor", "autograd", "nn", "quant", "models", "include"}},
    {"tests", {"tensor", "autograd", "nn", "quant", "models", "tools", "include"}},
};

std::string folder_of(const std::string& path) { return path.substr(0, path.find('/')); }

bool has_suffix(const std::string& path, std::initializer_list<std::string_view> suffixes) {
  return std::any_of(suffixes.begin(), suffixes.end(),
                     [&](std::string_view s) { return path.ends_with(s); });
}

bool is_source(const std::string& path) { return has_suffix(path, {".h", ".cpp", ".cu", ".cuh"}); }

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

// Line comments only: the style has no others.
std::string without_comments(const std::string& text) {
  std::string out;
  for (const std::string& line : lines_of(text)) out += line.substr(0, line.find("//")) + '\n';
  return out;
}

bool mentions(const std::string& text, const std::string& word) {
  const auto is_word = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
  };
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
    const size_t end = at + word.size();
    const bool starts = at == 0 || !is_word(text[at - 1]);
    const bool ends = end == text.size() || !is_word(text[end]);
    if (starts && ends) return true;
  }
  return false;
}

// This file's own examples do not count.
bool mentioned_under(const Tree& tree, const std::string& prefix, const std::string& word) {
  return std::any_of(tree.begin(), tree.end(), [&](const auto& file) {
    return file.first.starts_with(prefix) && file.first != "tests/architecture_test.cpp" &&
           mentions(without_comments(file.second), word);
  });
}

// One entry of a list: a name and where it stands.
struct Entry {
  std::string name, where;
};

// First capture of `pattern` on every line of a file, comments aside.
std::vector<Entry> entries(const Tree& tree, const std::string& path, const std::string& pattern) {
  std::vector<Entry> found;
  const auto file = tree.find(path);
  if (file == tree.end()) return found;
  const std::regex regex(pattern);
  int number = 0;
  for (const std::string& line : lines_of(without_comments(file->second))) {
    ++number;
    std::smatch match;
    if (std::regex_search(line, match, regex))
      found.push_back({match[1].str(), fmt::format("{}:{}", path, number)});
  }
  return found;
}

// ---- checkers ----

std::string judge_include(const Tree& tree, const std::string& path, const std::string& target,
                          bool quoted) {
  const std::string from = folder_of(path), to = folder_of(target);
  if (has_suffix(path, {".cu", ".cuh"}) &&
      (to == "fmt" || target.find("dnnl") != std::string::npos))
    return fmt::format("CUDA sources include neither fmt nor oneDNN, but here is {}", target);
  const bool ours = kMayInclude.contains(to) && target.find('/') != std::string::npos;
  if (!ours) {
    if (quoted) return fmt::format("\"{}\" is not relative to the root of the tree", target);
    return "";
  }
  if (!quoted && !tree.contains(target)) return "";  // another project's <nn/…>
  if (from == to || kMayInclude.at(from).contains(to)) return "";
  return fmt::format("{}/ may not include {}/, but here is \"{}\"", from, to, target);
}

Violations check_includes(const Tree& tree) {
  static const std::regex kInclude(R"re(^\s*#\s*include\s*(["<])([^">]+)[">])re");
  Violations violations;
  for (const auto& [path, text] : tree) {
    if (!kMayInclude.contains(folder_of(path)) || path.starts_with("tests/embed/")) continue;
    if (!is_source(path) && !path.ends_with(".def")) continue;
    int number = 0;
    for (const std::string& line : lines_of(text)) {
      ++number;
      std::smatch match;
      if (line.find("include") == std::string::npos || !std::regex_search(line, match, kInclude))
        continue;
      const std::string verdict = judge_include(tree, path, match[2].str(), match[1].str() == "\"");
      if (!verdict.empty()) violations.push_back(fmt::format("{}:{}: {}", path, number, verdict));
    }
  }
  return violations;
}

Violations check_lengths(const Tree& tree) {
  constexpr size_t kLimit = 500;
  Violations violations;
  for (const auto& [path, text] : tree) {
    if (!is_source(path)) continue;
    const size_t length = lines_of(text).size();
    if (length > kLimit)
      violations.push_back(fmt::format("{}:{}: {} lines, {} allowed: split it by topic", path,
                                       kLimit + 1, length, kLimit));
  }
  return violations;
}

// A kernel is written by `void name(` (also cpu::name) in tensor/cpu, or by a macro there that
// takes the name.
bool kernel_is_written(const Tree& tree, const std::string& name) {
  const std::regex definition(
      fmt::format(R"(\bvoid\s+(\w+::)*{0}\s*\(|\bOMQ_\w+\(\s*{0}\b)", name));
  return std::any_of(tree.begin(), tree.end(), [&](const auto& file) {
    return file.first.starts_with("tensor/cpu/") && file.first.ends_with(".cpp") &&
           std::regex_search(without_comments(file.second), definition);
  });
}

Violations check_kernels(const Tree& tree) {
  Violations violations;
  for (const Entry& kernel :
       entries(tree, "tensor/kernels.def", R"(^\s*OMQ_(?:PACKED_)?KERNEL\(\s*(\w+))")) {
    if (!kernel_is_written(tree, kernel.name))
      violations.push_back(
          fmt::format("{}: kernel {} is not defined under tensor/cpu/", kernel.where, kernel.name));
    // The gradient check of `softmax` is the test of softmax_vjp.
    std::string base = kernel.name;
    if (base.ends_with("_vjp")) base.resize(base.size() - 4);
    if (!mentioned_under(tree, "tests/", kernel.name) && !mentioned_under(tree, "tests/", base))
      violations.push_back(
          fmt::format("{}: kernel {} is mentioned in no test", kernel.where, kernel.name));
  }
  return violations;
}

// tests/support/cases.h is the list of cases that tests/autograd runs.
Violations check_ops(const Tree& tree) {
  Violations violations;
  std::set<std::string> seen;  // overloads
  for (const Entry& op : entries(tree, "autograd/ops.h", R"(^(?:inline\s+)?[\w:<>]+\s+(\w+)\()")) {
    if (op.name.starts_with("operator") || !seen.insert(op.name).second) continue;
    if (!mentioned_under(tree, "tests/autograd/", op.name) &&
        !mentioned_under(tree, "tests/support/cases.h", op.name))
      violations.push_back(fmt::format(
          "{}: op {} is in neither tests/autograd/ nor tests/support/cases.h", op.where, op.name));
  }
  return violations;
}

Violations check_methods(const Tree& tree) {
  Violations violations;
  for (const Entry& method : entries(tree, "quant/methods.def", R"(^\s*OMQ_\w+\(\s*(\w+))")) {
    const std::string source = fmt::format("quant/methods/{}.cpp", method.name);
    if (!tree.contains(source))
      violations.push_back(
          fmt::format("{}: method {} has no {}", method.where, method.name, source));
    if (!mentioned_under(tree, "tests/quant/", method.name))
      violations.push_back(
          fmt::format("{}: method {} is not mentioned in tests/quant/", method.where, method.name));
  }
  return violations;
}

// ---- the real tree ----

// Folders with sources that no layer rule covers, so that a new folder cannot slip past the rules.
Tree read_tree(const fs::path& root, Violations& unknown) {
  Tree tree;
  for (const fs::directory_entry& top : fs::directory_iterator(root)) {
    const std::string folder = top.path().filename().string();
    if (!top.is_directory() || folder.starts_with('.') || folder.starts_with("build") ||
        fs::exists(top.path() / "pyvenv.cfg") || fs::exists(top.path() / "CMakeCache.txt"))
      continue;
    for (const fs::directory_entry& file : fs::recursive_directory_iterator(top.path())) {
      const std::string path = fs::relative(file.path(), root).generic_string();
      if (!file.is_regular_file() || !(is_source(path) || path.ends_with(".def"))) continue;
      if (!kMayInclude.contains(folder)) {
        unknown.push_back(
            fmt::format("{}:1: folder {}/ is in no layer; see kMayInclude", path, folder));
        continue;
      }
      std::ifstream stream(file.path(), std::ios::binary);
      tree[path].assign(std::istreambuf_iterator<char>(stream), {});
    }
  }
  return tree;
}

void report(const Violations& violations) {
  for (const std::string& violation : violations) FAIL_CHECK(violation);
}

const Tree& real_tree() {
  static const Tree tree = [] {
    Violations unknown;
    Tree read = read_tree(OMQ_SOURCE_DIR, unknown);
    report(unknown);
    return read;
  }();
  return tree;
}

}  // namespace

TEST_CASE("every include follows the direction of the layers") {
  REQUIRE(real_tree().size() > 1);
  report(check_includes(real_tree()));
}

TEST_CASE("no source file is longer than 500 lines") { report(check_lengths(real_tree())); }

TEST_CASE("every kernel is written and tested") { report(check_kernels(real_tree())); }

TEST_CASE("every op has a test") { report(check_ops(real_tree())); }

TEST_CASE("every method has a file and a test") { report(check_methods(real_tree())); }

// ---- the checkers themselves ----

TEST_CASE("a forbidden include is found, an allowed one is not") {
  const std::vector<std::pair<std::string, std::string>> forbidden = {
      {"tensor/a.h", "#include \"autograd/ops.h\""},
      {"autograd/a.h", "#include \"nn/linear.h\""},
      {"nn/a.h", "#include \"models/llama.h\""},
      {"nn/a.h", "#include \"quant/spec.h\""},
      {"quant/a.h", "#include \"models/llama.h\""},
      {"models/a.h", "#include \"quant/spec.h\""},
      {"tools/a.cpp", "#include \"cuda/common.cuh\""},
      {"tests/nn/a.cpp", "# include \"cuda/common.cuh\""},
      {"cuda/a.cu", "#include \"nn/linear.h\""},
      {"cuda/a.cu", "#include <fmt/format.h>"},
      {"nn/a.h", "#include \"linear.h\""},
      {"nn/a.h", "#include \"../tensor/tensor.h\""},
  };
  for (const auto& [path, text] : forbidden) {
    CAPTURE(path);
    CAPTURE(text);
    const Violations violations = check_includes({{path, "#pragma once\n" + text + "\n"}});
    REQUIRE(violations.size() == 1);
    CHECK(violations[0].starts_with(path + ":2: "));
  }
  CHECK(
      check_includes({{"nn/a.h", "#include <models/llama.h>\n"}, {"models/llama.h", ""}}).size() ==
      1);

  const std::string all =
      "#include <vector>\n#include \"tensor/tensor.h\"\n#include \"nn/linear.h\"\n";
  for (const char* path :
       {"nn/a.h", "quant/a.cpp", "models/a.cpp", "tools/a.cpp", "tests/nn/a.cpp"})
    CHECK(check_includes({{path, all}}).empty());
  CHECK(check_includes(
            {{"cuda/a.cu", "#include \"cuda/common.cuh\"\n#include \"tensor/tensor.h\"\n"}})
            .empty());
}

TEST_CASE("a file that is too long is found") {
  std::string text;
  for (int i = 0; i < 501; ++i) text += "int x;\n";
  CHECK(check_lengths({{"nn/long.cpp", text}}) ==
        Violations{"nn/long.cpp:501: 501 lines, 500 allowed: split it by topic"});
  CHECK(check_lengths({{"tensor/cpu/packed_avx2.cpp", text}}).size() == 1);
  CHECK(check_lengths({{"nn/full.cpp", text.substr(7)}, {"notes.txt", text}}).empty());
}

TEST_CASE("a list entry without code or test is found") {
  const std::string kernels =
      "// OMQ_KERNEL(comment, ())\nOMQ_KERNEL(softmax, (Tensor& y))\nOMQ_KERNEL(softmax_vjp, ())\n";
  Tree tree = {{"tensor/kernels.def", kernels},
               {"tensor/cpu/softmax.cpp", "void softmax(Tensor& y) {}\n"}};
  CHECK(check_kernels(tree) ==
        Violations{"tensor/kernels.def:2: kernel softmax is mentioned in no test",
                   "tensor/kernels.def:3: kernel softmax_vjp is not defined under tensor/cpu/",
                   "tensor/kernels.def:3: kernel softmax_vjp is mentioned in no test"});
  tree["tests/tensor/softmax_test.cpp"] = "softmax(y);  // softmax_vjp\n";
  tree["tensor/cpu/softmax.cpp"] += "void cpu::softmax_vjp() {}\n";
  CHECK(check_kernels(tree).empty());

  const std::string ops =
      "Tensor relu(const Tensor& x);\nTensor operator+(const Tensor& a);\n  void member(int);\n";
  CHECK(check_ops({{"autograd/ops.h", ops}, {"tests/autograd/a_test.cpp", "relu_like(x);"}}) ==
        Violations{
            "autograd/ops.h:1: op relu is in neither tests/autograd/ nor tests/support/cases.h"});

  CHECK(check_methods({{"quant/methods.def", "OMQ_METHOD(rtn, \"nearest\")\n"}}) ==
        Violations{"quant/methods.def:1: method rtn has no quant/methods/rtn.cpp",
                   "quant/methods.def:1: method rtn is not mentioned in tests/quant/"});
}
