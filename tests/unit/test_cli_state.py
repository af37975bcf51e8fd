"""`nexus state` from its words to what it prints, over a scripted operator."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from nexus.cli import ask
from nexus.cli.client import ServiceRefused
from nexus.cli.command import main
from nexus.kernel.sim.disk import Disk as SimDisk
from nexus.protocols.statefsd import (
    INLINE_VALUE_MAX,
    LIST_MAX,
    Delete,
    Durability,
    Get,
    GetStore,
    Keys,
    ListKeys,
    Lost,
    Put,
    StatefsdStatus,
    Store,
    Stored,
    Value,
)
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Change as EngineChange
from nexus.services.statefsd.engine import Store as EngineStore
from nexus.wire import ReplyStatus
from tests.fakes.diskdevice import DiskDevice

WELL = Store("disk", "node", 3, 41, 40, 7, 1000, 2_000_000, 1, 0, [], writable=True)
Answer = Callable[[Any], Any]


class Operator:
    """A connection whose answers a test gives; a status is a refusal of statefsd's."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def client(self) -> "Operator":
        return self

    def relay(self, service: str, _protocol: Any, request: Any, _seconds: float) -> Any:
        assert service == "statefsd"
        self.asked.append(request)
        outcome = self.answer(request)
        if isinstance(outcome, StatefsdStatus | ReplyStatus):
            raise ServiceRefused(service, type(request).__name__, outcome)
        return outcome


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], Operator]:
    """The running system is one whose statefsd answers so."""

    def made(answer: Answer) -> Operator:
        operator = Operator(answer)
        monkeypatch.setattr(ask, "asked", lambda _name: operator)
        return operator

    return made


def test_get_prints_the_bytes_and_nothing_else(
    system: Any, capfdbinary: Any, tmp_path: Path
) -> None:
    operator = system(lambda _: Value(b"\x00\xff\n", 4))

    assert main(["state", "get", "/state/t/k"]) == 0
    assert capfdbinary.readouterr().out == b"\x00\xff\n"
    assert main(["state", "get", "/state/t/k", "-o", str(tmp_path / "value")]) == 0
    assert (tmp_path / "value").read_bytes() == b"\x00\xff\n"
    assert operator.asked == [Get(b"/state/t/k")] * 2


