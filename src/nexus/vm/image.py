"""The image of a guest: a kernel, and the base system as archives that lie over each other.

    base     Debian's Python with its standard library compiled and without source, the wheels the
             same way, the libraries these need, kernel modules, device nodes
    nexus    the package, with source and compiled: what a program is, is the digest of its source
    overlay  what one boot has of its own; made by who boots, never part of the image

Each is built once and kept by the digest of what went in; the same inputs give the same bytes.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import nexus
from nexus.bundle.needs import DEVICE_DISTRIBUTIONS, normalised
from nexus.vm import contract
from nexus.vm.compiled import compiled
from nexus.vm.elf import is_elf, needs_of
from nexus.vm.initramfs import Tree, entries_of, packed
from nexus.vm.kernelmodules import found_in, in_order
from nexus.vm.machines import Machine
from nexus.vm.packages import (
    Brought,
    NotHad,
    Spoilt,
    check,
    held,
    packages,
    put,
    unpacked,
    wheels,
)

MIB: Final = 1024 * 1024
LAYERS_MAX: Final = 24  # kept in the cache, those used last
LISTS: Final = 2  # of what is brought, packages and wheels: each may be found spoilt once
FORMAT: Final = 1  # raised when the same inputs give another image

SITE: Final = "usr/lib/python3/dist-packages"  # Debian's; on the path of an interpreter of its own
FOLDERS: Final = ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr/bin", "var")
LINKS: Final = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/bin"}
NODES: Final = {  # Python dies before its first line without a source of randomness
    "dev/console": (5, 1, 0o600),
    "dev/null": (1, 3, 0o666),
    "dev/kmsg": (1, 11, 0o600),
    "dev/random": (1, 8, 0o666),
    "dev/urandom": (1, 9, 0o666),
}
FILES: Final = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
INIT: Final = f"""\
#!/usr/bin/python3 -IS
import sys
sys.path.append("/{SITE}")
from nexus.vm.guest import main
main()
"""

MODULES: Final = ("virtio_mmio", "virtio_blk", "virtio_console", "softdog")
"""Not virtio_rng: the entropy device is driven by rngd."""

TOOLS: Final = ("fw_printenv",)  # U-Boot's environment, by an independent reader
TOOL_LINKS: Final = {"fw_setenv": "fw_printenv"}

WHEELS: Final = frozenset(normalised(name) for name in DEVICE_DISTRIBUTIONS)
"""What services and the loader import; `just diag-os` compares."""

STDLIB_LEFT_OUT: Final = frozenset(
    {
        "__pycache__",
        "_pyrepl",
        "curses",
        "dbm",
        "distutils",
        "doctest.py",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc.py",
        "pydoc_data",
        "sqlite3",
        "test",
        "tests",
        "tkinter",
        "turtle.py",
        "turtledemo",
        "unittest",
        "venv",
        "wsgiref",
        "xmlrpc",
    }
)
DYNLOAD_LEFT_OUT: Final = (
    "_bz2",
    "_codecs_",
    "_crypt",
    "_ctypes_test",
    "_curses",
    "_dbm",
    "_gdbm",
    "_sqlite3",
    "_ssl",
    "_test",
    "_tkinter",
    "_uuid",
    "_xx",
    "audioop",
    "nis",
    "ossaudiodev",
    "readline",
)
PACKAGE_LEFT_OUT: Final = frozenset({"__pycache__", "cli"})  # a device has no command


class Part(NamedTuple):
    """A file in an image: its path, its size in bytes, and the SHA-256 of these, in hex."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A built image. `layers` are archives, the lowest first."""

    machine: Machine
    kernel: Path
    kernel_version: str
    python: str
    layers: tuple[Path, ...]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of the archives."""
        return sum(layer.stat().st_size for layer in self.layers)

    @property
    def told(self) -> str:
        """What it is, in one line."""
        return (
            f"image {self.digest[:16]} for {self.machine.name}: Linux {self.kernel_version}, "
            f"Python {self.python}, {self.size / MIB:.1f} MiB"
        )

    def write_initrd(self, file: Path, overlay: Tree) -> None:
        """The archives in one file, the overlay's on top."""
        with file.open("wb") as out:
            for layer in self.layers:
                _ = out.write(layer.read_bytes())
            _ = out.write(packed(overlay))

    def contents(self) -> Iterator[Part]:
        """What is in it, layer by layer."""
        for layer in self.layers:
            for path, entry in entries_of(layer.read_bytes()):
                yield Part(path, len(entry.data), hashlib.sha256(entry.data).hexdigest())


def build(machine: Machine, cache: Path, *, refresh: bool = False) -> Image:
    """The image of this tree's base system; what is there of it already is taken. Raises NotHad."""
    pins = _requirements().read_text("utf-8")
    package = _package_files(Path(nexus.__file__).parent)
    with held(cache):
        for attempt in range(LISTS):
            with suppress(Spoilt):  # what was, is removed, and its list brought anew
                return _build(machine, cache, pins, package, refresh=refresh and not attempt)
        return _build(machine, cache, pins, package, refresh=False)


