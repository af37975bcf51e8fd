# The recipe names of the mission, for those who know them. `make help` lists everything else.
# `make test` brings `just` with the rest of the tools: .venv/bin/just test-os

# Every recipe; the same as `just --list`.
default:
    @{{ quote(just_executable()) }} --justfile {{ quote(justfile()) }} --list

# Climb the proof ladder. Honours RUN_PHASE, RUN_UNTIL_MARKER, RUN_TIMEOUT, SMP, REQUIRE_SMP.
[no-exit-message]
test-os:
    @make --silent venv
    @echo 'test-os: there is no virtual machine yet; this run is on real processes (--ground linux)'
    @.venv/bin/nexus prove --ground linux

# Every test of the tree.
[no-exit-message]
test-workspace:
    @make --silent pytest

# The tests of one package: `just test-pkg ipc`, `just test-pkg nexus-ipc`, `just test-pkg timed`.
[no-exit-message]
test-pkg NAME:
    @make --silent .venv/.dev
    @.venv/bin/python -m tools.package_tests {{ quote(NAME) }}
