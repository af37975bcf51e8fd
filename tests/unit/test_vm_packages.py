import json
import os
from hashlib import sha256
from pathlib import Path

import pytest

from nexus.proof.lock import holder_of
from nexus.vm import packages as bring
from nexus.vm.machines import AARCH64, MACHINES, NoSuchMachine, machine_named
from nexus.vm.packages import (
    LOCK_NAME,
    Brought,
    NotHad,
    Spoilt,
    cache_folder,
    check,
    held,
    packages,
    pins_of,
    put,
    unpacked,
)

PINS = """\
# made by
cffi==2.1.1 ; platform_python_implementation != 'PyPy' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via cryptography
h11==0.16.0 \\
    --hash=sha256:cc
    # via -r run.in
"""


def test_pins_keep_version_marker_and_every_hash() -> None:
    assert pins_of(PINS, frozenset({"cffi"})) == (
        "cffi==2.1.1 ; platform_python_implementation != 'PyPy' \\\n"
        "    --hash=sha256:aa \\\n"
        "    --hash=sha256:bb\n"
    )


def test_a_name_that_is_not_pinned_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="do not pin \\['tuf'\\]"):
        pins_of(PINS, frozenset({"h11", "tuf"}))


def test_every_wheel_of_an_image_is_pinned() -> None:
    from nexus.vm.image import WHEELS

    run = Path(__file__).parents[2] / "requirements/run.txt"

    assert pins_of(run.read_text("utf-8"), WHEELS).count("==") == len(WHEELS)


def test_without_apt_the_command_that_would_help_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NotHad, match="there is no apt-get; run it on Debian"):
        packages(AARCH64, tmp_path)


