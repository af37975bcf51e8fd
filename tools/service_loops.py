"""No service has a retry or polling loop of its own: those are nexus.ipc's and nexus.runtime's.

`python -m tools.service_loops` prints one line per loop and exits 1 if there is one. A loop is a
`while`, `for` or `async for` statement; functions defined inside it are looked at by themselves.
It is one of its own if

- POLLS: a `while` loop awaits Recv, ReplyRecv or Call, or any loop awaits SleepUntil (these
  traps made in place or bound to a name in the same function);
- TRIES AGAIN: it awaits inside a `try` whose handler goes on: no return, raise or break in it;
- REPEATS: its own test, or a test that leads to `continue`, asks with isinstance or `is` what an
  await in the loop has given;
- WAITS: it is a `while` loop that awaits anything;
- COUNTS: it is a `for` loop over range (or count, cycle, repeat), awaits and leaves early.

A function that awaits and leads back to itself, also by way of others of its module, is one too.

A `for` loop over given things that stops or fails at the first refusal is none of them. What
waits or counts for a good reason stands in EXCEPTIONS: one loop of one function, with the reason.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
SERVICES: Final = ROOT / "src" / "nexus" / "services"

EXCEPTIONS: Final = {
    ("demo/testsvc.py", "_flood_timed"): "a flood is its errand: it sends, and waits for nothing",
    ("demo/testsvc.py", "_fill_link"): "fills a link to its refusal, and reports that refusal",
    ("demo/testsvc.py", "_use"): "a stated number of instances: the first may have ended meanwhile",
    ("selftest/state_rungs.py", "_all_keys"): "reads page after page: each call asks for others",
    ("demo/testsvc.py", "_drop_answers"): "empties an inbox: each turn takes another message",
    ("execd/evidence.py", "_last_spans"): "halves a range until the last page is found",
    ("execd/keeping.py", "_numbers"): "reads page after page: each call asks for other keys",
    ("execd/service.py", "_flush_lines"): "prints what waits, up to the first that finds no room",
    ("exportd/readings.py", "series"): "reads page after page: each call asks for other rows",
    ("exportd/readings.py", "spans"): "reads page after page: each call asks for other spans",
    ("exportd/service.py", "_act"): "does what a machine has decided, each effect once",
    ("exportd/service.py", "_send"): "sends an answer piece by piece, up to the first refusal",
    ("exportd/service.py", "_serve"): "answers what a peer has asked, a request in each round",
    ("exportd/service.py", "_transmit"): "sends a body piece by piece, up to the first refusal",
    ("keystored/vault.py", "_listed"): "reads page after page: each call asks for other keys",
    ("keystored/vault.py", "_finish"): "reads page after page: each goes on behind the last",
    ("selftest/call_rungs.py", "_flood"): "a sample of calls; ends at the first failure",
    ("selftest/climb.py", "links"): "reads page after page: each call asks for other rows",
    ("selftest/climb.py", "qos_audit"): "reads page after page: each call asks for other lines",
    ("selftest/policy_rungs.py", "pages"): "reads page after page: each call asks for other rows",
    ("selftest/metric_rungs.py", "series_of"): "reads page after page: each call asks for others",
    ("selftest/metric_rungs.py", "wal_active"): "reads page after page: each call asks for others",
    ("selftest/metric_rungs.py", "_windows"): "reads page after page: each call asks for others",
    ("selftest/kernel_rungs.py", "deadline_fires"): "measures in groups of a stated number",
    (
        "statefsd/engine/checkpoint.py",
        "_read_around",
    ): "halves a range until its bad blocks are found",
    ("statefsd/engine/store.py", "_finish_build"): "writes a checkpoint piece by piece, to its end",
    ("selftest/decision_rungs.py", "_page_once"): (
        "a look every millisecond: a doubling pause would sleep through policyd's absence"
    ),
}
"""Loops that wait or count and are no retry: module under services, function, and why.

Each excuses one loop, and only from these two rules. A rung that needs one says so here.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.While | ast.For | ast.AsyncFor
RECEIVING: Final = frozenset({"Recv", "ReplyRecv", "Call"})
SLEEPING: Final = frozenset({"SleepUntil"})
COUNTING: Final = frozenset({"range", "count", "cycle", "repeat"})
WAITS: Final = "waits in a while"
COUNTS: Final = "asks a number of times and leaves early"
RECURS: Final = "leads back to its function"
INNER: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def loops(
    source: str, exceptions: Mapping[tuple[str, str], str] = EXCEPTIONS
) -> Iterator[tuple[int, str]]:
    """Line and reason of each loop of its own in the source of a module."""
    tree = ast.parse(source)
    left = _excused(source, exceptions)
    for function in ast.walk(tree):
        if isinstance(function, ast.AsyncFunctionDef):
            traps = _named_traps(function)
            for node in _within(function.body):
                if isinstance(node, Loop) and (reason := _reason(node, traps)):
                    if reason in {WAITS, COUNTS} and function.name in left:
                        left.remove(function.name)
                    else:
                        yield node.lineno, reason
    yield from ((line, RECURS) for line in _recursions(tree))


