// --device cpu|cuda[:N]|auto, as all programs understand it.
#pragma once

#include <string>
#include <string_view>

#include "tensor/device.h"

namespace omq::cli {

// "auto": the first GPU where this build has a back end for one and it can be used, else the CPU.
// Throws UsageError for another text, Error when a device that was asked for cannot be used.
Device device_from(std::string_view text);

// --cuda-path auto|sm80: sm80 keeps a GPU to the kernels of the oldest supported one. Throws
// UsageError for another text.
void choose_cuda_path(std::string_view text, Device d);

// "cuda:0, NVIDIA H100 80GB HBM3, 79.1 GiB" or the processor's name.
std::string device_text(Device d);

}  // namespace omq::cli
