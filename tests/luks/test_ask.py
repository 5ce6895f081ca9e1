# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real systemd-ask-password, answered as an agent would."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from vmcryptd.adapters.keysources.sources import ASKER_TRIES, SystemKeys
from vmcryptd.core.errors import CancelledError, KeyUnavailableError
from vmcryptd.core.ports import Key

REQUESTS = Path("/run/systemd/ask-password")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("systemd-ask-password"),
    reason="needs root and systemd-ask-password",
)


async def request(message: str) -> dict[str, str]:
    """The pending question."""
    while True:
        for path in REQUESTS.glob("ask.*"):
            lines = (line.partition("=") for line in path.read_text().splitlines())
            found = {key: value for key, _, value in lines}
            if found.get("Message") == message and Path(found["Socket"]).exists():
                return {**found, "path": str(path)}
        await asyncio.sleep(0.005)


async def answer(message: str, reply: bytes) -> None:
    pending = await request(message)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
        agent.sendto(reply, pending["Socket"])
    while Path(pending["path"]).exists():
        await asyncio.sleep(0.005)


def content(key: Key) -> bytes:
    fd = key.reader()
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)
        key.close()


def test_answer() -> None:
    async def go() -> bytes:
        task = asyncio.create_task(SystemKeys(credentials=None).ask("Passphrase for a, b"))
        pending = await request("Passphrase for a, b")
        assert (pending["Id"], pending["NotAfter"], pending["AcceptCached"]) == (
            "vmcryptd",
            "0",
            "0",
        )
        await answer("Passphrase for a, b", b"+open sesame\0")
        return content(await task)

    assert asyncio.run(go()) == b"open sesame"


def test_declined() -> None:
    async def go() -> None:
        task = asyncio.create_task(SystemKeys(credentials=None).ask("Declined"))
        await answer("Declined", b"-")
        await task

    with pytest.raises(CancelledError):
        asyncio.run(go())


def test_empty_answer_and_killed_asker_are_asked_again() -> None:
    async def go() -> bytes:
        task = asyncio.create_task(SystemKeys(credentials=None).ask("Again"))
        await answer("Again", b"+\0")
        os.kill(int((await request("Again"))["PID"]), signal.SIGTERM)
        await asyncio.sleep(0.1)
        await answer("Again", b"+yes\0")
        return content(await task)

    assert asyncio.run(go()) == b"yes"


def test_not_for_ever() -> None:
    async def go() -> None:
        task = asyncio.create_task(SystemKeys(credentials=None).ask("Nobody"))
        for _ in range(ASKER_TRIES):
            await answer("Nobody", b"+\0")
        await task

    with pytest.raises(KeyUnavailableError, match="the answer was empty"):
        asyncio.run(go())


def test_withdrawn_question_leaves_nothing() -> None:
    async def go() -> Path:
        task = asyncio.create_task(SystemKeys(credentials=None).ask("Withdrawn"))
        pending = await request("Withdrawn")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return Path(pending["path"])

    assert not asyncio.run(go()).exists()
