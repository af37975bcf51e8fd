#!/bin/sh
# Climbs the proof ladder in a virtual machine and prints the verdict; exit code 0 green, 1 red,
# 2 for a wrong request, or where there is nothing to run a machine with.
#
#   SMP=2 REQUIRE_SMP=1 RUN_UNTIL_MARKER=1 RUN_TIMEOUT=90s ./scripts/qemu-test.sh
#
# RUN_PHASE, RUN_UNTIL_MARKER, RUN_TIMEOUT, SMP and REQUIRE_SMP are those of the mission, where a
# run without SMP has one CPU. What follows on the command line is `nexus prove`'s.
set -eu
cd "$(dirname "$0")/.."
make --silent venv
SMP="${SMP:-1}" exec .venv/bin/nexus prove --ground vm "$@"
