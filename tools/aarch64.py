"""The telemetry formats on an emulated aarch64: `python -m tools.aarch64`, or `make aarch64`.

A smoke test, and no proof of any order: QEMU in user mode runs aarch64's CPython as a process of
this machine, and on x86_64 its loads and stores keep x86's order, which is stronger than what
aarch64 promises. What can go wrong there is enumerated by
tests/property/test_telemetry_weak_memory.py.

QEMU and Debian's Python for arm64 are brought by apt-get into .venv/aarch64, under an apt state of
its own: nothing is installed, and no root is needed. Which packages Python needs is apt's word. The
wheels are those of requirements/dev.txt, with their hashes. Exit code 3 if any of it cannot be had:
then nothing was run, which is no pass.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / ".venv" / "aarch64"
GUEST_ROOT: Final = WORK / "root"
GUEST_PYTHON: Final = GUEST_ROOT / "usr/bin/python3"
SITE: Final = WORK / "site"
QEMU: Final = WORK / "qemu-aarch64"
QEMU_NAMES: Final = {"./usr/bin/qemu-aarch64-static", "./usr/bin/qemu-aarch64"}
UNIT_TESTS: Final = "tests/unit/test_telemetry_*.py"
SMOKE: Final = "tests.linux.telemetry_smoke"
WHEELS: Final = frozenset(
    {
        "hypothesis",
        "iniconfig",
        "msgspec",
        "packaging",
        "pluggy",
        "pygments",
        "pytest",
        "sortedcontainers",
    }
)
"""What the smoke test, the unit tests and pytest import."""

BRING_MAX: Final = 600.0  # seconds for one command that brings something
RUN_MAX: Final = 600.0  # seconds for one run inside; each takes about a tenth
RED: Final = 1
NOT_RUN: Final = 3

PIN: Final = re.compile(r"^([a-z0-9-]+)==\S+(?: \\\n {4}--hash=\S+)+", re.MULTILINE)
APT_CONFIGURATION: Final = """\
Dir::State "{work}/state";
Dir::State::status "{work}/status";
Dir::Cache "{work}/cache";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "{host}"; }};
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
"""


class NotHad(Exception):
    """Something cannot be had here; the text says what, and which command would help."""


def pins_of(requirements: str, names: frozenset[str]) -> str:
    """The entries of a list of pinned requirements, hashes included, that have these names."""
    found = {match[1]: match[0] for match in PIN.finditer(requirements)}
    missing = sorted(names - found.keys())
    assert not missing, f"requirements/dev.txt does not pin {missing}"
    return "".join(f"{found[name]}\n" for name in sorted(names))


def bring() -> None:
    """Download everything anew, so that nothing old is among it. Raises NotHad."""
    for name in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(name) is None:
            raise NotHad(f"there is no {name}; run `make aarch64` on Debian")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    _bring_packages()
    version = _output([*_inside(), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    _bring_wheels(version)


def _bring_packages() -> None:
    host = _output(["dpkg", "--print-architecture"])
    for name in ("state/lists/partial", "cache/archives/partial"):
        (WORK / name).mkdir(parents=True)
    (WORK / "status").touch()  # as if nothing were installed
    configuration = WORK / "apt.conf"
    _ = configuration.write_text(APT_CONFIGURATION.format(work=WORK, host=host), "utf-8")
    apt = ["apt-get", "--quiet", "--quiet"]
    environment = os.environ | {"APT_CONFIG": str(configuration)}
    hint = "apt-get update"
    _bring([*apt, "update"], "lists of arm64 packages", hint, environment)
    wanted = ["python3:arm64", f"qemu-user-static:{host}"]
    options = ["--yes", "--download-only", "--no-install-recommends"]
    hint = "apt-cache policy python3:arm64 qemu-user-static"
    _bring([*apt, "install", *options, *wanted], " and ".join(wanted), hint, environment)
    for package in sorted((WORK / "cache/archives").glob("*.deb")):
        if package.name.startswith("qemu-"):
            _extract_qemu(package)
        else:
            _bring(["dpkg-deb", "-x", str(package), str(GUEST_ROOT)], package.name, "df -h .venv")
    if not QEMU.exists():
        raise NotHad("qemu-user-static holds no qemu-aarch64; try `apt-cache show qemu-user`")


def _extract_qemu(package: Path) -> None:
    """Of all the machines that QEMU knows, the one."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                program = archive.extractfile(member) if member.isfile() else None
                if program is not None and member.name in QEMU_NAMES:
                    _ = QEMU.write_bytes(program.read())
                    QEMU.chmod(0o755)


