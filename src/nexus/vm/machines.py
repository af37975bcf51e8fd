"""Which virtual machines there are, as far as building and starting one differs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

VARIABLE: Final = "NEXUS_VM_MACHINE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One kind of machine.

    `kernels` are Debian's packages that depend on the newest kernel, the first that exists counts.
    The bus has so many `transports`, of which the first `own_page` share their page of registers
    with no other device. Where `has_tsc` the kernel is told how fast the clock of the CPU goes:
    what it would measure is a matter of luck on a busy host. `append` are more words for the
    kernel: what guards a real CPU against its own speculation is left out, for an emulated one has
    none, and a page table of the kernel's own makes each system call ten times as slow.
    """

    name: str
    debian: str
    kernels: tuple[str, ...]
    wheels: tuple[str, ...]  # platforms of the package registry, newest first
    qemu: str
    qemu_package: str
    arguments: tuple[str, ...]
    console: str
    transports: int
    own_page: int
    append: tuple[str, ...] = ()
    has_tsc: bool = False


AARCH64: Final = Machine(
    name="aarch64",
    debian="arm64",
    # 6.12 has Landlock's ABI 6 and a peer's pidfd, which 6.1 has not; from trixie on it is the one.
    kernels=("linux-image-6.12-cloud-arm64", "linux-image-cloud-arm64"),
    wheels=("manylinux_2_34_aarch64", "manylinux_2_28_aarch64", "manylinux2014_aarch64"),
    qemu="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    # Of the CPUs that boot it, cortex-a72 is the fastest to emulate: no pointer authentication.
    arguments=("-M", "virt,gic-version=3", "-cpu", "cortex-a72"),
    console="ttyAMA0",
    transports=32,
    own_page=8,  # 0x200 bytes apart
    append=("nokaslr", "kpti=off", "mitigations=off"),  # a kernel at a random place has kpti too
)
X86_64: Final = Machine(
    name="x86_64",
    debian="amd64",
    kernels=("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"),
    wheels=("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64"),
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    arguments=("-M", "microvm,x-option-roms=off,rtc=on", "-cpu", "max"),
    console="ttyS0",
    transports=24,
    own_page=8,
    append=("mitigations=off",),
    has_tsc=True,
)
RISCV64: Final = Machine(
    name="riscv64",
    debian="riscv64",
    kernels=("linux-image-riscv64",),
    wheels=("manylinux_2_39_riscv64", "manylinux_2_35_riscv64", "manylinux_2_31_riscv64"),
    qemu="qemu-system-riscv64",
    qemu_package="qemu-system-misc",
    arguments=("-M", "virt,aclint=off", "-cpu", "rv64", "-bios", "default"),
    console="ttyS0",
    transports=8,
    own_page=1,  # 0x1000 bytes apart
)

MACHINES: Final = {each.name: each for each in (AARCH64, X86_64, RISCV64)}
DEFAULT: Final = AARCH64


class NoSuchMachine(Exception):
    """The text is one sentence."""


def machine_named(name: str | None = None, environ: Mapping[str, str] = os.environ) -> Machine:
    """The machine of that name, or of the environment's, or the default one. Raises
    NoSuchMachine."""
    wanted = name or environ.get(VARIABLE) or DEFAULT.name
    if wanted not in MACHINES:
        raise NoSuchMachine(f"no machine {wanted!r}: choose one of {' '.join(sorted(MACHINES))}")
    return MACHINES[wanted]
