#!/usr/bin/env bash
# Installs the Debian packages that a build needs and that are missing; says so first. The one
# list of packages.
#
#   install-packages.sh [build|format|lint|neon]...        default: build
#
# OMQ_NO_INSTALL=1 only looks. Optional packages (marked ?) are done without when they cannot be
# had. On a system without apt-get it does nothing: CMake then names what is missing.
set -euo pipefail

# shellcheck disable=SC2034  # read by name below
{
build="g++ cmake pkg-config libfmt-dev doctest-dev nlohmann-json3-dev libcli11-dev
       ?libpcre2-dev ?libdnnl-dev ?ninja-build ?ccache"
format="?clang-format"
lint="clang-tidy"
neon="?g++-aarch64-linux-gnu ?qemu-user"
}

say() { echo "omq: $*" >&2; }
installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

wanted=""
for group in "${@:-build}"; do
  case $group in
    build | format | lint | neon) wanted="$wanted ${!group}" ;;
    *) say "unknown package group '$group' (build, format, lint, neon)"; exit 2 ;;
  esac
done
command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || exit 0

required="" optional=""
for package in $wanted; do
  name=${package#\?}
  if installed "$name"; then continue; fi
  # A program that came from elsewhere than a package is as good.
  program=$name
  case $name in
    g++-aarch64-linux-gnu) program=aarch64-linux-gnu-g++ ;;
    qemu-user) program=qemu-aarch64 ;;
  esac
  case $name in
    g++ | cmake | pkg-config | clang-format | clang-tidy | ccache | g++-aarch64-linux-gnu | \
      qemu-user)
      if command -v "$program" >/dev/null; then continue; fi ;;
  esac
  if [ "$name" = "$package" ]; then required="$required $name"; else optional="$optional $name"; fi
done
[ -n "$required$optional" ] || exit 0

say "missing Debian packages:$required$optional"
if [ "${OMQ_NO_INSTALL:-0}" = 1 ]; then
  say "not installing (OMQ_NO_INSTALL=1)"
  exit 0
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null; then
    say "neither root nor sudo here; as root:  apt-get install$required$optional"
    [ -z "$required" ]
    exit
  fi
  as_root="sudo"
fi
say "installing them now with ${as_root:+sudo }apt-get"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -y -qq --no-install-recommends "$@" </dev/null >"$log" 2>&1
}

apt update || say "apt-get update failed; going on with the package lists as they are"
# shellcheck disable=SC2086
if apt install $required $optional; then exit 0; fi
# shellcheck disable=SC2086
if [ -n "$required" ] && ! apt install $required; then
  tail -n 15 "$log" >&2
  say "could not install:$required"
  exit 1
fi
for name in $optional; do
  apt install "$name" || say "could not install $name; going on without it"
done
