"""What is imported into each service's process and into PID 1, against what is declared.

`python -m tools.dep_gate` reads the source, follows every import and compares what it comes to with
requirements/os-graph.toml: packages of ours, modules of Python, libraries. Too much and too little
are both a fault, so the file says exactly what is there. It ends with `no forbidden crates in OS
graph` and exit code 0, or with one line per fault and exit code 1; whatever cannot be read, found
or understood is a fault, never an empty closure. `--found` prints the file as the tree has it.

- An import counts wherever it stands, in a function too; not under `if TYPE_CHECKING`. Importing
  a.b.c imports a and a.b.
- A module imports by a string only where [dynamic] says so: which modules, and why no more.
- [cuts] are imports that never happen on a device, each with the reason; one that is not there any
  more is a fault.
- Libraries are followed module by module. One of theirs that is guarded (in a function, behind an
  `if`, or in a `try` that catches ImportError) counts if it would succeed on a device, that is, if
  what it imports is declared for some program. What is compiled cannot be read: COMPILED says what
  it imports.
- PID 1 has what its own modules import and all programs that are forked from it.
"""

import ast
import importlib.metadata
import sys
import sysconfig
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.bundle.needs import DEVICE_DISTRIBUTIONS, normalised
from nexus.init.programs import PROGRAMS, ProgramSource

ROOT: Final = Path(__file__).resolve().parent.parent
DECLARED: Final = ROOT / "requirements" / "os-graph.toml"
GREEN: Final = "no forbidden crates in OS graph"
OURS: Final = "nexus"
PID1: Final = "pid1"
OWN_INTERPRETER: Final = "nexus.kernel.linux.stage2"  # what an exec'd service begins with
KINDS: Final = ("nexus", "python", "libraries")
COMPILED: Final[Mapping[str, tuple[str, ...]]] = {
    "backports-zstd": (),
    "cffi": (),
    "cryptography": ("_cffi_backend",),
    "google-crc32c": (),
    "msgspec": (),
}
"""By distribution, what its compiled modules import of others; a test loads them and looks."""

_CAUGHT: Final = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


class CannotTell(Exception):
    """A closure cannot be computed; the text is one sentence."""


