# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rotates the volume keys of volumes in use; a rotation can be paused and resumed at any point.

A rotation survives its caller and the daemon, and a restarted daemon finds it. The key is closed as soon as
cryptsetup has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from vmcryptd.core import events, planner
from vmcryptd.core.errors import (
    BusyError,
    CancelledError,
    OtherKeysError,
    StorageError,
    VmcryptdError,
)
from vmcryptd.core.goals import Goal, Verb
from vmcryptd.core.graph import VolumeNode
from vmcryptd.core.model import Header, Infinity, KeySlot, VolumeSpec
from vmcryptd.core.ports import Key, Ports
from vmcryptd.core.requester import REQUESTER
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs, outcome
from vmcryptd.engine.key_management import KeySlots, opened_by
from vmcryptd.engine.operations import Operations

log = logging.getLogger(__name__)

# It stops between two pieces of some MiB. Where that takes so long, the disk is about to be given up.
GRACE_S = 60.0


class _Rotation:
    def __init__(self, spec: VolumeSpec, job: Job) -> None:
        self.spec, self.job = spec, job
        self.begun = asyncio.Event()  # data is being moved

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def task(self) -> asyncio.Task[None]:
        assert self.job.task is not None
        return self.job.task


class Rotations:
    """Those that are under way."""

    def __init__(
        self,
        ports: Ports,
        inventory: Inventory,
        key_slots: KeySlots,
        derivations: Derivations,
        jobs: Jobs,
        operations: Operations,
    ) -> None:
        self._ports = ports
        self._inventory = inventory
        self._key_slots = key_slots
        self._derivations = derivations
        self._jobs = jobs
        self._operations = operations
        self._running: dict[str, _Rotation] = {}

    def start(self) -> None:
        """Follow those that run already, and find out which others were not finished."""
        for name, spec in self._inventory.settings.volumes.items():
            if self._ports.reencryption.is_running(spec):
                self._inventory.reencrypting.add(name)
                rotation = self._begin(spec, self._follow)
                rotation.begun.set()
            elif self._key_slots.backup_due_since(name):
                # It is due from the start of a rotation on to its end.
                self._jobs.spawn(self._look(spec))

    def close(self) -> None:
        """Stop following; the rotations go on."""
        for rotation in self._running.values():
            rotation.task.cancel()

    def state(self, name: str) -> str:
        """As `VolumeView.rotation`."""
        if name in self._running:
            return "running"
        return "unfinished" if name in self._inventory.reencrypting else ""

    async def rotate(self, name: str, fd: int, *, drop_others: bool) -> None:
        """Re-encrypt an open volume under a new volume key, or resume that; returns at the end.

        `fd` is closed; its key stays, and all other keys go: unless `drop_others`, none may be there.
        Raises OtherKeysError, WrongKeyError, BusyError, StorageError; CancelledError when it was stopped.
        """
        async with self._key_slots.keys(name, fd) as (spec, key):
            mapping = self._open_node(name).mapping
            header = await self._key_slots.header(spec)
            if header.version < 2:
                raise StorageError(
                    f"volume {name}: its header is of LUKS1, whose volume key cannot be rotated while it is open; "
                    f"`cryptsetup convert --type luks2 {spec.header_path}` makes it LUKS2 while it is locked"
                )
            slot = None
            if not header.is_reencrypting:
                slot = await self._key_slots.slot_of(spec, header, key)
                if not drop_others:
                    check_alone(header, name, slot)
            number = None if slot is None else slot.number

            def work(rotation: _Rotation) -> Coroutine[None, None, None]:
                return self._rotate(rotation, header, mapping, key, number)

            async with self._derivations.room_aside(header.memory_kib):
                with self._operations.changing():
                    rotation = self._begin(spec, work)
                    begun = asyncio.create_task(rotation.begun.wait())
                    try:
                        await asyncio.wait(
                            {begun, rotation.task}, return_when=asyncio.FIRST_COMPLETED
                        )
                    finally:
                        begun.cancel()
        await asyncio.wait({rotation.task})
        if (error := outcome(rotation.task)) is not None:
            raise error

    async def stop(self, name: str, grace_s: float = Infinity) -> None:
        """Have it stop where it can go on, if there is one; it is killed if that takes longer than `grace_s`.

        Raises NoSuchVolumeError, StorageError.
        """
        planner.check_volume(self._inventory.graph, name)
        if (rotation := self._running.get(name)) is not None:
            await self._stop(rotation, grace_s)

    async def abort(self, name: str, grace_s: float) -> None:
        """Stop it, in this time or by force; an error is only logged."""
        if (rotation := self._running.get(name)) is not None:
            try:
                await self._stop(rotation, grace_s)
            except VmcryptdError as error:
                log.error("%s", error)

    async def _stop(self, rotation: _Rotation, grace_s: float) -> None:
        timeout = None if grace_s == Infinity else grace_s
        begun = asyncio.create_task(rotation.begun.wait())
        try:
            # It cannot be stopped while it starts.
            await asyncio.wait(
                {begun, rotation.task}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            begun.cancel()
        if not rotation.task.done():
            log.info("the rotation of the volume key of %s is stopped", rotation.name)
            await self._ports.reencryption.stop(rotation.spec, grace_s)
            await asyncio.wait({rotation.task}, timeout=timeout)

    def _open_node(self, name: str) -> VolumeNode:
        self._inventory.observe()
        node = self._inventory.graph.volumes[name]
        if not node.is_usable:
            raise BusyError(
                f"volume {name}: it is not open, and its key is rotated while it is: `vmcryptctl unlock {name}` first"
            )
        return node

    def _begin(
        self, spec: VolumeSpec, work: Callable[[_Rotation], Coroutine[None, None, None]]
    ) -> _Rotation:
        rotation = _Rotation(spec, self._jobs.register(Goal(Verb.ROTATE, spec.name)))
        self._running[spec.name] = rotation
        self._key_slots.rotating.add(spec.name)
        task = asyncio.create_task(work(rotation))
        rotation.job.task = task
        task.add_done_callback(lambda _: self._ended(rotation))
        self._inventory.changes.notify()
        return rotation

    def _ended(self, rotation: _Rotation) -> None:
        del self._running[rotation.name]
        self._key_slots.rotating.discard(rotation.name)
        if not rotation.task.cancelled() and (error := outcome(rotation.task)) is not None:
            rotation.job.error = error
            unforeseen = rotation.task.exception()
            trace = None if isinstance(unforeseen, VmcryptdError) else unforeseen
            level = logging.INFO if isinstance(error, CancelledError) else logging.ERROR
            log.log(level, "%s", error, exc_info=trace)
        self._jobs.end(rotation.job)

    async def _rotate(
        self, rotation: _Rotation, before: Header, mapping: str, key: Key, slot: int | None
    ) -> None:
        spec = rotation.spec
        going = "goes on" if slot is None else "begins"
        log.info("the rotation of the volume key of %s %s", spec.name, going)
        async with self._key_slots.changing(spec, before):
            if before.data_reencrypted:
                self._check_whole(spec, mapping)
            else:
                await self._move(rotation, mapping, key, slot)
        await self._finish(rotation, before)

    async def _move(self, rotation: _Rotation, mapping: str, key: Key, slot: int | None) -> None:
        """Re-encrypt the data. A rotation that is killed before its last step has not failed."""
        spec, reencryption = rotation.spec, self._ports.reencryption
        try:
            # Before it moves anything, cryptsetup opens the old volume key and the new one by this key.
            await reencryption.rotate(spec, mapping, key, slot, self._reporter(rotation))
        except VmcryptdError:
            if reencryption.is_torn(mapping) or not await self._is_data_reencrypted(spec):
                raise

    def _check_whole(self, spec: VolumeSpec, mapping: str) -> None:
        name = spec.name
        if self._ports.reencryption.is_torn(mapping):
            raise BusyError(
                f"volume {name} has a part that gives errors, since cryptsetup was killed at it: stop what uses it, "
                f"then `vmcryptctl lock {name}` and `vmcryptctl unlock {name}` put it right"
            )

    async def _is_data_reencrypted(self, spec: VolumeSpec) -> bool:
        """Whether what ended had nothing left to do but to say so."""
        try:
            return (await self._key_slots.header(spec)).data_reencrypted
        except VmcryptdError:
            return False

    async def _follow(self, rotation: _Rotation) -> None:
        before = None
        try:
            before = await self._ports.crypt.header(rotation.spec)
        except VmcryptdError as error:
            # A disk at its limit is slow to answer. What runs on it runs all the same.
            log.warning("%s; tokens that lose their key slots by the rotation stay behind", error)
        mapping = self._inventory.graph.volumes[rotation.name].mapping
        await self._ports.reencryption.follow(rotation.spec, mapping, self._reporter(rotation))
        await self._finish(rotation, before)

    def _reporter(self, rotation: _Rotation) -> Callable[[float], None]:
        def on_progress(progress: float) -> None:
            rotation.begun.set()
            if rotation.job.progress != progress:
                rotation.job.progress = progress
                self._inventory.reencrypting.add(rotation.name)
                self._inventory.changes.notify()

        return on_progress

    async def _finish(self, rotation: _Rotation, before: Header | None) -> None:
        spec = rotation.spec
        header = await self._key_slots.header(spec)
        if header.data_reencrypted:
            header = await self._key_slots.finish_rotation(spec, header)
        if header.is_reencrypting:
            raise CancelledError(
                f"volume {spec.name}: the rotation of its volume key has stopped before its end; nothing is lost, and "
                f"it can be used and locked as before: `vmcryptctl key rotate {spec.name}` goes on"
            )
        bound = {token.number for token in before.tokens if token.slots} if before else set()
        gone = [one for one in header.tokens if one.number in bound and not one.slots]
        await self._key_slots.drop_tokens(spec, gone)
        self._inventory.forget_fitted(spec.name)
        extra = events.fields(events.KEY_ROTATED, volume=spec.name, uuid=header.uuid)
        asked = REQUESTER.get()
        log.info("volume %s has a new volume key, asked for by %s", spec.name, asked, extra=extra)

    async def _look(self, spec: VolumeSpec) -> None:
        try:
            await self._key_slots.header(spec)
        except VmcryptdError as error:
            log.debug("%s", error)  # opening the volume reports it
            return
        self._inventory.changes.notify()


def check_alone(header: Header, name: str, kept: KeySlot) -> None:
    """Raises OtherKeysError if the header has other key slots than the one that is kept."""
    others = [slot for slot in header.slots if slot.number != kept.number]
    if others:
        listed = ", ".join(f"{slot.number} ({opened_by(header, slot)})" for slot in others)
        raise OtherKeysError(
            f"volume {name}: the key opens key slot {kept.number}, and the new volume key is put under this key only; "
            f"of no use from the start on would be: key slot {listed}; `vmcryptctl key rotate --drop-others {name}` "
            "does it all the same; add other keys again when it has ended"
        )
