import os
import sys
from collections.abc import Callable
from importlib.machinery import SourcelessFileLoader
from pathlib import Path, PurePosixPath
from threading import Barrier, Thread
from types import ModuleType

import pytest

from nexus.vm import image
from nexus.vm.compiled import compiled, compiler_of
from nexus.vm.image import INIT, SITE, Image
from nexus.vm.initramfs import Tree, entries_of, packed
from nexus.vm.machines import AARCH64
from nexus.vm.packages import Brought, NotHad, Spoilt, held

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SOURCES = {
    "/usr/lib/a.py": b"WORDS = {'x', 'y', 'z'}\n",
    "/usr/lib/b.py": b"def fails():\n    raise ValueError\n",
}


def test_the_same_source_gives_the_same_bytes_whatever_was_compiled_before(tmp_path: Path) -> None:
    both = compiled(SOURCES, VERSION, tmp_path / "one")
    alone = {
        shown: compiled({shown: text}, VERSION, tmp_path / "two")[shown]
        for shown, text in reversed(SOURCES.items())
    }

    assert both == alone


def test_compiled_code_runs_without_its_source_and_tells_its_name_in_the_guest(
    tmp_path: Path,
) -> None:
    data = compiled(SOURCES, VERSION, tmp_path / "cache")["/usr/lib/b.py"]
    _ = (tmp_path / "b.pyc").write_bytes(data)
    loader = SourcelessFileLoader("b", str(tmp_path / "b.pyc"))
    module = ModuleType("b")
    loader.exec_module(module)

    with pytest.raises(ValueError) as told:  # noqa: PT011 (its own)
        module.fails()
    assert told.traceback[-1].frame.code.raw.co_filename == "/usr/lib/b.py"


def test_what_was_compiled_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(SOURCES, VERSION, tmp_path)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    assert compiled(SOURCES, VERSION, tmp_path) == first


def test_a_source_that_is_none_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError, match="invalid syntax"):
        compiled({"/a.py": b"def def"}, VERSION, tmp_path)


def test_without_the_guests_python_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NotHad, match=r"try `apt-get install python3\.99`"):
        compiler_of("3.99")


def test_a_layer_is_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    made = 0

    def make() -> Tree:
        nonlocal made
        made += 1
        tree = Tree()
        tree.file("a", str(made).encode())
        return tree

    first = image._layer(tmp_path, "base", ["1"], make)
    again = image._layer(tmp_path, "base", ["1"], make)
    other = image._layer(tmp_path, "base", ["2"], make)

    assert first == again != other
    assert made == 2


@pytest.mark.parametrize("content", [b"", b"0707", b"longer" * 1000])
def test_a_layer_of_another_size_is_made_anew(content: bytes, tmp_path: Path) -> None:
    first = image._layer(tmp_path, "base", ["1"], Tree)
    data = first.read_bytes()
    _ = first.write_bytes(content)

    again = image._layer(tmp_path, "base", ["1"], Tree)

    assert again.read_bytes() == data
    assert list((tmp_path / "layers").iterdir()) == [again]


def a_build(tmp_path: Path, outcomes: list[Exception | None]) -> Callable[..., Image]:
    """What `_build` does at each call: it fails, or gives an image."""

    def build(*_: object, refresh: bool) -> Image:
        with pytest.raises(NotHad, match="has been building"):
            held(tmp_path, 0).__enter__()
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return an_image(tmp_path, f"refresh {refresh}")

    return build


@pytest.mark.parametrize("spoilt", [["a package"], ["a package", "a wheel"]])
def test_what_is_spoilt_is_had_anew_in_the_same_build_which_holds_the_cache(
    spoilt: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Exception | None] = [*map(Spoilt, spoilt), None]
    monkeypatch.setattr(image, "_build", a_build(tmp_path, outcomes))

    assert image.build(AARCH64, tmp_path, refresh=True).digest == "refresh False"


def test_what_is_spoilt_again_and_again_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Exception | None] = [Spoilt(f"spoilt {number}") for number in range(3)]
    monkeypatch.setattr(image, "_build", a_build(tmp_path, outcomes))

    with pytest.raises(NotHad, match="spoilt 2"):
        image.build(AARCH64, tmp_path)


def test_a_spoilt_wheel_is_found_before_it_is_opened(tmp_path: Path) -> None:
    wheel = tmp_path / "wheel"
    _ = wheel.write_bytes(b"PK")

    with pytest.raises(Spoilt, match="msgspec in the cache was spoilt"):
        image._base(tmp_path, [Brought("msgspec", "1", "0" * 64, wheel)], "3.11", tmp_path)

    assert not wheel.exists()


