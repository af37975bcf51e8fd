import textwrap

import pytest

from tools.service_loops import EXCEPTIONS, SERVICES, loops, main


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
    "polling of a service": """
        while True:
            s = await client.call(GetStatus(), d)
            if s.ready:
                return
            await timed.call(Sleep(9), d)
        """,
    "polling a number of times": """
        for _ in range(50):
            o = await client.call(request, d)
            if o == Echoed(1):
                return o
        """,
    "polling through a wrapper": """
        for n in itertools.count():
            if await ready(client):
                break
        """,
    "a call of itself": """
        try:
            return await client.call(request, d)
        except AbiError:
            return await f(client, request, names)
        """,
    "a while that reads on": """
        rows = []
        while len(rows) < total:
            rows += (await client.call(request, d)).rows
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
    "a count that runs to its end": """
        for _ in range(9):
            r.append(await client.call(request, d))
        """,
    "a count that leaves and awaits nothing": """
        for n in range(9):
            if n == x:
                break
        await client.call(request, d)
        """,
    "a call of the same name on another": "await client.f(request)",
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


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("class A:\n  async def f(self):\n    await self.f()\n", 1),
        ("class A:\n  async def f(self):\n    await A.f(self)\n", 1),
        ("async def f():\n  await g()\nasync def g():\n  await f()\n", 2),
        ("async def f():\n  await g()\ndef g():\n  return f()\n", 1),
        ("class A:\n  async def f(self):\n    await self.other.f()\n", 0),
        ("class A:\n  async def f(self):\n    await f()\nasync def f():\n  pass\n", 0),
        ("def f(n):\n  return f(n - 1)\n", 0),
    ],
)
def test_an_async_function_does_not_lead_back_to_itself(source: str, count: int) -> None:
    assert len(list(loops(source))) == count


@pytest.mark.parametrize("place", EXCEPTIONS, ids="::".join)
def test_each_exception_is_needed_and_excuses_one_loop_of_one_module(
    place: tuple[str, str],
) -> None:
    source = (SERVICES / place[0]).read_text("utf-8")
    others = {key: why for key, why in EXCEPTIONS.items() if key != place}

    assert list(loops(source)) == []
    assert len(list(loops(source, others))) == 1
    assert len(list(loops(source + "\n"))) >= 1, "the same function elsewhere is not excused"
    assert EXCEPTIONS[place]