class Import(NamedTuple):
    """An import as it is written. `guarded`: it may fail and its module goes on."""

    name: str
    members: tuple[str, ...]
    line: int
    guarded: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A module: its file, None for a namespace package, and whose it is."""

    name: str
    file: Path | None
    library: str = ""


@dataclass(slots=True)
class Closure:
    """What a program comes to, by kind; of each thing, the first import that leads there."""

    modules: dict[str, str] = field(default_factory=dict)
    python: dict[str, str] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def nexus(self) -> dict[str, str]:
        """Packages of ours: the first two parts of the names of modules."""
        packages: dict[str, str] = {}
        for name, why in self.modules.items():
            _ = packages.setdefault(".".join(name.split(".")[:2]), why)
        _ = packages.pop(OURS, None)
        return packages

    def of_kind(self, kind: str) -> dict[str, str]:
        """What is compared with the declared list of this name."""
        found: dict[str, str] = getattr(self, kind)
        return found


Lists = Mapping[str, frozenset[str]]
"""What is declared, by kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Of:
    """What is declared of one program: lists it shares with others, and its own."""

    groups: tuple[str, ...]
    own: Lists


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The declared list, as it is written."""

    pid1: tuple[str, ...]
    groups: Mapping[str, Lists]
    programs: Mapping[str, "Of"]
    dynamic: Mapping[str, tuple[str, ...]]
    cuts: Mapping[tuple[str, str], str]

    @cached_property
    def libraries(self) -> frozenset[str]:
        """Every library that a device has."""
        lists = [*self.groups.values(), *(each.own for each in self.programs.values())]
        return frozenset().union(*(each["libraries"] for each in lists))

    def of(self, name: str) -> Iterator[tuple[str, Lists]]:
        """The lists of a program, each with the table it stands in."""
        program = self.programs[name]
        yield from ((f"group.{group}", self.groups[group]) for group in program.groups)
        yield f'program."{name}"', program.own


def declared_in(file: Path) -> Declared:
    """Read the declared list. Raises CannotTell."""
    try:
        content = tomllib.loads(file.read_text("utf-8"))
        cuts = {}
        for text, why in content.get("cuts", {}).items():
            importer, arrow, imported = text.split()
            assert arrow == "->", text
            cuts[importer, imported] = why
        groups = {name: _lists(lists) for name, lists in content["group"].items()}
        return Declared(
            pid1=tuple(content["pid1"]["modules"]),
            groups=groups,
            programs={name: _of(entry, groups) for name, entry in content["program"].items()},
            dynamic={
                name: tuple(entry["imports"])
                for name, entry in content.get("dynamic", {}).items()
                if entry["why"]
            },
            cuts=cuts,
        )
    except (OSError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise CannotTell(f"{file.name} cannot be read: {error!r}") from error


def _of(content: Mapping[str, Any], groups: Mapping[str, Lists]) -> Of:
    names = tuple(content.get("with", ()))
    if not groups.keys() >= set(names):
        raise ValueError(f"there are no groups {sorted(set(names) - groups.keys())}")
    own = {key: value for key, value in content.items() if key != "with"}
    return Of(groups=names, own=_lists(own))


def _lists(content: Mapping[str, Any]) -> Lists:
    unknown = content.keys() - set(KINDS)
    if unknown:
        raise ValueError(f"{sorted(unknown)} is none of {KINDS}")
    return {kind: frozenset(content.get(kind, ())) for kind in KINDS}


# ---------------------------------------------------------------- reading


class Source:
    """Modules as they lie in folders, and which distribution each file belongs to."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._libraries = _files_of_libraries(folders)

    def find(self, name: str) -> Found | None:
        """The module of this name; None if there is none in the folders."""
        folders: Sequence[Path] = self._folders
        found: Found | None = None
        for depth, part in enumerate(name.split("."), start=1):
            found = self._in(folders, part, ".".join(name.split(".")[:depth]))
            if found is None:
                return None
            inner = found.file is None or found.file.stem == "__init__"
            if found.file is None:
                folders = [each / part for each in folders if (each / part).is_dir()]
            else:
                folders = [found.file.parent] if inner else []
        return found

    def _in(self, folders: Sequence[Path], part: str, name: str) -> Found | None:
        namespace = None
        for folder in folders:
            package = folder / part
            compiled = sorted([*folder.glob(f"{part}.*.so"), folder / f"{part}.so"])
            for file in (package / "__init__.py", *compiled, folder / f"{part}.py"):
                if file.is_file():
                    return Found(name=name, file=file, library=self._library(file))
            if package.is_dir():
                namespace = Found(name=name, file=None)
        return namespace

    def _library(self, file: Path) -> str:
        return self._libraries.get(str(file), "")


def _files_of_libraries(folders: Sequence[Path]) -> dict[str, str]:
    """Each file of each distribution that is installed in the folders."""
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(each) for each in folders]):
        for file in distribution.files or ():
            if file.suffix in {".py", ".so"}:
                place = str(Path(str(distribution.locate_file(file))))
                found[place] = normalised(distribution.metadata["Name"])
    return found


