"""What is in a set that is built from a system file, and that it is the same wherever it is."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from cyclonedx.model.bom import Bom

from fuzz.sets import Kept
from nexus import __version__
from nexus.bundle import (
    SBOM,
    NotInstalled,
    Release,
    WrongContent,
    base_of,
    build,
    package_folder,
)
from nexus.drivers import finished
from nexus.init.plan import load_plan
from nexus.sets import BytesSource, Content, Manifest, SetRefused, SetStatus, unpack

ROOT: Final = Path(__file__).parents[2]
PUMP: Final = ROOT / "examples" / "pump" / "system.toml"
DEVICE: Final = ROOT / "systems" / "device.toml"
RELEASE: Final = Release(version=3, name="1.2.0", schemas={"/state/pump/": 2})
OWN: Final = """
[system]
name = "own"
path = ["src"]

[service.valve]
module = "plant.valve:Valve"
protocol = "nexus.protocols.hello"
"""


def opened(data: bytes) -> tuple[Manifest, dict[str, Content]]:
    kept = Kept()
    verified = finished(unpack(BytesSource(data), kept))
    return verified.manifest, kept.files


@cache
def pump_set() -> bytes:
    return build(PUMP, RELEASE, package=package_folder())


def laid_out(files: dict[str, Content], folder: Path) -> None:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.data)


def own_system(folder: Path, text: str = OWN) -> Path:
    """A system with a program of its own, in a folder of its own."""
    source = folder / "src" / "plant"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text('"""A plant."""\n')
    (source / "valve.py").write_text(
        "class Valve:\n"
        "    def __init__(self, context): ...\n"
        "    def handle(self, call, request): ...\n"
    )
    file = folder / "system.toml"
    file.write_text(text)
    return file


# ---------------------------------------------------------------- what is in it


def test_a_set_has_the_package_the_system_and_its_own_programs() -> None:
    manifest, files = opened(pump_set())

    home = PUMP.parent
    assert files["system/system.toml"].data == PUMP.read_bytes()
    own = home / "src" / "pump_station" / "pump.py"
    assert files["system/src/pump_station/pump.py"].data == own.read_bytes()
    package = {
        f"python/nexus/{file.relative_to(package_folder()).as_posix()}"
        for file in package_folder().rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert package == {path for path in files if path.startswith("python/")}
    assert (manifest.system, manifest.sbom) == ("system/system.toml", SBOM)
    assert (manifest.version, manifest.name) == (3, "1.2.0")
    assert manifest.schemas == {"/state/pump/": 2}


@pytest.mark.parametrize("file", [PUMP, DEVICE], ids=["pump", "device"])
def test_the_services_have_the_digests_of_the_plan(file: Path) -> None:
    data = pump_set() if file is PUMP else build(file, RELEASE, package=package_folder())
    manifest, _ = opened(data)

    plan = load_plan(file)
    assert manifest.services == {
        service.name: bytes.fromhex(service.program_digest) for service in plan.services
    }


def test_what_is_unpacked_is_the_same_system_with_no_help_from_here(tmp_path: Path) -> None:
    """Its plan, made by the package of the set from the system file of the set."""
    manifest, files = opened(pump_set())
    laid_out(files, tmp_path)

    told = subprocess.run(
        [sys.executable, "-P", "-m", "nexus.cli", "check", manifest.system, "--json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "python"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )

    document = json.loads(told.stdout)
    assert document["digest"] == load_plan(PUMP).digest
    assert document["plan"]["path"] == [str(tmp_path / "system" / "src")]


def test_a_set_for_the_simulator_has_the_system_alone() -> None:
    manifest, files = opened(build(DEVICE, RELEASE))

    assert [path for path in files if path.startswith("python/")] == []
    plan = load_plan(DEVICE)
    assert manifest.services["logd"].hex() == plan.by_name["logd"].program_digest


def test_a_changed_line_of_a_program_changes_its_digest_and_no_other(tmp_path: Path) -> None:
    package = tmp_path / "nexus"
    shutil.copytree(package_folder(), package, ignore=shutil.ignore_patterns("__pycache__"))
    before, _ = opened(build(PUMP, RELEASE, package=package))
    with (package / "services" / "logd" / "service.py").open("a") as file:
        file.write("# changed\n")

    after, _ = opened(build(PUMP, RELEASE, package=package))

    changed = {name for name in before.services if before.services[name] != after.services[name]}
    assert changed == {"logd"}


def test_what_is_no_source_is_left_out(tmp_path: Path) -> None:
    file = own_system(tmp_path)
    source = tmp_path / "src"
    (source / "plant" / "__pycache__").mkdir()
    (source / "plant" / "__pycache__" / "valve.cpython-311.pyc").write_bytes(b"compiled")
    (source / "plant" / ".secret").write_text("hidden")
    (source / "plant.egg-info").mkdir()
    (source / "plant.egg-info" / "x.py").write_text("")
    (source / "notes").mkdir()
    (source / "notes" / "to-do.txt").write_text("no Python around")
    (source / "plant" / "table.csv").write_text("1,2\n")
    (source / "plant" / "run.sh").write_text("#!/bin/sh\n")
    (source / "plant" / "run.sh").chmod(0o755)

    _, files = opened(build(file, RELEASE))

    assert sorted(path for path in files if path.startswith("system/src/")) == [
        "system/src/plant/__init__.py",
        "system/src/plant/run.sh",
        "system/src/plant/table.csv",
        "system/src/plant/valve.py",
    ]
    assert [path for path, content in files.items() if content.executable] == [
        "system/src/plant/run.sh"
    ]


def test_policy_files_are_in_it(tmp_path: Path) -> None:
    file = own_system(
        tmp_path, OWN.replace('path = ["src"]', 'path = ["src"]\npolicy = ["p/a.toml"]')
    )
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.toml").write_text('[allow]\nvalve = ["ipc.core"]\n')

    _, files = opened(build(file, RELEASE))

    assert files["system/p/a.toml"].data == b'[allow]\nvalve = ["ipc.core"]\n'


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("link", ["src/plant/link.py", "src/linked", "system.toml"])
def test_a_link_is_refused_and_not_followed(tmp_path: Path, link: str) -> None:
    file = own_system(tmp_path)
    target = tmp_path / "elsewhere"
    if link == "src/linked":
        target.mkdir()
        (target / "secret.py").write_text("KEY = 1\n")
    elif link == "system.toml":
        shutil.move(file, target)
    else:
        target.write_text("KEY = 1\n")
    (tmp_path / link).symlink_to(target)

    with pytest.raises(WrongContent, match="is a link"):
        _ = build(file, RELEASE)


def test_a_folder_that_is_not_below_the_system_file_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    file = own_system(tmp_path).rename(inside / "system.toml")
    for path in ("../src", str(tmp_path / "src")):
        file.write_text(OWN.replace('["src"]', json.dumps([path])))

        with pytest.raises(WrongContent, match="is not below the system file"):
            _ = build(file, RELEASE)


def test_a_program_that_is_installed_and_not_in_the_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = own_system(tmp_path)
    shutil.move(tmp_path / "src" / "plant", tmp_path / "site" / "installed_plant")
    file.write_text(
        OWN.replace('path = ["src"]', "").replace("plant.valve", "installed_plant.valve")
    )
    monkeypatch.syspath_prepend(tmp_path / "site")

    with pytest.raises(WrongContent, match=r"installed_plant is installed, and in no folder of"):
        _ = build(file, RELEASE, package=package_folder())


def test_a_name_that_no_set_can_have_is_refused(tmp_path: Path) -> None:
    file = own_system(tmp_path)
    (tmp_path / "src" / "plant" / "two words.py").write_text("")

    with pytest.raises(SetRefused) as refused:
        _ = build(file, RELEASE)

    assert refused.value.status is SetStatus.PATH


# ---------------------------------------------------------------- the same bytes


def built_apart(folder: Path, package: Path, seed: str, *, backwards: bool, umask: int) -> bytes:
    """A set built by an interpreter of its own, from copies made in this order."""
    home = folder / "deep" / "er"
    home.mkdir(parents=True)
    for tree, target in ((PUMP.parent / "src", home / "src"), (package, folder / "nexus")):
        files = sorted(file for file in tree.rglob("*") if file.is_file())
        for file in reversed(files) if backwards else files:
            if "__pycache__" not in file.parts:
                copy = target / file.relative_to(tree)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    shutil.copyfile(PUMP, home / "system.toml")
    output = folder / "out.nxs"
    words = ["bundle", "build", "system.toml", "-o", str(output), "--version", "3", "--name", "1"]
    words += ["--schema", "/state/b/=1", "--schema", "/state/a/=2"]
    _ = subprocess.run(
        [sys.executable, "-P", "-m", "nexus.cli", *words],
        cwd=home,
        env={
            "PYTHONPATH": str(folder),
            "PYTHONHASHSEED": seed,
            "PATH": os.environ["PATH"],
            "TZ": f"UTC{seed}",
        },
        umask=umask,
        capture_output=True,
        check=True,
    )
    return output.read_bytes()


def test_two_builds_in_other_folders_under_other_hash_seeds_are_equal(tmp_path: Path) -> None:
    package = tmp_path / "package"  # so that nobody's editor comes between the two
    shutil.copytree(package_folder(), package, ignore=shutil.ignore_patterns("__pycache__"))

    one = built_apart(tmp_path / "one", package, "1", backwards=False, umask=0o022)
    two = built_apart(tmp_path / "another", package, "4242", backwards=True, umask=0o077)

    assert one == two
    manifest, _ = opened(one)
    assert manifest.schemas == {"/state/a/": 2, "/state/b/": 1}


# ---------------------------------------------------------------- what it needs


def test_a_set_names_this_interpreter_and_what_is_installed() -> None:
    base = base_of(["typer"])

    assert base.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert base.distributions.keys() >= {"msgspec", "backports-zstd", "typer"}
    assert list(base.distributions) == sorted(base.distributions)
    with pytest.raises(NotInstalled, match="no-such-thing"):
        _ = base_of(["no-such-thing"])


# ---------------------------------------------------------------- the bill of materials


def test_the_bill_of_materials_lists_what_is_in_the_set_and_what_is_below_it() -> None:
    manifest, files = opened(pump_set())
    document = json.loads(files[SBOM].data)

    parts = {part["name"]: part for part in document["components"]}
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "pump-station"
    assert document["metadata"]["component"]["version"] == "1.2.0"
    assert parts["nexus-os"]["version"] == __version__
    for name, digest in manifest.services.items():
        assert parts[name]["hashes"] == [{"alg": "SHA-256", "content": digest.hex()}]
    for name, version in manifest.base.distributions.items():
        assert parts[name]["version"] == version
        assert parts[name]["scope"] == "excluded", "it is not in the set"
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{version}"
        assert parts[name]["licenses"]
    assert "timestamp" not in document["metadata"]


def test_the_library_that_wrote_the_bill_reads_it_and_finds_its_graph_whole() -> None:
    _, files = opened(build(PUMP, RELEASE))

    bom = Bom.from_json(json.loads(files[SBOM].data))  # type: ignore[attr-defined]

    assert bom.validate()
    assert len(bom.components) == len(json.loads(files[SBOM].data)["components"])


def test_the_serial_number_is_of_what_is_listed() -> None:
    numbers = {
        json.loads(opened(build(file, release))[1][SBOM].data)["serialNumber"]
        for file in (PUMP, DEVICE)
        for release in (RELEASE, Release(version=3, name="1.2.0"), Release(version=3, name="2"))
    }

    assert len(numbers) == 4  # the areas are no part of it
