"""Write the pages that come from the code: docs/reference/*.md whole, and parts of docs/contracts
and docs/claims.md.

`python -m tools.pages` writes them; with `--check` it writes nothing and exits 1 if one differs.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec

from nexus.init.policy import policy_schema_text
from nexus.init.system import schema_text
from nexus.proof import compare, worlds
from nexus.proof.report import spans
from nexus.testing.golden import protocols
from nexus.wire import HEADER_SIZE, Protocol, ReplyStatus, RequestInfo
from tests.sim.planted_bugs import BUGS
from tools.statuses import Evidence, Refusal, declared, evidence

ROOT: Final = Path(__file__).resolve().parent.parent
WRITTEN: Final = "<!-- Written by `make docs` from {source}; edit that instead. -->"

CONTRACTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "docs/contracts/ipc-liveness.md": {
        "limits": ("nexus.abi.limits", "nexus.ipc.*"),
        "refusals": ("abi", "wire", "ipc", "meta", "init", "timed", "interactive"),
    },
    "docs/contracts/ipc-performance.md": {
        "limits": ("nexus.wire.frame", "nexus.wire.protocol", "nexus.ipc.*"),
        "refusals": ("bulk", "echo", "testsvc"),
    },
}
"""Which limits (modules) and which statuses (owners) each contract quotes."""

LIMIT: Final = re.compile(r"^([A-Z][A-Z0-9_]*): Final = [^\n]*?#\s*([^\n]+)$", re.MULTILINE)
BLOCK: Final = "<!-- {name}: written by `make docs` -->\n{text}<!-- end of {name} -->"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    cells = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in cells
    )


def limits(module: ModuleType) -> list[tuple[str, object, str]]:
    """The commented constants of a module: name, value, unit and reason."""
    found = LIMIT.findall(inspect.getsource(module))
    return [
        (name, value, comment)
        for name, comment in found
        if isinstance(value := getattr(module, name), int) and not isinstance(value, IntEnum)
    ]


def _limit_rows(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    for name, value, comment in limits(module):
        yield f"`{name}`", f"{value:,}" if isinstance(value, int) else str(value), comment


# ---------------------------------------------------------------- docs/reference


def describe(info: Any) -> str:
    """The type and the bounds of a field, in words."""
    match info:
        case msgspec.inspect.IntType(ge=lowest, le=highest):
            return f"integer {_range(lowest, highest)}".strip()
        case msgspec.inspect.BytesType(min_length=least, max_length=most):
            return f"{_range(least or 0, most)} bytes"
        case msgspec.inspect.StrType(min_length=least, max_length=most, pattern=pattern):
            shape = f" like `{pattern}`" if pattern else ""
            return f"text, {_range(least or 0, most)} characters{shape}"
        case msgspec.inspect.ListType(item_type=item, min_length=least, max_length=most):
            return f"list, {_range(least or 0, most)} of ({describe(item)})"
        case msgspec.inspect.StructType(cls=cls) | msgspec.inspect.EnumType(cls=cls):
            return f"`{cls.__name__}`"
        case msgspec.inspect.TupleType(item_types=items):
            return "(" + ", ".join(describe(item) for item in items) + ")"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(describe(each) for each in types)
        case _:
            return type(info).__name__.removesuffix("Type").lower()


def _range(lowest: float | None, highest: float | None) -> str:
    if lowest is None and highest is None:
        return ""
    return f"{lowest if lowest is not None else ''}..{highest if highest is not None else ''}"


def _structs(message: type, seen: list[type]) -> list[type]:
    """The messages nested in the fields of a message, each once, outermost first."""

    def walk(info: Any) -> None:
        match info:
            case msgspec.inspect.StructType(cls=cls, fields=fields):
                if cls not in seen:
                    seen.append(cls)
                    for field in fields:
                        walk(field.type)
            case msgspec.inspect.ListType(item_type=item):
                walk(item)
            case msgspec.inspect.TupleType(item_types=items):
                for item in items:
                    walk(item)
            case msgspec.inspect.UnionType(types=types):
                for each in types:
                    walk(each)
            case _:
                pass

    walk(msgspec.inspect.type_info(message))
    return seen


def _fields(message: type) -> str:
    info = msgspec.inspect.type_info(message)
    assert isinstance(info, msgspec.inspect.StructType)
    if not info.fields:
        return "No fields.\n"
    return table(
        ("field", "type and bounds"), ((f"`{f.name}`", describe(f.type)) for f in info.fields)
    )


def _request(protocol: Protocol, info: RequestInfo) -> str:
    traits = [f"op {info.op}", "may be repeated" if info.idempotent else "must not be repeated"]
    if info.moves:
        traits.append("a capability may move with it")
    if info.gives:
        traits.append("a capability may move with its answer")
    if not protocol.codecs[info.request].batches:
        traits.append("refused in a batch")
    codec = protocol.codecs[info.request]
    return (
        f"### {info.request.__name__}\n\n{inspect.getdoc(info.request)}\n\n"
        f"{', '.join(traits).capitalize()}.\n"
        f"Answered with `{info.reply.__name__}`.\n"
        f"At most {HEADER_SIZE + codec.request_size_max} bytes as a frame, "
        f"its answer {HEADER_SIZE + codec.reply_size_max}.\n\n{_fields(info.request)}"
    )


def reference(protocol: Protocol, module: ModuleType) -> str:
    """The reference page of a protocol."""
    source = f"src/{module.__name__.replace('.', '/')}.py"
    parts = [
        f"# {protocol.name}\n",
        WRITTEN.format(source=source) + "\n",
        f"{inspect.getdoc(module)}\n",
        f"Protocol number {protocol.number}, version {protocol.version}.\n",
    ]
    if rows := list(_limit_rows(module)):
        parts.append("## Limits\n\n" + table(("limit", "value", "unit and reason"), rows))
    own = [refusal for refusal in declared() if refusal.owner == protocol.name]
    parts.append(
        "## Statuses\n\nBesides those every protocol shares (index).\n\n"
        + table(("number", "status", "when"), ((r.number, f"`{r.name}`", r.reason) for r in own))
        if own
        else "## Statuses\n\nOnly those every protocol shares (index).\n"
    )
    parts.append("## Requests\n")
    parts.extend(_request(protocol, info) for info in protocol.requests)
    structs: list[type] = []
    for info in protocol.requests:
        structs = _structs(info.reply, structs)
    for info in protocol.requests:
        structs = _structs(info.request, structs)
    requests = {info.request for info in protocol.requests}
    parts.append("## Messages\n")
    parts.extend(
        f"### {cls.__name__}\n\n{inspect.getdoc(cls)}\n\n{_fields(cls)}"
        for cls in structs
        if cls not in requests
    )
    return "\n".join(parts)


def index(found: Sequence[tuple[Protocol, ModuleType]]) -> str:
    """The first page of the reference."""
    abi = importlib.import_module("nexus.abi.limits")
    return "\n".join(
        [
            "# Reference\n",
            WRITTEN.format(source="src/nexus/protocols and src/nexus/abi") + "\n",
            (
                "Promises of the kernel ABI, ground by ground: [promises.md](promises.md).\n"
                "The traps themselves: the docstrings of `src/nexus/abi/traps.py`.\n"
                "What a system file may say: [system-file.schema.json](system-file.schema.json);"
                " a policy file: [policy-file.schema.json](policy-file.schema.json).\n"
            ),
            "## Protocols\n",
            table(
                ("number", "protocol", "version", "requests"),
                (
                    (
                        protocol.number,
                        f"[{protocol.name}]({protocol.name}.md)",
                        protocol.version,
                        ", ".join(info.request.__name__ for info in protocol.requests),
                    )
                    for protocol, _ in found
                ),
            ),
            "## Statuses of every protocol\n",
            table(
                ("number", "status", "when"),
                ((r.number, f"`{r.name}`", r.reason) for r in declared() if r.owner == "wire"),
            ),
            f"`{ReplyStatus.OK.name}` is {ReplyStatus.OK.value}.\n",
            "## Statuses of the kernel\n",
            table(
                ("number", "status", "when"),
                ((r.number, f"`{r.name}`", r.reason) for r in declared() if r.owner == "abi"),
            ),
            "## Limits of the ABI\n",
            table(("limit", "value", "unit and reason"), _limit_rows(abi)),
        ]
    )


# ---------------------------------------------------------------- docs/contracts


def sentence(test: str) -> str:
    """What a test says, as words: the name without its prefix."""
    return test.rpartition("::")[2].removeprefix("test_").replace("_", " ")


def matrix(owners: Sequence[str], refusals: Sequence[Refusal], found: Evidence) -> str:
    """Input, refusal, status, test, rung: one row for each test of each status."""
    rows: list[tuple[str, ...]] = []
    for refusal in refusals:
        if refusal.owner in owners:
            rungs = ", ".join(f"#{number}" for number in sorted(set(found.rungs[refusal.key])))
            rows.extend(
                (
                    sentence(test),
                    refusal.reason,
                    f"`{refusal.key}`",
                    f"`{test}`",
                    rungs or "-",
                )
                for test in found.tests[refusal.key]
            )
    return table(("input", "refusal", "status", "test", "rung"), rows)


def _modules(pattern: str) -> list[ModuleType]:
    name, star, _ = pattern.partition(".*")
    if not star:
        return [importlib.import_module(name)]
    folder = ROOT / "src" / name.replace(".", "/")
    return [
        importlib.import_module(f"{name}.{path.stem}")
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__"
    ]


def fill(page: str, blocks: dict[str, str]) -> str:
    """A page with the text between its marks replaced; each block has to have its marks."""
    for name, text in blocks.items():
        first, last = BLOCK.format(name=name, text="\n").split("\n\n")
        assert page.count(first) == 1, f"the mark {first!r} is missing"
        before, _, rest = page.partition(first)
        _, _, after = rest.partition(last)
        page = before + BLOCK.format(name=name, text=text) + after
    return page


def contract(path: Path, refusals: Sequence[Refusal], found: Evidence) -> str:
    """A contract page with its limits and its reject matrix as the code has them now."""
    wanted = CONTRACTS[path.relative_to(ROOT).as_posix()]
    rows = [
        (name, value, comment, f"`{module.__name__}`")
        for pattern in wanted["limits"]
        for module in _modules(pattern)
        for name, value, comment in _limit_rows(module)
    ]
    return fill(
        path.read_text("utf-8"),
        {
            "limits": table(("limit", "value", "unit and reason", "where"), rows),
            "reject matrix": matrix(wanted["refusals"], refusals, found),
        },
    )


# ---------------------------------------------------------------- proof


def three_worlds() -> str:
    """What `nexus prove --compare` compares, what it leaves out, and what may differ."""
    return "\n".join(
        [
            "# Three worlds compared\n",
            WRITTEN.format(source="src/nexus/proof/worlds.py and compare.py") + "\n",
            (
                "`nexus prove --compare sim,linux,vm` runs one scenario on each ground, and"
                " compares each with the first.\n"
                "A difference is red, unless it stands in a table here; the tables are the code's,"
                " and each report counts how often a row was needed.\n"
            ),
            "## `--scenario ladder`, the default: whole systems\n",
            (
                "The whole ladder is climbed on each ground, boot by boot.\n"
                "Compared is every line that a service or init prints, in each one's own order"
                " (init's, who hears of others as they come, without one), with process ids left"
                " out, and how each instance ends.\n"
            ),
            table(
                ("part", "rungs", "boots"),
                ((each.what, spans(each.rungs), spans(each.boots)) for each in worlds.PARTS),
            ),
            "What may differ:\n",
            table(("difference", "why"), ((each.id, each.why) for each in worlds.ALLOWED)),
            "## `--scenario conformance`: what the kernels promise\n",
            (
                "Four small programs and a root task of their own on the bare kernel.\n"
                "Compared is every trap with its answer, line, link, start, refused start and end,"
                " in the order of the task that it is about. It has calls, refusals, moves, shared"
                " memory, the end of a peer and a kill; it has no init, so no denial by policy, no"
                " state and no update: those are the ladder's.\n"
            ),
            f"Differences that are allowed: {len(compare.ALLOWED) or 'none'}.",
            "Not compared at all:\n",
            table(
                ("left out", "what", "why"),
                ((each.id, each.what, each.why) for each in compare.LEFT_OUT),
            ),
        ]
    )


def planted() -> str:
    """The planted bugs, by what found them."""
    return table(("area", "bug", "found by", "needed", "held to"), (bug.told for bug in BUGS))


def pages() -> dict[Path, str]:
    """Every page that comes from the code, as it should be."""
    found = [(protocol, _module_of(protocol)) for protocol in protocols()]
    folder = ROOT / "docs" / "reference"
    wanted = {
        folder / f"{protocol.name}.md": reference(protocol, module) for protocol, module in found
    }
    wanted[folder / "index.md"] = index(found)
    wanted[folder / "system-file.schema.json"] = schema_text()
    wanted[folder / "policy-file.schema.json"] = policy_schema_text()
    wanted[folder / "worlds.md"] = three_worlds()
    page = ROOT / "docs" / "claims.md"
    wanted[page] = fill(page.read_text("utf-8"), {"planted bugs": planted()})
    refusals = declared()
    seen = evidence(ROOT, refusals)
    for name in CONTRACTS:
        wanted[ROOT / name] = contract(ROOT / name, refusals, seen)
    return wanted


def _module_of(protocol: Protocol) -> ModuleType:
    return importlib.import_module(protocol.requests[0].request.__module__)


def main(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    different = 0
    for path, text in sorted(pages().items()):
        if not path.exists() or path.read_text("utf-8") != text:
            different += 1
            if "--check" in arguments:
                name = path.relative_to(ROOT)
                print(f"pages: {name} is not what the code says now: run make docs and read it")
            else:
                path.write_text(text, "utf-8")
    return 1 if different and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
