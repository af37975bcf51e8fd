"""Types and lint of exactly what goes into the image, or of all that does not.

`python -m tools.diagnose os` builds the image, takes the list of our modules from it, holds each of
them against the tree, checks their types and their form, and prints what else is in the image, and
how much of it. Libraries in it must be those that tools.dep_gate found to be imported, no more and
no less. `host` checks every other module of the tree. Exit code 0 green, 1 red, 2 where there is
no image to be had.
"""

import hashlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from nexus.bundle.needs import DEVICE_DISTRIBUTIONS, normalised
from nexus.vm.image import SITE, Image, Part, build
from nexus.vm.machines import machine_named
from nexus.vm.packages import NotHad, cache_folder

ROOT: Final = Path(__file__).resolve().parent.parent
TREES: Final = ("src", "tests", "tools", "fuzz", "bench")
OURS: Final = f"{SITE}/nexus/"
MIB: Final = 1024 * 1024


class Area(NamedTuple):
    """A part of an image: files, and their bytes."""

    files: int
    size: int


def area_of(path: str) -> str:
    """Which part of an image a file belongs to."""
    parts = PurePosixPath(path).parts
    if path.startswith(OURS):
        return "nexus, compiled" if path.endswith(".pyc") else "nexus, source"
    if path.startswith(f"{SITE}/"):
        return "libraries of Python"
    if path.startswith("lib_modules/"):
        return "kernel modules"
    if path.startswith("usr/lib/python"):
        return "Python's own, as libraries" if path.endswith(".so") else "Python's own, compiled"
    if path.startswith("usr/bin/"):
        return "programs"
    return "libraries of Debian" if parts[:2] == ("usr", "lib") else "everything else"


def areas(parts: Iterable[Part]) -> Mapping[str, Area]:
    """How much there is of each part of an image, the largest first."""
    found: dict[str, Area] = defaultdict(lambda: Area(0, 0))
    for part in parts:
        files, size = found[area_of(part.path)]
        found[area_of(part.path)] = Area(files + 1, size + part.size)
    return dict(sorted(found.items(), key=lambda each: -each[1].size))


def distributions(parts: Iterable[Part]) -> set[str]:
    """The libraries in an image, by what they say of themselves."""
    names = (PurePosixPath(part.path).parent.name for part in parts if _is_metadata(part.path))
    return {normalised(name.removesuffix(".dist-info").rpartition("-")[0]) for name in names}


def _is_metadata(path: str) -> bool:
    return path.startswith(SITE) and path.endswith(".dist-info/METADATA")


def modules_in(parts: Iterable[Part]) -> list[str]:
    """Our modules in an image, as paths below src/."""
    paths = (part.path for part in parts if part.path.startswith(OURS))
    return sorted(path.removeprefix(f"{SITE}/") for path in paths if path.endswith(".py"))


def faults_of(parts: Sequence[Part], root: Path) -> Iterator[str]:
    """What is wrong with the contents of an image."""
    digests = {part.path: part.digest for part in parts}
    modules = modules_in(parts)
    if not modules:
        yield "there is no module of ours in the image"
    for module in modules:
        file = root / "src" / module
        if not file.is_file():
            yield f"{module} is in the image, and not in the tree"
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digests[f"{SITE}/{module}"]:
            yield f"{module} is another one in the image than in the tree"
    found, wanted = distributions(parts), {normalised(name) for name in DEVICE_DISTRIBUTIONS}
    for name in sorted(found - wanted):
        yield f"{name} is in the image, and nothing there imports it"
    for name in sorted(wanted - found):
        yield f"{name} is imported, and not in the image"


def checked(files: Sequence[str]) -> int:
    """Lint, form and types of these files; 0 if all is well."""
    listed = "\n".join(files)
    python = [sys.executable, "-m"]
    results = [
        subprocess.run([*python, "ruff", "check", "--quiet", *files], cwd=ROOT).returncode,
        subprocess.run(
            [*python, "ruff", "format", "--quiet", "--check", *files], cwd=ROOT
        ).returncode,
        subprocess.run(
            [*python, "mypy", "--no-error-summary", "@/dev/stdin"],
            cwd=ROOT,
            input=listed,
            text=True,
        ).returncode,
    ]
    return 1 if any(results) else 0


def tree_files() -> list[str]:
    """Every Python file of the tree."""
    found = (path for tree in TREES for path in (ROOT / tree).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def diagnose_os(image: Image) -> int:
    """Check what is in the image, and say what it is."""
    parts = list(image.contents())
    faults = list(faults_of(parts, ROOT))
    modules = [f"src/{module}" for module in modules_in(parts)]
    for name, area in areas(parts).items():
        print(f"{name:<28} {area.files:>6} files {area.size / MIB:>8.2f} MiB")
    kernel = image.kernel.stat().st_size
    total = sum(part.size for part in parts)
    print(f"{'kernel ' + image.kernel_version:<28} {1:>6} file  {kernel / MIB:>8.2f} MiB")
    print(f"image {image.digest[:12]} for {image.machine.name}: {(total + kernel) / MIB:.2f} MiB")
    print(f"libraries: {', '.join(sorted(distributions(parts)))}")
    for fault in faults:
        print(f"diag-os: {fault}")
    red = checked(modules) or int(bool(faults))
    print(f"diag-os: {len(modules)} modules of ours, {'red' if red else 'clean'}")
    return red


def diagnose_host(image: Image) -> int:
    """Check everything else."""
    inside = {f"src/{module}" for module in modules_in(image.contents())}
    files = [file for file in tree_files() if file not in inside]
    red = checked(files)
    print(f"diag-host: {len(files)} modules of ours, {'red' if red else 'clean'}")
    return red


def main(arguments: Sequence[str]) -> int:
    """Diagnose one side."""
    if arguments not in (["os"], ["host"]):
        print("usage: python -m tools.diagnose os|host", file=sys.stderr)
        return 2
    try:
        image = build(machine_named(None), cache_folder())
    except NotHad as missing:
        print(f"not run: {missing}", file=sys.stderr)
        return 2
    return diagnose_os(image) if arguments == ["os"] else diagnose_host(image)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
