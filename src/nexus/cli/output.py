"""What a person sees: tables, JSON, progress. Colour and movement only on a terminal.

rich is imported when something is shown on a terminal, and not before: most of a command's time
would be its import.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from nexus.cli.errors import CommandFailed

STYLES: Final[Mapping[str, str]] = {
    "up": "green",
    "ok": "green",
    "held": "green",
    "allow": "green",
    "info": "cyan",
    "starting": "yellow",
    "backing off": "yellow",
    "late": "yellow",
    "degraded": "yellow",
    "warn": "yellow",
    "left out": "yellow",
    "failed": "red",
    "absent": "red",
    "deny": "red",
    "error": "red",
}
"""Colours of the words that say how something is."""


def is_lively(stream: Any = None) -> bool:
    """Whether colour and progress are wanted on this stream: a terminal, and no NO_COLOR."""
    stream = sys.stdout if stream is None else stream
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


@contextmanager
def answering() -> Iterator[None]:
    """Write a piece of the answer. Raises CommandFailed if nobody can have it; that somebody has
    read enough of it is a BrokenPipeError, as ever."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_answer()
        raise CommandFailed(f"cannot write the answer: {error.strerror or error}") from error


def drop_answer() -> None:
    """Let what waits to be written go nowhere: Python would complain once more at its exit."""
    _ = os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def say(text: str) -> None:
    """A line of the answer."""
    with answering():
        print(text)


def say_bytes(data: bytes) -> None:
    """An answer that is no text, as it is."""
    with answering():
        _ = sys.stdout.flush()
        _ = sys.stdout.buffer.write(data)
        _ = sys.stdout.buffer.flush()


def finish_answer() -> None:
    """Have all of the answer where it belongs. Raises as `answering`."""
    with answering():
        _ = sys.stdout.flush()


def tell(text: str) -> None:
    """A line about what is going on, beside the answer."""
    print(text, file=sys.stderr)


def say_json(document: Any) -> None:
    """The answer as one JSON document."""
    say(json.dumps(document, indent=2, default=_plain))


def say_json_line(document: Any) -> None:
    """One JSON document of several, on a line of its own."""
    say(json.dumps(document, default=_plain, separators=(",", ":")))
    finish_answer()


def _plain(value: Any) -> Any:
    """What json does not know: bytes as hexadecimal, structs as their fields."""
    import msgspec

    if isinstance(value, bytes):
        return value.hex()
    return msgspec.structs.asdict(value)


def shown(value: str) -> str:
    """What a service says of itself, in which no character ends it or a line, or moves a cursor."""
    return "".join(
        f"\\{each}" if each in '\\"' else each if each.isprintable() else ascii(each)[1:-1]
        for each in value
    )


def say_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns; coloured on a terminal, plain and as wide as needed elsewhere."""
    kept = [tuple(row) for row in rows]
    if is_lively():
        with answering():
            _say_rich_table(heads, kept)
    else:
        say("\n".join(table_lines(heads, kept)))


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces between them."""
    lines = [tuple(heads), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _say_rich_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head)
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell.lower(), "")) for cell in row))
    Console().print(table)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Something moves while one waits, on a terminal; nothing elsewhere."""
    if not is_lively(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many of `total` bytes are done, on a terminal; nothing elsewhere."""
    if not is_lively(sys.stderr):
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)
