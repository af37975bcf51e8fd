"""A test for the tree: what no linter knows about, one rule per function.

`python -m tools.tidy` prints one line per fault and exits 1 if there is one.
"""

import ast
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from tools.service_loops import loops

ROOT: Final = Path(__file__).resolve().parent.parent
EXAMPLE: Final = re.compile(r"examples/[^/]+/src/.*\.py")
CODE: Final = ("src", "tests", "tools", "fuzz", "bench")
LINE_LENGTH_MAX: Final = 100  # characters; ruff's formatter breaks what it can at the same number
TEXT_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes; a larger file is data, not text to check

BANNED_NAMES: Final = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}

BROAD_EXCEPTS: Final = {
    "src/nexus/runtime": "the outermost frame of a service: counts and re-raises",
    "src/nexus/cli": "the outermost frame of the command: prints a sentence and exits",
    "src/nexus/kernel/sim/kernel.py": "drives the tasks: what a program raises is its task's exit",
    "src/nexus/kernel/linux/child.py": "the same, in the process of the task",
    "src/nexus/kernel/linux/stage2.py": "the same, in an interpreter of its own",
    "src/nexus/vm/guest.py": "the outermost frame of process 1: tells it, and the power goes off",
    "src/nexus/init/programs.py": "imports a system's own module: what it raises is a sentence",
    "src/nexus/testing": "the outermost frame of a test program: its failure is the test's",
}
"""Where `except Exception` may stand, and why (style.md section 6)."""

GROUND_CHOICES: Final = ("src/nexus/proof", "src/nexus/init", "src/nexus/cli")
"""Who may ask which ground it is on: proof picks one, init picks its kernel, cli reads its name."""

SERVICES: Final = "src/nexus/services"
NEWS: Final = "changelog.d"
NEWS_NAME: Final = re.compile(r"\d+\.(added|changed|fixed|removed|security)\.md|README\.md")