def _excused(source: str, exceptions: Mapping[tuple[str, str], str]) -> set[str]:
    """The excepted functions of this module, which is known by its text: callers have no more."""
    modules = {module for module, _ in exceptions}
    same = {
        module
        for module in modules
        if (SERVICES / module).is_file() and (SERVICES / module).read_text("utf-8") == source
    }
    return {function for module, function in exceptions if module in same}


def _recursions(tree: ast.Module) -> Iterator[int]:
    """The line of each async function from which calls lead back to it."""
    found = list(_scoped(tree, ""))
    called = {
        (scope, function.name): {
            name
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and (name := _called(node.func, scope))
        }
        for scope, function in found
    }
    for scope, function in found:
        if isinstance(function, ast.AsyncFunctionDef):
            reached: set[tuple[str, str]] = set()
            pending = [(scope, function.name)]
            while pending:
                new = called.get(pending.pop(), set()) - reached
                reached |= new
                pending.extend(new)
            if (scope, function.name) in reached:
                yield function.lineno


def _scoped(node: ast.AST, scope: str) -> Iterator[tuple[str, Function]]:
    """Every function with the class it is a method of, "" if it is none's."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield scope, child
            yield from _scoped(child, "")
        else:
            yield from _scoped(child, child.name if isinstance(child, ast.ClassDef) else scope)


def _called(target: ast.expr, scope: str) -> tuple[str, str] | None:
    """Which function of this module a call may lead to: a method of the same class, or a name."""
    match target:
        case ast.Name(id=name):
            return "", name
        case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
            return scope, name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return owner, name
        case _:
            return None


def _within(body: list[ast.stmt] | list[ast.expr]) -> Iterator[ast.AST]:
    """Every node below, without what functions and classes defined there hold."""
    pending: list[ast.AST] = [node for node in body if not isinstance(node, INNER)]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(
            child for child in ast.iter_child_nodes(node) if not isinstance(child, INNER)
        )


def _named_traps(function: ast.AsyncFunctionDef) -> dict[str, str]:
    """Names bound to a trap made in this function."""
    return {
        target.id: trap
        for node in _within(function.body)
        if isinstance(node, ast.Assign) and (trap := _made(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _made(value: ast.expr) -> str:
    """The class a value is made from, by its name."""
    if not isinstance(value, ast.Call):
        return ""
    made = value.func
    return made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")


def _reason(loop: Loop, traps: dict[str, str]) -> str | None:
    nodes = list(_within(loop.body))
    if isinstance(loop, ast.While):
        nodes += _within([loop.test])
    awaited = {_trap_of(node.value, traps) for node in nodes if isinstance(node, ast.Await)}
    if awaited & SLEEPING or (isinstance(loop, ast.While) and awaited & RECEIVING):
        return "polls"
    if any(isinstance(node, ast.Try) and _goes_on(node) for node in nodes):
        return "tries again"
    results = _awaited_names(nodes)
    if isinstance(loop, ast.While) and _asks_about(loop.test, results):
        return "repeats until the outcome is right"
    for node in nodes:
        if isinstance(node, ast.If) and _asks_about(node.test, results) and _continues(node):
            return "repeats until the outcome is right"
    return _turns(loop, nodes)


def _turns(loop: Loop, nodes: list[ast.AST]) -> str | None:
    """Whether a loop has the form of a poll, whatever it asks."""
    if not any(isinstance(node, ast.Await) for node in nodes):
        return None
    if isinstance(loop, ast.While):
        return WAITS
    leaves = any(isinstance(node, ast.Return | ast.Break) for node in nodes)
    counted = any(
        isinstance(node, ast.Call) and _name_of(node.func) in COUNTING
        for node in ast.walk(loop.iter)
    )
    return COUNTS if leaves and counted else None


def _name_of(function: ast.expr) -> str:
    """The name a function is called by, bare or of itertools."""
    match function:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="itertools"), attr=name):
            return name
        case _:
            return ""


def _trap_of(value: ast.expr, traps: dict[str, str]) -> str:
    return traps.get(value.id, "") if isinstance(value, ast.Name) else _made(value)


def _goes_on(node: ast.Try) -> bool:
    """Whether an await is tried, and some handler stays in the loop."""
    tried = any(isinstance(part, ast.Await) for part in _within(node.body))
    return tried and any(
        not any(isinstance(part, ast.Return | ast.Raise | ast.Break) for part in _within(h.body))
        for h in node.handlers
    )


def _awaited_names(nodes: list[ast.AST]) -> set[str]:
    """Names that hold what an await in the loop gave."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Await):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.NamedExpr) and isinstance(node.value, ast.Await):
            names.add(node.target.id)
    return names


def _asks_about(test: ast.expr, names: set[str]) -> bool:
    """Whether a test asks of which kind one of these values is."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            asked = node.args[0]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            asked = node.left
        else:
            continue
        if any(
            (isinstance(part, ast.Name) and part.id in names) or isinstance(part, ast.Await)
            for part in ast.walk(asked)
        ):
            return True
    return False


def _continues(node: ast.If) -> bool:
    return any(isinstance(part, ast.Continue) for part in _within([*node.body, *node.orelse]))


def main() -> int:
    """Check every module of the services."""
    count = 0
    for path in sorted(SERVICES.rglob("*.py")):
        for line, reason in loops(path.read_text("utf-8")):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: a loop of its own that {reason}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
