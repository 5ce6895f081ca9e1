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

from vmcryptd.adapters.sim.host import Simulation
from vmcryptd.core.model import GuestState, Header, KeySource, Token, VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.core.states import GuestView, VolumeView
from vmcryptd.engine.engine import Engine
from vmcryptd.posix.memfd import MemfdKey

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
    """A descriptor with a key in it, as a caller sends one; the receiver closes it."""
    reader, writer = os.pipe()
    os.write(writer, passphrase.encode())
    os.close(writer)
    return reader


class Host(Simulation):
    """Questions wait for `answer`; `hold` keeps any call of a port from ending until `release`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.questions: list[str] = []
        self.deriving: list[int] = []  # memory that each key tried right now takes
        self.most_kib = 0  # memory that key derivations took at once
        self.available_kib = 4 * 1024 * 1024
        self.open_questions: list[str] = []
        self._answers: list[tuple[str, str | Exception]] = []
        self._answered = asyncio.Event()
        self._held: dict[str, asyncio.Event] = {}

    # --- what a test does ---

    def answer(self, answer: str | Exception, to: str = "") -> None:
        """Answer the next question in which the word `to` stands."""
        self._answers.append((to, answer))
        answered, self._answered = self._answered, asyncio.Event()
        answered.set()

    def hold(self, call: str) -> None:
        self._held[call] = asyncio.Event()

    def release(self, call: str) -> None:
        self._held.pop(call).set()

    def volume(self, name: str, **values: Any) -> None:
        self._volumes[name] = replace(self._volumes[name], **values)
        self._tell()

    def file(self, path: str, *, there: bool) -> None:
        """A header or key file comes or goes."""
        self._missing = self._missing - {path} if there else self._missing | {path}
        self._tell()

    def guest(self, name: str, state: GuestState, trouble: str = "") -> None:
        self._guests[name].state = state
        self._guests[name].trouble = trouble
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
        self.open_questions.append(message)
        self._tell()
        try:
            answer = await self._answer(message)
        finally:
            self.open_questions.remove(message)
        if isinstance(answer, Exception):
            raise answer
        return key(answer)

    async def _answer(self, message: str) -> str | Exception:
        while True:
            for word, answer in self._answers:
                if word in message:
                    self._answers.remove((word, answer))
                    return answer
            await self._answered.wait()

    async def header(self, volume: VolumeSpec) -> Header:
        self.calls.append(f"header {volume.name}")
        return await super().header(volume)

    async def fetch(self, source: KeySource, volume: VolumeSpec) -> Key:
        self.calls.append(f"fetch {source}")
        return await super().fetch(source, volume)

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        slots = self._volumes[volume.name].slots
        kib = slots[slot or 0].memory_kib
        self.deriving.append(kib)
        if len(self.deriving) > 1:
            self.most_kib = max(self.most_kib, sum(self.deriving))
        try:
            await self._gate(f"try {volume.name}{'' if len(slots) == 1 else f' {slot}'}")
            await super().open(volume, key, slot)
        finally:
            self.deriving.remove(kib)

    async def open_by_token(
        self, volume: VolumeSpec, token: Token, pin: Key | None, suspended: str
    ) -> None:
        await self._gate(
            f"token {volume.name} {token.number}{'' if pin is None else ' with a PIN'}"
        )
        await super().open_by_token(volume, token, pin, suspended)

    async def _fits(self, slot: Any, key: Key) -> bool:
        if not isinstance(key, MemfdKey):
            return await super()._fits(slot, key)
        reader = key.reader()
        try:
            return bool(hashlib.sha256(os.read(reader, 1000)).hexdigest() == slot.digest)
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
        self.notified = 0
        self.engine.changes.watch(self._changed)
        for changes in (self.engine.prompt.changes, self.engine.inventory.rebuilt):
            changes.watch(self._notified)
        self.engine.start()
        self.engine.inventory.watch_libvirt()

    def _notified(self) -> None:
        self.notified += 1

    def _changed(self) -> None:
        self.shown += 1
        self._notified()

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

    async def looked(self) -> None:
        """The engine knows the host's latest state."""
        await self.engine.inventory.look()

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

    async def rests(self) -> None:
        """Waiters that wake each other for ever would take a whole core, and nothing else would show it."""
        before, turns = self.notified, 300
        for _ in range(turns):
            await asyncio.sleep(0)
        assert self.notified - before < turns / 10, "the engine does not come to rest"

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
                await running.rests()
                await running.close()
            assert descriptors() == before

        def played() -> None:
            forgotten: list[str] = []
            with asyncio.Runner() as runner:
                # What asyncio would only write to the log: above all an unretrieved error.
                runner.get_loop().set_exception_handler(
                    lambda _, context: forgotten.append(f"{context}")
                )
                runner.run(scene())
                gc.collect()
            assert not forgotten

        played.__name__, played.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
        return played

    return decorate
