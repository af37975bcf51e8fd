"""The image of this tree, built: it needs the machine's packages, or they in the cache."""

import shutil
from pathlib import Path

import pytest

from nexus.vm.image import SITE, Image, build
from nexus.vm.initramfs import entries_of
from nexus.vm.machines import DEFAULT
from nexus.vm.packages import cache_folder

pytestmark = [pytest.mark.vm, pytest.mark.slow]


def test_the_same_inputs_give_the_same_bytes(built_image: Image, tmp_path: Path) -> None:
    cache = cache_folder()
    (tmp_path / "files").symlink_to(cache / "files")
    for listed in (*cache.glob("packages-*.json"), *cache.glob("wheels-*.json")):
        _ = shutil.copy(listed, tmp_path)

    anew = build(DEFAULT, tmp_path)

    assert anew.digest == built_image.digest
    assert [each.name for each in anew.layers] == [each.name for each in built_image.layers]
    for first, second in zip(built_image.layers, anew.layers, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_it_has_what_process_1_needs_before_its_first_line(built_image: Image) -> None:
    found = {
        path: entry
        for layer in built_image.layers
        for path, entry in entries_of(layer.read_bytes())
    }

    assert found["init"].data.startswith(b"#!/usr/bin/python3 -IS\n")
    assert found["dev/urandom"].device == (1, 9)
    assert found["dev/console"].device == (5, 1)
    assert f"{SITE}/nexus/vm/guest.py" in found
    order = found["lib_modules/order"].data.decode().split()
    assert {"virtio_mmio", "virtio_blk"} <= set(order)
    assert all(f"lib_modules/{name}.ko" in found for name in order)


def test_no_file_tells_who_built_it_or_when(built_image: Image) -> None:
    for layer in built_image.layers:
        data = layer.read_bytes()

        assert str(Path.home()).encode() not in data or str(Path.home()) == "/root"
        assert str(Path(__file__).parents[2]).encode() not in data
