# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting and stopping guests: readiness on the way up, deadlines on the way down."""

from __future__ import annotations

import asyncio
import functools
import logging

from vmcryptd.core import conflicts
from vmcryptd.core.errors import DeadlineError, GuestError, VmcryptdError
from vmcryptd.core.model import GuestSpec, Infinity, OnStopTimeout, SourceType
from vmcryptd.core.ports import Domains
from vmcryptd.engine.inventory import Inventory

log = logging.getLogger(__name__)

# A guest that never becomes ready must not hold up the others for ever.
READY_TIMEOUT_S = 120.0
# A disk that nothing explains may appear a little later; then libvirt names the missing one.
DISK_TIMEOUT_S = 30.0


class Guests:
    """Carries the `start` and `stop` steps to libvirt."""

    def __init__(self, domains: Domains, inventory: Inventory) -> None:
        self._domains = domains
        self._inventory = inventory
        self._turns = asyncio.Lock()
        self._last_start = -Infinity
        self._waited_for: set[str] = set()  # running guests that are ready, or were given up
        self._starting: set[str] = (
            set()
        )  # handed to libvirt, which may not show them as running yet

    async def start(self, name: str, wait_until_ready: bool) -> None:
        """Start a guest whose volumes are open. Raises GuestError."""
        node = self._inventory.graph.guests.get(name)
        if node is None or node.domain is None:
            raise GuestError(
                f"guest {name}: libvirt knows no such domain; define it, or take it out of the configuration"
            )
        await self._ready_before(node.spec)
        disks = [source.path for source in node.domain.sources if source.type is SourceType.BLOCK]
        if not all(map(self._inventory.exists, disks)):
            await self._inventory.changes.until(
                lambda: all(map(self._inventory.exists, disks)), DISK_TIMEOUT_S
            )
        await self._turn()
        await self._inventory.look()
        self._check(name)
        self._starting.add(name)
        starting = asyncio.ensure_future(self._domains.start(name))
        starting.add_done_callback(functools.partial(self._started, name))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # libvirt goes on starting it; the shutdown that overtook us must find it running, not about to run.
            await asyncio.wait({starting})
            raise
        self._waited_for.discard(name)
        if wait_until_ready:
            await self._ready(node.spec)

    def _started(self, name: str, starting: asyncio.Future[None]) -> None:
        self._starting.discard(name)
        # The result is always read here: a start that was cancelled twice has no other waiter.
        if not starting.cancelled() and (error := starting.exception()):
            log.info("libvirt did not start guest %s: %s", name, error)

    async def _turn(self) -> None:
        """Starts follow each other by `start_delay` at least."""
        loop = asyncio.get_running_loop()
        async with self._turns:
            next_start = self._last_start + self._inventory.settings.daemon.start_delay_s
            await asyncio.sleep(max(next_start - loop.time(), 0.0))
            self._last_start = loop.time()

    def _check(self, name: str) -> None:
        """Raises GuestError if the guest would destroy data."""
        graph = self._inventory.graph
        if name not in graph.guests:
            return  # undefined just now: libvirt says so
        found = conflicts.overwritten_volume(graph, name)
        if found := found or conflicts.shared_disk(graph, name, self._starting):
            raise GuestError(f"guest {name} was not started: {found.text}; {found.advice}")

    async def _ready_before(self, guest: GuestSpec) -> None:
        """Guests that this one starts after, and that libvirt or another client has started."""
        guests = self._inventory.graph.guests
        nodes = [guests[other] for other in guest.after if other in guests]
        self._waited_for -= {node.spec.name for node in nodes if not node.is_running}
        waits = [
            self._ready(node.spec)
            for node in nodes
            if node.is_running and node.spec.name not in self._waited_for
        ]
        await asyncio.gather(*waits)

    async def _ready(self, guest: GuestSpec) -> None:
        try:
            await self._domains.ready(guest, READY_TIMEOUT_S)
        except VmcryptdError as error:
            # It runs; guests after it are only ordered behind it, they do not need it to live.
            log.warning(
                "guest %s was started, but is not ready: %s; guests after it start all the same",
                guest.name,
                error,
            )
        self._waited_for.add(guest.name)

    async def stop(self, name: str, deadline: float) -> None:
        """Stop a guest by `deadline` (event loop time), or sooner if its own timeout says so.

        Raises GuestError, and LibvirtError when it is unknown whether it runs.
        """
        node = self._inventory.graph.guests.get(name)
        if node is None or node.domain is None:
            return  # a transient one that has ended by itself
        now = asyncio.get_running_loop().time()
        timeout_s = min(
            node.spec.stop_timeout_s, max(deadline - now, 0.0) if deadline != Infinity else Infinity
        )
        try:
            await self._domains.stop(node.spec, timeout_s)
            return
        except DeadlineError as error:
            if node.spec.on_stop_timeout is OnStopTimeout.LEAVE:
                raise GuestError(
                    f"guest {name} did not stop within {timeout_s:g} s and is left running, as configured; "
                    f"its volumes ({', '.join(node.needs) or 'none'}) stay open"
                ) from error
            log.warning("guest %s did not stop within %g s: it is killed now", name, timeout_s)
        except GuestError as error:
            if node.spec.on_stop_timeout is OnStopTimeout.LEAVE:
                raise
            log.warning("%s; it is killed now", error)
        await self._domains.kill(name)
