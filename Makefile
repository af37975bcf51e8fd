# Nexus: what can be done with this tree. `make help` lists it.
#
# Needs GNU make (Debian package make) and Python 3.11 or newer with its venv module (python3,
# python3-venv). Everything else is installed into .venv, at the versions and hashes that
# requirements/ pins. The Python is chosen by PATH; PYTHON=python3.12 chooses another.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --require-hashes \
       --only-binary :all: -r
TREES := $(wildcard src tests tools fuzz bench)

# A tree that was moved or copied, or whose Python was removed, gets its .venv made anew.
VENV_WORKS := $(shell test "$$(cat .venv/.made 2>/dev/null)" = "$(CURDIR)" && \
                      $(BIN)/python -c '' 2>/dev/null && echo yes)
ifneq ($(VENV_WORKS),yes)
.PHONY: .venv/.made
endif

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
	    while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

# ---------------------------------------------------------------- the virtual environment

.PHONY: venv
venv: .venv/.run ## make .venv with what running needs

.venv/.made:
	@python=$$(sh tools/prerequisites.sh python) && \
	    rm -rf .venv && "$$python" -m venv .venv && printf '%s\n' "$(CURDIR)" > $@

.venv/.run: .venv/.made requirements/run.txt pyproject.toml tools/link.py
	@$(PIP) requirements/run.txt
	@$(BIN)/python tools/link.py
	@touch $@

.venv/.dev: .venv/.run requirements/dev.txt
	@$(PIP) requirements/dev.txt
	@touch $@

.venv/.bench: .venv/.run requirements/bench.txt
	@$(PIP) requirements/bench.txt
	@touch $@

# ---------------------------------------------------------------- run and prove

.PHONY: run
run: .venv/.run ## start the selftest system as real processes, climb the ladder, print the verdict
	@$(BIN)/nexus prove --ground linux

# What only reads the tree takes both CPUs; what runs systems has them for itself. pytest comes
# last: its summary is the last thing printed.
.PHONY: test
test: .venv/.dev ## everything that must hold before a change lands
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target pyright mypy lint drift
	@$(MAKE) --no-print-directory --jobs=1 prove
	@$(MAKE) --no-print-directory --jobs=1 pytest

.PHONY: pytest
pytest: .venv/.dev
	@echo '== tests'
	@$(BIN)/pytest --beside

.PHONY: coverage
coverage: .venv/.dev ## branch coverage of the pure packages, shown and not gated
	@$(BIN)/coverage run -m pytest tests/unit tests/stateful
	@$(BIN)/coverage report --skip-covered

.PHONY: prove
prove: .venv/.dev ## both grounds, and the comparison of their event logs
	@echo '== proof: simulated kernel'
	@$(BIN)/nexus prove --ground sim --smp 2
	@echo '== proof: Linux kernel'
	@$(BIN)/nexus prove --ground linux
	@echo '== proof: the two compared'
	@$(BIN)/nexus prove --compare sim,linux --scenario conformance

.PHONY: vm
vm: .venv/.run ## the same in a virtual machine of its own (aarch64); installs QEMU if it is missing
	@sh tools/prerequisites.sh vm
	@$(BIN)/nexus vm build
	@SMP=$${SMP:-1} $(BIN)/nexus prove --ground vm

.PHONY: bench
bench: .venv/.bench ## ours and its peers, side by side (needs a C compiler)
	@sh tools/prerequisites.sh compiler
	@$(BIN)/python -m bench