@cache
def imports_of(file: Path, package: str) -> tuple[tuple[Import, ...], tuple[int, ...]]:
    """The imports of a source file, and the lines of those by a string. Raises CannotTell."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise CannotTell(f"{file} cannot be read: {error}") from error
    reading = _Reading(package)
    reading.visit(tree)
    return tuple(reading.found), tuple(reading.dynamic)


class _Reading(ast.NodeVisitor):
    """Collects the imports of one module, and notes which of them may fail."""

    def __init__(self, package: str) -> None:
        self.found: list[Import] = []
        self.dynamic: list[int] = []
        self._package = package
        self._guards = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.found.append(Import(alias.name, (), node.lineno, self._guards > 0))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        name = node.module or ""
        if node.level:
            parts = self._package.split(".")
            name = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [name])])
        members = tuple(alias.name for alias in node.names)
        self.found.append(Import(name, members, node.lineno, self._guards > 0))

    def visit_If(self, node: ast.If) -> None:
        if _names(node.test) & {"TYPE_CHECKING"}:
            for each in node.orelse:
                self.visit(each)
            return
        self.visit(node.test)
        self._guarded([*node.body, *node.orelse], guards=True)

    def visit_Try(self, node: ast.Try) -> None:
        caught = {name for each in node.handlers for name in _names(each.type)}
        bare = any(each.type is None for each in node.handlers)
        self._guarded(node.body, guards=bare or bool(caught & _CAUGHT))
        self._guarded([*node.handlers, *node.orelse], guards=True)
        self._guarded(node.finalbody, guards=False)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._guarded(node.body, guards=True)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _names(node.func) & {"import_module", "__import__"}:
            self.dynamic.append(node.lineno)
        self.generic_visit(node)

    def _guarded(self, body: Sequence[ast.AST], *, guards: bool) -> None:
        self._guards += guards
        for each in body:
            self.visit(each)
        self._guards -= guards


def _names(node: ast.expr | None) -> set[str]:
    """The last parts of the names in an expression."""
    found = set()
    for each in ast.walk(node) if node is not None else ():
        if isinstance(each, ast.Name):
            found.add(each.id)
        elif isinstance(each, ast.Attribute):
            found.add(each.attr)
    return found


# ---------------------------------------------------------------- following


class Step(NamedTuple):
    """A module to be looked at, and the import that leads there."""

    name: str
    why: str
    may_fail: bool


class Follower:
    """Follows imports from the modules of a program to all that they come to."""

    def __init__(self, source: Source, declared: Declared) -> None:
        self._source = source
        self._declared = declared
        self.cuts_used: set[tuple[str, str]] = set()
        self.dynamic_used: set[str] = set()
        self._found = cache(source.find)

    def closure(self, modules: Iterable[str]) -> Closure:
        """All that these modules come to. Raises CannotTell."""
        closure = Closure()
        certain = deque(Step(name, "the program itself", may_fail=False) for name in modules)
        possible: deque[Step] = deque()  # what is reached in no other way than by guarded imports
        while certain or possible:
            step = certain.popleft() if certain else possible.popleft()
            if step.name in closure.modules:
                continue
            found = self._found(step.name)
            if found is None:
                if step.may_fail:
                    continue
                raise CannotTell(f"{step.name} cannot be found ({step.why})")
            closure.modules[step.name] = step.why
            if found.library:
                _ = closure.libraries.setdefault(found.library, step.why)
            parents = (step._replace(name=parent) for parent in _parents(step.name))
            for each in (*parents, *self._next(found, step, closure)):
                (possible if each.may_fail else certain).append(each)
        for name in [name for name in closure.modules if name.partition(".")[0] != OURS]:
            del closure.modules[name]
        return closure

    def _next(self, found: Found, step: Step, closure: Closure) -> Iterator[Step]:
        """What one module imports."""
        if found.file is None:
            return
        if found.file.suffix != ".py":
            yield from self._compiled(found)
            return
        is_package = found.file.stem == "__init__"
        package = found.name if is_package else found.name.rpartition(".")[0]
        imports, dynamic = imports_of(found.file, package)
        ours = not found.library
        if dynamic and ours:
            for name in self._by_string(found.name, dynamic):
                yield Step(name, f"{found.name}, by a string", may_fail=False)
        for each in imports:
            why = f"{found.name}, line {each.line}"
            cut = next((c for c in self._declared.cuts if _is_cut(c, found.name, each)), None)
            top = each.name.partition(".")[0]
            if cut is not None:
                self.cuts_used.add(cut)
            elif top in sys.stdlib_module_names:
                if ours:
                    _ = closure.python.setdefault(top, why)
            else:
                may_fail = not ours and (each.guarded or step.may_fail)
                yield from self._imported(each, why, may_fail=may_fail)

    def _imported(self, each: Import, why: str, *, may_fail: bool) -> Iterator[Step]:
        target = self._found(each.name)
        if may_fail and not (target is not None and self._on_device(target)):
            return
        yield Step(each.name, why, may_fail)
        for member in each.members:
            inner = f"{each.name}.{member}"
            if self._found(inner) is not None:
                yield Step(inner, why, may_fail)

    def _on_device(self, target: Found) -> bool:
        return not target.library or target.library in self._declared.libraries

    def _compiled(self, found: Found) -> Iterator[Step]:
        if found.library not in COMPILED:
            raise CannotTell(f"{found.name} is compiled, and COMPILED does not say what it imports")
        for name in COMPILED[found.library]:
            yield Step(name, f"{found.name}, which is compiled", may_fail=False)

    def _by_string(self, name: str, lines: Sequence[int]) -> tuple[str, ...]:
        if name not in self._declared.dynamic:
            places = ", ".join(map(str, lines))
            raise CannotTell(
                f"{name} imports by a string (line {places}), which [dynamic] does not declare"
            )
        self.dynamic_used.add(name)
        return self._declared.dynamic[name]


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_cut(cut: tuple[str, str], importer: str, each: Import) -> bool:
    names = {each.name, *(f"{each.name}.{member}" for member in each.members)}
    inside = any(name == cut[1] or name.startswith(f"{cut[1]}.") for name in names)
    return importer == cut[0] and inside


# ---------------------------------------------------------------- judging


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What was found: the closure of each program, and every fault."""

    closures: Mapping[str, Closure]
    faults: tuple[str, ...]


