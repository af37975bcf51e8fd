"""On which line of a TOML text a key stands: tomllib does not say.

Reads a text that tomllib has already accepted, so nothing is checked here; what this scanner
does not understand it skips, and the key then has the line of what surrounds it. The time it
takes grows with the text, as long as no key has very many parts: `too_many_parts` finds those.
"""

import re
from typing import Final

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root of the document."""

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRING: Final = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}'
    r"|'''(?:[^']|'(?!''))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR: Final = re.compile(r"[^,\]}\n#]+")
_BLANK: Final = re.compile(r"[ \t]*")
KEY_PARTS_MAX: Final = 64  # of one dotted key; a system file has five

_OPAQUE: Final = re.compile(  # strings and comments; one without an end goes on to the last
    r'"""(?:[^"\\]|\\.|"(?!""))*(?:"{3,5}|\\?\Z)'
    r"|'''(?:[^']|'(?!''))*(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]|\\[^\n])*(?:"|\\?$)'
    r"|'[^'\n]*(?:'|$)"
    r"|\#[^\n]*",
    re.DOTALL | re.MULTILINE,
)
_GAP: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")


class KeyLines:
    """The line of every key and list element of a document, counted from 1."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self._counted_at = 0  # up to here the lines are counted: once, or a file takes minutes
        self._counted = 1
        self._lines: dict[KeyPath, int] = {(): 1}
        self._counts: dict[KeyPath, int] = {}  # elements seen of each [[array of tables]]
        self._scan()

    def line(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest thing around it that is written down."""
        for length in range(len(path), 0, -1):
            found = self._lines.get(path[:length])
            if found is not None:
                return found
        return 1

    def has(self, path: KeyPath) -> bool:
        """Whether `path` itself is written down."""
        return path in self._lines

    def _here(self) -> int:
        self._counted += self._text.count("\n", self._counted_at, self._at)
        self._counted_at = self._at
        return self._counted

    def _note(self, path: KeyPath, line: int) -> None:
        """Write the line down for `path` and for what is around it and has none yet."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return
            self._lines[path[:length]] = line

    def _take(self, pattern: re.Pattern[str]) -> str:
        """What matches here, and go on behind it; the empty string if nothing does."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match.group()

    def _skip(self, pattern: re.Pattern[str]) -> None:
        """Go on behind what matches here."""
        _ = self._take(pattern)

    def _scan(self) -> None:
        table: KeyPath = ()
        while True:
            self._skip(_GAP)
            before = self._at
            if before >= len(self._text):
                return
            line = self._here()
            if self._text.startswith("[[", before):
                self._at += 2
                table = self._resolve(self._keys())
                index = self._counts.get(table, 0)
                self._counts[table] = index + 1
                table = (*table, index)
                self._note(table, line)
                self._skip_line()
            elif self._text[before] == "[":
                self._at += 1
                table = self._resolve(self._keys())
                self._note(table, line)
                self._skip_line()
            else:
                self._pair(table)
            if self._at == before:
                self._skip_line()

    def _resolve(self, keys: KeyPath) -> KeyPath:
        """A header's keys with the index of the present element after each array of tables."""
        path: KeyPath = ()
        for position, key in enumerate(keys):
            path = (*path, key)
            if position < len(keys) - 1 and path in self._counts:
                path = (*path, self._counts[path] - 1)
        return path

    def _skip_line(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end + 1

    def _keys(self) -> KeyPath:
        """A dotted key."""
        keys: list[str | int] = []
        while True:
            self._skip(_BLANK)
            string = self._take(_STRING)
            key = _unquoted(string) if string else self._take(_BARE)
            if not string and not key:
                return tuple(keys)
            keys.append(key)
            self._skip(_BLANK)
            if not self._text.startswith(".", self._at):
                return tuple(keys)
            self._at += 1

    def _pair(self, table: KeyPath) -> None:
        line = self._here()
        path = (*table, *self._keys())
        self._note(path, line)
        self._skip(_BLANK)
        if self._text.startswith("=", self._at):
            self._at += 1
            self._skip(_BLANK)
            self._value(path)

    def _value(self, path: KeyPath) -> None:
        opening = self._text[self._at : self._at + 1]
        if opening in {"[", "{"}:
            self._nested(path, "]" if opening == "[" else "}")
        elif not self._take(_STRING):
            self._skip(_SCALAR)

    def _nested(self, path: KeyPath, closing: str) -> None:
        """An array or an inline table, from its opening bracket to behind its closing one."""
        self._at += 1
        index = 0
        while self._at < len(self._text):
            self._skip(_GAP)
            before = self._at
            if self._text.startswith(closing, before):
                self._at += 1
                return
            if self._text.startswith(",", before):
                self._at += 1
                continue
            if closing == "]":
                self._note((*path, index), self._here())
                self._value((*path, index))
                index += 1
            else:
                self._pair(path)
            if self._at == before:
                self._at += 1


def too_many_parts(text: str) -> int | None:
    """The first line with a dotted key of more than KEY_PARTS_MAX parts, or None.

    Both tomllib and this scanner take quadratic time for such a key. Dots in strings and
    comments do not count. The text may be any: tomllib has not seen it yet.
    """
    bare = _OPAQUE.sub(lambda match: "\n" * match.group().count("\n"), text)
    for number, line in enumerate(bare.split("\n"), start=1):
        if line.count(".") > KEY_PARTS_MAX:
            return number
    return None


def _unquoted(string: str) -> str:
    """The key inside quotes; escapes in keys are rare and stay as they are written."""
    return string[1:-1]
