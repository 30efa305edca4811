# Cross build for 64-bit ARM on Debian (g++-aarch64-linux-gnu), run by qemu-user. fmt, doctest,
# nlohmann-json and CLI11 are headers alone and those of this machine do: the compiler looks into
# /usr/include last.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Neoverse N1 is ARMv8.2-A with the dot product and nothing newer.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu neoverse-n1)

# fmt's package lies in the folder of this machine's own libraries.
file(GLOB omq_fmt_dir /usr/lib/*/cmake/fmt)
list(APPEND CMAKE_PREFIX_PATH ${omq_fmt_dir})
