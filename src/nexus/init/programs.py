"""The programs of a system: where their code is, what they speak, and their digests.

A program Nexus has is a module (or package) with a coroutine `main(boot)`, in PROGRAMS. One of
a system's own is a class, "package.module:Class", found on the `path` of the system file; what
is wrong with it is a WrongProgram with a sentence. A digest is SHA-256 over source files, so
that two clones of one revision agree and a changed line shows.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from nexus.abi import BootImage, HardwareKind, Program
from nexus.init.declare import cut
from nexus.wire import Protocol

OWN_PROTOCOL_MIN: Final = 1000  # numbers below are those of the protocols of Nexus
LOADER: Final = "nexus.runtime.program:load"  # makes `main` in an interpreter of its own
ORDINARY_LOADER: Final = "nexus.runtime.program:load_ordinary"

_own_packages: set[str] = set()
"""Top-level names in sys.modules that were imported from a system's `path`."""


class WrongProgram(Exception):
    """A program of a system's own cannot be used: `key` of its entry, and the sentence."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        super().__init__(f"{key}: expected {expected}, found {found}")
        self.key = key
        self.expected = expected
        self.found = found


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramSource:
    """Where a program is: `module` holds its code, `protocols` are the modules of what it serves.

    `asks_policy`: it decides nothing without the policy service; it `drives` a device of that kind;
    it `keeps_secret` where only it can read; it is `apart`, in an interpreter of its own, and its
    libraries are imported there and not in init, as those of one that keeps a secret are; it is
    told the `names` of all services. `disk_check` is the module whose `disk_fault` says what
    its settings and the size of its first block device have against each other. A program of a
    system's own has an `entry`; an `ordinary` one uses libraries that need asyncio, and `double` is
    the class that runs in the simulator instead. `path` are folders to import it from, besides
    Python's own.
    """

    name: str
    module: str
    protocols: tuple[str, ...] = ()
    asks_policy: bool = False
    drives: HardwareKind | None = None
    keeps_secret: bool = False
    apart: bool = False
    names: bool = False
    disk_check: str = ""
    entry: str = ""
    double: str = ""
    ordinary: bool = False
    path: tuple[str, ...] = ()


def _nexus_own(
    name: str,
    *,
    asks_policy: bool = False,
    drives: HardwareKind | None = None,
    keeps_secret: bool = False,
    disk_check: str = "",
) -> ProgramSource:
    """A program of Nexus whose package and protocol have its name."""
    return ProgramSource(
        name=name,
        module=f"nexus.services.{name}",
        protocols=(f"nexus.protocols.{name.rpartition('.')[2]}",),
        asks_policy=asks_policy,
        drives=drives,
        keeps_secret=keeps_secret,
        disk_check=disk_check,
    )


_SOURCES: Final = (
    _nexus_own("policyd"),
    _nexus_own("logd", asks_policy=True),
    _nexus_own("operator"),
    _nexus_own("timed"),
    _nexus_own("rngd", asks_policy=True, drives=HardwareKind.ENTROPY),
    _nexus_own(
        "statefsd",
        asks_policy=True,
        drives=HardwareKind.BLOCK,
        disk_check="nexus.services.statefsd.config",
    ),
    _nexus_own("keystored", asks_policy=True, keeps_secret=True),
    _nexus_own("metricsd", asks_policy=True),
    _nexus_own("execd", asks_policy=True),
    ProgramSource(
        name="updated",
        module="nexus.services.updated",
        protocols=("nexus.protocols.updated",),
        asks_policy=True,
        drives=HardwareKind.BLOCK,
        apart=True,
        names=True,
    ),
    ProgramSource(
        name="exportd",
        module="nexus.services.exportd",
        protocols=("nexus.protocols.exportd",),
        apart=True,
        names=True,
    ),
    _nexus_own("demo.testsvc"),
    _nexus_own("demo.hello"),
    ProgramSource(name="demo.exit0", module="nexus.services.demo.exit0"),
    ProgramSource(
        name="demo.exit42",
        module="nexus.services.demo.exit42",
        protocols=("nexus.protocols.hello",),  # spoken by no one: it has ended before
    ),
    ProgramSource(
        name="demo.faulty",
        module="nexus.services.demo.faulty",
        protocols=("nexus.protocols.hello",),
    ),
    ProgramSource(
        name="demo.interactive",
        module="nexus.services.demo.interactive",
        protocols=("nexus.protocols.interactive",),
    ),
    ProgramSource(
        name="selftest-client",
        module="nexus.services.selftest",
        protocols=("nexus.protocols.testsvc",),  # demo.testsvc's frames come back over its link
    ),
)
PROGRAMS: Final[Mapping[str, ProgramSource]] = {source.name: source for source in _SOURCES}


def own_source(
    entry: str, protocol: str, *, double: str, ordinary: bool, path: tuple[str, ...]
) -> ProgramSource:
    """The source of a program of a system's own; nothing is imported yet."""
    return ProgramSource(
        name=entry,
        module=entry.partition(":")[0],
        protocols=(protocol,),
        entry=entry,
        double=double,
        ordinary=ordinary,
        path=path,
    )