def _build(
    machine: Machine, cache: Path, pins: str, package: Mapping[str, bytes], *, refresh: bool
) -> Image:
    brought = packages(machine, cache, refresh=refresh)
    root = unpacked(brought, cache)
    python = _python_of(root)
    installed = wheels(machine, cache, pins, WHEELS, python)
    inputs = [*(each.digest for each in (*brought, *installed)), python]
    base = _layer(cache, "base", inputs, lambda: _base(root, installed, python, cache))
    inputs = [python, *(f"{name} {_digest(data)}" for name, data in sorted(package.items()))]
    own = _layer(cache, "nexus", inputs, lambda: _package(package, python, cache))
    kernel = _kernel(root)
    layers = (base, own)
    return Image(
        machine=machine,
        kernel=kernel,
        kernel_version=kernel.name.removeprefix("vmlinuz-"),
        python=python,
        layers=layers,
        digest=_digest("\n".join((kernel.name, *(each.stem for each in layers))).encode()),
    )


def pinned(machine: Machine, cache: Path, pin: Path) -> Image:
    """The image that the file `pin` names, or the one of this tree, which it names from then on: a
    run has one image, whatever is edited meanwhile. Of two who find no pin, the second takes what
    the first one's names. Raises NotHad."""
    if not pin.exists():
        image = build(machine, cache)
        told = {
            "kernel": str(image.kernel),
            "kernel_version": image.kernel_version,
            "python": image.python,
            "layers": [str(layer) for layer in image.layers],
            "digest": image.digest,
        }
        with tempfile.NamedTemporaryFile(dir=pin.parent, prefix=f"{pin.name}.") as new:
            _ = new.write(json.dumps(told).encode())
            new.flush()
            os.fsync(new.fileno())
            with suppress(FileExistsError):  # unlike a rename, a link replaces nothing
                os.link(new.name, pin)
    try:
        told = json.loads(pin.read_bytes())
        layers = tuple(Path(layer) for layer in told.pop("layers"))
        image = Image(machine=machine, kernel=Path(told.pop("kernel")), layers=layers, **told)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NotHad(f"{pin} does not name an image; remove it, or start the run anew") from None
    if not all(_is_taken(layer) for layer in layers):
        raise NotHad("the image of this run is no longer in the cache; start the run anew")
    return image


def _requirements() -> Path:
    """The pins of the source tree that this package is part of. Raises NotHad."""
    file = Path(nexus.__file__).parents[2] / "requirements" / "run.txt"
    if not file.is_file():
        raise NotHad("an image is built from a source tree; try `make vm` in one")
    return file


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _layer(cache: Path, name: str, inputs: list[str], make: Callable[[], Tree]) -> Path:
    """The archive of a layer, made if it is not there. Its size is in its name: one that is of
    another size is made anew."""
    folder = cache / "layers"
    digest = _digest("\n".join([str(FORMAT), *inputs]).encode())
    start = f"{name}-{digest[:32]}"
    for file in folder.glob(f"{start}-*.cpio"):
        if _is_taken(file):
            return file
        file.unlink()
    data = packed(make())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{start}-{len(data)}.cpio"
    put(data, file)
    old = sorted(folder.glob("*.cpio"), key=lambda each: each.stat().st_mtime_ns)
    for each in old[:-LAYERS_MAX]:
        each.unlink()
    return file


def _is_taken(layer: Path) -> bool:
    """Whether a layer is there and whole. Then it is used, and others go first."""
    try:
        is_whole = layer.stem.rpartition("-")[2] == str(layer.stat().st_size)
        if is_whole:
            os.utime(layer)
    except FileNotFoundError:
        return False
    return is_whole


def _python_of(root: Path) -> str:
    """The minor version of the guest's Python ("3.11"). Raises NotHad."""
    for path in sorted((root / "usr/bin").glob("python3.*")):
        if path.is_file() and not path.is_symlink() and path.name[9:].isdigit():
            return path.name.removeprefix("python")
    raise NotHad("there is no Python in Debian's packages; try `nexus vm build --refresh`")


def _kernel(root: Path) -> Path:
    found = sorted((root / "boot").glob("vmlinu[xz]-*"))
    if len(found) != 1:
        raise NotHad("there is no kernel in Debian's packages; try `nexus vm build --refresh`")
    return found[0]


# ---------------------------------------------------------------- the base system


def _base(root: Path, installed: list[Brought], python: str, cache: Path) -> Tree:
    check(installed)
    tree = Tree()
    for folder in FOLDERS:
        tree.folder(folder)
    tree.folder("tmp", 0o1777)
    for path, target in LINKS.items():
        tree.link(path, target)
    for path, (major, minor, mode) in NODES.items():
        tree.node(path, major, minor, mode)
    for path, data in FILES.items():
        tree.file(path, data)
    tree.file("init", INIT.encode(), 0o755)
    programs = _Programs(root, tree)
    programs.add(f"usr/bin/python{python}", (root / f"usr/bin/python{python}").read_bytes())
    tree.link("usr/bin/python3", f"python{python}")
    for name in TOOLS:
        programs.add(f"usr/bin/{name}", (root / "usr/bin" / name).read_bytes())
    for name, target in TOOL_LINKS.items():
        tree.link(f"usr/bin/{name}", target)
    _add_python(tree, programs, _stdlib(root, python), python, cache)
    tree.folder(f"usr/lib/python{python}/lib-dynload")
    tree.folder("usr/local/lib")
    for wheel in installed:
        _add_python(tree, programs, _unzipped(wheel.file), python, cache)
    programs.close()
    _add_modules(tree, root)
    return tree