OPTIMISED: Final = re.compile(r"python[0-9.]*\s+-O{1,2}\b|PYTHONOPTIMIZE=")
MACHINE_PATH: Final = re.compile(r"(?<![\w.])/(?:work|farm|root)/")
REGISTRY_HOST: Final = re.compile(
    r"\b(?:pypi|npmjs|pythonhosted|crates)\.(?:org|com|io)\b"
    r"|\b(?:files|registry|deb|security|index|mirrors?|proxy)\.[a-z0-9-]+\.(?:org|com|net|io|dev)\b"
)
PRAGMA: Final = re.compile(r"\s+# (?:noqa|type: ignore|pyright: ignore)\b.*$")
UNFINISHED: Final = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b(?!\(#\d+\))")
GROUND_TEST: Final = re.compile(
    r"\b(?:if|elif|while)\b.*(?:\bsimulated\b|\bground\s*(?:==|!=|is\b|in\b))"
)

SKIPPED: Final = {"__pycache__", "build", "dist"}
SHOWN: Final = {".ci"}  # the other hidden folders are git's, or caches
OWN_PATTERNS: Final = {"tools/tidy.py", "tests/unit/test_tidy.py"}
"""This file and its test spell the patterns out."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong where. `path` is relative to the root, `line` counts from 1 (0: the file)."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Tree:
    """A source tree to be checked."""

    root: Path

    @cached_property
    def paths(self) -> list[str]:
        """Every file of the tree, relative, without what is generated or hidden."""
        found: list[Path] = []
        for name, folders, files in os.walk(self.root):
            folder = Path(name)
            folders[:] = [
                inner
                for inner in folders
                if inner not in SKIPPED and (not inner.startswith(".") or inner in SHOWN)
            ]
            found.extend(folder / file for file in files if not file.endswith(".pyc"))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    @cached_property
    def examples(self) -> list[str]:
        """The programs of the examples."""
        return [path for path in self.paths if EXAMPLE.fullmatch(path)]

    @cached_property
    def modules(self) -> list[str]:
        """Every Python file that we wrote."""
        return [path for path in self.paths if path.endswith(".py") and path.split("/")[0] in CODE]

    def lines(self, path: str) -> list[str]:
        """The lines of a text file; none if it is binary or very large."""
        if path not in self._lines:
            data = b"\0"
            if (self.root / path).stat().st_size <= TEXT_SIZE_MAX:
                data = (self.root / path).read_bytes()
            self._lines[path] = [] if b"\0" in data else data.decode("utf-8").splitlines()
        return self._lines[path]

    @cached_property
    def _lines(self) -> dict[str, list[str]]:
        return {}

    def parse(self, path: str) -> ast.Module:
        """The syntax tree of a Python file."""
        return ast.parse((self.root / path).read_text("utf-8"), path)


OF_TESTS: Final = re.compile(r"nexus\.(testing|cli)")  # what tests may keep alive


def banned_names(tree: Tree) -> Iterator[Fault]:
    """A module is named after what it does."""
    for path in tree.modules:
        for part in Path(path).with_suffix("").parts:
            if part in BANNED_NAMES:
                yield Fault(path, 0, f"'{part}' names nothing: say what is in it")


def dead_modules(tree: Tree) -> Iterator[Fault]:
    """Every module of the package is reached: imported, or named where commands are declared.

    A module that only its own tests import is dead; nexus.testing is there for tests. What an
    example's program imports is there for programs.
    """
    wanted: set[str] = set()
    for path in (*tree.modules, *tree.examples):
        shipped = path.startswith(("src/", "examples/"))
        if not shipped and not any(OF_TESTS.search(line) for line in tree.lines(path)):
            continue
        for node in ast.walk(tree.parse(path)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif shipped and isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value.partition(":")[0]]  # a program named by its module
            wanted.update(name for name in names if shipped or OF_TESTS.match(name))
    for path in ("Makefile", "justfile", "pyproject.toml"):
        if path in tree.paths:
            wanted.update(re.findall(r"nexus(?:\.\w+)+", "\n".join(tree.lines(path))))
    for path in tree.modules:
        if path.startswith("src/") and Path(path).stem not in {"__init__", "__main__"}:
            module = ".".join(Path(path).with_suffix("").parts[1:])
            if module not in wanted:
                yield Fault(path, 0, "nobody imports this module: use it or remove it")


def unfinished(tree: Tree) -> Iterator[Fault]:
    """What is left for later has an issue."""
    for path in tree.paths:
        if path not in OWN_PATTERNS:
            for number, line in enumerate(tree.lines(path), start=1):
                if UNFINISHED.search(line):
                    yield Fault(path, number, "work left for later names its issue: (#N) after it")


def long_lines(tree: Tree) -> Iterator[Fault]:
    """Code fits the width."""
    for path in tree.paths:
        if path.endswith((".py", ".sh", ".c")) or path in {"Makefile", "justfile", ".ci/run"}:
            for number, line in enumerate(tree.lines(path), start=1):
                if len(PRAGMA.sub("", line)) > LINE_LENGTH_MAX:
                    yield Fault(path, number, f"{len(line)} characters, {LINE_LENGTH_MAX} fit")


def broad_excepts(tree: Tree) -> Iterator[Fault]:
    """A bug is never caught, except in the outermost frames. (Of tests, ruff asks the reason.)"""
    for path in tree.modules:
        if path.startswith(tuple(BROAD_EXCEPTS)) or not path.startswith(("src/", "tools/")):
            continue
        for node in ast.walk(tree.parse(path)):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises(node):
                yield Fault(path, node.lineno, "catches bugs: name the exceptions that are meant")


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(part) for part in caught.elts)
    return caught is None or (
        isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"}
    )


def _raises(handler: ast.ExceptHandler) -> bool:
    """Whether it only cleans up: its last statement raises again what it caught."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def optimised_python(tree: Tree) -> Iterator[Fault]:
    """Assertions stay on, in production too."""
    yield from _matches(tree, OPTIMISED, "turns assertions off")


def machine_paths(tree: Tree) -> Iterator[Fault]:
    """Nothing in the tree knows the machine it was written on."""
    yield from _matches(tree, MACHINE_PATH, "a path of one machine")


def registry_hosts(tree: Tree) -> Iterator[Fault]:
    """Where packages come from is the business of the machine's set-up."""
    yield from _matches(tree, REGISTRY_HOST, "names a registry's host")


def _matches(tree: Tree, pattern: re.Pattern[str], text: str) -> Iterator[Fault]:
    for path in tree.paths:
        if path not in OWN_PATTERNS:
            for number, line in enumerate(tree.lines(path), start=1):
                if found := pattern.search(line):
                    yield Fault(path, number, f"{text}: {found[0].strip()}")


def ground_tests(tree: Tree) -> Iterator[Fault]:
    """No module asks which ground it is on."""
    for path in tree.modules:
        if path.startswith("src/") and not path.startswith(GROUND_CHOICES):
            for number, line in enumerate(tree.lines(path), start=1):
                if GROUND_TEST.search(line):
                    yield Fault(path, number, "asks for the ground: the kernel decides, not you")


def service_loops(tree: Tree) -> Iterator[Fault]:
    """Retry and polling belong to ipc and runtime; tools/service_loops.py finds them."""
    for path in tree.modules:
        if path.startswith(SERVICES):
            for line, reason in loops((tree.root / path).read_text("utf-8")):
                yield Fault(path, line, f"a loop of its own that {reason}: use nexus.ipc")


def contracts_complete(tree: Tree) -> Iterator[Fault]:
    """Every package of ours stands in the contract that keeps nexus.testing out of it."""
    settings = tomllib.loads("\n".join(tree.lines("pyproject.toml")))
    contracts = settings["tool"]["importlinter"]["contracts"]
    named = next(entry for entry in contracts if entry["id"] == "testing")["source_modules"]
    packages = {
        ".".join(Path(path).parts[1:3])
        for path in tree.modules
        if path.startswith("src/nexus/") and len(Path(path).parts) > 3
    }
    for package in sorted(packages - set(named) - {"nexus.testing", "nexus.proof"}):
        yield Fault("pyproject.toml", 0, f"import contract 'testing' leaves out {package}")


def news(tree: Tree) -> Iterator[Fault]:
    """Every change has a fragment in changelog.d, named `<issue>.<kind>.md`."""
    fragments = [path for path in tree.paths if path.startswith(f"{NEWS}/")]
    for path in fragments:
        if not NEWS_NAME.fullmatch(Path(path).name):
            yield Fault(path, 0, "a news fragment is named <issue>.<kind>.md, as its README says")
    if not any(Path(path).name != "README.md" for path in fragments):
        changelog = "\n".join(tree.lines("CHANGELOG.md"))
        if "## [Unreleased]" in changelog:
            yield Fault(NEWS, 0, "nothing is told of what changed since the last release")


RULES: Final[tuple[Callable[[Tree], Iterator[Fault]], ...]] = (
    banned_names,
    dead_modules,
    unfinished,
    long_lines,
    broad_excepts,
    optimised_python,
    machine_paths,
    registry_hosts,
    ground_tests,
    service_loops,
    contracts_complete,
    news,
)


def faults(tree: Tree) -> list[Fault]:
    """Every fault of a tree, in order of path and line."""
    return sorted(
        (fault for rule in RULES for fault in rule(tree)),
        key=lambda fault: (fault.path, fault.line, fault.text),
    )


def main() -> int:
    """Check this tree."""
    found = faults(Tree(ROOT))
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
