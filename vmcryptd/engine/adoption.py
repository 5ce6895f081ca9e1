# SPDX-License-Identifier: LGPL-2.1-or-later
"""Renames mappings that another program opened to the name that guests use."""

from __future__ import annotations

import asyncio
import logging

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.core.model import VolumeState
from vmcryptd.core.ports import Ports
from vmcryptd.core.states import Activities
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Jobs

log = logging.getLogger(__name__)


class Adoption:
    """Renames such mappings while they are unused.

    UDisks, and so Cockpit, opens a volume as luks-UUID: such a mapping is renamed at once. An administrator chose any
    other name, and may be about to use it: it stays until a guest is started.
    """

    def __init__(self, ports: Ports, inventory: Inventory, activities: Activities, jobs: Jobs):
        self._ports = ports
        self._inventory = inventory
        self._activities = activities
        self._jobs = jobs
        self._turns: dict[str, asyncio.Lock] = {}
        self._at: set[str] = set()  # volumes that are being renamed by themselves
        inventory.rebuilt.watch(self._look)

    def _look(self) -> None:
        for name, node in self._inventory.graph.volumes.items():
            is_from_udisks = node.is_misnamed and node.mapping == f"luks-{node.uuid}"
            if is_from_udisks and name not in self._at and not self._jobs.is_closed:
                self._at.add(name)
                self._jobs.spawn(self._rename_by_itself(name))

    async def _rename_by_itself(self, name: str) -> None:
        try:
            await self.rename(name)
        finally:
            self._at.discard(name)

    async def rename(self, name: str) -> None:
        """Rename the volume's mapping if that is necessary and it is unused."""
        node = self._inventory.graph.volumes[name]
        if not node.is_misnamed:
            return
        await self._ports.blocks.wait_udev()  # which looks into what has just been opened
        users = await self._ports.blocks.holders(node.mapping)
        if users:
            log.warning("%s; it is used by %s", node.trouble, ", ".join(users))
            return
        async with self._turns.setdefault(name, asyncio.Lock()):
            if self._is_going_down(name) or self._mapping(name) != node.mapping:
                return
            try:
                await self._ports.crypt.rename(node.mapping, name)
            except VmcryptdError as error:
                log.warning("volume %s: %s", name, error)
                return
            log.info("volume %s: its mapping %s is renamed", name, node.mapping)
            await self._inventory.look()

    async def mapping_to_close(self, name: str) -> str:
        """The volume's mapping once nothing renames it any more; empty if there is none."""
        async with self._turns.setdefault(name, asyncio.Lock()):
            return self._mapping(name)

    def _mapping(self, name: str) -> str:
        node = self._inventory.graph.volumes.get(name)
        return node.mapping if node else ""

    def _is_going_down(self, name: str) -> bool:
        activity = self._activities.volumes.get(name)
        is_locking = activity is not None and activity.doing is VolumeState.LOCKING
        return is_locking or self._jobs.is_going_down or self._jobs.is_closed
