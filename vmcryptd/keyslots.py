# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways into a volume: what its key slots are, and which key opens which."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from vmcryptd import planner
from vmcryptd.errors import WrongKeyError
from vmcryptd.model import Header, KeySlot, VolumeSpec
from vmcryptd.ports import Key, Ports
from vmcryptd.world import World

# What cryptsetup does at the least. Nobody makes a slot for a passphrase so cheap.
FEWEST_ITERATIONS = 1000

Derivation = Callable[[int], AbstractAsyncContextManager[None]]


class KeySlots:
    """Looks into headers and changes them, each volume's one thing at a time."""

    def __init__(self, ports: Ports, world: World, derivation: Derivation) -> None:
        self._ports = ports
        self._world = world
        self._derivation = derivation  # holds memory for a key derivation of so many KiB
        self._locks: dict[str, asyncio.Lock] = {}

    async def listed(self, name: str) -> dict[str, Any]:
        """What `vmcryptctl key list --json` prints. Raises VmcryptdError."""
        spec = self._spec(name)
        header = await self._ports.crypt.header(spec)
        return {
            "volume": name,
            "uuid": header.uuid,
            "version": header.version,
            "sources": [str(source) for source in spec.keys],
            "slots": [
                {
                    "slot": slot.number,
                    "opened_by": opened_by(header, slot),
                    "kdf": slot.kdf,
                    "memory_kib": slot.memory_kib,
                    "threads": slot.threads,
                    "iterations": slot.iterations,
                    "priority": slot.priority,
                }
                for slot in header.slots
            ],
            "tokens": [
                {
                    "token": token.number,
                    "kind": token.kind,
                    "slots": list(token.slots),
                    "needs_pin": token.needs_pin,
                }
                for token in header.tokens
            ],
        }

    async def test(self, name: str, fd: int) -> int:
        """The key slot that a caller's key opens; `fd` is closed. Raises WrongKeyError if there is none."""
        async with self._keys(name, fd) as (spec, key):
            return await self._slot_of(spec, await self._ports.crypt.header(spec), key)

    async def _slot_of(self, spec: VolumeSpec, header: Header, key: Key) -> int:
        # The cheap ones first: of a keystore's key and a passphrase only the latter takes its time.
        for slot in sorted(header.slots, key=lambda slot: (slot.cost, slot.number)):
            async with self._derivation(slot.memory_kib):
                if await self._ports.slots.fits(spec, slot.number, key):
                    return slot.number
        raise WrongKeyError(
            f"The key fits no key slot of {spec.name}: try another; "
            f"`vmcryptctl key list {spec.name}` shows the key slots"
        )

    @contextlib.asynccontextmanager
    async def _keys(self, name: str, *fds: int) -> AsyncIterator[Any]:
        """The volume, and the keys read from descriptors, which are closed; nobody else is at its header."""
        left = list(fds)
        with contextlib.ExitStack() as keys:
            read = []
            try:
                self._spec(name)
                while left:
                    key = await self._ports.keys.receive(left.pop(0))
                    keys.callback(key.close)
                    read.append(key)
            finally:
                for fd in left:
                    os.close(fd)
            async with self._locks.setdefault(name, asyncio.Lock()):
                yield self._spec(name), *read

    def _spec(self, name: str) -> VolumeSpec:
        planner.check_volume(self._world.graph, name)
        return self._world.settings.volumes[name]


def opened_by(header: Header, slot: KeySlot) -> str:
    """What opens a slot, as far as the header tells."""
    for token in header.tokens:
        if slot.number in token.slots:
            return token.kind.removeprefix("systemd-")
    cheap = slot.kdf == "pbkdf2" and slot.iterations <= FEWEST_ITERATIONS
    return "random key" if cheap else "passphrase"
