# What this configure run chose, in a few lines.

function(omq_say what condition yes no)
  if(${condition})
    message(STATUS "  ${what}: ${yes}")
  else()
    message(STATUS "  ${what}: ${no}")
  endif()
endfunction()

list(TRANSFORM OMQ_OBJECTS REPLACE "^omq_" "" OUTPUT_VARIABLE folders)
list(JOIN folders " " folders)
message(STATUS "omq ${PROJECT_VERSION}, ${CMAKE_BUILD_TYPE}, ${OMQ_ARCH}, "
               "baseline ${OMQ_PORTABLE_BASELINE}")
message(STATUS "  folders: ${folders}")
omq_say("matrix products" OMQ_HAVE_ONEDNN "oneDNN" "plain loops (gemm_naive.cpp)")
omq_say("pre-tokenizer" OMQ_HAVE_PCRE2 "PCRE2" "plain (pretokenizer_plain.cpp)")
omq_say("CUDA" OMQ_HAVE_CUDA "sm ${CMAKE_CUDA_ARCHITECTURES}"
        "none: ${OMQ_CUDA_WHY} (cuda/absent.cpp)")
omq_say("sanitizers" OMQ_SANITIZE "address, undefined" "off")
