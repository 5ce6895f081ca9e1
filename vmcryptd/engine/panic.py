# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything shut at once: guests killed, mappings closed, and where that fails, keys wiped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.core.ports import Ports
from vmcryptd.engine.inventory import Inventory

# libvirt may hang while it kills; the keys do not wait for it longer than this.
KILL_S = 5.0


async def panic(
    inventory: Inventory, ports: Ports, let_go: Callable[[str], Awaitable[None]]
) -> list[str]:
    """Never stops at an error; returns a sentence for each.

    `let_go` ends what works on one volume, before that is closed and while the others are.
    """
    graph = inventory.graph
    errors: list[str] = []
    tasks: dict[str, asyncio.Task[None]] = {}

    async def kill(guest: str) -> None:
        try:
            async with asyncio.timeout(KILL_S):
                await ports.domains.kill(guest)
        except TimeoutError:
            errors.append(f"guest {guest} could not be killed within {KILL_S:g} s")
        except VmcryptdError as error:
            errors.append(str(error))

    async def down(name: str) -> None:
        guests = (f"guest {guest}" for guest in graph.guests_on.get(name, ()))
        users = (*guests, *graph.standing_on.get(name, ()))
        if before := [tasks[user] for user in users if user in tasks]:
            await asyncio.wait(before)
        node = graph.volumes[name]
        await let_go(name)
        try:
            if node.mounts:
                await ports.blocks.unmount(node.spec, node.mapping)
            if node.is_active:
                await ports.blocks.deactivate(node.spec, node.mapping)
            await ports.crypt.close(node.mapping)
        except VmcryptdError as error:
            errors.append(f"{name}: {error}; its key is wiped, I/O to it blocks")
            try:
                await ports.crypt.wipe(node.mapping)
            except VmcryptdError as worse:
                errors.append(f"{name}: its key could NOT be wiped: {worse}")

    for name, guest in graph.guests.items():
        if guest.needs and guest.is_running:
            tasks[f"guest {name}"] = asyncio.create_task(kill(name))
    for name in reversed(graph.beneath(graph.volumes)):
        if graph.volumes[name].is_open:
            tasks[name] = asyncio.create_task(down(name))
    if tasks:
        await asyncio.wait(tasks.values())
    inventory.observe()
    return errors
