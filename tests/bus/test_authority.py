# SPDX-License-Identifier: LGPL-2.1-or-later
"""polkit as an authority: allowed, refused, slow, hanging, absent, and root."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.forkserver import PIPE, Forked
from vmcryptd.adapters.systemd.polkit import Polkit
from vmcryptd.bus import transport
from vmcryptd.core.errors import NotAuthorizedError

pytestmark = pytest.mark.bus_library

ACTION = "org.vmcryptd1.unlock"
PURPOSE = "unlock volume $(volume)"
DETAILS = {"volume": "cr_imap"}
POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY = "/org/freedesktop/PolicyKit1/Authority"

# A peer with a user id of its own: prints its bus name and stays until its stdin ends.
PEER = """
import asyncio, os
from vmcryptd.bus import transport
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
async def main():
    connection = await transport.connect()
    print(connection._transport.unique_name, flush=True)
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, gone.set)
    await gone.wait()
asyncio.run(main())
"""


@pytest.fixture
def nobody() -> Iterator[str]:
    """The bus name of a peer that is not root."""
    if os.getuid() != 0:
        pytest.skip("only root can act as another user on the bus")
    with Forked("-c", PEER, stdin=PIPE, stdout=PIPE) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        name = peer.stdout.readline().strip()
        assert name.startswith(":")
        yield name
        peer.stdin.close()


async def check(
    authority: Polkit, sender: str, *actions: str, interactive: bool, uid: int = 65534
) -> None:
    call = transport.Call(
        sender, "/", "a.b", "C", "", [], 1, True, interactive, [], uid=uid
    )  # fmt: skip
    await authority.check(call, actions, PURPOSE, DETAILS)


@asynccontextmanager
async def connected() -> AsyncIterator[transport.Connection]:
    connection = await transport.connect()
    yield connection
    await connection.disconnect()


async def tell_mock(
    connection: transport.Connection, member: str, signature: str, *body: Any
) -> list[Any]:
    mock = "org.freedesktop.DBus.Mock"
    return await connection.call(POLKIT, AUTHORITY, mock, member, signature, body, timeout_s=10)


def test_allowed_and_refused(run: Any, polkitd: None, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection:
            authority = Polkit(connection)
            with pytest.raises(NotAuthorizedError) as caught:
                await check(authority, nobody, ACTION, interactive=False)
            assert str(caught.value) == (
                "user 65534 may not do org.vmcryptd1.unlock: polkit refused; root always may"
            )
            await tell_mock(connection, "SetAllowed", "as", [ACTION])
            await check(authority, nobody, ACTION, interactive=True)
            with pytest.raises(NotAuthorizedError):
                await check(authority, nobody, "org.vmcryptd1.panic", interactive=True)

    run(test())


def test_root_is_not_asked(run: Any) -> None:
    async def test() -> None:
        if os.getuid() != 0:
            pytest.skip("not root")
        async with connected() as connection:
            name = connection._transport.unique_name
            await check(Polkit(connection), name, ACTION, interactive=False, uid=0)

    run(test())


def test_without_polkit_only_root_may(run: Any, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection:
            with pytest.raises(NotAuthorizedError, match="polkit cannot be asked"):
                await check(Polkit(connection), nobody, ACTION, interactive=False)

    run(test())


def test_a_trusted_user_may_without_polkit(run: Any, nobody: str) -> None:
    """As who runs a simulated host."""

    async def test() -> None:
        async with connected() as connection:
            trusted = frozenset({await connection.peer_uid(nobody)})
            await check(Polkit(connection, trusted=trusted), nobody, ACTION, interactive=False)

    run(test())


@pytest.mark.parametrize(
    "answer", [("", None), ("b", True), ("s", "allowed"), ("(bb)", [True, False])]
)
def test_an_answer_that_makes_no_sense_is_a_refusal(run: Any, nobody: str, answer: Any) -> None:
    async def test() -> None:
        async with connected() as connection, connected() as polkit:
            signature, value = answer
            asked: list[transport.Call] = []

            def reply(call: transport.Call) -> None:
                asked.append(call)
                polkit.reply(call, signature, [value] if signature else [])

            polkit.on_call = reply
            await polkit.request_name(POLKIT)
            with pytest.raises(NotAuthorizedError, match="makes no sense"):
                await check(Polkit(connection), nobody, ACTION, interactive=True)
            [subject, action, details, flags, cancellation] = asked[0].body
            assert subject == ["system-bus-name", {"name": nobody}]
            message = f"Authentication is required to {PURPOSE}"
            assert (action, flags) == (ACTION, 1)
            assert details == {"volume": "cr_imap", "polkit.message": message}
            assert cancellation

    run(test())


class Silent:
    """A polkit that never answers, and records its calls."""

    def __init__(self, connection: transport.Connection) -> None:
        self.calls: asyncio.Queue[transport.Call] = asyncio.Queue()
        connection.on_call = self.calls.put_nowait


def test_hanging_polkit_is_a_refusal_and_is_logged(run: Any, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection, connected() as polkit:
            silent = Silent(polkit)
            await polkit.request_name(POLKIT)
            authority = Polkit(connection, timeout_s=0.05, interactive_timeout_s=30)
            with pytest.raises(NotAuthorizedError, match=r"did not answer within 0.05 s"):
                await check(authority, nobody, ACTION, interactive=False)
            asked, cancelled = await silent.calls.get(), await silent.calls.get()
            assert asked.body[3] == 0
            assert (cancelled.member, cancelled.body) == (
                "CancelCheckAuthorization",
                asked.body[4:],
            )

            waiting = asyncio.create_task(check(authority, nobody, ACTION, interactive=True))
            asked = await silent.calls.get()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            cancelled = await silent.calls.get()
            assert cancelled.body == asked.body[4:]

    run(test())


def test_a_password_dialog_delays_no_other_caller(run: Any, polkitd: None, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection:
            authority = Polkit(connection)
            await tell_mock(connection, "SetAllowed", "as", [ACTION, "org.vmcryptd1.lock"])
            await tell_mock(connection, "SimulateHangActions", "as", [ACTION])
            slow = asyncio.create_task(check(authority, nobody, ACTION, interactive=True))
            await check(authority, nobody, "org.vmcryptd1.lock", interactive=True)
            assert not slow.done()
            await tell_mock(connection, "ReleaseHangingCalls", "")
            await slow

    run(test())


@pytest.mark.parametrize(
    ("answers", "asked", "refused"),
    [
        # Each action: allowed, challenge. A dialog is shown where one can help, and only there.
        ({"a": (True, False), "b": (True, False)}, ["a", "b"], None),
        ({"a": (False, True), "b": (False, False)}, ["a", "b"], "b"),
        ({"a": (False, True), "b": (True, False)}, ["a", "b", "a!"], None),
        ({"a": (False, True), "b": (False, True)}, ["a", "b", "a!", "b!"], None),
    ],
)
def test_two_actions_need_no_more_dialogs_than_they_must(
    run: Any, nobody: str, answers: dict[str, tuple[bool, bool]], asked: list[str], refused: Any
) -> None:
    async def test() -> None:
        async with connected() as connection, connected() as polkit:
            seen: list[str] = []

            def reply(call: transport.Call) -> None:
                action, interactive = call.body[1], call.body[3]
                seen.append(action + "!" * interactive)
                allowed, challenge = answers[action]
                polkit.reply(call, "(bba{ss})", [[allowed or bool(interactive), challenge, {}]])

            polkit.on_call = reply
            await polkit.request_name(POLKIT)
            if refused is None:
                await check(Polkit(connection), nobody, "a", "b", interactive=True)
            else:
                with pytest.raises(NotAuthorizedError, match=f"may not do {refused}: "):
                    await check(Polkit(connection), nobody, "a", "b", interactive=True)
            assert seen == asked

    run(test())


def test_polkit_that_is_slow(run: Any, polkitd: None, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection:
            await tell_mock(connection, "SetAllowed", "as", [ACTION])
            await tell_mock(connection, "SetDelay", "d", 0.2)
            await check(Polkit(connection), nobody, ACTION, interactive=False)
            with pytest.raises(NotAuthorizedError):
                await check(Polkit(connection, timeout_s=0.05), nobody, ACTION, interactive=False)

    run(test())


def test_polkit_that_dies_while_it_is_asked(run: Any, nobody: str) -> None:
    async def test() -> None:
        async with connected() as connection:
            polkit = await transport.connect()
            silent = Silent(polkit)
            await polkit.request_name(POLKIT)
            asking = asyncio.create_task(
                check(Polkit(connection), nobody, ACTION, interactive=True)
            )
            await silent.calls.get()
            await polkit.disconnect()
            with pytest.raises(NotAuthorizedError, match="polkit cannot be asked"):
                await asking

    run(test())