def test_layers_that_nobody_used_for_long_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "LAYERS_MAX", 2)
    first, second = (image._layer(tmp_path, "nexus", [each], Tree) for each in "12")
    os.utime(first, ns=(1, 1))
    os.utime(second, ns=(2, 2))

    used = image._layer(tmp_path, "nexus", ["1"], Tree)
    third = image._layer(tmp_path, "nexus", ["3"], Tree)

    assert used == first
    assert sorted((tmp_path / "layers").iterdir()) == sorted([first, third])


def test_the_package_has_its_source_and_every_module_compiled() -> None:
    files = image._package_files(Path(image.__file__).parents[1])

    assert f"{SITE}/nexus/vm/guest.py" in files
    assert not any("/cli/" in path or "__pycache__" in path for path in files)


@pytest.mark.parametrize(
    ("name", "is_used"),
    [
        ("msgspec/_core.cpython-311-aarch64-linux-gnu.so", True),
        ("google_crc32c.libs/libcrc32c-f753397d.so.1.1.0", True),
        ("msgspec/__init__.py", True),
        ("msgspec/__init__.pyi", False),
        ("tuf-7.0.1.dist-info/METADATA", True),
        ("tuf-7.0.1.dist-info/RECORD", False),
        ("cffi-2.data/scripts/x.py", False),
        ("google/tests/test_x.py", False),
    ],
)
def test_of_a_wheel_only_what_runs_is_taken(name: str, *, is_used: bool) -> None:
    assert image._is_used(PurePosixPath(name)) is is_used


def test_an_overlay_lies_over_the_image(tmp_path: Path) -> None:
    base, over = Tree(), Tree()
    base.file("init", INIT.encode(), 0o755)
    over.file("job.json", b"{}")
    layer = tmp_path / "base.cpio"
    _ = layer.write_bytes(packed(base))
    built = Image(
        machine=AARCH64,
        kernel=Path("vmlinuz-6"),
        kernel_version="6",
        python="3.11",
        layers=(layer,),
        digest="0" * 64,
    )

    built.write_initrd(tmp_path / "initrd", over)

    found = dict(entries_of((tmp_path / "initrd").read_bytes()))
    assert list(found) == ["init", "job.json"]
    assert [part.path for part in built.contents()] == ["init"]
    assert "Linux 6, Python 3.11" in built.told


def an_image(folder: Path, digest: str) -> Image:
    layer = folder / f"base-{digest}-5.cpio"
    _ = layer.write_bytes(b"layer")
    return Image(
        machine=AARCH64,
        kernel=folder / "vmlinuz",
        kernel_version="6.12",
        python="3.11",
        layers=(layer,),
        digest=digest,
    )


def test_a_run_has_one_image_whatever_is_edited_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = [an_image(tmp_path, digest) for digest in "01"]
    given = iter(built)
    monkeypatch.setattr(image, "build", lambda *_: next(given))

    first = image.pinned(AARCH64, tmp_path, tmp_path / "pin")
    again = image.pinned(AARCH64, tmp_path, tmp_path / "pin")
    other = image.pinned(AARCH64, tmp_path, tmp_path / "pin of another run")

    assert [first, again, other] == [built[0], built[0], built[1]]


def test_boots_that_start_together_have_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Barrier(2, timeout=10)
    given = iter([an_image(tmp_path, digest) for digest in "01"])

    def build(*_given: object) -> Image:
        _ = both.wait()  # neither has found a pin
        return next(given)

    had = list[Image]()
    monkeypatch.setattr(image, "build", build)
    boots = [
        Thread(target=lambda: had.append(image.pinned(AARCH64, tmp_path, tmp_path / "run" / "pin")))
        for _ in range(2)
    ]
    (tmp_path / "run").mkdir()

    for boot in boots:
        boot.start()
    for boot in boots:
        boot.join(10)

    assert len(had) == 2
    assert had[0] == had[1]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["pin"]


@pytest.mark.parametrize("text", ["", '{"kernel": "/boo', "[]", "{}", '{"layers": [], "x": 1}'])
def test_a_pin_that_names_no_image_is_not_run(text: str, tmp_path: Path) -> None:
    pin = tmp_path / "pin"
    _ = pin.write_text(text)

    with pytest.raises(NotHad, match="pin does not name an image; remove it"):
        image.pinned(AARCH64, tmp_path, pin)


@pytest.mark.parametrize("content", [None, b"", b"lay"])
def test_a_pinned_image_that_is_not_whole_is_not_run(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = an_image(tmp_path, "0")
    monkeypatch.setattr(image, "build", lambda *_: built)
    _ = image.pinned(AARCH64, tmp_path, tmp_path / "pin")
    (layer,) = built.layers
    layer.unlink() if content is None else layer.write_bytes(content)

    with pytest.raises(NotHad, match="image of this run is no longer in the cache; start the run"):
        image.pinned(AARCH64, tmp_path, tmp_path / "pin")
