"""The disk of a board whose boot loader is U-Boot: a script that chooses, and a kernel per slot.

    U-Boot --boot.scr--> the environment on the boot device --> a try less, the slot --> its kernel

The script counts a try before the kernel of the slot in trial starts, in the variables of
boot-format.md, and our loader takes that count up (docs/adr/0029). It reads and writes the
redundant environment as a U-Boot does that is built for it; Debian's keeps its own in flash.
"""

import os
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final

from nexus.bootctl import SlotName
from nexus.vm.packages import NotHad

LOADER: Final = Path("/usr/lib/u-boot/qemu_arm64/u-boot.bin")
TOOLS: Final = {"mkfs.vfat": "dosfstools", "mcopy": "mtools"}
TOOL_FOLDERS: Final = ("/usr/sbin", "/sbin")  # of root's path alone
TOOL_MAX: Final = 60.0  # seconds for one of them

NAME: Final = "loader"  # of the disk; U-Boot looks for scripts on the first one
FLASH_SIZE: Final = 64 << 20  # bytes; QEMU's second one, which Debian's U-Boot looks into
SETTINGS_SIZE: Final = 0x40000  # its CONFIG_ENV_SIZE
SETTINGS: Final = {
    "bootdelay": "0",
    "bootcmd": "virtio scan; setenv devnum 0; "
    "load virtio 0:1 0x40200000 boot.scr && source 0x40200000",
}
"""U-Boot's own environment. By default it waits for a key, for two seconds of a clock that counts
its instructions: those take twenty of ours."""

SECTOR: Final = 512
START: Final = 2048  # sector where the file system begins
SPARE: Final = 8 << 20  # bytes of it beside the files
_HEAD: Final = Struct(">7I4B32s")  # include/image.h of U-Boot: struct legacy_img_hdr
_MAGIC: Final = 0x27051956
_LINUX, _ARM64, _SCRIPT = 5, 22, 6
_ENTRY: Final = Struct("<B3sB3sII")  # of the table of partitions

SCRIPT: Final = """\
echo nexus: boot.scr
disk=${devnum}
place=
for n in 0 1 2 3 4 5 6 7; do
  if test -z "${place}"; then
    if virtio dev ${n}; then
      if virtio read 0x50000000 0 0x40; then
        for copy in 0x50000000 0x50004000; do
          setexpr data ${copy} + 5
          crc32 ${data} 0x3ffb 0x50020000
          cp.b 0x50020000 0x50020013 1
          cp.b 0x50020001 0x50020012 1
          cp.b 0x50020002 0x50020011 1
          cp.b 0x50020003 0x50020010 1
          if cmp.b 0x50020010 ${copy} 4; then
            setexpr at ${copy} + 4
            setexpr.b flags *${at}
            setenv nexus_sequence 0
            env import -b ${data} 0x3ffb nexus_sequence
            newer=0
            if test -z "${place}"; then
              newer=1
            elif test ${nexus_sequence} -gt ${best}; then
              newer=1
            elif test ${nexus_sequence} -eq ${best}; then
              if test "${kept}${flags}" = ff0; then
                newer=1
              elif test "${kept}${flags}" != 0ff; then
                if test 0x${flags} -gt 0x${kept}; then newer=1; fi
              fi
            fi
            if test ${newer} = 1; then
              device=${n}; place=${copy}; from=${data}; best=${nexus_sequence}; kept=${flags}
            fi
          fi
        done
      fi
    fi
  fi
done
slot=a
if test -z "${place}"; then
  echo nexus: no environment, slot a
else
  env import -d -b ${from} 0x3ffb
  slot=${nexus_active}
  if test -n "${nexus_trying}"; then
    tries=0; state=
    if test ${nexus_trying} = a; then tries=${nexus_a_tries}; state=${nexus_b_state}; fi
    if test ${nexus_trying} = b; then tries=${nexus_b_tries}; state=${nexus_a_state}; fi
    if test ${tries} -gt 0; then
      slot=${nexus_trying}
      setexpr nexus_${slot}_tries ${tries} - 1
      if test -z "${nexus_counted}"; then setenv nexus_counted 0; fi
      setexpr nexus_counted ${nexus_counted} + 1
    elif test ${state} != good; then
      slot=${nexus_trying}
    fi
    setenv nexus_booting ${slot}
    env export -b -s 0x3ffb 0x50030005
    setenv filesize
    env export -b -s 0x3ffb 0x50030005
    setexpr flags 0x${kept} + 1
    mw.b 0x50030004 ${flags} 1
    crc32 0x50030005 0x3ffb 0x50020000
    cp.b 0x50020000 0x50030003 1
    cp.b 0x50020001 0x50030002 1
    cp.b 0x50020002 0x50030001 1
    cp.b 0x50020003 0x50030000 1
    block=0
    if test ${place} = 0x50000000; then block=0x20; fi
    virtio dev ${device}
    if virtio write 0x50030000 ${block} 0x20; then
      echo nexus: counted ${nexus_counted}
    else
      echo nexus: nothing is tried that cannot be counted
      slot=${nexus_active}
    fi
  fi
fi
echo nexus: slot ${slot}
if load virtio ${disk}:1 0x40400000 slot-${slot}/kernel; then
  if load virtio ${disk}:1 0x43f00000 slot-${slot}/words; then
    env import -t 0x43f00000 ${filesize} bootargs
    if load virtio ${disk}:1 0x44000000 slot-${slot}/initrd; then
      booti 0x40400000 0x44000000:${filesize} 0x40000000
    fi
  fi
fi
echo nexus: slot ${slot} does not start
reset
"""
"""What U-Boot's old shell takes: no functions, numbers of setexpr in hexadecimal (tries and counts
have one digit), those of test in decimal. The environment replaces U-Boot's own, as after `env
default`, so that what is written back is what was read; what the shell itself needs is in variables
of the shell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What U-Boot starts for a slot."""

    kernel: Path
    initrd: Path
    words: str  # the kernel's command line


