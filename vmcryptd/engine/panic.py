# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kills all guests and closes all mappings at once; keys of mappings that do not close are wiped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vmcryptd.core import events
from vmcryptd.core.errors import BusyError, VmcryptdError
from vmcryptd.core.ports import Ports
from vmcryptd.engine.inventory import Inventory

log = logging.getLogger(__name__)

# libvirt may hang while it kills; the keys do not wait for it longer than this.
KILL_S = 5.0
# A disk or udevd that hangs may keep a volume from being closed for minutes; its key is wiped after this.
CLOSE_S = 10.0


async def panic(
    inventory: Inventory, ports: Ports, release: Callable[[str], Awaitable[str]]
) -> dict[str, VmcryptdError]:
    """Continue past every error. Returns the errors by "NAME" of a volume or "guest NAME"; the journal has the actions.

    `release` ends what works on one volume, before that is closed and while the others are, and returns the name that
    its mapping has by then; empty if it has none.
    """
    graph = inventory.graph
    errors: dict[str, VmcryptdError] = {}
    tasks: dict[str, asyncio.Task[None]] = {}

    def failed(name: str, error: VmcryptdError) -> None:
        errors[name] = error
        guest = name.removeprefix("guest ") if name.startswith("guest ") else ""
        event, volume = (events.PANIC, ()) if guest else (events.LOCK, name)
        extra = events.fields(event, volume=volume, guest=guest, error=error)
        log.error("panic: %s", error, extra=extra)

    async def kill(guest: str) -> None:
        try:
            async with asyncio.timeout(KILL_S):
                await ports.domains.kill(guest)
        except TimeoutError:
            failed(
                f"guest {guest}",
                BusyError(f"guest {guest} could not be killed within {KILL_S:g} s"),
            )
        except VmcryptdError as error:
            failed(f"guest {guest}", error)
        else:
            extra = events.fields(events.PANIC, guest=guest)
            log.warning("panic: guest %s is killed", guest, extra=extra)

    async def down(name: str) -> None:
        guests = (f"guest {guest}" for guest in graph.guests_on.get(name, ()))
        users = (*guests, *graph.standing_on.get(name, ()))
        if before := [tasks[user] for user in users if user in tasks]:
            await asyncio.wait(before)
        node = graph.volumes[name]
        mapping = await release(name) or node.mapping
        try:
            async with asyncio.timeout(CLOSE_S):
                if node.mounts:
                    await ports.blocks.unmount(node.spec, mapping)
                if node.is_active:
                    await ports.blocks.deactivate(node.spec, mapping)
                await ports.crypt.close(mapping)
        except (TimeoutError, VmcryptdError) as caught:
            is_late = isinstance(caught, TimeoutError)
            error = f"it takes longer than {CLOSE_S:g} s" if is_late else str(caught)
            try:
                await ports.crypt.wipe(mapping)
            except VmcryptdError as worse:
                what = f"cannot be closed ({error}), and its key could NOT be wiped: {worse}"
            else:
                what = f"cannot be closed ({error}); its key is wiped, and I/O to it blocks"
            failed(name, BusyError(f"volume {name}: it {what}"))
        else:
            extra = events.fields(events.LOCK, volume=name, uuid=node.uuid)
            log.warning("panic: volume %s is closed", name, extra=extra)

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
