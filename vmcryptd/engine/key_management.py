# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists, tests, adds, changes and removes the keys of volumes.

After a failure at any point, the old key or its tested successor opens the volume. A new key is tested before the
old one is removed, and a removal needs a key that still opens the volume afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from vmcryptd.core import events, planner
from vmcryptd.core.errors import (
    BusyError,
    DeadlineError,
    DependencyError,
    LastKeyError,
    NoSuchKeySlotError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.events import Event
from vmcryptd.core.model import Header, KeySlot, Token, VolumeSpec
from vmcryptd.core.ports import Key, Ports
from vmcryptd.core.requester import REQUESTER
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.operations import Operations

log = logging.getLogger(__name__)

# cryptsetup's default limit of memory for Argon2id.
NEW_SLOT_KIB = 1024 * 1024
# cryptsetup's minimum. A slot for a passphrase is never so cheap.
FEWEST_ITERATIONS = 1000


class KeySlots:
    """Reads and changes headers, one operation at a time for each volume."""

    def __init__(
        self,
        ports: Ports,
        inventory: Inventory,
        derivations: Derivations,
        operations: Operations,
    ) -> None:
        self._ports = ports
        self._inventory = inventory
        self._derivations = derivations
        self._operations = operations
        self._due = ports.memory.backups_due()
        self.rotating: set[str] = set()  # volumes whose header a rotation changes, for hours
        self._locks: dict[str, asyncio.Lock] = {}

    async def listed(self, name: str) -> dict[str, Any]:
        """What `vmcryptctl key list --json` prints. Raises VmcryptdError."""
        spec = self._spec(name)
        header = await self.header(spec)
        return {
            "volume": name,
            "uuid": header.uuid,
            "version": header.version,
            "header_backup_due_since": self.backup_due_since(name),
            "is_half_rotated": header.is_reencrypting,
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
                    "caveat": slot.caveat,
                    "fitted_by": [
                        str(source)
                        for source in spec.keys
                        if self._inventory.fitted(name, str(source)) == slot.number
                    ],
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
        async with self.keys(name, fd) as (spec, key):
            slot = await self.slot_of(spec, await self._changeable(spec), key)
            return slot.number

    async def add(self, name: str, fd: int, new_fd: int) -> int:
        """Have a second key open the volume, too. Returns its slot. Raises WrongKeyError, StorageError."""
        async with self.keys(name, fd, new_fd) as (spec, key, new_key):
            return await self._add(spec, key, new_key)

    async def remove(self, name: str, slot: int, fd: int) -> None:
        """Wipe a key slot; the key has to open another one. Raises LastKeyError, WrongKeyError."""
        async with self.keys(name, fd) as (spec, key):
            header = await self._changeable(spec)
            check_removable(header, name, slot)
            try:
                await self._remove(spec, header, slot, key)
            except WrongKeyError:
                raise WrongKeyError(
                    f"volume {name}: the key fits no key slot other than {slot}; "
                    "to remove that slot, give a key that opens the volume afterwards, too"
                ) from None

    async def change(self, name: str, fd: int, new_fd: int) -> int:
        """Put a new key in the place of another one. Returns the new slot. Raises WrongKeyError."""
        async with self.keys(name, fd, new_fd) as (spec, key, new_key):
            header = await self._changeable(spec)
            old = await self.slot_of(spec, header, key)
            with self._operations.changing():
                return await self._change(spec, key, new_key, old)

    async def _change(self, spec: VolumeSpec, key: Key, new_key: Key, old: KeySlot) -> int:
        name = spec.name
        new = await self._add(spec, key, new_key, priority=old.priority)
        # Until here the old key opens the volume, and from here on both do, until the old one is gone.
        try:
            await self._remove(spec, await self._ports.crypt.header(spec), old.number, new_key)
        except VmcryptdError as error:
            raise type(error)(
                f"{error}; the new key of volume {name} works (key slot {new}), and the old one still does "
                f"(key slot {old.number}): `vmcryptctl key remove {name} {old.number}` removes it"
            ) from None
        self._log(events.KEY_CHANGED, name, new, "has another key in the place of an old one")
        return new

    async def add_from_keystore(self, name: str, keystore: str, fd: int) -> str:
        """Have the volume opened by a random key that lies in a keystore, too. Returns the key source.

        Raises DependencyError unless the keystore is open, and as `add`.
        """
        async with self.keys(name, fd) as (spec, key):
            path = self._place_in(keystore, name)
            new_key = await self._ports.slots.make_key(path)
            try:
                self._place_in(keystore, name)  # was it closed just now, it would lie in the open
                slot = await self._add(spec, key, new_key, is_random=True)
            except BaseException:
                # Also when only its test failed: what does not open the volume must not seem to.
                with contextlib.suppress(VmcryptdError):
                    await self._ports.slots.drop_key(path)
                raise
            finally:
                new_key.close()
            source = f"file:{path}"
            self._inventory.note_fitted(name, source, slot)
        return source

    def _place_in(self, keystore: str, name: str) -> str:
        """Where the keystore holds the volume's key. Raises NoSuchVolumeError, DependencyError, StorageError."""
        self._inventory.observe()
        planner.check_volume(self._inventory.graph, keystore)
        node = self._inventory.graph.volumes[keystore]
        if node.spec.mount is None:
            raise StorageError(
                f'volume {keystore} is no keystore: that has content = "filesystem" and a mount; '
                "`vmcryptctl keystore init` makes one"
            )
        if name in self._inventory.graph.beneath([keystore]):
            raise StorageError(
                f"volume {keystore} needs {name} itself: the key of {name} would be locked in with it; "
                "take another keystore"
            )
        if not node.is_usable or node.spec.mount not in node.mounts:
            raise DependencyError(
                f"keystore {keystore} is not open and mounted at {node.spec.mount}: "
                f"`vmcryptctl unlock {keystore}` first, and `vmcryptctl lock {keystore}` afterwards"
            )
        return f"{node.spec.mount}/{name}.key"

    async def back_up(self, name: str, fd: int) -> None:
        """Write the header into a caller's file; `fd` is closed. Raises StorageError, DeviceMissingError."""
        try:
            self._spec(name)
            async with self._alone(name) as spec:
                await self._changeable(spec)
                await self._ports.slots.back_up(spec, fd)
                self._note_due(name, "")
                log.info(
                    "volume %s: a backup of its header was made, asked for by %s",
                    name, REQUESTER.get(), extra=self._inventory.event(events.HEADER_BACKED_UP, name),
                )  # fmt: skip
        finally:
            os.close(fd)

    def backup_due_since(self, name: str) -> str:
        """Since when every backup of the volume's header is out of date; empty if none is."""
        return self._due.get(name, "")

    async def _add(
        self,
        spec: VolumeSpec,
        key: Key,
        new_key: Key,
        *,
        priority: int = 1,
        is_random: bool = False,
    ) -> int:
        before = await self._changeable(spec)
        known = {slot.number for slot in before.slots}
        async with self.changing(spec, before):
            new_kib = NEW_SLOT_KIB if before.version > 1 and not is_random else 0
            async with self._derivations.room_aside(max(before.memory_kib, new_kib)):
                self._inventory.check_alone(spec)
                await self._ports.slots.add(spec, key, new_key, is_random=is_random)
            after = await self._ports.crypt.header(spec)
            added = [slot for slot in after.slots if slot.number not in known]
            if len(added) != 1:
                raise StorageError(
                    f"volume {spec.name}: another program has changed its header meanwhile; "
                    f"`vmcryptctl key list {spec.name}` shows what it holds now"
                )
            number = added[0].number
            async with self._derivations.room_aside(added[0].memory_kib):
                works = await self._ports.slots.fits(spec, number, new_key)
            if not works:
                raise StorageError(
                    f"volume {spec.name}: the new key does not open its key slot {number}; "
                    f"the old keys work as before; `vmcryptctl key remove {spec.name} {number}` cleans up"
                )
            if priority != added[0].priority:
                await self._ports.slots.prioritise(spec, number, priority)
        self._log(events.KEY_ADDED, spec.name, number, "has a new key")
        return number

    async def _remove(self, spec: VolumeSpec, header: Header, slot: int, key: Key) -> None:
        """The key has to open another slot, else WrongKeyError."""
        async with self.changing(spec, header):
            async with self._derivations.room_aside(header.memory_kib):
                self._inventory.check_alone(spec)
                await self._ports.slots.remove(spec, slot, key)
            self._inventory.forget_fitted(spec.name, slot)
            self._log(events.KEY_REMOVED, spec.name, slot, "is without a key that it had")
            await self.drop_tokens(spec, [one for one in header.tokens if one.slots == (slot,)])

    def _log(self, event: Event, name: str, slot: int, what: str) -> None:
        extra = self._inventory.event(event, name, source=f"key slot {slot}")
        asked = REQUESTER.get()
        log.info("volume %s %s: key slot %d, asked for by %s", name, what, slot, asked, extra=extra)

    async def drop_tokens(self, spec: VolumeSpec, tokens: Iterable[Token]) -> None:
        """Remove tokens whose key slots are gone."""
        for token in tokens:
            try:
                await self._ports.slots.remove_token(spec, token.number)
            except VmcryptdError as error:
                log.warning("a token without a key slot stays behind: %s", error)

    @contextlib.asynccontextmanager
    async def changing(self, spec: VolumeSpec, before: Header) -> AsyncIterator[None]:
        """A new backup of the header is due from the moment on at which it may have changed."""
        since = self.backup_due_since(spec.name)
        if not since:
            self._note_due(spec.name, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        try:
            with self._operations.changing():
                yield
        except VmcryptdError:
            with contextlib.suppress(VmcryptdError):
                if await self._ports.crypt.header(spec) == before:
                    self._note_due(spec.name, since)
            raise

    async def header(self, spec: VolumeSpec) -> Header:
        """Read it, and note whether a rotation is unfinished. Raises as `Crypt.header`
        and `Inventory.accept_header`."""
        header = await self._ports.crypt.header(spec)
        self._inventory.accept_header(spec.name, header)
        return header

    async def finish_rotation(self, spec: VolumeSpec, header: Header) -> Header:
        """Make up for the end that a rotation of the volume key was cut off at (`Header.data_reencrypted`).

        Returns the header as it is then. Raises as `Slots.finish_rotation`.
        """
        async with self.changing(spec, header):
            await self._ports.slots.finish_rotation(spec)
        self._inventory.forget_fitted(spec.name)
        log.info(
            "the rotation of the volume key of %s, cut off at its very end, is complete", spec.name
        )
        return await self.header(spec)

    async def _changeable(self, spec: VolumeSpec) -> Header:
        """Raises BusyError if a rotation is unfinished: cryptsetup allows no change, and a backup would be useless."""
        header = await self.header(spec)
        if header.is_reencrypting:
            raise BusyError(
                f"volume {spec.name}: its volume key is half rotated, so its header is not changed otherwise; "
                f"finish that first: `vmcryptctl key rotate {spec.name}`"
            )
        return header

    def _note_due(self, name: str, since: str) -> None:
        others = {other: when for other, when in self._due.items() if other != name}
        self._due = {**others, name: since} if since else others
        self._ports.memory.keep_backups_due(self._due)
        self._inventory.changes.notify()

    async def slot_of(self, spec: VolumeSpec, header: Header, key: Key) -> KeySlot:
        # The cheap ones first: of a keystore's key and a passphrase only the latter takes its time.
        ordered = sorted(header.slots, key=lambda one: (bool(one.caveat), one.cost, one.number))
        for slot in ordered:
            async with self._derivations.room_aside(slot.memory_kib):
                try:
                    if await self._ports.slots.fits(spec, slot.number, key):
                        return slot
                except (StorageError, OutOfMemoryError, DeadlineError) as error:
                    if not slot.caveat:
                        raise
                    log.warning(
                        "volume %s: key slot %d %s: %s", spec.name, slot.number, slot.caveat, error
                    )
        raise WrongKeyError(
            f"volume {spec.name}: the key fits no key slot; try another; "
            f"`vmcryptctl key list {spec.name}` shows the key slots"
        )

    @contextlib.asynccontextmanager
    async def keys(self, name: str, *fds: int) -> AsyncIterator[Any]:
        """The volume, and the keys read from descriptors, which are closed."""
        left = list(fds)
        with contextlib.ExitStack() as keys:
            read = []
            try:
                keys.enter_context(self._operations.begun())
                self._spec(name)
                while left:
                    key = await self._ports.keys.receive(left.pop(0))
                    keys.callback(key.close)
                    read.append(key)
            finally:
                for fd in left:
                    os.close(fd)
            async with self._alone(name) as spec:
                yield spec, *read

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[VolumeSpec]:
        """Hold the volume's header for one operation."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self.rotating:
                raise BusyError(
                    f"volume {name}: its volume key is being rotated; `vmcryptctl status {name}` shows how far it is, "
                    f"`vmcryptctl key rotate --stop {name}` pauses it"
                )
            yield self._spec(name)  # the configuration may be another by now

    def _spec(self, name: str) -> VolumeSpec:
        planner.check_volume(self._inventory.graph, name)
        return self._inventory.graph.volumes[name].spec


def check_removable(header: Header, name: str, slot: int) -> None:
    """Raises NoSuchKeySlotError, LastKeyError."""
    numbers = [one.number for one in header.slots]
    if slot not in numbers:
        raise NoSuchKeySlotError(
            f"volume {name} has no key slot {slot}, but {', '.join(map(str, numbers)) or 'none at all'}"
        )
    # One that is ignored opens the volume only for who names it, which nothing does by itself.
    if not any(one.priority for one in header.slots if one.number != slot):
        raise LastKeyError(
            f"key slot {slot} is the last way into volume {name}, so it stays; "
            f"`vmcryptctl key add {name}` makes another one first, `vmcryptctl key change {name}` replaces it"
        )


def opened_by(header: Header, slot: KeySlot) -> str:
    """What opens a slot, as far as the header tells."""
    for token in header.tokens:
        if slot.number in token.slots:
            return token.kind.removeprefix("systemd-")
    cheap = slot.kdf == "pbkdf2" and slot.iterations <= FEWEST_ITERATIONS
    return "random key" if cheap else "passphrase"
