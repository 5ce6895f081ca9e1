# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys against key slots: the likeliest slot first, each at most once, and as many side by side as there is room for.

An Argon2id key slot may ask for 1 GiB and all cores, per volume: opening all at once calls the OOM killer
(systemd pull request 12124), one after another takes minutes (systemd issue 19161).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from vmcryptd.core import slot_order
from vmcryptd.core.errors import WrongKeyError
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import Header, KeySlot, Unlock, VolumeSpec
from vmcryptd.core.ports import Crypt, Key
from vmcryptd.core.slot_order import Tried
from vmcryptd.engine.inventory import Inventory


class Derivations:
    """Tries keys, as many side by side as the budget allows."""

    def __init__(self, crypt: Crypt, inventory: Inventory) -> None:
        self._crypt = crypt
        self._inventory = inventory
        self._budget = KdfBudget(crypt.available_memory_kib)
        self._heights: dict[str, int] = {}
        self._heights_of: Graph | None = None

    async def key(
        self,
        spec: VolumeSpec,
        header: Header,
        key: Key,
        source: str,
        tried: Tried | None = None,
        only: int | None = None,
    ) -> None:
        """Make or resume the mapping with a key, by any slot that may fit, or by `only` this one.

        Slots in `tried` are left out, and those that do not fit are added. Raises WrongKeyError if none fits.
        """
        order = slot_order.order(header, self._inventory.fitted(spec.name, source))
        if not order:
            return await self._derive(spec, key, None, header.memory_kib)
        if only is not None:
            order = tuple(slot for slot in header.slots if slot.number == only)
        tried = set() if tried is None else tried
        error = WrongKeyError(
            f"volume {spec.name}: the key was tried on each of its key slots before"
        )
        for slot in order:
            identity = (spec.name, slot.number, slot.salt)
            if identity in tried:
                continue
            try:
                await self._derive(spec, key, slot, slot.memory_kib)
            except WrongKeyError as wrong:
                tried.add(identity)
                error = wrong
            else:
                if len(header.slots) > 1:  # of one alone the order is known
                    self._inventory.note_fitted(spec.name, source, slot.number)
                return None
        raise error

    async def _derive(
        self, spec: VolumeSpec, key: Key, slot: KeySlot | None, memory_kib: int
    ) -> None:
        async with self._room(spec, memory_kib):
            node = self._inventory.graph.volumes[spec.name]
            number = None if slot is None else slot.number
            if node.is_open and node.suspended:
                await self._crypt.resume(spec, node.mapping, key, number)
            else:
                await self._crypt.open(spec, key, number)

    @asynccontextmanager
    async def room_for_token(self, spec: VolumeSpec, memory_kib: int) -> AsyncIterator[None]:
        """For the derivation behind a token. One that costs next to nothing takes none from the others."""
        if not memory_kib:
            yield
            return
        async with self._room(spec, memory_kib):
            yield

    def room_aside(self, memory_kib: int) -> AbstractAsyncContextManager[None]:
        """For a key derivation that opens nothing: it waits behind those that do."""
        return self._budget.take(memory_kib, self._inventory.settings.daemon.kdf_memory, 0)

    def _room(self, spec: VolumeSpec, memory_kib: int) -> AbstractAsyncContextManager[None]:
        share = self._inventory.settings.daemon.kdf_memory
        return self._budget.take(memory_kib, share, self._height(spec.name))

    def _height(self, name: str) -> int:
        if self._heights_of is not self._inventory.graph:
            self._heights_of = self._inventory.graph
            self._heights = heights(self._inventory.graph)
        return self._heights.get(name, 0)


@dataclass(order=True)
class _Waiting:
    place: tuple[int, int]  # the highest first, then in order of arrival
    memory_kib: int = field(compare=False)
    share: float = field(compare=False)
    may_start: asyncio.Future[None] = field(compare=False)


class KdfBudget:
    """Lets key derivations run side by side as far as memory and cores allow; a single one always runs."""

    def __init__(self, available_kib: Callable[[], int], cores: int = os.cpu_count() or 1) -> None:
        self._available_kib = available_kib
        self._cores = cores
        self._idle_kib = 0
        self._used_kib = 0
        self._running = 0
        self._waiting: list[_Waiting] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def take(self, memory_kib: int, share: float, height: int = 0) -> AsyncIterator[None]:
        """Hold `memory_kib`, once that fits into `share` of what is available.

        `height`: how long a chain of volumes waits for this one.
        """
        may_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Waiting((-height, next(self._arrivals)), memory_kib, share, may_start)
        bisect.insort(self._waiting, entry)
        self._start()
        try:
            await may_start
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self._end(memory_kib)  # it had just been let in
            raise
        try:
            yield
        finally:
            self._end(memory_kib)

    def _end(self, memory_kib: int) -> None:
        self._used_kib -= memory_kib
        self._running -= 1
        self._start()

    def _start(self) -> None:
        """Let in who fits, in order. A small one may pass a large one that has to wait for memory."""
        if not self._waiting or self._running >= self._cores:
            return
        available_kib = self._available_kib()
        for entry in list(self._waiting):
            if self._running >= self._cores:
                return
            if self._fits(entry.memory_kib, entry.share, available_kib):
                self._waiting.remove(entry)
                self._used_kib += entry.memory_kib
                self._running += 1
                # Cancelled just now: `take` gives it back as soon as its task runs.
                if not entry.may_start.cancelled():
                    entry.may_start.set_result(None)

    def _fits(self, memory_kib: int, share: float, available_kib: int) -> bool:
        if self._running == 0:
            # Measured while nothing runs: one that has just started has not yet taken what it is going to take.
            self._idle_kib = available_kib
            return True
        return self._used_kib + memory_kib <= self._idle_kib * share and memory_kib <= available_kib


def heights(graph: Graph) -> dict[str, int]:
    """How many volumes wait one behind the other for each that is closed."""
    closed = [
        name
        for name, node in graph.volumes.items()
        if not node.is_usable and node.spec.unlock is not Unlock.MANUAL
    ]
    found: dict[str, int] = {}
    for name in reversed(graph.beneath(closed)):
        for lower in graph.volumes[name].needs:
            found[lower] = max(found.get(lower, 0), found.get(name, 0) + 1)
    return found
