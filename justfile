# The recipe names of the mission, for those who know them. `make help` lists everything else.
# `make test` brings `just` with the rest of the tools: .venv/bin/just test-os

# Every recipe; the same as `just --list`.
default:
    @{{ quote(just_executable()) }} --justfile {{ quote(justfile()) }} --list

# Climb the proof ladder in a machine. Honours RUN_PHASE, RUN_UNTIL_MARKER, RUN_TIMEOUT, SMP.
[no-exit-message]
test-os:
    @./scripts/qemu-test.sh

# The same on two CPUs with the rungs that need them, and then on one.
[no-exit-message]
test-smp:
    @SMP=2 REQUIRE_SMP=1 ./scripts/qemu-test.sh
    @SMP=1 REQUIRE_SMP=0 ./scripts/qemu-test.sh

# What is imported into each service and into PID 1, against what is declared.
[no-exit-message]
dep-gate:
    @make --silent .venv/.dev
    @.venv/bin/lint-imports --no-cache > .venv/imports.log || { cat .venv/imports.log; exit 1; }
    @.venv/bin/python -m tools.dep_gate

# Types and lint of exactly what goes into the image, and its contents with their sizes.
[no-exit-message]
diag-os:
    @make --silent .venv/.dev
    @.venv/bin/python -m tools.diagnose os

# Types and lint of what runs on the host alone.
[no-exit-message]
diag-host:
    @make --silent .venv/.dev
    @.venv/bin/python -m tools.diagnose host

# Every test of the tree.
[no-exit-message]
test-workspace:
    @make --silent pytest

# The tests of one package: `just test-pkg ipc`, `just test-pkg nexus-ipc`, `just test-pkg timed`.
[no-exit-message]
test-pkg NAME:
    @make --silent .venv/.dev
    @.venv/bin/python -m tools.package_tests {{ quote(NAME) }}
