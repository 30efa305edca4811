# Install: libomq.a; omq.h for C, and the C++ headers under include/omq; the programs; for users'
# builds omqConfig.cmake (targets omq::c for C, omq::omq for C++) and omq.pc.

if(NOT TARGET omq)
  return()
endif()
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/omq")
install(TARGETS omq EXPORT omqTargets ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
if(OMQ_PROGRAMS)
  set(installed_programs ${OMQ_PROGRAMS})
  list(REMOVE_ITEM installed_programs train-tiny)
  install(TARGETS ${installed_programs} RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
foreach(folder tensor autograd nn quant models)
  install(DIRECTORY ${folder} DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/omq"
          FILES_MATCHING PATTERN "*.h" PATTERN "*.def")
endforeach()
install(FILES include/omq.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/omq")

# What a linker needs behind libomq.a; a C compiler does not add the C++ library by itself.
set(OMQ_LINK_LIBS "-lstdc++ -lm -pthread")
set(OMQ_PC_CFLAGS "")
if(OMQ_FMT STREQUAL "fmt::fmt")
  string(PREPEND OMQ_LINK_LIBS "-lfmt ")
else()
  set(OMQ_PC_CFLAGS "-DFMT_HEADER_ONLY=1")
endif()
if(OMQ_HAVE_ONEDNN)
  string(APPEND OMQ_LINK_LIBS " -ldnnl -lgomp")
endif()
if(OMQ_HAVE_PCRE2)
  string(APPEND OMQ_LINK_LIBS " -lpcre2-8")
endif()

install(EXPORT omqTargets NAMESPACE omq:: DESTINATION "${package_dir}")
configure_package_config_file(cmake/omqConfig.cmake.in "${CMAKE_BINARY_DIR}/omqConfig.cmake"
                              INSTALL_DESTINATION "${package_dir}"
                              PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file("${CMAKE_BINARY_DIR}/omqConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_BINARY_DIR}/omqConfig.cmake" "${CMAKE_BINARY_DIR}/omqConfigVersion.cmake"
              cmake/FindOneDNN.cmake cmake/FindPCRE2.cmake
        DESTINATION "${package_dir}")
file(RELATIVE_PATH OMQ_PC_TO_PREFIX "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
configure_file(cmake/omq.pc.in "${CMAKE_BINARY_DIR}/omq.pc" @ONLY)
install(FILES "${CMAKE_BINARY_DIR}/omq.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
