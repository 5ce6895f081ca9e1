# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long root waits for an answer, at most, while one unprivileged user sends as many calls as the bus takes."""

import asyncio
import contextlib
import itertools
import json
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dbus_next import BusType
from dbus_next.aio import MessageBus

from tests.vm import caller

FLOODER = Path(__file__).resolve().parents[1] / "bus/flooder.py"
CONNECTIONS = 32
LASTS_S = 20.0
NEW_EVERY = 10  # calls; the others share a connection
STATE = {
    "interface": "org.freedesktop.DBus.Properties",
    "member": "Get",
    "signature": "ss",
    "body": [caller.MANAGER, "State"],
}
PLAN = {"member": "Plan", "signature": "s", "body": ["shutdown"]}


@contextlib.contextmanager
def flood() -> Iterator[None]:
    """Calls of Plan by nobody, as many at a time as dbus-daemon allows."""
    uid = str(pwd.getpwnam("nobody").pw_uid)
    address = f"unix:path={caller.BUS_SOCKET}"
    call = (caller.ROOT, caller.MANAGER, "Plan", "boot")
    command = [sys.executable, str(FLOODER), "reads", address, uid, str(CONNECTIONS), *call]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answered() -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"?\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        try:
            assert process.stdout.readline() == b"ready\n"
            before = answered()
            yield
            assert answered() > before, "the flood has ended"
        finally:
            process.kill()


async def longest_s() -> float:
    """Of all answers within the time, on one connection and on new ones in turn."""
    longest = 0.0
    end = time.perf_counter() + LASTS_S
    kept = await MessageBus(bus_type=BusType.SYSTEM).connect()
    for number in itertools.count():
        if time.perf_counter() >= end:
            break
        bus = kept
        if number % NEW_EVERY == 0:
            # The user of a new connection has to be asked of the same bus first.
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
        begun = time.perf_counter()
        answer = await caller.call(bus, PLAN if number % 2 else STATE)
        longest = max(longest, time.perf_counter() - begun)
        assert "out" in answer, answer
        if bus is not kept:
            bus.disconnect()
    kept.disconnect()
    return longest


def main(rounds: int) -> None:
    out: dict[str, list[float]] = {"calm": [], "flood": []}
    for _ in range(rounds):
        out["calm"].append(asyncio.run(longest_s()))
        with flood():
            out["flood"].append(asyncio.run(longest_s()))
    print(json.dumps(out))


if __name__ == "__main__":
    main(int(sys.argv[1]))
