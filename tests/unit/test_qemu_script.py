"""scripts/qemu-test.sh hands the environment of the mission and its own arguments on to
`nexus prove`, and brings back its exit code; over a tree with stand-ins for `make` and `nexus`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

SCRIPT: Final = Path(__file__).resolve().parents[2] / "scripts" / "qemu-test.sh"
MAKE: Final = """#!/bin/sh
pwd > "$SAID/make"
printf '%s\\n' "$@" >> "$SAID/make"
[ -z "${MAKE_FAILS:-}" ] || exit 2
mkdir -p .venv/bin
cp "$SAID/nexus" .venv/bin/nexus
"""
NEXUS: Final = f"""#!{sys.executable}
import json, os, sys
told = {{"argv": sys.argv[1:], "environ": dict(os.environ), "pid": os.getpid(), "at": os.getcwd()}}
print(json.dumps(told))
sys.exit(int(os.environ.get("VERDICT", "0")))
"""
ENDS_MAX: Final = 30  # seconds


class Tree:
    """A tree with the script in it, whose .venv is there when the stand-in for make has run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a tree"
        self.said = folder / "said"
        self.elsewhere = folder / "elsewhere"
        programs = folder / "bin"
        for each in (self.root / "scripts", self.said, self.elsewhere, programs):
            each.mkdir(parents=True)
        self.script = Path(shutil.copy(SCRIPT, self.root / "scripts"))
        for file, text in ((programs / "make", MAKE), (self.said / "nexus", NEXUS)):
            _ = file.write_text(text)
            file.chmod(0o755)
        self._environ = {"PATH": f"{programs}:{os.defpath}", "SAID": str(self.said)}
        self.pid = 0

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The script, from a folder that is not the tree, with no other environment."""
        with subprocess.Popen(
            [self.script, *words],
            env=self._environ | environ,
            cwd=self.elsewhere,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            self.pid = child.pid
            try:
                out, errors = child.communicate(timeout=ENDS_MAX)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        return subprocess.CompletedProcess(words, child.returncode, out, errors)

    def told(self, *words: str, **environ: str) -> dict[str, Any]:
        """What nexus was told by a green run."""
        done = self.run(*words, **environ)
        assert (done.returncode, done.stderr) == (0, "")
        told: dict[str, Any] = json.loads(done.stdout)
        return told


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_ladder_is_climbed_in_a_machine(tree: Tree) -> None:
    assert tree.told()["argv"] == ["prove", "--ground", "vm"]


def test_what_follows_on_the_command_line_is_proves_word_for_word(tree: Tree) -> None:
    told = tree.told("--seed", "7", "a word", "", "*")

    assert told["argv"] == ["prove", "--ground", "vm", "--seed", "7", "a word", "", "*"]


@pytest.mark.parametrize(
    ("environ", "count"),
    [({}, "1"), ({"SMP": ""}, "1"), ({"SMP": "1"}, "1"), ({"SMP": "2"}, "2"), ({"SMP": "x"}, "x")],
)
def test_a_machine_has_one_cpu_unless_the_caller_says_how_many(
    environ: dict[str, str], count: str, tree: Tree
) -> None:
    assert tree.told(**environ)["environ"]["SMP"] == count


def test_all_else_in_the_environment_is_as_it_was(tree: Tree) -> None:
    mission = {
        "RUN_PHASE": "policy",
        "RUN_UNTIL_MARKER": "1",
        "RUN_TIMEOUT": "90s",
        "REQUIRE_SMP": "1",
    }

    environ = tree.told(**mission)["environ"]

    assert {name: environ.get(name) for name in mission} == mission
    assert not mission.keys() & tree.told()["environ"].keys()


@pytest.mark.parametrize("code", [0, 1, 2, 7])
def test_its_exit_code_is_that_of_the_verdict(code: int, tree: Tree) -> None:
    assert tree.run(VERDICT=str(code)).returncode == code


def test_whoever_ends_the_script_ends_the_run_itself(tree: Tree) -> None:
    told = tree.told()

    assert told["pid"] == tree.pid


def test_it_runs_in_its_own_tree_after_what_a_run_needs_was_made_there(tree: Tree) -> None:
    told = tree.told()

    assert told["at"] == str(tree.root)
    assert (tree.said / "make").read_text().splitlines() == [str(tree.root), "--silent", "venv"]


def test_where_nothing_can_be_made_nothing_is_run(tree: Tree) -> None:
    done = tree.run()
    assert done.returncode == 0

    done = tree.run(MAKE_FAILS="1")  # with a .venv of before

    assert (done.returncode, done.stdout) == (2, "")
