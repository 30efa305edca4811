# Compiler settings shared by everything that is built here: target omq_flags, and flags of single
# files.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# libomq.a may end up in somebody's shared library.
if(NOT OMQ_STATIC)
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
endif()
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug, …" FORCE)
endif()
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  set(OMQ_ARCH x86_64)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(OMQ_ARCH aarch64)
else()
  set(OMQ_ARCH other)
endif()

# What the hot loops outside the per-instruction-set files may use: x86-64-v3 (AVX2, FMA, F16C)
# runs on every PC since 2015. "native" is faster on one machine and runs only there; empty leaves
# the compiler's default.
set(default_baseline "")
if(OMQ_ARCH STREQUAL "x86_64")
  set(default_baseline x86-64-v3)
endif()
set(OMQ_PORTABLE_BASELINE "${default_baseline}"
    CACHE STRING "-march= of everything but the packed kernels")

add_library(omq_flags INTERFACE)
target_include_directories(omq_flags INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}")
target_compile_features(omq_flags INTERFACE cxx_std_20)
# errno and trap semantics of math functions keep loops from being vectorised and nobody here
# reads them. The rest of -ffast-math is not wanted: it lets sums be reordered, and results must
# not depend on the compiler's mood.
target_compile_options(omq_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -fno-math-errno -fno-trapping-math
                                -fno-semantic-interposition>)
# GCC 12 takes `"text" + string` for overlapping copies once it is inlined (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(omq_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
# Every compiler warns of other things: only for the one that CI runs are warnings errors.
if(OMQ_WERROR AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(omq_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
# nvcc: constexpr functions of the standard library in kernels; line numbers for profilers and
# checkers; no remark on libstdc++'s long double. Never -use_fast_math: codes must equal the CPU's.
target_compile_options(omq_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -diag-suppress=20208
                             -Xcompiler=-Wall,-Wextra>)
if(OMQ_PORTABLE_BASELINE)
  target_compile_options(omq_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-march=${OMQ_PORTABLE_BASELINE}>)
endif()

set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_MINSIZEREL "-Os -ffunction-sections -fdata-sections -DNDEBUG")
# Where the time goes, small code costs more than it saves; but once is enough (OMQ_WIDE of
# tensor/cpu/loops.h).
if(CMAKE_BUILD_TYPE STREQUAL "MinSizeRel")
  set(OMQ_HOT_FILES attention decode_attention gemm_naive gemm_onednn matmul norm packed
      packed_scalar rope row_products row_quant softmax)
  list(TRANSFORM OMQ_HOT_FILES REPLACE "(.+)" "tensor/cpu/\\1.cpp")
  set_source_files_properties(${OMQ_HOT_FILES} tensor/parallel.cpp
                              PROPERTIES COMPILE_OPTIONS "-O2;-DOMQ_NO_WIDE")
  set(omq_isa_speed -O2)
  # fmt asks the C++ locale for a separator that nobody here prints; without that, a program that
  # uses no streams is half a megabyte smaller.
  target_compile_definitions(omq_flags INTERFACE FMT_STATIC_THOUSANDS_SEPARATOR=44)
endif()
if(OMQ_SANITIZE)
  target_compile_options(omq_flags INTERFACE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(omq_flags INTERFACE -fsanitize=address,undefined)
  # GCC 12 sees errors in its own library headers once they carry the sanitizers' checks.
  target_compile_options(omq_flags INTERFACE
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-array-bounds>)
endif()
if(OMQ_STATIC)
  target_link_options(omq_flags INTERFACE -static -s -Wl,--gc-sections)
endif()

# A packed kernel file, packed_ISA.cpp or packed_ISA_*.cpp, is compiled for its own instruction set
# and entered only after the processor said that it has it.
set(omq_avx2 -mavx2 -mfma -mf16c)
set(omq_avx512 ${omq_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
    -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC's own AVX-512 header starts its "undefined" registers from themselves and then warns about
  # it (GCC bug 105593).
  list(APPEND omq_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(omq_amx ${omq_avx512} -mamx-tile -mamx-int8 -mamx-bf16)
set(omq_neon -march=armv8.2-a+dotprod)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Scheduled before registers are given out, all of a step's codes are unpacked before they are
  # multiplied, and sums are spilled.
  list(APPEND omq_neon -fno-schedule-insns)
endif()
if(OMQ_ARCH STREQUAL "x86_64")
  set(OMQ_ISA_FILES avx2 avx512 amx)
elseif(OMQ_ARCH STREQUAL "aarch64")
  set(OMQ_ISA_FILES neon)
endif()
foreach(isa IN LISTS OMQ_ISA_FILES)
  file(GLOB isa_sources CONFIGURE_DEPENDS tensor/cpu/packed_${isa}.cpp
       tensor/cpu/packed_${isa}_*.cpp)
  set_source_files_properties(${isa_sources}
                              PROPERTIES COMPILE_OPTIONS "${omq_isa_speed};${omq_${isa}}")
endforeach()

find_program(OMQ_CCACHE ccache)
if(OMQ_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${OMQ_CCACHE}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${OMQ_CCACHE}")
endif()
