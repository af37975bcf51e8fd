"""Every public claim has a test: `python -m tools.claims` reads docs/claims.md.

A claim is a row `| id | claim | tests |`; each test is a path and a name, as pytest takes them
(`tests/unit/test_x.py::test_y`). It fails when a claim has none, or names one that is not there,
when an id is given twice, when a page quotes a claim that the table has not got, or when the
promise table names a test that is not there.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CLAIMS: Final = "docs/claims.md"
PROMISES: Final = "docs/reference/promises.md"
QUOTING: Final = ("README.md", "ARCHITECTURE.md", "SECURITY.md")
ROW: Final = re.compile(r"^\|\s*(C\d+)\s*\|\s*(.*?)\s*\|\s*(.*?)\s*\|\s*$", re.MULTILINE)
TEST: Final = re.compile(r"`([\w/.-]+\.py(?:::\w+)+)`")
QUOTE: Final = re.compile(r"\bC\d+\b")


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence that we say in public, and the tests that hold it."""

    id: str
    text: str
    tests: tuple[str, ...]


def claims(page: str) -> list[Claim]:
    """The rows of the table."""
    return [
        Claim(id=name, text=text, tests=tuple(TEST.findall(tests)))
        for name, text, tests in ROW.findall(page)
    ]


def exists(root: Path, test: str) -> bool:
    """Whether the file of a test defines it."""
    path, *names = test.split("::")
    if not (root / path).is_file():
        return False
    nodes: list[ast.stmt] = ast.parse((root / path).read_text("utf-8")).body
    for name in names:
        found = [
            node
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name == name
        ]
        # A stateful test of hypothesis is an assignment: TestX = Machine.TestCase
        if not found:
            return any(
                isinstance(node, ast.Assign)
                and any(isinstance(to, ast.Name) and to.id == name for to in node.targets)
                for node in nodes
            )
        nodes = found[0].body
    return True


def faults(root: Path) -> Iterator[str]:
    """A sentence for each claim that nothing holds."""
    found = claims((root / CLAIMS).read_text("utf-8"))
    seen: set[str] = set()
    for claim in found:
        if claim.id in seen:
            yield f"{claim.id} is given twice"
        seen.add(claim.id)
        if not claim.tests:
            yield f"{claim.id} has no test: {claim.text}"
        for test in claim.tests:
            if not exists(root, test):
                yield f"{claim.id} names a test that is not there: {test}"
    for page in QUOTING:
        if (root / page).is_file():
            for quote in QUOTE.findall((root / page).read_text("utf-8")):
                if quote not in seen:
                    yield f"{page} quotes {quote}, which {CLAIMS} has not got"
    if (root / PROMISES).is_file():
        for test in TEST.findall((root / PROMISES).read_text("utf-8")):
            if not exists(root, test):
                yield f"{PROMISES} names a test that is not there: {test}"


def main() -> int:
    """Check this tree."""
    found = list(faults(ROOT))
    for fault in found:
        print(f"claims: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
