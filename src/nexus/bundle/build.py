"""A system set out of a system file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Final

from nexus.bundle.gather import (
    PYTHON,
    SYSTEM,
    Contents,
    WrongContent,
    package_files,
    placed,
    system_files,
)
from nexus.bundle.needs import base_of
from nexus.bundle.sbom import sbom
from nexus.init.plan import Plan, make_plan, sources_of
from nexus.init.programs import ProgramSource, digested_modules
from nexus.init.system import load
from nexus.sets import About, Content, write

SBOM: Final = "sbom.cdx.json"
HEALTH_DEFAULT: Final = 60_000_000_000  # ns; the slowest board we know is up in a tenth of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What who releases a set decides: the version, a higher one is newer; what people call it; how
    long a trial boot has to prove well; the versions of the data by area of statefs."""

    version: int
    name: str
    health: int = HEALTH_DEFAULT
    schemas: Mapping[str, int] = field(default_factory=dict)


def build(
    file: Path, release: Release, *, package: Path | None = None, needs: tuple[str, ...] = ()
) -> bytes:
    """The set of the system in `file`. `package` is the package tree of Nexus; without one the set
    holds the system alone, which is all that a simulated machine takes from it.

    Raises SystemFileError, WrongContent, NotInstalled and SetRefused.
    """
    system = load(file)
    plan = make_plan(system)
    files = system_files(system)
    digests = {service.name: service.program_digest for service in plan.services}
    if package is not None:
        files |= package_files(package)
        digests = _digests(plan, system.path, files)
    base = base_of(needs)
    files[SBOM] = Content(data=sbom(plan.name, release.name, files, base, digests))
    about = About(
        version=release.version,
        name=release.name,
        system=placed(file.name),
        sbom=SBOM,
        health=release.health,
        base=base,
        services={name: bytes.fromhex(digest) for name, digest in digests.items()},
        schemas=release.schemas,
    )
    return write(about, files)


def _digests(plan: Plan, path: tuple[str, ...], files: Contents) -> dict[str, str]:
    """The digest of each service's program, as a plan made of these very files has it."""
    roots = [*(PurePosixPath(SYSTEM, folder).as_posix() for folder in path), PYTHON]
    sources = sources_of(plan)
    return {
        service.name: program_digest(sources[service.program], roots, files)
        for service in plan.services
    }


def program_digest(source: ProgramSource, roots: Sequence[str], files: Contents) -> str:
    """What nexus.init.programs says of a program, of the files of a set. Raises WrongContent."""
    around = digested_modules(source)
    digest = sha256()
    for module in around:
        found = _sources(module, roots, files)
        if not found:
            raise WrongContent(
                Path(module.replace(".", "/")),
                "is installed, and in no folder of system.path: it would not be in the set",
            )
        for name, data in sorted(found.items()):
            digest.update(f"{name}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _sources(module: str, roots: Sequence[str], files: Contents) -> dict[str, bytes]:
    """The source files of a module or a package by their names inside it, from the first root."""
    for root in roots:
        path = f"{root}/{module.replace('.', '/')}"
        if (single := files.get(f"{path}.py")) is not None:
            return {f"{PurePosixPath(path).name}.py": single.data}
        inside = {
            name.removeprefix(f"{path}/"): content.data
            for name, content in files.items()
            if name.startswith(f"{path}/") and name.endswith(".py")
        }
        if inside:
            return inside
    return {}