.PHONY: campaign
campaign: .venv/.dev ## the long run: seeds with faults, Nth failures, mutated frames and files
	@$(BIN)/python -m nexus.proof.campaign --seeds 500 --report docs/reference/campaign.md
	@$(BIN)/nexus prove --saboteurs --ground sim > docs/reference/saboteurs-sim.txt
	@$(BIN)/nexus prove --saboteurs --ground linux > docs/reference/saboteurs-linux.txt
	@$(BIN)/python -m fuzz.decoders --frames 200000 > docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.files --files 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.images --images 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.memory --turns 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.sets --sets 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.trust --updates 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m fuzz.boots --devices 20000 >> docs/reference/fuzz.txt
	@$(BIN)/python -m nexus.proof.powercut --report docs/reference/powercut.md
	@$(BIN)/python -m nexus.proof.powercut_ota --report docs/reference/powercut-ota.md
	@$(BIN)/python -m nexus.proof.longrun > docs/reference/longrun.txt
	@$(BIN)/python -m tests.linux.slot_kills --kills 100 --report docs/reference/ota-kills.txt
	@$(BIN)/python -m tests.vm.powercut --report docs/reference/powercut-vm.md
	@$(BIN)/python -m tests.vm.powercut_update --report docs/reference/powercut-update-vm.md
	@$(BIN)/pytest tests/vm/boot_loader_long.py
	@$(BIN)/nexus prove --saboteurs sample --ground vm --smp 2 > docs/reference/saboteurs-vm.txt
	@$(BIN)/nexus prove --compare sim,linux,vm > docs/reference/worlds-ladder.txt
	@$(BIN)/python -m tools.aarch64 > .venv/aarch64.txt && \
	    mv .venv/aarch64.txt docs/reference/aarch64.txt

.PHONY: aarch64
aarch64: .venv/.made ## a smoke test of rings and pages on an emulated aarch64 (downloads QEMU)
	@$(BIN)/python -m tools.aarch64

# ---------------------------------------------------------------- checks

.PHONY: lint
lint: .venv/.dev ## format, lint, words, the rules of the tree, who may import whom
	@echo '== lint'
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/codespell
	@$(BIN)/python -m tools.tidy
	@$(BIN)/lint-imports --no-cache > .venv/imports.log || { cat .venv/imports.log; exit 1; }
	@$(BIN)/python -m tools.dep_gate > .venv/graph.log || { cat .venv/graph.log; exit 1; }

.PHONY: types
types: mypy pyright ## mypy strict, and basedpyright for results that nobody looks at

.PHONY: mypy
mypy: .venv/.dev
	@echo '== types: mypy'
	@$(BIN)/mypy --no-error-summary $(TREES)
	@for name in pump gauge; do MYPYPATH=src:examples/$$name/src $(BIN)/mypy --no-error-summary \
	    examples/$$name/src examples/$$name/tests || exit; done

.PHONY: pyright
pyright: .venv/.dev
	@echo '== types: basedpyright'
	@$(BIN)/basedpyright --level error > .venv/types.log || { cat .venv/types.log; exit 1; }

.PHONY: drift
drift: .venv/.dev ## generated pages, claims and statuses agree with the code
	@echo '== drift'
	@for file in systems/*.toml; do $(BIN)/nexus check $$file > /dev/null || exit; done
	@$(BIN)/python -m nexus.testing.golden tests/golden
	@$(BIN)/python -m tools.pages --check
	@$(BIN)/python -m tools.claims
	@$(BIN)/python -m tools.statuses

.PHONY: docs
docs: .venv/.dev ## write the generated pages
	@$(BIN)/python -m tools.pages

.PHONY: golden
golden: .venv/.dev ## write the golden frames of new protocols, and of those with a new version
	@$(BIN)/python -m nexus.testing.golden --write tests/golden

# ---------------------------------------------------------------- upkeep

# Every pin with the hashes of all its files, so that one list serves every Python from 3.11 on,
# x86_64 and aarch64. The lists name no index: that is the business of the machine's own set-up.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
           --custom-compile-command 'make pins' --no-emit-index-url --no-emit-find-links $(PINS)

.PHONY: pins
pins: .venv/.made ## write requirements/*.txt anew from *.in (PINS=--upgrade for newer versions)
	@$(PIP) requirements/pins.txt
	@cd requirements && for name in run pins dev bench; do \
	    ../$(COMPILE) $$name.in -o $$name.txt || exit; done

.PHONY: clean
clean: ## remove .venv, caches and whatever a run left behind
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
	    .coverage build dist
	find $(TREES) -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
