import lzma
from pathlib import Path

import pytest

from nexus.vm.kernelmodules import MissingModule, found_in, in_order


def write(folder: Path, name: str, depends: str, *, packed: bool = True) -> None:
    data = b"\x7fELF...\0license=GPL\0depends=%s\0name=%s\0" % (depends.encode(), name.encode())
    file = folder / "kernel/drivers" / f"{name}.ko"
    file.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        _ = file.with_suffix(".ko.xz").write_bytes(lzma.compress(data))
    else:
        _ = file.write_bytes(data)


def test_a_module_comes_behind_all_it_needs_and_once(tmp_path: Path) -> None:
    write(tmp_path, "virtio_blk", "virtio,virtio-ring")
    write(tmp_path, "virtio_mmio", "virtio,virtio_ring")
    write(tmp_path, "virtio", "")
    write(tmp_path, "virtio_ring", "virtio", packed=False)

    modules = in_order(["virtio_mmio", "virtio-blk"], found_in(tmp_path))

    assert [each.name for each in modules] == ["virtio", "virtio_ring", "virtio_mmio", "virtio_blk"]
    assert all(each.data.startswith(b"\x7fELF") for each in modules)


def test_a_module_that_the_kernel_has_not_is_named(tmp_path: Path) -> None:
    write(tmp_path, "softdog", "watchdog_core")

    with pytest.raises(MissingModule, match="no module watchdog_core"):
        in_order(["softdog"], found_in(tmp_path))


def test_modules_that_need_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    write(tmp_path, "b", "a")

    with pytest.raises(MissingModule, match="a needs itself"):
        in_order(["a"], found_in(tmp_path))
