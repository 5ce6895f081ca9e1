# SPDX-License-Identifier: LGPL-2.1-or-later
"""One question for everything that waits, and the answers, held only for as long as something waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from vmcryptd.core import events, wording
from vmcryptd.core.errors import CancelledError, VmcryptdError
from vmcryptd.core.model import Infinity, VolumeSpec
from vmcryptd.core.ports import Key, Keys
from vmcryptd.core.requester import REQUESTER, Requester
from vmcryptd.core.slot_order import Tried
from vmcryptd.posix.changes import Changes

log = logging.getLogger(__name__)

# Volumes whose other sources are still being tried may join the first question for so long.
GATHER_S = 1.0
# After a mistyped keystore passphrase the question comes again after so long, though volumes still try the answer.
PASSED_ON_S = 5.0
# A question that was declined, or whose agent broke, comes again after a while: at once would be a tight loop.
AGAIN_S = (1.0, 30.0)


class Answer:
    """A key that a person or caller gave, and the volumes that it has opened or that have refused it."""

    def __init__(
        self, key: Key, source: str, only: frozenset[str] | None = None, target: str = ""
    ) -> None:
        self.key = key
        self.source = source
        self.only = only  # the volumes it was handed in for; None: all that wait
        self.target = target  # the volume that is to be opened by it and by nothing else
        self.refused: dict[str, VmcryptdError] = {}
        self.accepted: set[str] = set()
        self.tried: Tried = set()  # key slots that it does not fit; they are not derived again
        self.until = 0.0  # when it is wiped, in seconds since 1970; 0: when nothing needs it
        # For the journal. A password agent does not say which user has typed.
        self.requester = Requester() if source == "prompt" else REQUESTER.get()
        self.origin = (
            "given to a password agent" if source == "prompt" else f"handed in by {self.requester}"
        )

    def is_for(self, volume: str) -> bool:
        return volume not in self.refused and (self.only is None or volume in self.only)


IsLeft = Callable[[Answer], bool]


class Held(NamedTuple):
    """A key that is in memory now, and why it still is."""

    source: str
    volumes: tuple[str, ...]  # have yet to try it
    until: float  # when it is wiped, in seconds since 1970; 0: as soon as these have tried it


class Prompt:
    """Asks a person for all volumes that wait, and hands each answer to each of them once."""

    def __init__(
        self,
        keys: Keys,
        changed: Callable[[], None],
        on_waiting: Callable[[list[str]], Awaitable[None]],
    ) -> None:
        self._keys = keys
        self._changed = changed
        self._on_waiting = on_waiting
        self._expected: set[str] = set()  # on their way up, and may take an answer
        self._fetching: set[str] = set()  # of these, the ones that try their other sources
        self._trying: set[str] = set()  # and the ones that try an answer right now
        self._waiting: dict[str, VolumeSpec] = {}
        self._behind: dict[str, IsLeft] = {}  # these wait for a keystore, and try what it leaves
        self._passed_on: set[str] = set()  # of these, the ones that try an answer right now
        self._pins: list[str] = []  # volumes that the PIN of a token is asked for
        self._answers: list[Answer] = []
        self._timers: dict[Answer, asyncio.TimerHandle] = {}
        self.changes = Changes()  # there may be another answer, or none be wanted any more
        self._asking: asyncio.Task[None] | None = None
        self._is_closed = False
        self._wiped = 0  # how often all answers were wiped
        self.key_cache_s = 0.0
        self.declined = False

    @property
    def waiting(self) -> list[str]:
        return sorted({*self._waiting, *self._pins})

    @property
    def is_asking_pin(self) -> bool:
        return bool(self._pins)

    @property
    def expected(self) -> frozenset[str]:
        return frozenset(self._expected)

    @property
    def held(self) -> list[Held]:
        return [
            Held(
                answer.source,
                tuple(sorted(filter(answer.is_for, answer.only or self._expected))),
                answer.until,
            )
            for answer in self._answers
        ]

    # --- the volumes' side ---

    def expect(self, volume: str) -> None:
        """The volume is on its way up: answers are kept until it has tried them."""
        self._expected.add(volume)
        self.drop_unneeded()  # an answer that was about to be discarded is needed again

    def release(self, volume: str) -> None:
        """The volume takes no more answers."""
        self._expected.discard(volume)
        self._fetching.discard(volume)
        self._trying.discard(volume)
        self._passed_on.discard(volume)
        self._waiting.pop(volume, None)
        self.drop_unneeded()

    def fetching(self, volume: str) -> None:
        """The volume tries its other sources, until it asks for an answer."""
        self._fetching.add(volume)
        self._passed_on.discard(volume)
        self.changes.notify()

    def _waits(self, spec: VolumeSpec) -> None:
        if spec.name in self._waiting and spec.name not in self._fetching | self._trying:
            return  # volumes that wait would wake each other for ever
        self._waiting[spec.name] = spec
        self._fetching.discard(spec.name)
        self._trying.discard(spec.name)
        self.changes.notify()
        self._changed()

    def _tries(self, volume: str) -> None:
        self._waiting.pop(volume, None)
        self._fetching.discard(volume)
        self._trying.add(volume)
        self.changes.notify()
        self._changed()

    def untried(self, volume: str) -> Answer | None:
        is_expected = volume in self._expected
        fitting = [a for a in self._answers if a.is_for(volume)]
        # A key that was handed in for just this volume goes before the others.
        return next(
            (a for a in fitting if a.only is not None),
            fitting[0] if fitting and is_expected else None,
        )

    async def next(self, spec: VolumeSpec, is_wanted: Callable[[], bool]) -> Answer | None:
        """The next answer to try; the volume waits until there is one, or None is wanted any more."""
        while (answer := self.untried(spec.name)) is None and is_wanted():
            self._waits(spec)
            if self._asking is None and not self._is_closed:
                self._asking = asyncio.create_task(self._ask())
                self._asking.add_done_callback(self._asked)
            await self.changes.wait()
        self._tries(spec.name)
        return answer

    @contextlib.contextmanager
    def behind(self, volume: str, is_left: IsLeft) -> Iterator[None]:
        """While the volume waits for a keystore: of the answers only those that are left to it are tried on it."""
        self._behind[volume] = is_left
        try:
            yield
        finally:
            del self._behind[volume]

    def is_behind(self, volume: str) -> bool:
        """Whether the volume waits for a keystore, and has tried what that left to it."""
        return volume in self._behind and volume not in self._passed_on and not self._left(volume)

    async def passed_on(self, volume: str) -> Answer:
        """The next answer that is left to a volume behind a keystore; it tries this from now on."""
        self._passed_on.discard(volume)
        self.changes.notify()
        self._changed()  # a caller may wait until the volume has tried its key
        while (answer := self._left(volume)) is None:
            await self.changes.wait()
        self._passed_on.add(volume)
        return answer

    def _left(self, volume: str) -> Answer | None:
        answer = self.untried(volume)
        return answer if answer is not None and self._behind[volume](answer) else None

    async def pin(self, spec: VolumeSpec, message: str) -> Key:
        """Ask for the PIN of a token, beside the question for passphrases.

        Raises CancelledError when it was declined, KeyUnavailableError when asking is impossible.
        """
        self._pins.append(spec.name)
        self._changed()
        try:
            if spec.name not in self._waiting:
                await self._on_waiting([spec.name])
            return await self._keys.ask(message)
        finally:
            self._pins.remove(spec.name)
            self._changed()

    def refuse(self, volume: str, answer: Answer, error: VmcryptdError, uuid: str = "") -> None:
        answer.refused[volume] = error
        log.warning(
            "volume %s: the key %s does not open it", volume, answer.origin,
            extra=events.fields(
                events.WRONG_KEY, volume=volume, uuid=uuid, source=answer.source, error=error,
                requester=answer.requester,
            ),
        )  # fmt: skip
        self.drop_unneeded()
        self._changed()

    def accept(self, volume: str, answer: Answer) -> None:
        answer.accepted.add(volume)
        log.info("volume %s: the key %s opens it", volume, answer.origin)
        self.changes.notify()
        self._changed()

    # --- the person's side ---

    def offer(
        self, key: Key, source: str, only: frozenset[str] | None = None, target: str = ""
    ) -> Answer:
        """Take a caller's key; it is held until all expected volumes have tried it."""
        answer = Answer(key, source, only, target)
        self._answers.append(answer)
        self.changes.notify()
        self._changed()
        return answer

    def withdraw(self, answer: Answer) -> None:
        """Discard an answer now."""
        if timer := self._timers.pop(answer, None):
            timer.cancel()
        if answer in self._answers:
            self._answers.remove(answer)
        answer.key.close()
        self.changes.notify()
        self._changed()

    def cache(self, seconds: float) -> None:
        """How long answers are held that nothing needs any more; also those that are held by now."""
        if seconds != self.key_cache_s:
            self.key_cache_s = seconds
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            for answer in self._answers:
                answer.until = 0.0
            self.drop_unneeded()

    def drop_unneeded(self) -> None:
        """Discard the answers that no opening volume can still use (after `key_cache_s`)."""
        for answer in list(self._answers):
            if answer.only is not None:
                continue  # its caller withdraws it
            needed = any(answer.is_for(volume) for volume in self._expected)
            if needed and answer.until:
                answer.until = 0.0
                if timer := self._timers.pop(answer, None):
                    timer.cancel()
                self._changed()
            elif not needed and not answer.until:
                self._discard(answer)
        self.changes.notify()

    def _discard(self, answer: Answer) -> None:
        """Nothing needs it any more: now, or when late comers have had their time."""
        is_mistyped = bool(answer.refused) and not answer.accepted
        if self.key_cache_s <= 0 or is_mistyped:
            self.withdraw(answer)
            return
        answer.until = time.time() + self.key_cache_s
        if self.key_cache_s != Infinity:
            loop = asyncio.get_running_loop()
            self._timers[answer] = loop.call_later(self.key_cache_s, self.withdraw, answer)
        self._changed()

    def wipe(self) -> None:
        """Discard every answer now, and those to questions that are open."""
        self._wiped += 1
        for answer in list(self._answers):
            self.withdraw(answer)

    def close(self) -> None:
        """Stop asking for good, and discard all answers."""
        self._is_closed = True
        if self._asking is not None:
            self._asking.cancel()
        self.wipe()

    # --- inside ---

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("asking for a passphrase failed", exc_info=error)
        self.changes.notify()  # who began to wait just now asks again
        self._changed()

    async def _ask(self) -> None:
        announced: set[str] = set()
        again_s = AGAIN_S[0]
        answer: Answer | None = None
        while True:
            await self._gather(answer is None)
            names = sorted(self._waiting)
            if not names:
                return
            await self._announce(announced)
            wrong = answer is not None and any(name in answer.refused for name in names)
            message = question([self._waiting[name] for name in names], wrong)
            wiped = self._wiped
            try:
                key = await self._ask_while_waiting(message, names, announced)
            except CancelledError:
                self.declined = True
            except VmcryptdError as error:
                log.warning("the question for a passphrase broke off, it comes again: %s", error)
            else:
                again_s = AGAIN_S[0]
                if key is not None and wiped != self._wiped:
                    key.close()  # it was asked for before everything went down
                    key = None
                answer = self.offer(key, "prompt") if key is not None else None
                self.drop_unneeded()  # the volumes may be open by now
                continue
            self._changed()
            await self._pause(again_s)
            again_s = min(again_s * 2, AGAIN_S[1])

    async def _announce(self, announced: set[str]) -> None:
        """Announce the waiting volumes, if there is a new one."""
        if not announced.issuperset(self._waiting):
            announced.update(self._waiting)
            await self._on_waiting(sorted(self._waiting))

    async def _gather(self, first: bool) -> None:
        """Wait for who may join the question, or need none."""
        await self._until_all_wait()
        while self._is_trying and not first:
            await (
                self.changes.wait()
            )  # a second question names the volumes that the answer did not fit
        try:
            async with asyncio.timeout(PASSED_ON_S):
                while self._passed_on or any(map(self._left, self._behind)):
                    await self.changes.wait()  # it may open all that the keystore is wanted for
        except TimeoutError:
            pass

    async def _until_all_wait(self) -> None:
        """Wait until no volume tries a key or is about to: then all that will wait are waiting."""
        try:
            async with asyncio.timeout(GATHER_S):
                while self._fetching or self._is_trying:
                    await self.changes.wait()
        except TimeoutError:
            pass  # a slow source must not hold up the question

    @property
    def _is_trying(self) -> bool:
        return bool(self._trying) or any(map(self.untried, self._waiting))

    async def _ask_while_waiting(
        self, message: str, names: list[str], announced: set[str]
    ) -> Key | None:
        """Ask until there is an answer, or None when none of the named volumes can use one any more.

        One that is trying a key that came another way is still asked for: it may not fit, and who is typing an answer
        just now would be interrupted. For the same reason the question stays as it is when another volume begins to
        wait; that is announced.
        """
        asking = asyncio.ensure_future(self._keys.ask(message))
        try:
            while not asking.done() and any(name in self._expected for name in names):
                await _first(asking, self.changes.wait())
                if not asking.done() and not announced.issuperset(self._waiting):
                    await _first(asking, self._until_all_wait())
                    if not asking.done():
                        await self._announce(announced)
            return asking.result() if asking.done() else None
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
                _discard_late(asking)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self._waiting:
                    await self.changes.wait()
        except TimeoutError:
            pass


def _discard_late(asking: asyncio.Future[Key]) -> None:
    """An answer that came in the very moment in which its question was withdrawn."""
    if not asking.cancelled() and asking.exception() is None:
        asking.result().close()


async def _first(asking: asyncio.Future[Any], other: Coroutine[None, None, Any]) -> None:
    """Until the question has its answer, or the other has ended."""
    task: asyncio.Future[Any] = asyncio.ensure_future(other)
    try:
        await asyncio.wait({asking, task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()


def question(volumes: list[VolumeSpec], wrong: bool) -> str:
    """One line, as agents show it."""
    before = "That did not fit. " if wrong else ""
    return wording.question([one.name for one in volumes], volumes[0].device, before)
