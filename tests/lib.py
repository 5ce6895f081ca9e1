# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated host whose people, disks and guests a test moves, and an engine on it that must leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from vmcryptd.adapters.memfd import MemfdKey
from vmcryptd.adapters.sim import Simulation
from vmcryptd.engine import Engine
from vmcryptd.model import GuestState, VolumeSpec
from vmcryptd.ports import Key
from vmcryptd.state import GuestView, VolumeView

PATIENCE_S = 30.0


def digest(passphrase: str) -> str:
    return hashlib.sha256(passphrase.encode()).hexdigest()


def opened_by(passphrase: str) -> str:
    """A line for a [sim.volume.NAME] table."""
    return f'passphrase_sha256 = "{digest(passphrase)}"'


def key(passphrase: str) -> MemfdKey:
    made = MemfdKey()
    os.write(made.fileno(), passphrase.encode())
    made.seal()
    return made


def handed_in(passphrase: str) -> int:
    """A descriptor with a key in it, as a caller sends one; whoever takes it closes it."""
    reader, writer = os.pipe()
    os.write(writer, passphrase.encode())
    os.close(writer)
    return reader


class Host(Simulation):
    """Questions wait for `answer`; `hold` keeps any call of a port from ending until `release`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.questions: list[str] = []
        self.deriving: list[str] = []  # volumes that try a key right now
        self.most_kib = 0  # memory that key derivations took at once
        self.available_kib = 4 * 1024 * 1024
        self._answers: asyncio.Queue[str | Exception] = asyncio.Queue()
        self._held: dict[str, asyncio.Event] = {}

    # --- what a test does ---

    def answer(self, answer: str | Exception) -> None:
        self._answers.put_nowait(answer)

    def hold(self, call: str) -> None:
        self._held[call] = asyncio.Event()

    def release(self, call: str) -> None:
        self._held.pop(call).set()

    def volume(self, name: str, **values: Any) -> None:
        self._volumes[name] = replace(self._volumes[name], **values)
        self._tell()

    def guest(self, name: str, state: GuestState) -> None:
        self._guests[name].state = state
        self._tell()

    def guest_gone(self) -> None:
        self._tell()

    def libvirt(self, is_there: bool) -> None:
        self._libvirt = is_there
        self._tell()

    def done(self, *prefixes: str) -> list[str]:
        """What was done to volumes and guests, in order."""
        return [call for call in self.calls if call.startswith(prefixes)]

    # --- what the engine meets ---

    async def _gate(self, call: str) -> None:
        self.calls.append(call)
        self._tell()
        if call in self._held:
            await self._held[call].wait()

    def available_memory_kib(self) -> int:
        return self.available_kib

    async def ask(self, message: str) -> Key:
        self.questions.append(message)
        self._tell()
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return key(answer)

    async def open(self, volume: VolumeSpec, key: Key) -> None:
        self.deriving.append(volume.name)
        kib = sum(self._volumes[name].memory_kib for name in self.deriving)
        if len(self.deriving) > 1:
            self.most_kib = max(self.most_kib, kib)
        try:
            await self._gate(f"try {volume.name}")
            await super().open(volume, key)
        finally:
            self.deriving.remove(volume.name)

    async def _fits(self, volume: Any, key: Key) -> bool:
        if not isinstance(key, MemfdKey):
            return await super()._fits(volume, key)
        reader = key.reader()
        try:
            found = hashlib.sha256(os.read(reader, 1000)).hexdigest()
            return found in volume.slots.values()
        finally:
            os.close(reader)

    async def close(self, mapping: str) -> None:
        await self._gate(f"closing {mapping}")
        await super().close(mapping)

    async def start(self, name: str) -> None:
        await self._gate(f"starting {name}")
        await super().start(name)

    async def refresh(self, timeout_s: float) -> Any:
        await self._gate("refresh")
        return await super().refresh(timeout_s)


class Running:
    """An engine on a host, and the questions that tests ask about it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.engine = Engine(host.settings, host.ports())
        self.shown = 0
        self.engine.changed = self._changed
        self.engine.start()
        self.engine.world.watch_libvirt()

    def _changed(self) -> None:
        self.shown += 1

    async def until(self, predicate: Callable[[], object]) -> None:
        """Wait for it. Not everything that tests look at gives an event."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not predicate():
                    await asyncio.sleep(0.001)
        except TimeoutError:
            seen = (self.state, self.volumes(), self.host.calls, self.host.questions)
            raise AssertionError(f"it did not happen: {seen}") from None

    async def idle(self) -> None:
        await self.until(lambda: not self.engine.jobs)

    @property
    def state(self) -> str:
        return str(self.engine.state)

    def volumes(self) -> dict[str, str]:
        return {view.name: str(view.state) for view in self.engine.volume_views()}

    def guests(self) -> dict[str, str]:
        return {view.name: str(view.state) for view in self.engine.guest_views()}

    def volume(self, name: str) -> VolumeView:
        return next(view for view in self.engine.volume_views() if view.name == name)

    def guest(self, name: str) -> GuestView:
        return next(view for view in self.engine.guest_views() if view.name == name)

    async def close(self) -> None:
        self.engine.close()
        for _ in range(100):  # turns of the loop, no time
            if len(asyncio.all_tasks()) == 1:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"left running: {asyncio.all_tasks()}")


def descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the one that listed them
    return found


def play(text: str) -> Callable[[Callable[[Running], Awaitable[None]]], Callable[[], None]]:
    """Make a test of a coroutine that gets an engine on the host that `text` describes."""

    def decorate(test: Callable[[Running], Awaitable[None]]) -> Callable[[], None]:
        async def scene() -> None:
            running = Running(Host.parse(text))
            before = descriptors()
            async with asyncio.timeout(2 * PATIENCE_S):
                await test(running)
                await running.close()
            assert descriptors() == before

        def played() -> None:
            forgotten: list[str] = []
            with asyncio.Runner() as runner:
                # What asyncio would only write to the log: above all, an error that nobody looked at.
                runner.get_loop().set_exception_handler(
                    lambda _, context: forgotten.append(f"{context}")
                )
                runner.run(scene())
                gc.collect()
            assert not forgotten

        played.__name__, played.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
        return played

    return decorate
