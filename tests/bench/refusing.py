# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in the virtual machine as nobody: how fast the daemon answers, before and after it has refused many calls."""

import asyncio
import json
import sys
import time

from dbus_next import BusType
from dbus_next.aio import MessageBus

from tests.vm import caller

CALLS = 10_000
ANSWERS = 100
QUESTION = {
    "interface": "org.freedesktop.DBus.Properties",
    "member": "Get",
    "signature": "ss",
    "body": [caller.MANAGER, "State"],
}


async def answers() -> float:
    """How long so many take, one after the other."""
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    begun = time.perf_counter()
    for _ in range(ANSWERS):
        await caller.call(bus, QUESTION)
    taken = time.perf_counter() - begun
    bus.disconnect()
    return taken


def main(rounds: int) -> None:
    before = [asyncio.run(answers()) for _ in range(rounds)]
    refused = caller.flood({"flood": CALLS, "messages": caller.BAD_CALLS})
    assert "allowed" not in refused["out"][0], refused
    after = [asyncio.run(answers()) for _ in range(rounds)]
    print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
