# SPDX-License-Identifier: LGPL-2.1-or-later
"""Over the bus, too: a call whose key is still on its way opens nothing after all was closed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.bus.test_service import Daemon, opened_by, start, with_daemon

__all__ = ["start"]  # a fixture

HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
[sim.volume.mail]
{opened_by("alpha")}
"""
CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("UnlockWithKey", "sh", ("mail", 0)),
    ("UnlockAllWithKey", "h", (0,)),
    ("TestKey", "sh", ("mail", 0)),
    ("RemoveKey", "sxh", ("mail", 0, 0)),
]


def keys(daemon: Daemon) -> int:
    count = 0
    for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was read
            count += "memfd:" in os.readlink(link)
    return count


async def begin(daemon: Daemon, member: str, signature: str, *body: Any) -> tuple[Any, int]:
    """A call whose key does not end, once the daemon reads it; and the key's writing end."""
    before = keys(daemon)
    reader, writer = os.pipe()
    os.write(writer, b"alp")
    refused = asyncio.create_task(daemon.refused(member, signature, *body, fds=[reader]))
    while keys(daemon) == before:
        await asyncio.sleep(0.01)
    os.close(reader)
    return refused, writer


@pytest.mark.parametrize("down", ["LockAll", "Shutdown", "Panic"])
def test_a_key_in_transit(start: Any, run: Any, down: str) -> None:
    @with_daemon(HOST)
    async def scene(daemon: Daemon) -> None:
        begun = [await begin(daemon, member, signature, *body) for member, signature, body in CALLS]
        await daemon.call(down)
        assert keys(daemon) == 0
        for refused, writer in begun:
            assert await refused == "Cancelled"
            with pytest.raises(BrokenPipeError):
                os.write(writer, b"ha")
            os.close(writer)
        assert (await daemon.volume("mail"))["State"] == "locked"
        await daemon.unlock("mail", "alpha")
        assert (await daemon.volume("mail"))["State"] == "unlocked"

    scene(start, run)
