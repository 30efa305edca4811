# Tests: one doctest program per folder of tests/, each registered twice: NAME runs everything but
# the test cases whose name begins with "slow:", NAME.slow (label slow) runs those.
#
# The programs of the lower layers link only the objects of their own layer and those below, so
# that the direction of dependencies is checked by the linker too.

add_library(omq_test_main OBJECT tests/support/main.cpp)
target_link_libraries(omq_test_main PUBLIC omq_flags doctest::doctest)
target_compile_definitions(omq_test_main PUBLIC OMQ_SOURCE_DIR="${CMAKE_CURRENT_SOURCE_DIR}")

function(omq_add_test name)
  target_link_libraries(omq-test-${name} PRIVATE omq_test_main nlohmann_json::nlohmann_json)
  target_compile_definitions(omq-test-${name} PRIVATE
    OMQ_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  set_target_properties(omq-test-${name} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  # Test code runs once: what it saves by running fast is less than what compiling it fast saves.
  target_compile_options(omq-test-${name} PRIVATE -O1)
  add_test(NAME ${name} COMMAND omq-test-${name} --test-case-exclude=slow:*)
  set(timeout 900)
  if(OMQ_SANITIZE)  # several times as slow, on machines that others use too
    set(timeout 2400)
  endif()
  set_tests_properties(${name} PROPERTIES ENVIRONMENT OMQ_THREADS=1 TIMEOUT ${timeout})
  if(NO_SLOW IN_LIST ARGN)
    return()
  endif()
  add_test(NAME ${name}.slow COMMAND omq-test-${name} --test-case=slow:*)
  # A folder without slow test cases shows as skipped in that tier.
  set_tests_properties(${name}.slow PROPERTIES ENVIRONMENT OMQ_THREADS=1 LABELS slow TIMEOUT 3600
    SKIP_REGULAR_EXPRESSION "test cases: +0 \\|")
endfunction()

set(tensor_links tensor cuda)
set(autograd_links autograd ${tensor_links})
set(nn_links nn ${autograd_links})

file(GLOB test_folders CONFIGURE_DEPENDS LIST_DIRECTORIES true
     RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}/tests" tests/*)
list(REMOVE_ITEM test_folders support embed fixtures golden)
file(GLOB support_sources CONFIGURE_DEPENDS tests/support/*.cpp)
list(FILTER support_sources EXCLUDE REGEX "/main\\.cpp$")

foreach(folder IN LISTS test_folders)
  file(GLOB sources CONFIGURE_DEPENDS tests/${folder}/*.cpp)
  if(NOT sources OR (folder STREQUAL "tools" AND NOT OMQ_TOOLS))
    continue()
  endif()
  add_executable(omq-test-${folder} ${sources} ${support_sources})
  if(DEFINED ${folder}_links)
    omq_link(omq-test-${folder} ${${folder}_links})
  else()
    omq_link(omq-test-${folder} tools)
    target_link_libraries(omq-test-${folder} PRIVATE omq)
  endif()
  if(folder STREQUAL "tools")
    target_link_libraries(omq-test-tools PRIVATE omq_tools_flags)
    add_dependencies(omq-test-tools programs)
  endif()
  omq_add_test(${folder})
endforeach()

# The programs' manners once more, over the options of the tiny preset.
if(OMQ_TOOLS AND OMQ_CLI11)
  add_executable(omq-test-options tests/tools/cli_test.cpp tools/cli.cpp tools/interrupt.cpp
                 tools/memory_option.cpp)
  target_include_directories(omq-test-options BEFORE PRIVATE tools/plain)
  target_compile_definitions(omq-test-options PRIVATE OMQ_VERSION="${PROJECT_VERSION}")
  omq_link(omq-test-options)
  target_link_libraries(omq-test-options PRIVATE omq)
  omq_add_test(options NO_SLOW)
endif()

add_executable(omq-test-architecture tests/architecture_test.cpp)
target_link_libraries(omq-test-architecture PRIVATE omq_flags ${OMQ_FMT})
omq_add_test(architecture NO_SLOW)

# No inline function may leave a packed kernel file: the linker keeps one copy of it for
# everybody, and that copy could hold instructions that the processor lacks.
if(OMQ_ISA_FILES AND TARGET omq_tensor AND NOT OMQ_SANITIZE)
  add_test(NAME isa_symbols COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/support/isa_symbols.sh"
           $<TARGET_OBJECTS:omq_tensor> COMMAND_EXPAND_LISTS)
endif()

# The packed kernels of AVX-512 and AMX once more, with their intrinsics in plain C++: every machine
# tests them. Compiled by way of files that include them, for the sources themselves carry the flags
# of their instruction sets.
if(OMQ_ARCH STREQUAL "x86_64" AND TARGET omq AND NOT OMQ_SANITIZE)
  file(GLOB emulated_kernels CONFIGURE_DEPENDS tensor/cpu/packed_avx512*.cpp
       tensor/cpu/packed_amx*.cpp)
  set(emulated_sources "")
  foreach(source IN LISTS emulated_kernels)
    get_filename_component(name "${source}" NAME)
    set(wrapper "${CMAKE_BINARY_DIR}/emulated/${name}")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n" @ONLY)
    list(APPEND emulated_sources "${wrapper}")
  endforeach()
  add_library(omq_emulated OBJECT ${emulated_sources})
  target_include_directories(omq_emulated BEFORE PRIVATE tests/support/emulated)
  target_link_libraries(omq_emulated PUBLIC omq_flags ${OMQ_FMT})
  # Intel's register types may alias others, those in plain C++ may not.
  target_compile_options(omq_emulated PRIVATE -fno-strict-aliasing
                         $<$<CXX_COMPILER_ID:GNU>:-Wno-psabi>)
  add_executable(omq-test-emulated tests/support/emulated/runs_test.cpp tests/tensor/packed_test.cpp
                 tests/tensor/packed_rows_test.cpp tests/tensor/prompt_attention_test.cpp
                 ${support_sources})
  target_link_libraries(omq-test-emulated PRIVATE omq_emulated omq)  # in front of the library's own
  omq_add_test(emulated NO_SLOW)
endif()

# With a GPU back end: the tests of the layers that run on it, in one program that is carried to the
# machine with the GPU (run from the root of the tree there, with OMQ_SOURCE_DIR=.).
if(OMQ_HAVE_CUDA)
  file(GLOB gpu_test_sources CONFIGURE_DEPENDS tests/tensor/*.cpp tests/autograd/*.cpp tests/nn/*.cpp
       tests/quant/*.cpp tests/models/device_*.cpp)
  add_executable(omq-test-gpu EXCLUDE_FROM_ALL ${gpu_test_sources} ${support_sources})
  omq_link(omq-test-gpu tools)
  target_link_libraries(omq-test-gpu PRIVATE omq omq_test_main nlohmann_json::nlohmann_json)
  target_compile_definitions(omq-test-gpu PRIVATE OMQ_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  target_link_options(omq-test-gpu PRIVATE -static-libstdc++ -static-libgcc -s)
endif()

# kill -9 at random moments of a calibration, each run resumed.
if(TARGET omq-quant)
  foreach(kills 2 20)
    set(name resume_kill_${kills})
    add_test(NAME ${name} COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/tools/resume_kill_test.sh"
             "${CMAKE_RUNTIME_OUTPUT_DIRECTORY}" ${kills})
    set_tests_properties(${name} PROPERTIES ENVIRONMENT OMQ_THREADS=1 TIMEOUT 900)
  endforeach()
  set_tests_properties(resume_kill_20 PROPERTIES LABELS slow)
endif()

# Outside projects in C++ and C, built against an install of this tree.
if(TARGET omq AND NOT OMQ_STATIC)
  find_program(OMQ_CC NAMES cc gcc clang)
  add_test(NAME embed COMMAND bash "${CMAKE_CURRENT_SOURCE_DIR}/tests/embed/run.sh"
           "${CMAKE_BINARY_DIR}" "${CMAKE_CXX_COMPILER}" "${OMQ_CC}")
  set_tests_properties(embed PROPERTIES LABELS "slow;install" ENVIRONMENT OMQ_THREADS=1 TIMEOUT 600)
endif()
