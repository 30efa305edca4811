// See device_option.h.
#include "tools/device_option.h"

#include <charconv>

#include "tensor/tensor.h"
#include "tools/cli.h"

namespace omq::cli {
namespace {

void try_out(Device d) { Tensor::empty({1}, DType::U8, d); }

}  // namespace

Device device_from(std::string_view text) {
  if (text == "cpu") return {};
  Device gpu{DeviceType::CUDA, 0};
  if (text == "auto") {
    if (!cuda_device_api()) return {};
    try {
      try_out(gpu);
      return gpu;
    } catch (const Error&) {  // no driver, no GPU: that is what auto is for
      return {};
    }
  }
  const std::string_view kind = text.substr(0, text.find(':'));
  if (kind == "cuda" && kind.size() < text.size()) {
    const std::string_view number = text.substr(kind.size() + 1);
    int index = -1;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
    if (error != std::errc{} || end != number.data() + number.size() || index < 0 || index > 127)
      throw UsageError(fmt::format("--device {}: a number after cuda: wanted, 0 to 127", text));
    gpu.index = static_cast<int8_t>(index);
  } else if (kind != "cuda") {
    throw UsageError(fmt::format("--device {}: cpu, cuda, cuda:N or auto wanted", text));
  }
  try_out(gpu);
  return gpu;
}

void choose_cuda_path(std::string_view text, Device d) {
  if (text != "auto" && text != "sm80")
    throw UsageError(fmt::format("--cuda-path {}: auto or sm80 wanted", text));
  if (d.type == DeviceType::CUDA) device_api(d).set_plain_path(text == "sm80", d.index);
}

std::string device_text(Device d) {
  return d.type == DeviceType::CPU
             ? cpu_name()
             : fmt::format("{}, {}", to_string(d), device_api(d).describe(d.index));
}

}  // namespace omq::cli