def _bring_wheels(version: str) -> None:
    pins = WORK / "pins.txt"
    text = (ROOT / "requirements/dev.txt").read_text("utf-8")
    _ = pins.write_text(pins_of(text, WHEELS), "utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    kind = ["--platform", "manylinux2014_aarch64", "--python-version", version]
    options = ["--require-hashes", "--only-binary", ":all:", "--no-deps", "--no-compile"]
    command = [*pip, *kind, *options, "--target", str(SITE), "-r", str(pins)]
    _bring(command, f"wheels for Python {version} on aarch64", "pip index versions msgspec")


def _bring(
    command: Sequence[str], what: str, hint: str, environment: dict[str, str] | None = None
) -> None:
    """Run it; what it says goes to stderr, as it may name hosts and paths."""
    try:
        done = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=BRING_MAX)
    except subprocess.TimeoutExpired:
        raise NotHad(f"no {what} in {BRING_MAX:.0f} s; try `{hint}`") from None
    if done.returncode:
        raise NotHad(f"no {what}; try `{hint}`")


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=BRING_MAX)
    if done.returncode:
        told = " ".join(command).replace(f"{ROOT}/", "")
        raise NotHad(f"{Path(command[0]).name} does not work here; try `{told}`")
    return done.stdout.strip()


def _inside() -> list[str]:
    return [str(QEMU), "-L", str(GUEST_ROOT), str(GUEST_PYTHON), "-s"]


def _run(*arguments: str) -> tuple[int, list[str]]:
    """Run the Python inside with these arguments; its exit code and what it printed."""
    environment = {
        "CI": "true",  # hypothesis: no deadlines, the same examples each time
        "HYPOTHESIS_STORAGE_DIRECTORY": str(WORK / "hypothesis"),
        "LANG": "C.UTF-8",
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(str(each) for each in (ROOT / "src", ROOT, SITE)),
        "PYTHONPYCACHEPREFIX": str(WORK / "pycache"),
    }
    command = [*_inside(), *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=RUN_MAX
        )
    except subprocess.TimeoutExpired:
        return RED, [f"not over in {RUN_MAX:.0f} s"]
    return done.returncode, done.stdout.splitlines()


def report() -> int:
    """Run it all, print what came out; 0 if all of it is green."""
    print("A smoke test of src/nexus/telemetry on aarch64 under QEMU user-mode emulation.")
    print("No proof of ordering: QEMU on an x86_64 host gives a stronger order than aarch64 has.")
    print(f"outside: {os.uname().machine}, {_output([str(QEMU), '--version']).splitlines()[0]}")
    smoke, lines = _run("-m", SMOKE)
    print(*lines, sep="\n")
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(UNIT_TESTS))
    options = ["-q", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT)]
    plugins = ["-p", "no:cacheprovider", "--import-mode=importlib"]
    unit, lines = _run("-m", "pytest", *options, *plugins, *tests)
    print(f"unit tests, {UNIT_TESTS}: {lines[-1] if lines else 'nothing printed'}")
    if unit:
        print(*lines, sep="\n", file=sys.stderr)
    is_green = smoke == unit == 0
    print(f"verdict: {'green' if is_green else 'RED'}")
    return 0 if is_green else RED


def main() -> int:
    """Bring what is needed, and run; NOT_RUN if it cannot be had."""
    try:
        bring()
    except NotHad as missing:
        print(f"not run: {missing}")
        return NOT_RUN
    return report()


if __name__ == "__main__":
    sys.exit(main())
