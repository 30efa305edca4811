// libFuzzer entry point for model files: the first byte chooses the parser, the rest is the file.
//
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I.
//   tests/fuzz/libfuzzer/model_file_fuzzer.cpp \
//     LIBRARY-BUILT-WITH-CLANG-AND-ASAN -lpcre2-8 -o model_file_fuzzer && ./model_file_fuzzer
//     CORPUS
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 4) {
    case 0:
      omq::fuzz::safetensors(rest);
      break;
    case 1:
      omq::fuzz::gguf(rest);
      break;
    case 2:
      omq::fuzz::checkpoint(rest, /*tokenizer=*/true);
      break;
    default:
      omq::fuzz::config(rest);
  }
  return 0;
}
