import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.vm.elf import HEADER, WrongElf, is_elf, needs_of


def test_this_interpreter_needs_a_libc_and_a_loader() -> None:
    data = Path(sys.executable).resolve().read_bytes()

    needs = needs_of(data)

    assert any(name.startswith("libc.so") for name in needs.libraries)
    assert "/ld-linux" in needs.interpreter


def test_a_library_has_no_interpreter_or_is_a_program_too() -> None:
    file = import_module("msgspec._core").__file__
    assert file is not None

    needs = needs_of(Path(file).read_bytes())

    assert needs.interpreter == ""


def test_what_is_no_elf_file_is_refused() -> None:
    assert not is_elf(b"#!/bin/sh\n")
    with pytest.raises(WrongElf, match="no 64-bit little-endian ELF file"):
        needs_of(b"#!/bin/sh\n")


def test_a_32_bit_file_is_refused() -> None:
    with pytest.raises(WrongElf, match="no 64-bit"):
        needs_of(b"\x7fELF\x01\x01" + bytes(100))


@given(st.binary(max_size=400), st.integers(6, 300))
def test_a_damaged_file_is_refused_or_read_and_never_anything_else(noise: bytes, at: int) -> None:
    data = bytearray(Path(sys.executable).resolve().read_bytes()[:4096])
    data[at : at + len(noise)] = noise

    try:
        needs = needs_of(bytes(data))
    except WrongElf:
        return
    assert len(needs.libraries) <= 512


def test_a_file_that_ends_in_its_header_is_refused() -> None:
    with pytest.raises(WrongElf):
        needs_of(b"\x7fELF\x02\x01" + bytes(HEADER.size - 10))
