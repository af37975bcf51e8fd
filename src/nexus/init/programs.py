"""The programs a system file may name: where their code is, and what they speak.

A program is a module (or package) with a coroutine `main(boot)`. Its digest is SHA-256 over the
source files of that module, so that two clones of one revision agree and a changed line shows.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

from nexus.abi import Program
from nexus.wire import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramSource:
    """Where a program is: `module` holds `main`, `protocols` are the modules of what it serves."""

    name: str
    module: str
    protocols: tuple[str, ...] = ()


_SOURCES: Final = (
    ProgramSource(
        name="timed", module="nexus.services.timed", protocols=("nexus.protocols.timed",)
    ),
    ProgramSource(
        name="demo.testsvc",
        module="nexus.services.demo.testsvc",
        protocols=("nexus.protocols.testsvc",),
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


def protocols_of(source: ProgramSource) -> tuple[Protocol, ...]:
    """What the program serves besides meta, which every service answers."""
    found = []
    for name in source.protocols:
        protocol = importlib.import_module(name).PROTOCOL
        assert isinstance(protocol, Protocol), f"{name}.PROTOCOL"
        found.append(protocol)
    return tuple(found)


@cache
def program_digest(module: str) -> str:
    """SHA-256, hexadecimal, over the source of a module, or of every module of a package.

    Each file counts with its path inside the package, its size and its bytes.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is in the program table and cannot be found"
    assert spec.origin is not None, f"{module} has no source file"
    origin = Path(spec.origin)
    files = [origin]
    if spec.submodule_search_locations is not None:
        files = sorted(origin.parent.rglob("*.py"))
    digest = sha256()
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(origin.parent).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def load_program(source: ProgramSource) -> Program:
    """Import the program. Its `main` is looked up here, once, before anything is started."""
    module = importlib.import_module(source.module)
    return Program(name=source.name, main=module.main, digest=program_digest(source.module))
