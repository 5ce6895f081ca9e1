# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a locked volume to its mapping: device, header, key sources in order, then a person."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from vmcryptd.errors import (
    BusyError,
    DeviceMissingError,
    KeyUnavailableError,
    VmcryptdError,
    WrongKeyError,
    WrongUuidError,
)
from vmcryptd.model import Header, SourceKind, VolumeSpec
from vmcryptd.ports import Crypt, Key, Keys
from vmcryptd.prompt import Answer, Prompt
from vmcryptd.world import World

# An Argon2id key slot may ask for 1 GiB and all cores, per volume: opening all at once calls the OOM killer
# (systemd pull request 12124), one after another takes minutes (systemd issue 19161).


class KdfBudget:
    """Lets key derivations run side by side as far as memory and cores allow; a single one always runs."""

    def __init__(self, available_kib: Callable[[], int], cores: int = os.cpu_count() or 1) -> None:
        self._available_kib = available_kib
        self._cores = cores
        self._idle_kib = 0
        self._used_kib = 0
        self._running = 0
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def take(self, memory_kib: int, share: float) -> AsyncIterator[None]:
        """Hold `memory_kib`, once that fits into `share` of what is available."""
        while not self._fits(memory_kib, share):
            await self._freed.wait()
        self._used_kib += memory_kib
        self._running += 1
        try:
            yield
        finally:
            self._used_kib -= memory_kib
            self._running -= 1
            freed, self._freed = self._freed, asyncio.Event()
            freed.set()

    def _fits(self, memory_kib: int, share: float) -> bool:
        available_kib = self._available_kib()
        if self._running == 0:
            # Measured while nothing runs: one that has just started has not yet taken what it is going to take.
            self._idle_kib = available_kib
            return True
        return (
            self._running < self._cores
            and self._used_kib + memory_kib <= self._idle_kib * share
            and memory_kib <= available_kib
        )


class Unlocker:
    """Opens one volume at a time per caller; what it needs beneath is open already."""

    def __init__(
        self,
        crypt: Crypt,
        keys: Keys,
        prompt: Prompt,
        world: World,
        doing: Callable[[str, bool], None],
    ) -> None:
        self._crypt = crypt
        self._keys = keys
        self._prompt = prompt
        self._world = world
        self._doing = doing  # tells that a volume is busy (True) or waits (False)
        self._budget = KdfBudget(crypt.available_memory_kib)
        self.absent: set[str] = set()  # volumes whose device is waited for

    async def open(self, name: str, may_ask: Callable[[], bool]) -> str:
        """Make the mapping. Returns the key source that fitted. Raises VmcryptdError."""
        spec = self._world.graph.volumes[name].spec
        await self._wait_for_device(spec)
        self._prompt.trying(name, True)
        self._doing(name, True)
        header = await self._crypt.header(spec)
        self._world.uuids[name] = header.uuid
        if spec.uuid and header.uuid != spec.uuid:
            raise WrongUuidError(
                f"volume {name}: the LUKS header on {spec.device} has the UUID {header.uuid}, the configuration says "
                f"{spec.uuid}; is it the right device? If so, correct `uuid`"
            )
        if self._is_usable(name):
            return ""  # somebody else was quicker
        if taken_by := self._world.graph.volumes[name].taken_by:
            raise BusyError(
                f"volume {name}: the mapping name {name} is taken by something else ({taken_by}); "
                f"`dmsetup info {name}` tells more, remove or rename it"
            )
        try:
            return await self._try_all(spec, header, may_ask)
        except BusyError:
            # Somebody else may have been quicker just now.
            self._world.observe()
            if self._is_usable(name):
                return ""
            raise

    def _is_usable(self, name: str) -> bool:
        node = self._world.graph.volumes.get(name)
        return node is not None and node.is_usable

    def derivation(self, memory_kib: int) -> AbstractAsyncContextManager[None]:
        """Room in the budget for a key derivation that is none of an opening."""
        return self._budget.take(memory_kib, self._world.settings.daemon.kdf_memory)

    async def _wait_for_device(self, spec: VolumeSpec) -> None:
        def is_there() -> bool:
            node = self._world.graph.volumes[spec.name]
            return bool(node.device) or node.is_open

        if is_there():
            return
        self.absent.add(spec.name)
        try:
            if await self._world.until(is_there, spec.timeout_s):
                return
        finally:
            self.absent.discard(spec.name)
        raise DeviceMissingError(
            f"volume {spec.name}: its device {spec.device} did not appear within {spec.timeout_s:g} s; "
            f"check the disk and `device` in the configuration; the volume is opened when it appears"
        )

    async def _try_all(self, spec: VolumeSpec, header: Header, may_ask: Callable[[], bool]) -> str:
        failures: list[VmcryptdError] = []
        given = self._prompt.untried(spec.name)
        # A key that somebody handed in for this volume goes before its sources.
        is_ours = given is not None and given.only is not None
        if given is not None and is_ours and await self._try_answer(spec, header, given, failures):
            return given.source
        if given is None or given.target != spec.name:
            for source in spec.keys:
                if source.kind is SourceKind.PROMPT:
                    continue
                try:
                    key = await self._keys.fetch(source, spec)
                    try:
                        await self._try(spec, header, key)
                    finally:
                        key.close()
                except (KeyUnavailableError, WrongKeyError) as error:
                    failures.append(type(error)(f"{source}: {error}"))
                else:
                    return str(source)
        while True:
            answer = self._prompt.untried(spec.name)
            if answer is None:
                if not (spec.asks and may_ask()):
                    raise self._exhausted(spec, failures)
                self._doing(spec.name, False)
                answer = await self._prompt.next(spec, lambda: not self._is_usable(spec.name))
                if answer is None:
                    return ""
                self._doing(spec.name, True)
            if await self._try_answer(spec, header, answer, failures):
                return answer.source

    async def _try_answer(
        self, spec: VolumeSpec, header: Header, answer: Answer, failures: list[VmcryptdError]
    ) -> bool:
        try:
            await self._try(spec, header, answer.key)
        except WrongKeyError as error:
            self._prompt.refuse(spec.name, answer, error)
            failures.append(error)
            return False
        self._prompt.accept(spec.name, answer)
        return True

    def _exhausted(self, spec: VolumeSpec, failures: list[VmcryptdError]) -> VmcryptdError:
        if not failures:
            return KeyUnavailableError(
                f"volume {spec.name}: it has no key source that works without a person; "
                f"`vmcryptctl unlock {spec.name}` asks"
            )
        if len(failures) == 1 and isinstance(failures[0], WrongKeyError):
            return failures[0]
        cls = (
            WrongKeyError
            if all(isinstance(error, WrongKeyError) for error in failures)
            else KeyUnavailableError
        )
        told = "; ".join(str(error) for error in failures)
        return cls(
            f"volume {spec.name}: none of its key sources opened it: {told}; "
            f"`vmcryptctl unlock {spec.name}` takes a passphrase"
        )

    async def _try(self, spec: VolumeSpec, header: Header, key: Key) -> None:
        async with self._budget.take(header.memory_kib, self._world.settings.daemon.kdf_memory):
            node = self._world.graph.volumes[spec.name]
            if node.is_open and node.suspended:
                await self._crypt.resume(spec, node.mapping, key)
            else:
                await self._crypt.open(spec, key)