def test_a_package_that_cannot_be_had_is_named_with_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        _ = (programs / name).write_text("#!/bin/sh\nexit 100\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    with pytest.raises(NotHad, match=r"no linux-image-6\.12-cloud-arm64 or .*try `apt-get update`"):
        packages(AARCH64, tmp_path / "cache")


def listed(cache: Path) -> Path:
    (file,) = cache.glob("packages-*.json")
    return file


def test_what_was_brought_is_kept_by_its_content_and_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def bring_it(_machine: object, _cache: Path) -> list[Path]:
        nonlocal asked
        asked += 1
        file = tmp_path / "libc6_2.36-9+deb12u10_arm64.deb"
        _ = file.write_bytes(b"a package")
        return [file]

    monkeypatch.setattr(bring, "_bring_packages", bring_it)

    first = packages(AARCH64, tmp_path)
    again = packages(AARCH64, tmp_path)

    assert first == again
    assert asked == 1
    (libc,) = first
    assert (libc.name, libc.version) == ("libc6", "2.36-9+deb12u10")
    assert libc.file.read_bytes() == b"a package"
    assert libc.digest == sha256(b"a package").hexdigest()
    assert packages(AARCH64, tmp_path, refresh=True) == first
    assert asked == 2


@pytest.mark.parametrize("entry", [["libc6", "2", "../../etc/passwd"], ["libc6"], 7, None])
def test_a_list_that_somebody_has_spoilt_is_made_anew(
    entry: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "libc6_2_arm64.deb"
    file.parent.mkdir()

    def bring_it(_machine: object, _cache: Path) -> list[Path]:
        _ = file.write_bytes(b"a package")
        return [file]

    monkeypatch.setattr(bring, "_bring_packages", bring_it)
    first = packages(AARCH64, tmp_path)
    _ = listed(tmp_path).write_text(json.dumps([entry]))

    assert packages(AARCH64, tmp_path) == first


def test_an_empty_list_is_not_believed_and_none_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "libc6_2_arm64.deb"
    _ = file.write_bytes(b"a package")
    given = iter(([file], []))
    monkeypatch.setattr(bring, "_bring_packages", lambda *_: next(given))
    first = packages(AARCH64, tmp_path)
    _ = listed(tmp_path).write_text("[]")

    with pytest.raises(NotHad, match="nothing was brought for packages-aarch64-"):
        packages(AARCH64, tmp_path)
    assert listed(tmp_path).read_text() == "[]"

    _ = file.write_bytes(b"a package")
    given = iter(([file],))
    assert packages(AARCH64, tmp_path) == first


def brought(cache: Path, name: str, data: bytes = b"a package") -> Brought:
    digest = sha256(data).hexdigest()
    file = cache / "files" / digest
    file.parent.mkdir(exist_ok=True)
    _ = file.write_bytes(data)
    return Brought(name, "2", digest, file)


def test_what_is_spoilt_in_the_cache_is_named_and_removed(tmp_path: Path) -> None:
    sound, cut, other = (brought(tmp_path, name, name.encode()) for name in ("a", "libc6", "zlib"))
    _ = cut.file.write_bytes(b"lib")
    _ = other.file.write_bytes(b"zlob")

    check([sound])
    with pytest.raises(Spoilt, match="libc6, zlib in the cache was spoilt; try `nexus vm build"):
        check([sound, cut, other])

    assert list((tmp_path / "files").iterdir()) == [sound.file]


def test_nothing_is_unpacked_of_a_package_that_is_spoilt(tmp_path: Path) -> None:
    package = brought(tmp_path, "libc6")
    _ = package.file.write_bytes(b"a pack")

    with pytest.raises(Spoilt, match="libc6"):
        unpacked([package], tmp_path)

    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("how", ["cut", "gone", "no sizes", "sizes cut"])
def test_an_unpacked_folder_that_is_not_whole_is_made_anew(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0

    def unpack(command: list[str], *_rest: object) -> str:
        nonlocal made
        made += 1
        root = Path(command[-1])
        (root / "boot").mkdir(parents=True)
        _ = (root / "boot/vmlinuz-6").write_bytes(b"a kernel")
        (root / "boot/vmlinuz").symlink_to("vmlinuz-6")
        return ""

    monkeypatch.setattr(bring, "run", unpack)
    package = brought(tmp_path, "linux")
    folder = unpacked([package], tmp_path)
    assert unpacked([package], tmp_path) == folder
    assert made == 1

    kernel, sizes = folder / "boot/vmlinuz-6", folder.with_suffix(".json")
    if how == "cut":
        _ = kernel.write_bytes(b"a k")
    elif how == "gone":
        kernel.unlink()
    elif how == "no sizes":
        sizes.unlink()
    else:
        _ = sizes.write_bytes(sizes.read_bytes()[:5])

    assert unpacked([package], tmp_path) == folder
    assert made == 2
    assert kernel.read_bytes() == b"a kernel"
    assert sorted((tmp_path / "unpacked").iterdir()) == sorted([folder, sizes])


def test_one_command_at_a_time_has_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "vm"

    with held(cache):
        assert holder_of(cache / LOCK_NAME) == os.getpid()
        with pytest.raises(NotHad, match=f"process {os.getpid()} has been building in .* for 0 s"):
            held(cache, 0).__enter__()

    with held(cache, 0):
        assert holder_of(cache / LOCK_NAME) == os.getpid()


def test_the_lock_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(NotHad, match=r"^no apt$"), held(tmp_path):
        raise NotHad("no apt")

    assert holder_of(tmp_path / LOCK_NAME) is None


def test_a_cache_that_cannot_be_written_is_not_run_and_says_what_to_do(tmp_path: Path) -> None:
    _ = (tmp_path / "file").write_bytes(b"")

    with (
        pytest.raises(NotHad, match=r"Not a directory.*try `NEXUS_CACHE_DIR=.* nexus vm build`"),
        held(tmp_path / "file" / "vm"),
    ):
        pass
    with pytest.raises(NotHad, match=r"cannot be used \(No space left on device\)"), held(tmp_path):
        raise OSError(28, "No space left on device")


def test_what_cannot_be_kept_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "list.json"
    put(b"first", file)

    def full(_descriptor: int) -> None:
        assert file.read_bytes() == b"first"  # nothing is in its place before it is on the disk
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        put(b"second", file)

    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_package_that_is_none_leaves_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "files" / "x"
    file.parent.mkdir()
    _ = file.write_bytes(b"no package")
    wrong = [bring.Brought("libc6", "2", sha256(b"no package").hexdigest(), file)]

    with pytest.raises(NotHad, match="no content of libc6"):
        unpacked(wrong, tmp_path)

    assert list((tmp_path / "unpacked").iterdir()) == []


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_folder({"NEXUS_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/vm")
    assert cache_folder({"XDG_CACHE_HOME": "/b", "HOME": "/c"}) == Path("/b/nexus/vm")
    assert cache_folder({"HOME": "/c"}) == Path("/c/.cache/nexus/vm")


def test_a_machine_is_found_by_option_then_environment_then_default() -> None:
    assert machine_named(None, {}) is AARCH64
    assert machine_named("aarch64", {"NEXUS_VM_MACHINE": "vax"}) is AARCH64
    with pytest.raises(NoSuchMachine, match=f"no machine 'vax': choose one of {min(MACHINES)}"):
        machine_named(None, {"NEXUS_VM_MACHINE": "vax"})
