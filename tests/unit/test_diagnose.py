"""What is wrong with the contents of an image is said, and all of it is counted somewhere."""

import hashlib
from pathlib import Path

from nexus.bundle.needs import DEVICE_DISTRIBUTIONS
from nexus.vm.image import SITE, Part
from tools.diagnose import areas, distributions, faults_of, modules_in, tree_files

MODULE = "nexus/abi/limits.py"
MODULE_TEXT = "LIMIT = 1\n"


def part(path: str, text: str = "some bytes") -> Part:
    data = text.encode()
    return Part(path, len(data), hashlib.sha256(data).hexdigest())


def image(root: Path, *, without: str = "", more: tuple[Part, ...] = ()) -> list[Part]:
    """An image with one module of ours, as it is in the tree `root`, and the libraries."""
    file = root / "src" / MODULE
    file.parent.mkdir(parents=True, exist_ok=True)
    _ = file.write_text(MODULE_TEXT)
    names = (name.replace("-", "_") for name in DEVICE_DISTRIBUTIONS if name != without)
    metadata = [part(f"{SITE}/{name}-1.0.dist-info/METADATA") for name in names]
    return [part(f"{SITE}/{MODULE}", MODULE_TEXT), *metadata, *more]


def test_an_image_of_this_tree_with_its_libraries_has_no_fault(tmp_path: Path) -> None:
    assert list(faults_of(image(tmp_path), tmp_path)) == []
    assert modules_in(image(tmp_path)) == [MODULE]
    assert "google-crc32c" in distributions(image(tmp_path))


def test_a_library_too_much_and_one_too_few_are_faults(tmp_path: Path) -> None:
    more = (part(f"{SITE}/requests-2.0.dist-info/METADATA"),)

    assert list(faults_of(image(tmp_path, without="h11", more=more), tmp_path)) == [
        "requests is in the image, and nothing there imports it",
        "h11 is imported, and not in the image",
    ]


def test_a_module_of_another_tree_is_a_fault(tmp_path: Path) -> None:
    parts = image(tmp_path, more=(part(f"{SITE}/nexus/gone.py"),))
    _ = (tmp_path / "src" / MODULE).write_text("LIMIT = 2\n")

    assert list(faults_of(parts, tmp_path)) == [
        f"{MODULE} is another one in the image than in the tree",
        "nexus/gone.py is in the image, and not in the tree",
    ]


def test_an_image_without_anything_of_ours_is_no_clean_image(tmp_path: Path) -> None:
    parts = [part for part in image(tmp_path) if not part.path.endswith(MODULE)]

    assert next(faults_of(parts, tmp_path)) == "there is no module of ours in the image"


def test_every_file_of_an_image_is_counted_once(tmp_path: Path) -> None:
    paths = ("bin", "usr/bin/python3.11", "usr/lib/x/libc.so.6", "lib_modules/a.ko")
    parts = image(tmp_path, more=tuple(part(path) for path in paths))

    found = areas(parts)

    assert sum(area.files for area in found.values()) == len(parts)
    assert sum(area.size for area in found.values()) == sum(part.size for part in parts)


def test_the_tree_has_files_on_either_side() -> None:
    files = tree_files()

    assert "src/nexus/vm/host.py" in files
    assert "tools/diagnose.py" in files
