import textwrap

import pytest

from tools.service_loops import loops, main


def found(body: str) -> list[str]:
    source = "async def f(client, request, names):\n"
    source += textwrap.indent(textwrap.dedent(body), "    ")
    return [reason for _, reason in loops(source)]


OWN = {
    "a wait for messages": """
        while True:
            m = await Recv((slot,), deadline)
        """,
    "a call by hand": """
        while x:
            m = await abi.Call(a, b, c, d, e)
        """,
    "a kept trap": """
        trap = ReplyRecv(s, d)
        while x:
            m = await trap
        """,
    "a sleep": """
        for _ in range(9):
            await SleepUntil(t)
        """,
    "a poll in the condition": """
        while await Recv(s, NO_WAIT):
            pass
        """,
    "a poll in an inner loop": """
        if x:
            for name in names:
                with y:
                    while z:
                        await Recv(s, d)
        """,
    "a handler that falls through": """
        for _ in range(9):
            try:
                await Send(s, b"")
            except AbiError:
                n = 1
        """,
    "a handler that continues": """
        while True:
            try:
                return await client.call(request, d)
            except AbiError:
                continue
        """,
    "a condition on the outcome": """
        r = None
        while not isinstance(r, Sum):
            r = await client.call(request, d)
        """,
    "an await in the condition": """
        while (r := await client.call(request, d)) is None:
            pass
        """,
    "a continue on the outcome": """
        for _ in range(3):
            r = await client.call(request, d)
            if isinstance(r, Refused):
                continue
            return r
        """,
}

HONEST = {
    "no loop": "r = await client.call(request, d)",
    "a loop that ends at the first refusal": """
        for name in names:
            r = await client.call(request, d)
            if isinstance(r, Refused):
                return r
        """,
    "one swap per given thing": """
        for name in names:
            await Send(s, name)
            m = await Recv(s, d)
        """,
    "a handler that leaves": """
        for name in names:
            try:
                await Send(s, name)
            except AbiError:
                return None
        """,
    "page after page": """
        rows = []
        while len(rows) < total:
            rows += (await client.call(request, d)).rows
        """,
    "no await": """
        while x:
            x = x.next
        """,
    "a continue on what was given": """
        for name in names:
            if isinstance(name, str):
                continue
            await client.call(name, d)
        """,
    "a function inside": """
        while x:
            async def later():
                return await Recv(s, d)
            x = later
        """,
    "a try around no await": """
        for name in names:
            try:
                n = int(name)
            except ValueError:
                n = 0
        """,
}


@pytest.mark.parametrize("body", OWN.values(), ids=OWN)
def test_a_loop_of_its_own_is_found(body: str) -> None:
    assert len(found(body)) == 1


@pytest.mark.parametrize("body", HONEST.values(), ids=HONEST)
def test_an_honest_loop_is_left_alone(body: str) -> None:
    assert found(body) == []


def test_no_service_has_a_loop_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
