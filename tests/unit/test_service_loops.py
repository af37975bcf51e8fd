import textwrap

import pytest

from tools.service_loops import loops, main


def found(body: str) -> list[str]:
    source = "async def f(client, request, names):\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    return [reason for _, reason in loops(source)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True:\n    m = await Recv((slot,), deadline)\n", "polls"),
        ("while x:\n    m = await abi.Call(a, b, c, d, e)\n", "polls"),
        ("trap = ReplyRecv(s, d)\nwhile x:\n    m = await trap\n", "polls"),
        ("for _ in range(9):\n    await SleepUntil(t)\n", "polls"),
        ("while await Recv(s, NO_WAIT):\n    pass\n", "polls"),
        (
            "for _ in range(9):\n    try:\n        await Send(s, b'')\n    except AbiError:\n        n = 1\n",
            "tries again",
        ),
        (
            "while True:\n    try:\n        return await client.call(request, d)\n    except AbiError:\n        continue\n",
            "tries again",
        ),
        (
            "r = None\nwhile not isinstance(r, Sum):\n    r = await client.call(request, d)\n",
            "repeats until the outcome is right",
        ),
        (
            "while (r := await client.call(request, d)) is None:\n    pass\n",
            "repeats until the outcome is right",
        ),
        (
            "for _ in range(3):\n    r = await client.call(request, d)\n    if isinstance(r, Refused):\n        continue\n    return r\n",
            "repeats until the outcome is right",
        ),
        (
            "if x:\n    while True:\n        with y:\n            while z:\n                await Recv(s, d)\n",
            "polls",
        ),
    ],
)
def test_a_loop_of_its_own_is_found(body: str, reason: str) -> None:
    assert reason in found(body)


@pytest.mark.parametrize(
    "body",
    [
        "r = await client.call(request, d)\n",
        "for name in names:\n    r = await client.call(request, d)\n    if isinstance(r, Refused):\n        return r\n",
        "for name in names:\n    await Send(s, name)\n    m = await Recv(s, d)\n",
        "for name in names:\n    try:\n        await Send(s, name)\n    except AbiError:\n        return None\n",
        "rows = []\nwhile len(rows) < total:\n    rows += (await client.call(request, d)).rows\n",
        "while x:\n    x = x.next\n",
        "for name in names:\n    if isinstance(name, str):\n        continue\n    await client.call(name, d)\n",
        "while x:\n    def later():\n        return Recv(s, d)\n    x = later()\n",
        "for name in names:\n    try:\n        n = int(name)\n    except ValueError:\n        n = 0\n",
    ],
)
def test_an_honest_loop_is_left_alone(body: str) -> None:
    assert found(body) == []


def test_no_service_has_a_loop_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