def modules_of(source: ProgramSource) -> tuple[str, ...]:
    """Where the imports of a program of Nexus begin."""
    apart = (OWN_INTERPRETER,) if is_apart(source) else ()
    check = (source.disk_check,) if source.disk_check else ()
    return (source.module, *source.protocols, *check, *apart)


def is_apart(source: ProgramSource) -> bool:
    """Whether it has an interpreter of its own, so that init does not import it."""
    return source.apart or source.keeps_secret


def gate(
    source: Source,
    declared: Declared,
    programs: Mapping[str, ProgramSource],
    distributions: Iterable[str] = DEVICE_DISTRIBUTIONS,
) -> Gate:
    """Compare every program, and PID 1, with what is declared for it, and all libraries of the list
    with the `distributions` that a set says it needs."""
    follower = Follower(source, declared)
    forked = [name for each in programs.values() if not is_apart(each) for name in modules_of(each)]
    roots = {name: modules_of(each) for name, each in programs.items()}
    roots[PID1] = (*declared.pid1, *forked)
    closures: dict[str, Closure] = {}
    faults: list[str] = []
    for name, modules in roots.items():
        try:
            closures[name] = follower.closure(modules)
        except CannotTell as error:
            faults.append(f"{name}: {error}")
    for name in sorted(roots.keys() ^ declared.programs.keys()):
        what = "is not declared" if name in roots else "is declared, and there is no such program"
        faults.append(f"{name}: {what}")
    for name, closure in closures.items():
        faults += _differences(name, closure, declared)
    if len(closures) == len(roots):  # else nobody knows what the missing ones would have used
        faults += _unused(follower, declared)
    devices = {normalised(name) for name in distributions}
    for name in sorted(devices ^ declared.libraries):
        faults.append(
            f"{name} is either declared or in DEVICE_DISTRIBUTIONS, and has to be in both"
        )
    return Gate(closures=closures, faults=tuple(faults))


def _differences(name: str, closure: Closure, declared: Declared) -> Iterator[str]:
    if name not in declared.programs:
        return
    for kind in KINDS:
        found = closure.of_kind(kind)
        told: dict[str, str] = {}
        for table, lists in declared.of(name):
            for thing in sorted(lists[kind]):
                if thing in told:
                    yield f"{name}: {kind}: {thing} stands in {told[thing]} and in {table}"
                told[thing] = table
        for thing in sorted(found.keys() - told.keys()):
            yield f"{name}: forbidden {kind}: {thing}, imported by {found[thing]}"
        for thing in sorted(told.keys() - found.keys()):
            yield f"{name}: {kind}: {thing} is declared in {told[thing]}, and not imported"