def check_own(source: ProgramSource) -> None:
    """Import a program of a system's own as far as this process may. Raises WrongProgram.

    An ordinary program is only read: its libraries belong into the process it gets, not into
    the one that becomes init.
    """
    _ = protocols_of(source)
    if source.ordinary:
        _check_coroutine(source)
        _ = _own_class(source, source.double, "double")
    else:
        _ = _own_class(source, source.entry, "module")


def protocols_of(source: ProgramSource) -> tuple[Protocol, ...]:
    """What the program serves besides meta, which every service answers. Raises WrongProgram."""
    if source.entry:
        return tuple(_own_protocol(source, name) for name in source.protocols)
    found = []
    for name in source.protocols:
        protocol = importlib.import_module(name).PROTOCOL
        assert isinstance(protocol, Protocol), f"{name}.PROTOCOL"
        found.append(protocol)
    return tuple(found)


def disk_fault(source: ProgramSource, settings: Mapping[str, object], size: int) -> str | None:
    """What the program has against a disk of so many bytes under these settings."""
    if not source.disk_check:
        return None
    fault: str | None = importlib.import_module(source.disk_check).disk_fault(settings, size)
    return fault


@cache
def program_digest(module: str) -> str:
    """SHA-256, hexadecimal, over the source of a module, or of every module of a package.

    Each file counts with its path inside the package, its size and its bytes.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is in the program table and cannot be found"
    return _digest([spec])


def digested_modules(source: ProgramSource) -> list[str]:
    """The modules and packages that the digest of a program covers, in order."""
    if not source.entry:
        return [source.module]
    modules = {source.module, *source.protocols, source.double.partition(":")[0]} - {""}
    return sorted({module.rpartition(".")[0] or module for module in modules})


def own_digest(source: ProgramSource) -> str:
    """The digest of a program of a system's own that check_own has passed.

    It covers the packages around its module, its protocol and its double, or the module itself
    where there is no package around it.
    """
    with _importing(source.path):
        specs = [importlib.util.find_spec(name) for name in digested_modules(source)]
    return _digest([spec for spec in specs if spec is not None])


def measured(source: ProgramSource) -> str:
    """The digest of the program's files as they are now; "" if one is gone."""
    importlib.invalidate_caches()
    try:
        if source.entry:
            return own_digest(source)
        spec = importlib.util.find_spec(source.module)
        return "" if spec is None else _digest([spec])
    except (OSError, ModuleNotFoundError):  # a file, or the package that it was in
        return ""


def _digest(specs: list[ModuleSpec]) -> str:
    digest = sha256()
    for spec in specs:
        for name, file in _files(spec):
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _files(spec: ModuleSpec) -> list[tuple[str, Path]]:
    """The source files of a module or a package, by their names inside it."""
    if spec.submodule_search_locations is None:
        assert spec.origin is not None, f"{spec.name} has no source file"
        return [(Path(spec.origin).name, Path(spec.origin))]
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return sorted(
        (file.relative_to(folder).as_posix(), file)
        for folder in folders
        for file in folder.rglob("*.py")
    )