def test_get_as_json_has_text_or_hexadecimal(system: Any, capsys: Any) -> None:
    _ = system(lambda _: Value(b"70", 4))
    assert main(["state", "get", "/state/t/k", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    _ = system(lambda _: Value(b"\xff", 5))
    assert main(["state", "get", "/state/t/k", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)

    assert text == {"key": "/state/t/k", "sequence": 4, "value": "70", "size": 2}
    assert data == {"key": "/state/t/k", "sequence": 5, "value_hex": "ff", "size": 1}


def test_put_is_durable_unless_it_is_told_otherwise(system: Any, capsys: Any) -> None:
    operator = system(
        lambda request: Stored(9, request.durability is Durability.DURABLE, repeated=False)
    )

    assert main(["state", "put", "/state/t/k", "70"]) == 0
    assert main(["state", "put", "/state/t/k", "70", "--accepted", "--request-id", "5"]) == 0
    assert main(["state", "put", "/state/t/k", "70", "--json"]) == 0

    assert operator.asked == [
        Put(b"/state/t/k", b"70", Durability.DURABLE, 0),
        Put(b"/state/t/k", b"70", Durability.ACCEPTED, 5),
        Put(b"/state/t/k", b"70", Durability.DURABLE, 0),
    ]
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "/state/t/k was set: sequence 9, durable"
    assert second == "/state/t/k was set: sequence 9, accepted"
    assert json.loads("\n".join(rest)) == {
        "key": "/state/t/k",
        "sequence": 9,
        "durable": True,
        "repeated": False,
    }


def test_put_takes_a_file_or_the_standard_input(
    system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = system(lambda _: Stored(1, durable=True, repeated=False))
    file = tmp_path / "value"
    _ = file.write_bytes(b"\x00from a file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\x01piped")))

    assert main(["state", "put", "/state/t/k", "--file", str(file)]) == 0
    assert main(["state", "put", "/state/t/k", "--file", "-"]) == 0

    assert [request.value for request in operator.asked] == [b"\x00from a file", b"\x01piped"]


def test_a_repeated_request_is_said_to_be_one(system: Any, capsys: Any) -> None:
    _ = system(lambda _: Stored(3, durable=True, repeated=True))

    assert main(["state", "rm", "/state/t/k", "--request-id", "7"]) == 0

    assert capsys.readouterr().out == ("/state/t/k had been applied before: sequence 3, durable\n")


def test_rm_drops_a_key_durably(system: Any, capsys: Any) -> None:
    operator = system(lambda _: Stored(3, durable=True, repeated=False))

    assert main(["state", "rm", "/state/t/k"]) == 0

    assert operator.asked == [Delete(b"/state/t/k", Durability.DURABLE, 0)]
    assert capsys.readouterr().out == "/state/t/k was removed: sequence 3, durable\n"


def test_ls_follows_the_pages(system: Any, capsys: Any) -> None:
    pages = {b"": Keys([b"/state/a", b"/state/b"], more=True), b"/state/b": Keys([b"/state/c"],
             more=False)}  # fmt: skip
    operator = system(lambda request: pages[request.after])

    assert main(["state", "ls"]) == 0
    assert capsys.readouterr().out == "/state/a\n/state/b\n/state/c\n"
    assert main(["state", "ls", "/state/t/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == ["/state/a", "/state/b", "/state/c"]
    assert operator.asked[2] == ListKeys(b"/state/t/", b"", LIST_MAX)


def test_check_says_how_the_store_is_by_its_exit_code(system: Any, capsys: Any) -> None:
    operator = system(lambda _: WELL)
    assert main(["state", "check"]) == 0
    shown = capsys.readouterr().out
    assert operator.asked == [GetStore()]
    assert "device: disk (node)" in shown
    assert "epoch 3, sequence 41, durable up to 40" in shown

    lost = [Lost(b"/state/t/k", 4096, 12), Lost(b"", 8192, 0)]
    damaged = Store("disk", "node", 3, 41, 40, 7, 1000, 2_000_000, 1, 2, lost, writable=True)
    _ = system(lambda _: damaged)
    assert main(["state", "check"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].split() == ["/state/t/k", "4096", "12"]
    assert shown[-1].split() == ["-", "8192", "-"]

    assert main(["state", "check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["lost"][0]["key"] == "/state/t/k"


def test_a_store_that_cannot_be_written_is_not_well(system: Any, capsys: Any) -> None:
    _ = system(lambda _: Store("disk", "file", 3, 1, 1, 1, 1, 9, 0, 0, [], writable=False))

    assert main(["state", "check"]) == 1
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize("status", list(StatefsdStatus), ids=lambda status: status.name)
def test_every_refusal_is_one_sentence_with_its_name(
    system: Any, capsys: Any, status: StatefsdStatus
) -> None:
    _ = system(lambda _: status)

    code = main(["state", "put", "/state/t/k", "1"])

    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert status.name in captured.err


def test_a_denial_says_which_right_lacks(system: Any, capsys: Any) -> None:
    _ = system(lambda _: ReplyStatus.DENIED)

    assert main(["state", "get", "/state/t/k"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nexus: /state/t/k: DENIED, operator's entry in the system file")
    assert "statefs.read" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["put", "/state/t/k"], "give the value, or --file FILE"),
        (["put", "/state/t/k", "1", "--file", "x"], "give the value, or --file FILE"),
        (["put", "/state/t/k", "--file", "/nonexistent/file"], "cannot read /nonexistent/file"),
        (["put", "/state/t/k", "x" * (INLINE_VALUE_MAX + 1)], "the value has 7169 bytes"),
        (["get", "/state/" + "k" * 300], "the key has 307 bytes"),
        (["get"], "Missing argument 'key'"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(
    system: Any, capsys: Any, words: list[str], sentence: str
) -> None:
    operator = system(lambda _: None)

    assert main(["state", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert operator.asked == []


def test_the_examples_are_in_the_help(capsys: Any) -> None:
    for command in ("get", "put", "ls", "rm", "check"):
        assert main(["state", command, "--help"]) == 0
        assert f"nexus state {command}" in capsys.readouterr().out.partition("Examples:")[2]


def test_the_power_is_cut_from_the_command_line(capsys: Any) -> None:
    words = ["sim", "powercut", "state", "--workload", "puts", "--every", "50"]

    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    text = capsys.readouterr().out

    assert figures["cases"] > 0
    assert (figures["losses"], figures["bricks"], figures["problems"]) == (0, 0, [])
    assert "0 losses, 0 bricks" in text


def test_wrong_words_about_a_power_cut_are_wrong_usage(capsys: Any) -> None:
    assert main(["sim", "powercut"]) == 2
    assert "nexus sim powercut state" in capsys.readouterr().err
    assert main(["sim", "powercut", "state", "--workload", "none"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert main(["sim", "powercut", "state", "--help"]) == 0
    assert "--seed" in capsys.readouterr().out


# ------------------------------------------------------------------ images


def an_image(path: Path, *, rot: bytes = b"") -> None:
    """An image with three keys, one of them damaged."""
    disk = SimDisk(8192)
    device = DiskDevice(disk)

    async def written() -> None:
        opened = await EngineStore.open(device, Settings().limits)
        for number in range(3):
            change = EngineChange(b"/state/t/%d" % number, b"needle-%d" % number)
            _ = opened.stage([change])
            await opened.commit(True)
        await opened.close()

    with contextlib.suppress(StopIteration):
        written().send(None)
    image = bytearray(disk.durable_image())
    if rot:
        image[image.index(rot)] ^= 1
    _ = path.write_bytes(image)


def test_an_image_is_looked_at_and_not_written(tmp_path: Path, capsys: Any) -> None:
    image = tmp_path / "disk.img"
    an_image(image)
    before = image.read_bytes()

    assert main(["state", "check", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["state", "check", str(image), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)

    assert lines[0].startswith(f"{image} opens: epoch ")
    assert lines[1] == "keys: 3, quarantined: 0"
    assert lines[3].split() == ["/state/t/0", "8", "1"]
    assert [each["key"] for each in document["keys"]] == [f"/state/t/{n}" for n in range(3)]
    assert image.read_bytes() == before


def test_damage_in_an_image_is_named_by_the_exit_code_too(tmp_path: Path, capsys: Any) -> None:
    image = tmp_path / "disk.img"
    an_image(image, rot=b"needle-1")

    assert main(["state", "check", str(image)]) == 1
    lines = capsys.readouterr().out.splitlines()

    assert lines[1] == "keys: 3, quarantined: 1"
    assert lines[4].split() == ["/state/t/1", "damaged", "2"]
    assert lines[-1].startswith("lost: /state/t/1, at byte ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 blocks are too few"),
        (bytes(1 << 20), "it is blank"),
        (b"\xeb\x3c\x90MSDOS5.0".ljust(1 << 20, b"x"), "it holds something else than a store"),
    ],
)
def test_what_is_no_store_is_told_with_its_reason(
    tmp_path: Path, capsys: Any, content: bytes, reason: str
) -> None:
    image = tmp_path / "disk.img"
    _ = image.write_bytes(content)

    assert main(["state", "check", str(image)]) == 1
    assert reason in capsys.readouterr().out
    assert main(["state", "check", str(image), "--json"]) == 1
    assert reason in json.loads(capsys.readouterr().out)["reason"]


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path: Path, capsys: Any) -> None:
    assert main(["state", "check", str(tmp_path / "none.img")]) == 2
    assert "cannot read" in capsys.readouterr().err
