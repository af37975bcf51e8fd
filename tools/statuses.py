"""Every status a peer can meet, the tests that name or assert it and the rungs that show it.

`python -m tools.statuses` fails when no test asserts a status of the ABI, of the wire, of ipc or
of a protocol, or a test declares one that does not exist.

A test names a status (`Status.QUEUE_FULL`, `TimedStatus.OVER_LIMIT`) or declares it:
`@pytest.mark.covers("timed.OVER_LIMIT", rung=66)`; the contracts list both. A test asserts a
status that it declares, that it compares with something in an assertion or among the parameters
of a test with assertions, or that it hands to a step that fails if it is another
(`refused(trap, Status.QUEUE_FULL)`). That it compares with what came back is for review.
A rung shows a status if the function that climbs it, whose docstring begins with `#66:`, names it.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from nexus.abi import Status
from nexus.ipc import BulkFault, outcome
from nexus.testing.golden import protocols
from nexus.wire import ReplyStatus

ROOT: Final = Path(__file__).resolve().parent.parent
TESTS: Final = ("tests", "src/nexus/testing")
CLIMBERS: Final = ("src/nexus/services/selftest", "src/nexus/kernel")
ASSERTING: Final = {"refused", "raises", "expect"}  # steps that fail if it is another
NOT_REFUSALS: Final = {"OK"}
ANSWERS: Final = {"CallFailure", "Refused", "Routed"}  # the base, and what is no failure of ipc

RUNG: Final = re.compile(r"#(\d+)\b")
COMMENTED: Final = re.compile(r"^\s+([A-Z][A-Z0-9_]*)\s*=\s*\d+\s*#\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One status: who declares it, in which enum, and the comment that says when it is given.

    An outcome of `nexus.ipc` is a class of its own: its `enum` is empty, and it has no number.
    """

    owner: str
    enum: str
    name: str
    number: int | None
    reason: str

    @property
    def key(self) -> str:
        """How tests and pages name it."""
        return f"{self.owner}.{self.name}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where statuses are named: keys to test ids, and to numbers of rungs."""

    tests: dict[str, list[str]]
    rungs: dict[str, list[int]]
    unknown: list[str]  # declared by a test, but no such status
    asserted: set[str] = field(default_factory=set)  # the keys that some test asserts


def declared() -> list[Refusal]:
    """Every status: the kernel's, those all protocols share, and each protocol's own.

    With them every way in which ipc says no: outcomes of calls and routes, and faults of bulk data.
    """
    found = [*_members("abi", Status), *_members("wire", ReplyStatus)]
    for protocol in protocols():
        enums = {info.refuses for info in protocol.requests if info.refuses is not None}
        for enum in sorted(enums, key=lambda enum: enum.__name__):
            found.extend(_members(protocol.name, enum))
    found.extend(_members("bulk", BulkFault))
    for name, value in vars(outcome).items():
        if inspect.isclass(value) and value.__module__ == outcome.__name__ and name not in ANSWERS:
            said = (inspect.getdoc(value) or name).splitlines()[0].rstrip(".")
            found.append(Refusal("ipc", "", name, None, said))
    return found


def _members(owner: str, enum: type[Enum]) -> Iterator[Refusal]:
    comments = dict(COMMENTED.findall(inspect.getsource(enum)))
    for member in enum:
        if member.name not in NOT_REFUSALS:
            if isinstance(member.value, int):
                reason = comments.get(member.name, member.name.lower().replace("_", " "))
                yield Refusal(owner, enum.__name__, member.name, member.value, reason)
            else:
                yield Refusal(owner, enum.__name__, member.name, None, member.value)


def evidence(root: Path, refusals: list[Refusal]) -> Evidence:
    """Read tests and climbers for the statuses they name."""
    keys = {(refusal.enum, refusal.name): refusal.key for refusal in refusals}
    known = set(keys.values())
    found = Evidence({key: [] for key in known}, {key: [] for key in known}, [])
    for path, function in _functions(root, TESTS):
        if not function.name.startswith("test_"):
            continue
        test = f"{path}::{function.name}"
        covered, rungs = _declared_by(function)
        found.unknown.extend(f"{test}: {key}" for key in covered if key not in known)
        found.asserted.update((_asserted_in(function, keys) | covered) & known)
        for key in sorted((_named_in(function, keys) | covered) & known):
            found.tests[key].append(test)
            found.rungs[key].extend(rungs)
    for _, function in _functions(root, CLIMBERS):
        if number := RUNG.match(ast.get_docstring(function) or ""):
            for key in _named_in(function, keys):
                found.rungs[key].append(int(number[1]))
    return found


def _functions(
    root: Path, places: tuple[str, ...]
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for place in places:
        for file in sorted((root / place).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield file.relative_to(root).as_posix(), node


def _asserted_in(
    function: ast.FunctionDef | ast.AsyncFunctionDef, keys: dict[tuple[str, str], str]
) -> set[str]:
    """What a test compares an outcome with: in an assertion, a step, or its parameters."""
    found: set[str] = set()
    asserts = False
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            asserts = True
            for part in ast.walk(node.test):
                if isinstance(part, ast.Compare) or _calls(part, {"isinstance"}):
                    found |= _named_in(part, keys)
        elif _calls(node, ASSERTING):
            asserts = True
            found |= _named_in(node, keys)
    if asserts:
        for mark in function.decorator_list:
            if _calls(mark, {"parametrize"}):
                found |= _named_in(mark, keys)
    return found


def _calls(node: ast.AST, names: set[str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    return getattr(called, "attr", getattr(called, "id", "")) in names


def _named_in(function: ast.AST, keys: dict[tuple[str, str], str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id=enum), attr=name) if (enum, name) in keys:
                found.add(keys[enum, name])
            case ast.Name(id=name) if ("", name) in keys:
                found.add(keys["", name])
            case _:
                pass
    return found


def _declared_by(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[set[str], list[int]]:
    """The keys and rungs of the `covers` marks of a test."""
    covered: set[str] = set()
    rungs: list[int] = []
    for mark in function.decorator_list:
        if (
            isinstance(mark, ast.Call)
            and isinstance(mark.func, ast.Attribute)
            and mark.func.attr == "covers"
        ):
            covered.update(ast.literal_eval(argument) for argument in mark.args)
            rungs.extend(
                ast.literal_eval(word.value) for word in mark.keywords if word.arg == "rung"
            )
    return covered, rungs


def faults(refusals: list[Refusal], found: Evidence) -> list[str]:
    """A sentence for each status no test asserts, and for each declaration of none."""
    missing = [
        f"{refusal.key} ({refusal.reason}): no test asserts this status"
        for refusal in refusals
        if refusal.key not in found.asserted
    ]
    return [*missing, *(f"{entry}: there is no such status" for entry in found.unknown)]


def main() -> int:
    """Check this tree."""
    refusals = declared()
    found = faults(refusals, evidence(ROOT, refusals))
    for fault in found:
        print(f"statuses: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
