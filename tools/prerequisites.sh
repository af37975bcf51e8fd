#!/bin/sh
# Says in one sentence what is missing before anything is built, and which package brings it.
#
#   prerequisites.sh python     print the Python to make .venv with, or say what to install
#   prerequisites.sh compiler   succeed if a C compiler is there, or say what to install
#   prerequisites.sh vm         install QEMU and its like if they are missing, or say how
#
# Uses nothing but the shell, because what it looks for may be everything else.
set -u

MINIMUM=3.11 # tomllib, ExceptionGroup, StrEnum; Debian 12's python3

missing() {
    printf 'nexus: %s\n' "$1" >&2
    exit 2
}

recent() { # $1: a command. Is it Python, and recent enough?
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

complete() { # $1: a Python. Can it make a virtual environment with pip in it?
    "$1" -c 'import venv, ensurepip' >/dev/null 2>&1
}

python() {
    without_venv=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        recent "$candidate" || continue
        if complete "$candidate"; then
            command -v "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        # Debian's python3 needs python3-venv, and a python3.12 needs python3.12-venv.
        package=${without_venv##*/}-venv
        missing "$without_venv has no venv module: install the Debian package $package."
    fi
    if [ -n "${PYTHON:-}" ]; then
        missing "PYTHON=$PYTHON is not Python $MINIMUM or newer: name another, or leave it unset."
    fi
    packages="Debian packages python3 and python3-venv"
    missing "Python $MINIMUM or newer is missing: install the $packages."
}

compiler() {
    command -v "${CC:-cc}" >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 ||
        missing "make bench needs a C compiler: install the Debian packages gcc and libc6-dev."
}

vm() {
    packages=
    needed() { # $1: a command, or the path of a file; $2: the Debian package that brings it
        [ -f "$1" ] || PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 ||
            packages="$packages $2"
    }
    needed qemu-system-aarch64 qemu-system-arm
    needed mkfs.ext4 e2fsprogs
    needed dpkg-deb dpkg
    # A board with a boot loader (tests/vm/uboot.py), and an independent reader of its environment.
    needed /usr/lib/u-boot/qemu_arm64/u-boot.bin u-boot-qemu
    needed mkfs.vfat dosfstools
    needed mcopy mtools
    needed fw_printenv libubootenv-tool
    [ -n "$packages" ] || return 0
    install="apt-get update && apt-get install --no-install-recommends$packages"
    command -v apt-get >/dev/null 2>&1 || missing "make vm needs the Debian packages$packages."
    [ "$(id -u)" = 0 ] || missing "make vm needs more programs: run \`$install\` as root."
    # shellcheck disable=SC2086 # a list of packages
    apt-get -qq update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -qq \
        -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends $packages >&2 ||
        missing "not run: $packages could not be installed: try \`$install\`."
}

case "${1:-}" in
    python) python ;;
    compiler) compiler ;;
    vm) vm ;;
    *) missing "usage: prerequisites.sh python|compiler|vm" ;;
esac
