# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes keystores: all of one is made, or nothing.

Until its table is in the configuration, none of it counts. A file gets its name only when all in it is written.
Before anything is made, `Making` is kept: after a crash the next daemon takes back what bears that UUID, which nothing
else has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from vmcryptd.core import events
from vmcryptd.core.errors import BusyError, CancelledError, VmcryptdError
from vmcryptd.core.goals import Goal, Verb
from vmcryptd.core.keystores import Keystore, Making, wanted
from vmcryptd.core.ports import Key, Ports
from vmcryptd.core.requester import REQUESTER
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs, outcome
from vmcryptd.engine.operations import Operations

log = logging.getLogger(__name__)


class Keystores:
    """Those that are being made."""

    def __init__(
        self, ports: Ports, inventory: Inventory, jobs: Jobs, operations: Operations
    ) -> None:
        self._ports = ports
        self._operations = operations
        self._inventory = inventory
        self._jobs = jobs
        self._making: dict[str, Making] = {}
        self._running: dict[str, Job] = {}
        # A table was added to the configuration files: has them read again. Raises VmcryptdError if it is refused.
        self.read_again: Callable[[], Awaitable[None]] = _read_nothing

    def start(self) -> None:
        """Take back what an earlier daemon did not finish."""
        self._making = {making.name: making for making in self._ports.memory.making()}
        for making in list(self._making.values()):
            self._jobs.spawn(self._recover(making))

    async def check(self, name: str, options: Mapping[str, object]) -> Keystore:
        """Make all checks before a key is asked for. Raises VmcryptdError."""
        import uuid  # not needed for the start

        keystore = wanted(name, options, str(uuid.uuid4()))
        if name in self._running or name in self._making:
            raise BusyError(f"keystore {name} is being made already")
        self._ports.tables.check(name, keystore.table)
        if keystore.size:
            await self._ports.formatting.check_file(name, keystore.place)
        else:
            await self._ports.formatting.check_device(name, keystore.place)
        return keystore

    async def create(self, name: str, fd: int, options: Mapping[str, object]) -> Job:
        """Make a keystore that the key opens. Returns the job once it has begun; `fd` is closed.

        Raises OptionError, ConfigError, StorageError, BusyError, KeyUnusableError.
        """
        left = [fd]
        try:
            with self._operations.begun():
                keystore = await self.check(name, options)
                key = await self._ports.keys.receive(left.pop())
        finally:
            for one in left:
                os.close(one)
        try:
            if name in self._running or name in self._making:
                raise BusyError(f"keystore {name} is being made already")
            job = self._jobs.register(Goal(Verb.CREATE_KEYSTORE, name))
        except VmcryptdError:
            key.close()
            raise
        self._running[name] = job
        job.task = asyncio.create_task(self._create(job, keystore, key))
        job.task.add_done_callback(lambda task: self._ended(name, job, task))
        self._inventory.changes.notify()
        return job

    def _ended(self, name: str, job: Job, task: asyncio.Task[None]) -> None:
        del self._running[name]
        if (error := outcome(task)) is not None:
            if isinstance(error, CancelledError):
                error = CancelledError(f"keystore {name} was not made: {error}")
            job.error = error
            log.error("%s", error)
        self._jobs.end(job)

    def _progress(self, job: Job, share: float) -> None:
        job.progress = share
        self._inventory.changes.notify()

    async def _create(self, job: Job, keystore: Keystore, key: Key) -> None:
        with contextlib.closing(key), self._operations.begun():
            await self._make(job, keystore, key)
        extra = events.fields(events.KEYSTORE_MADE, volume=keystore.name, uuid=keystore.uuid)
        log.info(
            "keystore %s is made: %s, asked for by %s",
            keystore.name, keystore.place, REQUESTER.get(), extra=extra,
        )  # fmt: skip
        self._progress(job, 1.0)

    async def _make(self, job: Job, keystore: Keystore, key: Key) -> None:
        formatting, name = self._ports.formatting, keystore.name
        async with contextlib.AsyncExitStack() as undo:
            self._progress(job, 0.0)
            await undo.enter_async_context(self._kept(keystore))
            place: str | int = keystore.place
            if keystore.size:
                place = await formatting.new_file(keystore.place, keystore.size)
                undo.callback(os.close, place)
            else:
                await formatting.check_device(name, keystore.place)
            self._progress(job, 0.2)
            await formatting.format(place, keystore.uuid, key)
            self._progress(job, 0.5)
            try:
                await formatting.open(place, name, key)
                key.close()
                self._progress(job, 0.8)
                await formatting.make_file_system(name)
            finally:
                await self._close(name)  # one that is broken off may have made it all the same
            if isinstance(place, int):
                await formatting.name_file(place, keystore.place)
            self._ports.tables.write(name, keystore.table)
            try:
                await self.read_again()
            except BaseException:
                self._ports.tables.remove(name)
                raise

    async def _close(self, name: str) -> None:
        # Also when this is cancelled: a mapping that nothing knows would stay open.
        closing = asyncio.ensure_future(self._ports.crypt.close(name))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing})
            raise

    @contextlib.asynccontextmanager
    async def _kept(self, keystore: Keystore) -> AsyncIterator[None]:
        """While this lasts, a daemon that comes after a crash knows of the keystore; what fails is taken back."""
        making = Making(keystore.name, keystore.place, keystore.uuid, bool(keystore.size))
        self._making[keystore.name] = making
        self._keep()
        try:
            await self._ports.memory.kept()
            yield
        except BaseException:
            taking_back = asyncio.ensure_future(self._take_back(making))
            await asyncio.wait({taking_back})
            raise
        self._forget(making)

    async def _recover(self, making: Making) -> None:
        if self._ports.tables.has(making.name):
            self._forget(making)  # only that was left to do
            return
        log.warning("keystore %s was not finished and is taken back: %s", making.name, making.place)
        try:
            if mapping := self._inventory.mapping_of(making.uuid):
                await self._ports.crypt.close(mapping)
        except VmcryptdError as error:
            log.error("keystore %s: %s", making.name, error)
            return
        await self._take_back(making)

    async def _take_back(self, making: Making) -> None:
        """Remove all parts with the keystore's UUID. The rest is logged, and tried again by the next daemon."""
        try:
            await self._ports.formatting.take_back(
                making.place, making.uuid, is_file=making.is_file
            )
        except VmcryptdError as error:
            log.error("keystore %s: %s", making.name, error)
            return
        self._forget(making)

    def _forget(self, making: Making) -> None:
        del self._making[making.name]
        self._keep()

    def _keep(self) -> None:
        self._ports.memory.keep_making(self._making.values())


async def _read_nothing() -> None:
    """Nothing was configured in files."""
