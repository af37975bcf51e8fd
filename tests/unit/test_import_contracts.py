"""Each import contract of pyproject.toml breaks when what it forbids is done."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]

MODULES: Final = (
    "abi",
    "bootctl",
    "bootctl/block",
    "bootctl/environment",
    "bootctl/record",
    "bundle",
    "cli",
    "drivers",
    "init",
    "ipc",
    "kernel",
    "kernel/core",
    "kernel/linux",
    "kernel/sim",
    "kernel/sim/watchdog",
    "loader",
    "loader/choose",
    "loader/tail",
    "log",
    "metrics",
    "proof",
    "protocols",
    "runtime",
    "services",
    "services/demo",
    "services/demo/interactive",
    "services/demo/testsvc",
    "services/exportd",
    "services/exportd/collector",
    "services/exportd/pages",
    "services/keystored",
    "services/keystored/ed25519",
    "services/keystored/sealing",
    "services/selftest",
    "services/timed",
    "services/updated",
    "sets",
    "telemetry",
    "testing",
    "trust",
    "trust/metadata",
    "trust/sign",
    "trust/verify",
    "vm",
    "wire",
)
IGNORED: Final = {
    "kernel/sim/watchdog": "import signal\nimport threading",
    "services/exportd/collector": "import h11",
    "services/exportd/pages": "import h11",
    "services/keystored/ed25519": "import cryptography",
    "services/keystored/sealing": "import cryptography",
    "trust/metadata": "import tuf\nimport securesystemslib",
    "trust/sign": "import cryptography\nimport tuf\nimport securesystemslib",
    "trust/verify": "import tuf",
}
VIOLATIONS: Final = {
    "layers": ("abi", "import nexus.wire"),
    "services": ("services/timed", "import nexus.services.selftest"),
    "demo-services": ("services/demo/testsvc", "import nexus.services.demo.interactive"),
    "kernels": ("kernel/linux", "import nexus.kernel.sim"),
    "kernel-core": ("kernel/core", "import nexus.kernel.linux"),
    "kernel-carries-bytes": ("kernel/linux", "import nexus.wire"),
    "pure": ("loader/choose", "import time"),
    "abi-only": ("services/timed", "import socket"),
    "sim-is-closed": ("kernel/sim", "import os"),
    "testing": ("runtime", "import nexus.testing"),
    "host-only": ("log", "import rich"),
    "scraping": ("services/timed", "import prometheus_client"),
    "http": ("services/timed", "import h11"),
    "sbom": ("loader", "import cyclonedx"),
    "tuf": ("services/updated", "import tuf"),
    "trust": ("init", "import nexus.trust.verify"),
    "boot-record": ("init", "import nexus.bootctl.block"),
    "keys": ("services/timed", "import cryptography"),
}


def contracts() -> dict[str, str]:
    """Id to name, of every contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return {entry["id"]: entry["name"] for entry in settings["tool"]["importlinter"]["contracts"]}


def broken(folder: Path, planted: dict[str, str]) -> set[str]:
    """The names of the contracts that a package with these lines breaks."""
    # The imports that a contract names have to be there to be ignored.
    lines = IGNORED | planted
    for module in ("", *MODULES):
        path = folder / "nexus" / module / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""x."""\n{lines.get(module, "")}\n', "utf-8")
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return set(re.findall(r"^(.*) BROKEN", done.stdout, re.MULTILINE))


def test_a_package_that_follows_the_map_breaks_none(tmp_path: Path) -> None:
    assert broken(tmp_path, {}) == set()


@pytest.mark.parametrize("contract", sorted(VIOLATIONS))
def test_a_planted_import_breaks_its_contract(tmp_path: Path, contract: str) -> None:
    module, line = VIOLATIONS[contract]

    assert contracts()[contract] in broken(tmp_path, {module: line})


def test_every_contract_has_a_violation_planted_for_it() -> None:
    assert set(contracts()) == set(VIOLATIONS)
