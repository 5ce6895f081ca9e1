# SPDX-License-Identifier: LGPL-2.1-or-later
"""One key against the key slots of one volume: the likeliest slot first, each at most once, within the budget."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from vmcryptd.core import slot_order
from vmcryptd.core.errors import WrongKeyError
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import Header, KeySlot, VolumeSpec
from vmcryptd.core.ports import Crypt, Key
from vmcryptd.core.slot_order import Tried
from vmcryptd.engine import kdf
from vmcryptd.engine.inventory import Inventory


class Attempts:
    """Tries keys, as many side by side as the budget allows."""

    def __init__(self, crypt: Crypt, inventory: Inventory) -> None:
        self._crypt = crypt
        self._inventory = inventory
        self._budget = kdf.KdfBudget(crypt.available_memory_kib)
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
    async def room(self, spec: VolumeSpec, memory_kib: int) -> AsyncIterator[None]:
        """For a derivation of somebody else's. One that costs next to nothing takes none from the others."""
        if not memory_kib:
            yield
            return
        async with self._room(spec, memory_kib):
            yield

    def derivation(self, memory_kib: int) -> AbstractAsyncContextManager[None]:
        """Room in the budget for a key derivation that is none of an opening: it waits behind these."""
        return self._budget.take(memory_kib, self._inventory.settings.daemon.kdf_memory, 0)

    def _room(self, spec: VolumeSpec, memory_kib: int) -> AbstractAsyncContextManager[None]:
        share = self._inventory.settings.daemon.kdf_memory
        return self._budget.take(memory_kib, share, self._height(spec.name))

    def _height(self, name: str) -> int:
        if self._heights_of is not self._inventory.graph:
            self._heights_of = self._inventory.graph
            self._heights = kdf.heights(self._inventory.graph)
        return self._heights.get(name, 0)
