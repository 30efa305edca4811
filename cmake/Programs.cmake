# Programs and benchmarks. In tools/ a file with a hyphen in its name is a program (omq-quant.cpp,
# train-tiny.cpp), one without is shared by the programs. Every tools/bench/NAME.cpp becomes
# omq-bench-NAME.

file(GLOB_RECURSE tools_sources CONFIGURE_DEPENDS tools/*.cpp)
list(FILTER tools_sources EXCLUDE REGEX "/tools/(bench|plain)/")
set(program_sources ${tools_sources})
list(FILTER program_sources INCLUDE REGEX "/[^/]*-[^/]*\\.cpp$")
list(FILTER tools_sources EXCLUDE REGEX "/[^/]*-[^/]*\\.cpp$")

add_library(omq_tools_flags INTERFACE)
target_compile_definitions(omq_tools_flags INTERFACE OMQ_VERSION="${PROJECT_VERSION}")
target_link_libraries(omq_tools_flags INTERFACE nlohmann_json::nlohmann_json)
if(OMQ_CLI11)
  target_link_libraries(omq_tools_flags INTERFACE CLI11::CLI11)
else()
  list(APPEND tools_sources tools/plain/terminate.cpp)
  target_include_directories(omq_tools_flags INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/tools/plain")
endif()

if(tools_sources)
  add_library(omq_tools OBJECT ${tools_sources})
  target_link_libraries(omq_tools PUBLIC
    omq_flags omq_tools_flags ${OMQ_FMT} Threads::Threads)
endif()

set(OMQ_PROGRAMS "")
foreach(source IN LISTS program_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} "${source}")
  omq_link(${name} tools)
  target_link_libraries(${name} PRIVATE omq omq_tools_flags)
  list(APPEND OMQ_PROGRAMS ${name})
endforeach()
add_custom_target(programs DEPENDS ${OMQ_PROGRAMS})

if(OMQ_BENCH)
  file(GLOB bench_sources CONFIGURE_DEPENDS tools/bench/*.cpp)
  set(OMQ_BENCHES "")
  foreach(source IN LISTS bench_sources)
    get_filename_component(name "${source}" NAME_WE)
    add_executable(omq-bench-${name} "${source}")
    omq_link(omq-bench-${name} tools)
    target_link_libraries(omq-bench-${name} PRIVATE omq omq_tools_flags)
    if(OMQ_HAVE_CUDA)  # carried to the machine with the GPU, whose libstdc++ may be another
      target_link_options(omq-bench-${name} PRIVATE -static-libstdc++ -static-libgcc -s)
    endif()
    list(APPEND OMQ_BENCHES omq-bench-${name})
  endforeach()
  add_custom_target(benches DEPENDS ${OMQ_BENCHES})
endif()
