# PCRE2::PCRE2, the 8-bit library with Unicode properties. A static build takes libpcre2-8.a.
find_path(PCRE2_INCLUDE_DIR pcre2.h)
if(OMQ_STATIC)
  find_library(PCRE2_LIBRARY NAMES libpcre2-8.a)
else()
  find_library(PCRE2_LIBRARY NAMES pcre2-8)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(PCRE2 REQUIRED_VARS PCRE2_LIBRARY PCRE2_INCLUDE_DIR)
mark_as_advanced(PCRE2_INCLUDE_DIR PCRE2_LIBRARY)
if(PCRE2_FOUND AND NOT TARGET PCRE2::PCRE2)
  add_library(PCRE2::PCRE2 UNKNOWN IMPORTED)
  set_target_properties(PCRE2::PCRE2 PROPERTIES
    IMPORTED_LOCATION "${PCRE2_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${PCRE2_INCLUDE_DIR}")
endif()
