#!/bin/sh
# Says in one sentence what is missing before anything is built, and which package brings it.
#
#   prerequisites.sh python     print the Python to make .venv with, or say what to install
#   prerequisites.sh compiler   succeed if a C compiler is there, or say what to install
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

case "${1:-}" in
    python) python ;;
    compiler) compiler ;;
    *) missing "usage: prerequisites.sh python|compiler" ;;
esac