class _Programs:
    """Puts programs and libraries into a tree, and in the end the libraries they need."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self._tree = tree
        (triplet,) = (each.name for each in (root / "usr/lib").glob("*-linux-gnu"))
        self._target = f"usr/lib/{triplet}"
        self._folders = [root / "usr/lib" / triplet, root / "lib" / triplet, root / "lib"]
        self._folders += [root / "usr/lib", root / "lib64", root / "usr/lib64"]
        self._own: set[str] = set()  # names of libraries that wheels bring
        self._needed: dict[str, str] = {}  # library: who needs it

    def add(self, path: str, data: bytes) -> None:
        """Put it there, as a file that may be run."""
        self._tree.file(path, data, 0o755)
        self._own.add(PurePosixPath(path).name)
        needs = needs_of(data)
        for name in needs.libraries:
            _ = self._needed.setdefault(name, path)
        if needs.interpreter:
            loader = PurePosixPath(needs.interpreter)
            self._tree.file(f"usr{needs.interpreter}", self._found(loader.name, path), 0o755)

    def close(self) -> None:
        """Put in whatever is still needed."""
        while missing := sorted(self._needed.keys() - self._own):
            for name in missing:
                self.add(f"{self._target}/{name}", self._found(name, self._needed[name]))

    def _found(self, name: str, needed_by: str) -> bytes:
        for folder in self._folders:
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        raise NotHad(f"no {name}, which {needed_by} needs; try `nexus vm build --refresh`")


def _add_python(
    tree: Tree, programs: _Programs, files: Mapping[str, bytes], python: str, cache: Path
) -> None:
    """Modules compiled and without source, libraries, and the data beside them."""
    sources = {f"/{path}": data for path, data in files.items() if path.endswith(".py")}
    for shown, data in compiled(sources, python, cache).items():
        tree.file(f"{shown[1:]}c", data)
    for path, data in files.items():
        if is_elf(data):
            programs.add(path, data)
        elif not path.endswith(".py"):
            tree.file(path, data)


def _stdlib(root: Path, python: str) -> dict[str, bytes]:
    home = root / f"usr/lib/python{python}"
    found = {}
    for path in sorted(home.rglob("*")):
        parts = path.relative_to(home).parts
        left_out = not STDLIB_LEFT_OUT.isdisjoint(parts) or parts[0].startswith("config-")
        if left_out or not path.is_file():  # sitecustomize.py leads into /etc, where nothing is
            continue
        is_dynamic = parts[0] == "lib-dynload" and not path.name.startswith(DYNLOAD_LEFT_OUT)
        if path.suffix == ".py" or (path.suffix == ".so" and is_dynamic):
            found[f"usr/lib/python{python}/{'/'.join(parts)}"] = path.read_bytes()
    return found


def _unzipped(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            f"{SITE}/{name}": archive.read(name)
            for name in sorted(archive.namelist())
            if _is_used(PurePosixPath(name))
        }


def _is_used(path: PurePosixPath) -> bool:
    """Whether a file of a wheel is for running: no headers, types, tests or scripts."""
    if path.parts[0].endswith(".data") or "tests" in path.parts:
        return False
    if path.parts[0].endswith(".dist-info"):
        return path.name == "METADATA"  # its version
    return path.suffix in {".py", ".so"} or ".so." in path.name


def _add_modules(tree: Tree, root: Path) -> None:
    (folder,) = (root / "lib/modules").iterdir()
    builtin = {
        Path(line).stem.replace("-", "_")
        for line in (folder / "modules.builtin").read_text("utf-8").splitlines()
    }
    modules = in_order([name for name in MODULES if name not in builtin], found_in(folder))
    for module in modules:
        tree.file(f"{contract.MODULES[1:]}/{module.name}.ko", module.data)
    order = "".join(f"{module.name}\n" for module in modules)
    tree.file(contract.MODULES_ORDER[1:], order.encode())


# ---------------------------------------------------------------- the package


def _package_files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if PACKAGE_LEFT_OUT.isdisjoint(parts):
            found[f"{SITE}/nexus/{'/'.join(parts)}"] = path.read_bytes()
    return found


def _package(files: Mapping[str, bytes], python: str, cache: Path) -> Tree:
    tree = Tree()
    tag = f"cpython-{python.replace('.', '')}"
    for path, data in files.items():
        tree.file(path, data)
    sources = {f"/{path}": data for path, data in files.items()}
    for shown, data in compiled(sources, python, cache).items():
        source = PurePosixPath(shown[1:])
        tree.file(f"{source.parent}/__pycache__/{source.stem}.{tag}.pyc", data)
    return tree
