# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key slots of simulated volumes: each is the digest of its key."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from vmcryptd.core.errors import StorageError, WrongKeyError
from vmcryptd.core.model import Infinity, KeySlot, VolumeSpec
from vmcryptd.core.ports import Key, OnProgress
from vmcryptd.posix.run import run

MOST = 8  # key slots of one volume


@dataclass(frozen=True)
class SourceKey:
    """A key that no person entered: it holds only the name of its source."""

    source: str

    def reader(self) -> int:
        raise AssertionError("a simulated source has no content")

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SimSlot:
    """One key slot: what opens it, and what a try costs."""

    digest: str = ""
    sources: tuple[str, ...] = ()
    memory_kib: int = 65536  # 0: PBKDF2
    iterations: int = 0  # 0: few
    kdf: str = ""  # any other KDF
    priority: int = 1


class HasSlots(Protocol):
    """A simulated volume, as far as this module needs it."""

    slots: dict[int, SimSlot]
    rotates_in_s: float
    is_half_rotated: bool
    data_reencrypted: bool
    fault: str


async def fits(slot: SimSlot, key: Key) -> bool:
    if isinstance(key, SourceKey):
        return key.source in slot.sources
    return bool(slot.digest) and await digest(key) == slot.digest


async def digest(key: Key) -> str:
    reader = key.reader()
    try:
        # The key stays a descriptor here, too: a child reads it.
        done = await run(["sha256sum"], stdin=reader, timeout_s=10)
    finally:
        os.close(reader)
    return done.out.partition(" ")[0]


def key_slots(volume: HasSlots) -> tuple[KeySlot, ...]:
    return tuple(
        KeySlot(
            number,
            slot.kdf or ("argon2id" if slot.memory_kib else "pbkdf2"),
            slot.memory_kib,
            threads=4 if slot.memory_kib else 1,
            iterations=slot.iterations or (4 if slot.memory_kib else 1000),
            priority=slot.priority,
            salt=slot.digest,
        )
        for number, slot in sorted(volume.slots.items())
    )


@dataclass
class SimSlots:
    """The port `Slots` on a simulated host."""

    volumes: Mapping[str, HasSlots]
    calls: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # keys in keystores

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        self.calls.append(f"test {volume.name} {slot}")
        found = self.volumes[volume.name].slots.get(slot)
        return found is not None and await fits(found, key)

    async def add(
        self, volume: VolumeSpec, key: Key, new_key: Key, *, is_random: bool = False
    ) -> None:
        simulated = self.volumes[volume.name]
        if not await self._opens(simulated, key):
            raise WrongKeyError(f"volume {volume.name}: the key fits no key slot")
        number = min(set(range(MOST)) - simulated.slots.keys(), default=MOST)
        if number == MOST:
            raise StorageError(f"all key slots of {volume.name} are in use")
        self.calls.append(f"add {volume.name} {number}")
        slot = SimSlot(memory_kib=0) if is_random else SimSlot()
        if isinstance(new_key, SourceKey):
            simulated.slots[number] = replace(slot, sources=(new_key.source,))
        else:
            simulated.slots[number] = replace(slot, digest=await digest(new_key))

    async def remove(self, volume: VolumeSpec, slot: int, key: Key) -> None:
        simulated = self.volumes[volume.name]
        if not await self._opens(simulated, key, but=slot):
            raise WrongKeyError(f"the key fits no other key slot of {volume.name}")
        self.calls.append(f"remove {volume.name} {slot}")
        del simulated.slots[slot]

    async def _opens(self, volume: HasSlots, key: Key, but: int | None = None) -> bool:
        return any([await fits(slot, key) for n, slot in volume.slots.items() if n != but])

    async def prioritise(self, volume: VolumeSpec, slot: int, priority: int) -> None:
        slots = self.volumes[volume.name].slots
        slots[slot] = replace(slots[slot], priority=priority)

    async def remove_token(self, volume: VolumeSpec, token: int) -> None:
        raise AssertionError("simulated volumes have no tokens")

    async def make_key(self, path: str) -> Key:
        self.calls.append(f"make {path}")
        if path in self.files:
            raise StorageError(f"{path} is there already")
        self.files.add(path)
        return SourceKey(f"file:{path}")

    async def drop_key(self, path: str) -> None:
        self.calls.append(f"drop {path}")
        self.files.discard(path)

    async def finish_rotation(self, volume: VolumeSpec) -> None:
        self.calls.append(f"finish rotation {volume.name}")
        simulated = self.volumes[volume.name]
        simulated.is_half_rotated = simulated.data_reencrypted = False

    async def back_up(self, volume: VolumeSpec, fd: int) -> None:
        self.calls.append(f"back up {volume.name}")
        try:
            os.write(fd, f"the simulated header of {volume.name}\n".encode())
        except OSError as error:
            raise StorageError(f"the backup cannot be written: {error.strerror}") from None


@dataclass
class SimReencryption:
    """The port `Reencryption` on a simulated host. A rotation ends with the process."""

    volumes: Mapping[str, HasSlots]
    calls: list[str] = field(default_factory=list)
    _stopped: dict[str, asyncio.Event] = field(default_factory=dict)

    async def rotate(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None, on_progress: OnProgress
    ) -> None:
        slots = self.volumes[volume.name].slots
        fitting = [n for n in slots if slot in (None, n) and await fits(slots[n], key)]
        if not fitting:
            raise WrongKeyError(f"volume {volume.name}: the key fits no key slot")
        if self.volumes[volume.name].fault == "no-rotation":
            raise StorageError(f"volume {volume.name}: it cannot be reencrypted (simulated)")
        self.calls.append(f"rotate {volume.name} {slot}")
        self.volumes[volume.name].is_half_rotated = True
        stopped = self._stopped[volume.name] = asyncio.Event()
        takes_s = self.volumes[volume.name].rotates_in_s
        on_progress(0.25)
        try:
            async with asyncio.timeout(None if takes_s == Infinity else takes_s):
                await stopped.wait()
        except TimeoutError:
            on_progress(1.0)
            kept, new = slots[fitting[0]], max(slots) + 1
            slots.clear()
            slots[new] = kept
            self.volumes[volume.name].is_half_rotated = False
        finally:
            del self._stopped[volume.name]

    def is_running(self, volume: VolumeSpec) -> bool:
        return volume.name in self._stopped

    def is_torn(self, mapping: str) -> bool:
        return False

    async def follow(self, volume: VolumeSpec, mapping: str, on_progress: OnProgress) -> None:
        raise AssertionError("nothing simulated runs before its daemon")

    async def stop(self, volume: VolumeSpec, grace_s: float) -> None:
        self.calls.append(f"stop rotating {volume.name}")
        if volume.name in self._stopped:
            self._stopped[volume.name].set()