def _unused(follower: Follower, declared: Declared) -> Iterator[str]:
    for group in sorted(declared.groups):
        if not any(group in each.groups for each in declared.programs.values()):
            yield f"group.{group}: no program has it"
    for importer, imported in sorted(declared.cuts.keys() - follower.cuts_used):
        yield f"cuts: {importer} does not import {imported}"
    for name in sorted(declared.dynamic.keys() - follower.dynamic_used):
        yield f"dynamic: {name} imports nothing by a string, or is in no program"


# ---------------------------------------------------------------- telling


def as_text(found: Gate, declared: Declared) -> str:
    """The faults, or what each program has and the line that a script looks for."""
    if found.faults:
        return "".join(f"dep-gate: {fault}\n" for fault in found.faults)
    lines = [f"{'program':<18} {'modules':>7} {'python':>6}  libraries"]
    for name, closure in found.closures.items():
        count = f"{len(closure.modules):>7} {len(closure.python):>6}"
        lines.append(f"{name:<18} {count}  {', '.join(sorted(closure.libraries))}")
    lines += [f"cut {a} -> {b}: {why}" for (a, b), why in declared.cuts.items()]
    return "\n".join([*lines, GREEN]) + "\n"


def as_declared(found: Gate, declared: Declared) -> str:
    """The lists as they would have to be declared for the tree as it is."""
    parts = ["[pid1]", _array("modules", declared.pid1), ""]
    shared: dict[str, Lists] = {}
    for group in declared.groups:
        members = [name for name, each in declared.programs.items() if group in each.groups]
        also = [other for other in shared if all(_has(declared, name, other) for name in members)]
        own = {}
        for kind in KINDS:
            each = (frozenset(found.closures[name].of_kind(kind)) for name in members)
            own[kind] = frozenset.intersection(*each) - _union(shared, also, kind)
        shared[group] = own
        parts += _table(f"group.{group}", own)
    for name, closure in found.closures.items():
        groups = declared.programs[name].groups if name in declared.programs else ()
        own = {
            kind: frozenset(closure.of_kind(kind)) - _union(shared, groups, kind) for kind in KINDS
        }
        parts += _table(f'program."{name}"', own, groups)
    return "\n".join(parts)


def _has(declared: Declared, name: str, group: str) -> bool:
    return group in declared.programs[name].groups


def _union(shared: Mapping[str, Lists], groups: Iterable[str], kind: str) -> frozenset[str]:
    return frozenset().union(*(shared[each][kind] for each in groups))


def _table(name: str, lists: Lists, groups: Sequence[str] = ()) -> list[str]:
    lines = [_array("with", groups)] if groups else []
    lines += [_array(kind, sorted(names)) for kind, names in lists.items() if names]
    return [f"[{name}]", *lines, ""]


def _array(key: str, names: Sequence[str]) -> str:
    text = f"{key} = [{', '.join(_quoted(name) for name in names)}]"
    if len(text) <= 100:
        return text
    lines, line = [f"{key} = ["], "   "
    for name in names:
        if len(line) + len(name) + 4 > 100:
            lines.append(line)
            line = "   "
        line += f" {_quoted(name)},"
    return "\n".join([*lines, line, "]"])


def _quoted(name: str) -> str:
    return f'"{name}"'


def folders() -> list[Path]:
    """Where this interpreter finds what a device would import: our source, what is installed."""
    paths = sysconfig.get_paths()
    installed = dict.fromkeys((Path(paths["purelib"]), Path(paths["platlib"])))
    return [ROOT / "src", *installed]


def main(arguments: Sequence[str], say: Callable[[str], object] = sys.stdout.write) -> int:
    """Judge this tree; 0 green, 1 red, 2 usage."""
    if arguments not in ([], ["--found"]):
        _ = say("usage: python -m tools.dep_gate [--found]\n")
        return 2
    try:
        declared = declared_in(DECLARED)
        found = gate(Source(folders()), declared, PROGRAMS)
    except CannotTell as error:
        _ = say(f"dep-gate: {error}\n")
        return 1
    _ = say(as_declared(found, declared) if arguments else as_text(found, declared))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