def load_program(source: ProgramSource, *, executes: bool = False) -> Program:
    """Import the program. Its `main` is looked up here, once, before anything is started.

    Where the kernel `executes` programs, one that is apart is not imported: the interpreter
    of its own finds its `main` by `entry`. What cryptography holds is in no fork of init then.
    """
    if not source.entry:
        module = None
        if not (executes and (source.keeps_secret or source.apart)):
            module = importlib.import_module(source.module)
        return Program(
            name=source.name,
            main=_never_forked if module is None else module.main,
            digest=program_digest(source.module),
            entry=f"{source.module}:main",
        )
    from nexus.runtime.program import program_of  # a plan is checked without it

    key = "double" if source.ordinary else "module"
    own = _own_class(source, source.double if source.ordinary else source.entry, key)
    (protocol,) = protocols_of(source)
    loader = ORDINARY_LOADER if source.ordinary else LOADER
    return Program(
        name=source.name,
        main=program_of(own, protocol),
        digest=own_digest(source),
        entry=f"{loader} {source.entry} {source.protocols[0]}",
        path=source.path,
        ordinary=source.ordinary,
    )


async def _never_forked(boot: BootImage) -> int:
    """Stands for a `main` that this process does not import; a plan has it started by exec."""
    raise AssertionError(f"{boot.name} needs an interpreter of its own")


# ---------------------------------------------------------------- programs of a system's own


def _own_protocol(source: ProgramSource, name: str) -> Protocol:
    module = _import(source, name, "protocol")
    protocol = getattr(module, "PROTOCOL", None)
    if not isinstance(protocol, Protocol):
        found = "no PROTOCOL" if protocol is None else f"a PROTOCOL that is {_kind(protocol)}"
        raise WrongProgram(
            "protocol", "a module with PROTOCOL, a nexus.wire.Protocol", f'{found} in "{name}"'
        )
    if protocol.number < OWN_PROTOCOL_MIN and not name.startswith("nexus."):
        raise WrongProgram(
            "protocol",
            f"a PROTOCOL with a number from {OWN_PROTOCOL_MIN} on",
            f'{protocol.number} in "{name}"',
        )
    try:
        protocol.derive()
    except AssertionError as endless:
        raise WrongProgram(
            "protocol", "a PROTOCOL of messages with a bound", f'in "{name}" {cut(str(endless))}'
        ) from endless
    return protocol


def _own_class(source: ProgramSource, entry: str, key: str) -> Any:
    """The class that `entry` names, seen to be one that the runtime can serve with."""
    name, _, attribute = entry.partition(":")
    module = _import(source, name, key)
    own = getattr(module, attribute, None)
    if own is None:
        listed = cut(", ".join(_candidates(module))) or "none"
        raise WrongProgram(
            key, f'a class of "{name}" with a method handle ({listed})', f'no "{attribute}"'
        )
    if not isinstance(own, type):
        raise WrongProgram(
            key, f'"{attribute}" of "{name}" to be a class', f"that it is {_kind(own)}"
        )
    if not callable(getattr(own, "handle", None)):
        raise WrongProgram(
            key, f'a method handle(self, call, request) in "{attribute}" of "{name}"', "none"
        )
    try:
        signature = inspect.signature(own)
    except (TypeError, ValueError):  # it says nothing about its arguments; the start will tell
        return own
    try:
        _ = signature.bind(None)
    except TypeError as error:
        raise WrongProgram(
            key,
            f'"{attribute}" of "{name}" to be made with its context alone: __init__(self, context)',
            cut(f"{attribute}{signature}"),
        ) from error
    return own


