"""Python compiled for a guest, by an interpreter of the guest's own minor version.

A guest compiles nothing: on an emulated machine that takes minutes. What is made here is taken
without a look at the source (PEP 552, "unchecked"), and the same source gives the same bytes:
marshal's version 2 writes no references, which would follow what else the interpreter has seen.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nexus.vm.packages import NotHad

COMPILE_MAX: Final = 300.0  # seconds for everything; it takes ten on a slow machine
UNCHECKED: Final = 0b01  # flags of PEP 552: found by hash, and not compared with the source
MARSHAL_VERSION: Final = 2

# Reads lines of JSON, [name shown in tracebacks, source file, target file]; runs in the compiler.
PROGRAM: Final = f"""
import importlib.util, json, marshal, os, sys
for line in sys.stdin:
    shown, source, target = json.loads(line)
    with open(source, "rb") as file:
        text = file.read()
    code = compile(text, shown, "exec", dont_inherit=True, optimize=0)
    head = importlib.util.MAGIC_NUMBER + ({UNCHECKED}).to_bytes(4, "little")
    data = head + importlib.util.source_hash(text) + marshal.dumps(code, {MARSHAL_VERSION})
    with open(target + ".new", "wb") as file:
        file.write(data)
    os.replace(target + ".new", target)
"""


def compiler_of(version: str) -> str:
    """A Python of this minor version ("3.11") on this machine. Raises NotHad."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise NotHad(
            f"no Python {version} to compile for the guest; try `apt-get install python{version}`"
        )
    return found


def compiled(sources: Mapping[str, bytes], version: str, cache: Path) -> dict[str, bytes]:
    """The compiled form of each source, by the name that a traceback shows. Raises NotHad, and
    SyntaxError as the sentence of it for a source that is none."""
    folder = cache / "compiled" / f"{version}-{MARSHAL_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    targets = {
        shown: folder / hashlib.sha256(shown.encode() + b"\0" + text).hexdigest()
        for shown, text in sources.items()
    }
    missing = [shown for shown, target in sorted(targets.items()) if not target.exists()]
    if missing:
        _compile({shown: (sources[shown], targets[shown]) for shown in missing}, version)
    return {shown: target.read_bytes() for shown, target in targets.items()}


def _compile(wanted: Mapping[str, tuple[bytes, Path]], version: str) -> None:
    lines = []
    for shown, (text, target) in wanted.items():
        source = target.with_suffix(".py")
        _ = source.write_bytes(text)
        lines.append(json.dumps([shown, str(source), str(target)]))
    try:
        done = subprocess.run(  # noqa: S603 (our own program)
            [compiler_of(version), "-S", "-c", PROGRAM],
            input="\n".join(lines),
            env={"PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=COMPILE_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotHad(f"nothing compiled in {COMPILE_MAX:.0f} s; try `nexus vm build`") from None
    finally:
        for _text, target in wanted.values():
            target.with_suffix(".py").unlink(missing_ok=True)
    if done.returncode:
        raise SyntaxError(done.stderr.strip().rpartition("\n")[2])
