# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tries keys on key slots: the likeliest slot first, each at most once, in parallel as far as memory allows.

An Argon2id key slot may ask for 1 GiB and all cores, per volume: opening all at once calls the OOM killer
(systemd pull request 12124), one after another takes minutes (systemd issue 19161).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from vmcryptd.core import slot_order
from vmcryptd.core.errors import (
    DeadlineError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import ABSURD_KIB, Header, KeySlot, Unlock, VolumeSpec
from vmcryptd.core.ports import Crypt, Key
from vmcryptd.core.slot_order import Tried
from vmcryptd.engine.inventory import Inventory

log = logging.getLogger(__name__)


class Derivations:
    """Tries keys, as many in parallel as the budget allows."""

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

        Slots in `tried` are left out, and those that do not fit are added. Raises WrongKeyError if none fits, as far
        as they could be tried.
        """
        order = slot_order.order(header, self._inventory.fitted(spec.name, source))
        if not order:
            return await self._derive(spec, key, None, header.slots)
        if only is not None:
            order = tuple(slot for slot in header.slots if slot.number == only)
        tried = set() if tried is None else tried
        error: VmcryptdError = WrongKeyError(
            f"volume {spec.name}: the key was tried on each of its key slots before"
        )
        skipped = []
        for slot in order:
            identity = (spec.name, slot.number, slot.salt)
            if identity in tried:
                continue
            if slot.caveat:
                log.warning(
                    "volume %s: key slot %d %s; it is tried last",
                    spec.name, slot.number, slot.caveat,
                )  # fmt: skip
            try:
                await self._derive(spec, key, slot.number, (slot,))
            except WrongKeyError as wrong:
                tried.add(identity)
                error = wrong
            except (StorageError, OutOfMemoryError, DeadlineError) as failed:
                if not slot.caveat:
                    raise
                tried.add(identity)
                why = str(failed).removeprefix(f"volume {spec.name}: ")
                skipped.append(f"key slot {slot.number} {slot.caveat}: {why}")
                if len(order) == 1:
                    error = failed
            else:
                if len(header.slots) > 1:  # of one alone the order is known
                    self._inventory.note_fitted(spec.name, source, slot.number)
                return None
        if skipped:
            texts = [str(error)] if isinstance(error, WrongKeyError) else [f"volume {spec.name}"]
            raise type(error)("; ".join((*texts, *skipped)))
        raise error

    async def _derive(
        self, spec: VolumeSpec, key: Key, number: int | None, slots: Sequence[KeySlot]
    ) -> None:
        async with self._room(spec, slots):
            self._inventory.check_alone(spec)  # there may have been a long wait for the room
            node = self._inventory.graph.volumes[spec.name]
            if node.is_open and node.suspended:
                await self._crypt.resume(spec, node.mapping, key, number)
            else:
                await self._crypt.open(spec, key, number)

    @asynccontextmanager
    async def room_for_token(
        self, spec: VolumeSpec, slots: Sequence[KeySlot]
    ) -> AsyncIterator[None]:
        """For the derivation behind a token. One that costs next to nothing takes none from the others."""
        if not any(slot.memory_kib or slot.is_absurd for slot in slots):
            yield
            return
        async with self._room(spec, slots):
            yield

    def room_aside(self, memory_kib: int) -> AbstractAsyncContextManager[None]:
        """Room for a key derivation that opens nothing: it waits behind those that do."""
        share = self._inventory.settings.daemon.kdf_memory
        return self._budget.take(memory_kib, share, 0, is_absurd=memory_kib > ABSURD_KIB)

    def _room(
        self, spec: VolumeSpec, slots: Sequence[KeySlot]
    ) -> AbstractAsyncContextManager[None]:
        share = self._inventory.settings.daemon.kdf_memory
        memory_kib = max((slot.memory_kib for slot in slots), default=0)
        is_absurd = any(slot.is_absurd for slot in slots)
        return self._budget.take(memory_kib, share, self._height(spec.name), is_absurd=is_absurd)

    def _height(self, name: str) -> int:
        if self._heights_of is not self._inventory.graph:
            self._heights_of = self._inventory.graph
            self._heights = heights(self._inventory.graph)
        return self._heights.get(name, 0)


@dataclass(order=True)
class _Waiting:
    place: tuple[bool, int, int]  # the absurd last, the highest first, then in order of arrival
    memory_kib: int = field(compare=False)
    share: float = field(compare=False)
    may_start: asyncio.Future[None] = field(compare=False)

    @property
    def is_absurd(self) -> bool:
        return self.place[0]


class KdfBudget:
    """Lets key derivations run side by side as far as memory and cores allow; a single one always runs.

    One that claims absurdly much runs when nothing else wants to, and nothing waits for it.
    """

    def __init__(self, available_kib: Callable[[], int], cores: int = os.cpu_count() or 1) -> None:
        self._available_kib = available_kib
        self._cores = cores
        self._idle_kib = 0
        self._used_kib = 0
        self._running = 0
        self._is_absurd_running = False
        self._waiting: list[_Waiting] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def take(
        self, memory_kib: int, share: float, height: int = 0, *, is_absurd: bool = False
    ) -> AsyncIterator[None]:
        """Hold `memory_kib`, once that fits into `share` of what is available.

        `height`: how long a chain of volumes waits for this one.
        """
        may_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Waiting((is_absurd, -height, next(self._arrivals)), memory_kib, share, may_start)
        bisect.insort(self._waiting, entry)
        self._start()
        try:
            await may_start
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._start()  # an absurd one may have waited for it
            else:
                self._end(entry)  # it had just been let in
            raise
        try:
            yield
        finally:
            self._end(entry)

    def _end(self, entry: _Waiting) -> None:
        if entry.is_absurd:
            self._is_absurd_running = False
        else:
            self._used_kib -= entry.memory_kib
            self._running -= 1
        self._start()

    def _start(self) -> None:
        """Start the entries that fit, in order. A small one may pass a large one that waits for memory."""
        if not self._waiting or self._running >= self._cores:
            return
        available_kib = self._available_kib()
        for entry in list(self._waiting):
            if self._running >= self._cores:
                return
            if entry.is_absurd:
                if self._running or self._is_absurd_running or self._waiting[0] is not entry:
                    return
                self._is_absurd_running = True
            elif self._fits(entry.memory_kib, entry.share, available_kib):
                self._used_kib += entry.memory_kib
                self._running += 1
            else:
                continue
            self._waiting.remove(entry)
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
