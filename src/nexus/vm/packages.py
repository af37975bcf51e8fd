"""What a guest is made of, brought here: Debian's packages and the registry's wheels.

Names and versions are apt's word, under an apt state of its own: nothing is installed, no root is
needed, and the machine's own state is not touched. Where packages come from, and whose signatures
count, is the machine's set-up. What was brought is kept by the digest of its content, and a list
says what belongs together: as long as that list and what it names are there, nothing is asked.

One command at a time has the cache: who builds holds its lock, and all else here is under it. What
is in the cache is compared with its digest before anything is made of it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from nexus.proof.lock import AlreadyHeld, take
from nexus.vm.machines import Machine

CACHE_VARIABLE: Final = "NEXUS_CACHE_DIR"
LOCK_NAME: Final = "lock"
LOCK_MAX: Final = 600 * 10**9  # ns for somebody else's first build, which brings everything
BRING_MAX: Final = 600.0  # seconds for one command that brings something
PACKAGES_MAX: Final = 512  # of one guest; it has about sixty
WANTED: Final = ("python3", "libpython3-stdlib", "libstdc++6", "libubootenv-tool")
"""What is asked for by name, libstdc++6 for a wheel's library; what these need is apt's word."""

PIN: Final = re.compile(r"^([a-z0-9-]+)==\S+[^\n]*(?: \\\n {4}--hash=\S+)+", re.MULTILINE)
DEPENDS: Final = re.compile(r"^ +Depends: (linux-image-\S+)$", re.MULTILINE)
SHA256: Final = re.compile(r"[0-9a-f]{64}")
CONFIGURATION: Final = """\
Dir::State "{state}";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
APT::Architecture "{debian}";
APT::Architectures {{ "{debian}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
"""


class NotHad(Exception):
    """Something cannot be had here; the text says what, and which command would help."""


class Spoilt(NotHad):
    """Something in the cache was not what was brought, and is removed: the next who asks for it
    has it brought anew."""


class Brought(NamedTuple):
    """A package or wheel in the cache."""

    name: str
    version: str
    digest: str  # SHA-256 of the file, hexadecimal
    file: Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where what was brought and built is kept: may be removed at any time."""
    home = Path(environ.get("HOME") or "/")
    own = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "nexus"
    return Path(environ.get(CACHE_VARIABLE) or own) / "vm"


@contextmanager
def held(cache: Path, wait: int = LOCK_MAX) -> Iterator[None]:
    """Hold the cache's lock, waiting at most `wait` ns for it; the folder is made if it is missing.

    Raises NotHad, also for an OSError of what is done meanwhile: all of it is the cache's.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = take(cache / LOCK_NAME, wait)
        try:
            yield
        finally:
            os.close(descriptor)
    except AlreadyHeld as error:
        raise NotHad(
            f"process {error.pid or 'unknown'} has been building in {cache} for "
            f"{wait // 10**9} s; try again when it has ended"
        ) from None
    except OSError as error:
        raise NotHad(
            f"the cache {cache} cannot be used ({error.strerror or error}): make room and have it "
            f"belong to you, or try `{CACHE_VARIABLE}=$(mktemp -d) nexus vm build`"
        ) from error


def put(data: bytes, file: Path) -> None:
    """Have a file with this content, or the one that was there before, whatever fails."""
    new = file.with_suffix(".new")  # whoever else would write it waits for the lock
    try:
        with new.open("wb") as out:
            _ = out.write(data)
            out.flush()
            os.fsync(out.fileno())
        _ = new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def check(brought: Iterable[Brought]) -> None:
    """See that each file is what its digest says, before something is made of it. Raises Spoilt."""
    spoilt = [
        each
        for each in brought
        if hashlib.sha256(each.file.read_bytes()).hexdigest() != each.digest
    ]
    for each in spoilt:
        each.file.unlink(missing_ok=True)
    if spoilt:
        names = ", ".join(each.name for each in spoilt)
        raise Spoilt(f"{names} in the cache was spoilt; try `nexus vm build --refresh`")


def packages(machine: Machine, cache: Path, *, refresh: bool = False) -> list[Brought]:
    """Debian's packages of a guest, its kernel among them. Raises NotHad."""
    asked = hashlib.sha256(" ".join((*WANTED, *machine.kernels)).encode()).hexdigest()[:16]
    listed = cache / f"packages-{machine.name}-{asked}.json"
    found = None if refresh else _listed(listed, cache)
    return _keep(_bring_packages(machine, cache), listed, cache) if found is None else found


def wheels(
    machine: Machine, cache: Path, requirements: str, names: frozenset[str], version: str
) -> list[Brought]:
    """The wheels with these names, at the versions and hashes of a list of pinned requirements, for
    this version of Python ("3.11"). Raises NotHad."""
    pins = pins_of(requirements, names)
    digest = hashlib.sha256(f"{version}\n{pins}".encode()).hexdigest()[:16]
    listed = cache / f"wheels-{machine.name}-{digest}.json"
    found = _listed(listed, cache)
    return (
        _keep(_bring_wheels(machine, cache, pins, version), listed, cache)
        if found is None
        else found
    )


def pins_of(requirements: str, names: frozenset[str]) -> str:
    """The entries of a list of pinned requirements, hashes included, that have these names."""
    found = {match[1]: match[0] for match in PIN.finditer(requirements)}
    missing = sorted(names - found.keys())
    assert not missing, f"the requirements do not pin {missing}"
    return "".join(f"{found[name]}\n" for name in sorted(names))


def unpacked(brought: Sequence[Brought], cache: Path) -> Path:
    """A folder with what is in Debian's packages, all in one. Raises NotHad."""
    digest = hashlib.sha256("\n".join(each.digest for each in brought).encode()).hexdigest()[:16]
    folder = cache / "unpacked" / digest
    sizes = folder.with_suffix(".json")
    if _is_whole(folder, sizes):
        return folder
    check(brought)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="new-") as name:
        new = Path(name, "root")
        for each in brought:
            command = ["dpkg-deb", "-x", str(each.file), str(new)]
            _ = run(command, f"content of {each.name}", "apt-get install dpkg")
        os.sync()  # thousands of files: one fsync for each takes far longer
        files = [path for path in new.rglob("*") if path.is_file() and not path.is_symlink()]
        told = {str(path.relative_to(new)): path.stat().st_size for path in files}
        put(json.dumps(told, indent=0).encode(), sizes)
        if folder.exists():
            _ = folder.rename(Path(name, "old"))
        _ = new.rename(folder)
    return folder


def _is_whole(folder: Path, sizes: Path) -> bool:
    """Whether every file is in a folder, and as long as it was when it was unpacked."""
    try:
        told = json.loads(sizes.read_bytes())
        return all(os.lstat(f"{folder}/{path}").st_size == told[path] for path in told)
    except (OSError, ValueError, TypeError):
        return False


def _listed(listed: Path, cache: Path) -> list[Brought] | None:
    """What a list names, if it names anything and all of it is there."""
    try:
        entries = json.loads(listed.read_text("utf-8"))
        found = [_cached(cache, *entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return None
    return found if found and all(each.file.is_file() for each in found) else None


def _cached(cache: Path, name: str, version: str, digest: str) -> Brought:
    if SHA256.fullmatch(digest) is None:
        raise ValueError(f"no digest: {digest!r}")
    return Brought(name, version, digest, cache / "files" / digest)


def _keep(files: Iterable[Path], listed: Path, cache: Path) -> list[Brought]:
    """Move files into the cache under their digests, and write the list of them. Raises NotHad."""
    kept = []
    (cache / "files").mkdir(parents=True, exist_ok=True)
    for file in sorted(files):
        name, version, *_ = unquote(file.stem).split("_" if file.suffix == ".deb" else "-")
        data = file.read_bytes()
        kept.append(_cached(cache, name, version, hashlib.sha256(data).hexdigest()))
        put(data, kept[-1].file)
        file.unlink()
    assert len(kept) <= PACKAGES_MAX, f"{len(kept)} packages"
    if not kept:
        raise NotHad(f"nothing was brought for {listed.stem}; try `nexus vm build --refresh`")
    put(json.dumps([each[:3] for each in kept], indent=0).encode(), listed)
    return kept


def _bring_packages(machine: Machine, cache: Path) -> list[Path]:
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(name) is None:
            raise NotHad(f"there is no {name}; run it on Debian")
    state = cache / f"apt-{machine.debian}"
    fresh = state / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    for name in ("lists/partial", "cache", "new/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # as if nothing were installed
    configuration = state / "apt.conf"
    text = CONFIGURATION.format(state=state, debian=machine.debian)
    _ = configuration.write_text(text, "utf-8")
    environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
    # A source of somebody else's that fails, or is slow, is no reason to stop: what is missing is
    # seen below.
    with suppress(subprocess.TimeoutExpired):
        _ = subprocess.run(
            ["apt-get", "-qq", "update"],  # noqa: S607 (that of this machine)
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            timeout=BRING_MAX,
            check=False,
        )
    kernel = _kernel(machine, environment)
    hint = f"apt-get update && apt-cache policy {' '.join(WANTED)}"
    into = f"Dir::Cache::Archives={fresh}"
    options = ["--yes", "--download-only", "--no-install-recommends", "-o", into]
    command = ["apt-get", "-qq", *options, "install", *WANTED]
    _ = run(command, f"packages for {machine.debian}", hint, environment)
    command = ["apt-get", "-qq", "download", kernel]
    _ = run(command, kernel, "apt-get update", environment, fresh)
    return list(fresh.glob("*.deb"))


def _kernel(machine: Machine, environment: Mapping[str, str]) -> str:
    """The package of the newest kernel. Raises NotHad."""
    for name in machine.kernels:
        command = ["apt-cache", "depends", name]
        try:
            text = run(command, name, "apt-get update", environment)
        except NotHad:
            continue
        if found := DEPENDS.search(text):
            return found[1]
    names = " or ".join(machine.kernels)
    raise NotHad(
        f"no {names}: the sources of this machine have none for {machine.debian}; "
        f"try `apt-get update`, or a source of a release that has it"
    )


def _bring_wheels(machine: Machine, cache: Path, pins: str, version: str) -> list[Path]:
    folder = cache / "wheels-new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _ = (folder / "pins.txt").write_text(pins, "utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    kind = [word for each in machine.wheels for word in ("--platform", each)]
    abis = [f"cp{version.replace('.', '')}", "abi3", "none"]
    kind += [word for each in abis for word in ("--abi", each)]
    kind += ["--implementation", "cp", "--python-version", version]
    options = ["--require-hashes", "--only-binary", ":all:", "--no-deps", "--dest", str(folder)]
    command = [*pip, *kind, *options, "-r", str(folder / "pins.txt")]
    what = f"wheels for Python {version} on {machine.name}"
    _ = run(command, what, "pip index versions msgspec")
    return list(folder.glob("*.whl"))


def run(
    command: Sequence[str],
    what: str,
    hint: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """What a command prints; its complaints go to stderr, as they may name hosts and paths.

    Raises NotHad, which says `what` is not there and the command that would help.
    """
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments)
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=BRING_MAX,
            check=False,
        )
    except FileNotFoundError:
        raise NotHad(f"no {what}: there is no {command[0]}; try `{hint}`") from None
    except subprocess.TimeoutExpired:
        raise NotHad(f"no {what} in {BRING_MAX:.0f} s; try `{hint}`") from None
    if done.returncode:
        raise NotHad(f"no {what}; try `{hint}`")
    return done.stdout