def _candidates(module: ModuleType) -> list[str]:
    """The classes of a module that could be meant."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
        if callable(getattr(value, "handle", None))
    ]


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def _check_coroutine(source: ProgramSource) -> None:
    """Read, without importing it, that the module has the coroutine function `entry` names."""
    name, _, attribute = source.entry.partition(":")
    file = _file_of(source, name)
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise WrongProgram("module", "Python that can be read", _syntax(name, error)) from error
    bound = {
        each.name: each
        for each in tree.body
        if isinstance(each, (ast.AsyncFunctionDef, ast.FunctionDef, ast.ClassDef))
    }
    found = bound.get(attribute)
    if not isinstance(found, ast.AsyncFunctionDef):
        known = [n for n, each in bound.items() if isinstance(each, ast.AsyncFunctionDef)]
        listed = cut(", ".join(known)) or "none"
        what = "something else" if found is not None else "no such function"
        raise WrongProgram(
            "module",
            f'a coroutine function, async def, of "{name}" ({listed})',
            f'"{attribute}", {what}',
        )


def _file_of(source: ProgramSource, name: str) -> Path:
    package = name.rpartition(".")[0]
    if package:
        _ = _import(source, package, "module")
    with _importing(source.path):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # below a module, or __main__
            spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise WrongProgram("module", _looked_in(source), f'no source file of "{name}"')
    return Path(spec.origin)


def _looked_in(source: ProgramSource) -> str:
    folders = ", ".join(Path(folder).name for folder in source.path)
    place = f"in the folders of system.path ({folders}), or installed" if folders else "installed"
    return f"a module that is {place}"


def _import(source: ProgramSource, name: str, key: str) -> ModuleType:
    """Import a module of a system's own. Whatever it raises becomes a WrongProgram."""
    top = name.partition(".")[0]
    with _importing(source.path):
        _make_room(source, top, key)
        is_new = top not in sys.modules
        threads = set(threading.enumerate())
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            if name == missing or name.startswith(f"{missing}."):
                hint = "" if source.path else '; add path = ["FOLDER"] to [system]'
                raise WrongProgram(key, _looked_in(source), f'no "{cut(name)}"{hint}') from error
            raise WrongProgram(
                key,
                f'a module whose imports are installed ("{cut(missing)}" is not)',
                _fault(source, name, error),
            ) from error
        except SyntaxError as error:
            raise WrongProgram(key, "Python that can be read", _syntax(name, error)) from error
        except (Exception, SystemExit) as error:  # a module may raise anything
            fault = _fault(source, name, error)
            raise WrongProgram(key, "a module that can be imported", fault) from error
        finally:
            if is_new and top in sys.modules and _from_path(sys.modules[top], source.path):
                _own_packages.add(top)
    started = [each.name for each in threading.enumerate() if each not in threads]
    if started:
        raise WrongProgram(
            key,
            "a module that starts no thread or timer when it is imported: "
            "init would have it, and would fork with it",
            f'"{cut(name)}", which started {cut(started[0])}',
        )
    return module


def _from_path(module: ModuleType, path: tuple[str, ...]) -> bool:
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", ()))
    return any(Path(place).is_relative_to(folder) for place in places for folder in path)


def _make_room(source: ProgramSource, top: str, key: str) -> None:
    """Forget a package of the same name from another system's path; refuse a name that is taken.

    Two packages of one name cannot both be imported: Python's own would get the wrong one.
    """
    found = PathFinder.find_spec(top, list(source.path))
    present = sys.modules.get(top)
    is_other = present is not None and not _from_path(present, source.path)
    if found is not None and (
        top in sys.stdlib_module_names
        or (is_other and top not in _own_packages)
        or _is_elsewhere(source, found)
    ):
        raise WrongProgram(
            key, "a package name that neither Python nor an installed package has", f'"{top}"'
        )
    if is_other and top in _own_packages:
        _own_packages.discard(top)
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            del sys.modules[name]


def _is_elsewhere(source: ProgramSource, found: ModuleSpec) -> bool:
    """Whether another package of this name is installed. A folder may be on both paths."""
    others = [folder for folder in sys.path if folder not in source.path]
    other = PathFinder.find_spec(found.name, others)
    if other is None or other.origin is None:
        return False
    return found.origin is None or Path(other.origin).resolve() != Path(found.origin).resolve()


@contextmanager
def _importing(path: tuple[str, ...]) -> Iterator[None]:
    """`path` in front of sys.path, for as long as this lasts."""
    before = list(sys.path)
    sys.path[:0] = path
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _syntax(name: str, error: SyntaxError | ValueError | RecursionError) -> str:
    if not isinstance(error, SyntaxError):
        return f'"{cut(name)}": {cut(str(error))}'
    file = Path(error.filename).name if error.filename else name
    return f"{cut(error.msg)} at {cut(file)}:{error.lineno or 1}"


def _fault(source: ProgramSource, name: str, error: BaseException) -> str:
    """What an import raised, in one line, and the last place of the system's own it came by."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(folder) for folder in source.path)
    ]
    place = f" at {cut(Path(frames[-1].filename).name)}:{frames[-1].lineno}" if frames else ""
    text = cut(str(error))
    return f'"{cut(name)}" raised {type(error).__name__}{place}{": " if text else ""}{text}'