def check() -> Path:
    """U-Boot itself. Raises NotHad."""
    if not LOADER.is_file():
        raise NotHad(f"there is no {LOADER}; try `apt-get install u-boot-qemu`")
    for name in TOOLS:
        _ = _tool(name)
    return LOADER


def make_disk(file: Path, starts: Mapping[SlotName, Start]) -> None:
    """A disk with the script and these files, each slot's in a folder of its own. Raises NotHad."""
    folder = file.with_suffix(".files")
    folder.mkdir()
    _ = (folder / "boot.scr").write_bytes(script_image(SCRIPT))
    size = SPARE
    for name, start in starts.items():
        home = folder / f"slot-{name}"
        home.mkdir()
        _ = (home / "words").write_text(f"bootargs={start.words}\n", "ascii")
        for what, source in (("kernel", start.kernel), ("initrd", start.initrd)):
            _ = shutil.copyfile(source, home / what)
            size += source.stat().st_size
    count = -(-size // SECTOR)
    with file.open("xb") as disk:
        _ = disk.truncate((START + count) * SECTOR)
        _ = disk.seek(446)
        _ = disk.write(_ENTRY.pack(0x80, b"", 0x0C, b"", START, count))
        _ = disk.seek(510)
        _ = disk.write(b"\x55\xaa")
    _run("mkfs.vfat", "-F", "32", "--offset", str(START), str(file), str(count // 2))
    names = sorted(str(each) for each in folder.iterdir())
    _run("mcopy", "-s", "-i", f"{file}@@{START * SECTOR}", *names, "::")
    shutil.rmtree(folder)


def make_flash(file: Path) -> None:
    """The flash memory with SETTINGS, as U-Boot keeps its environment where it has one copy."""
    data = b"".join(f"{name}={value}\0".encode("ascii") for name, value in SETTINGS.items())
    data = data.ljust(SETTINGS_SIZE - 4, b"\0")
    with file.open("xb") as flash:
        _ = flash.write(zlib.crc32(data).to_bytes(4, "little") + data)
        _ = flash.truncate(FLASH_SIZE)


def script_image(text: str) -> bytes:
    """A script as `source` takes it; what `mkimage -T script` makes, without a time."""
    body = text.encode("ascii")
    data = len(body).to_bytes(4, "big") + bytes(4) + body
    fields = (len(data), 0, 0, zlib.crc32(data), _LINUX, _ARM64, _SCRIPT, 0, b"nexus")
    head = _HEAD.pack(_MAGIC, 0, 0, *fields)
    return _HEAD.pack(_MAGIC, zlib.crc32(head), 0, *fields) + data


def _run(name: str, *arguments: str) -> None:
    try:
        done = subprocess.run(
            [_tool(name), *arguments],
            capture_output=True,
            text=True,
            timeout=TOOL_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotHad(f"{name} was not over in {TOOL_MAX:.0f} s; try `df -h`") from None
    if done.returncode:
        raise NotHad(f"{name} says {done.stderr.strip()!r}; try `df -h`")


def _tool(name: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *TOOL_FOLDERS))
    program = shutil.which(name, path=path)
    if program is None:
        raise NotHad(f"there is no {name}; try `apt-get install {TOOLS[name]}`")
    return program
