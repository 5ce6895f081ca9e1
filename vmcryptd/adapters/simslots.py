# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key slots of simulated volumes: what would open them is known by its digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vmcryptd.adapters.run import run
from vmcryptd.errors import StorageError, WrongKeyError
from vmcryptd.model import KeySlot, VolumeSpec
from vmcryptd.ports import Key

MOST = 8  # key slots of one volume


@dataclass(frozen=True)
class SourceKey:
    """A key that no person gave: it only remembers which source it is from."""

    source: str

    def reader(self) -> int:
        raise AssertionError("a simulated source has no content")

    def close(self) -> None:
        pass


class HasSlots(Protocol):
    """A simulated volume, as far as this module needs it."""

    slots: dict[int, str]  # number → digest of what opens it
    random: set[int]  # the slots of keys that nobody has to derive
    memory_kib: int


async def digest(key: Key) -> str:
    if isinstance(key, SourceKey):
        return key.source
    reader = key.reader()
    try:
        # The key stays a descriptor here, too: a child reads it.
        done = await run(["sha256sum"], stdin=reader, timeout_s=10)
    finally:
        os.close(reader)
    return done.out.partition(" ")[0]


def key_slots(volume: HasSlots) -> tuple[KeySlot, ...]:
    return tuple(
        KeySlot(number, "pbkdf2", iterations=1000)
        if number in volume.random
        else KeySlot(number, "argon2id", volume.memory_kib, 4, 4)
        for number in sorted(volume.slots)
    )


@dataclass
class SimSlots:
    """The port `Slots` on a simulated host."""

    volumes: Mapping[str, HasSlots]
    calls: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # keys in keystores

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        self.calls.append(f"test {volume.name} {slot}")
        return await digest(key) == self.volumes[volume.name].slots.get(slot)

    async def add(
        self, volume: VolumeSpec, key: Key, new_key: Key, *, is_random: bool = False
    ) -> None:
        simulated = self.volumes[volume.name]
        if await digest(key) not in simulated.slots.values():
            raise WrongKeyError(f"the key fits no key slot of {volume.name}")
        number = min(set(range(MOST)) - simulated.slots.keys(), default=MOST)
        if number == MOST:
            raise StorageError(f"all key slots of {volume.name} are in use")
        self.calls.append(f"add {volume.name} {number}")
        simulated.slots[number] = await digest(new_key)
        if is_random:
            simulated.random.add(number)

    async def remove(self, volume: VolumeSpec, slot: int, key: Key) -> None:
        simulated = self.volumes[volume.name]
        proof = await digest(key)
        if not any(found == proof for n, found in simulated.slots.items() if n != slot):
            raise WrongKeyError(f"the key fits no other key slot of {volume.name}")
        self.calls.append(f"remove {volume.name} {slot}")
        del simulated.slots[slot]
        simulated.random.discard(slot)

    async def prioritise(self, volume: VolumeSpec, slot: int, priority: int) -> None:
        raise AssertionError("simulated slots have no priorities")

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

    async def back_up(self, volume: VolumeSpec, fd: int) -> None:
        self.calls.append(f"back up {volume.name}")
        try:
            os.write(fd, f"the simulated header of {volume.name}\n".encode())
        except OSError as error:
            raise StorageError(f"the backup cannot be written: {error.strerror}") from None
