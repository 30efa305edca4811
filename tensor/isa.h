// Which instruction set the packed kernels use: chosen once from what the processor says, or forced
// for tests and benchmarks.
//
// Every packed kernel exists once per instruction set (cpu/packed_scalar.cpp, packed_avx2.cpp,
// packed_avx512.cpp, packed_amx.cpp, packed_neon.cpp); the best one that this processor runs is
// taken at the first call. The environment variable OMQ_ISA names another.
#pragma once

#include <string_view>
#include <vector>

namespace omq {

// The instruction set in use: "amx", "avx512", "avx2", "neon" or "scalar". Throws Error when
// OMQ_ISA names one that does not run here.
const char* packed_isa_name();

// Uses the named instruction set from now on. False, and nothing changes, when it does not exist in
// this build or this processor does not run it. Not to be called while a packed kernel runs.
bool force_packed_isa(std::string_view name);

// Every instruction set that runs here, the best first; "scalar" is always the last.
std::vector<const char*> packed_isas_here();

}  // namespace omq
