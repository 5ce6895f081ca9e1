# SPDX-License-Identifier: LGPL-2.1-or-later
"""One attempt to open a volume whose header is known: sources, then a person, PIN or server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from vmcryptd.core.errors import (
    CancelledError,
    KeyFileMissingError,
    KeyUnavailableError,
    KeyWithdrawnError,
    NotAskedError,
    NotYetError,
    VmcryptdError,
    WrongKeyError,
    WrongPinError,
)
from vmcryptd.core.model import Header, KeySource, SourceKind, Token, VolumeSpec, VolumeState
from vmcryptd.core.ports import Crypt, Keys
from vmcryptd.core.slot_order import Tried
from vmcryptd.core.states import Activity
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.failures import Failures, together
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.opening import Opening, Phase
from vmcryptd.engine.prompt import Answer, Prompt
from vmcryptd.engine.tokens import Tokens, question

# A TPM locks itself for hours after some wrong PINs: after so many only the other sources are left.
PIN_TRIES = 3
# A network source is tried again after the first time, then after twice that, up to the second: the network may come
# up later, and a server come back.
AGAIN_S = (1.0, 60.0)
# Without a person to ask, the volume fails after this time.
ALONE_S = 300.0

Way = Coroutine[Any, Any, str]  # opens the volume and returns what with; raises when it gives up


class Attempt:
    """One attempt; call either `run` or `by_answer`, once."""

    def __init__(
        self,
        spec: VolumeSpec,
        header: Header,
        crypt: Crypt,
        keys: Keys,
        prompt: Prompt,
        inventory: Inventory,
        derivations: Derivations,
        tokens: Tokens,
        activity: Activity,
        opening: Opening,
    ) -> None:
        self._opening = opening
        self._spec = spec
        self._header = header
        self._crypt = crypt
        self._keys = keys
        self._prompt = prompt
        self._inventory = inventory
        self._derivations = derivations
        self._tokens = tokens
        self._activity = activity
        self._failures = Failures(spec.name, header.uuid)
        self._later: list[KeySource] = []  # may give a key after a while
        self._missing: list[KeySource] = []  # key files that are not there
        self._wrong: Tried = set()  # slots that Clevis gave a wrong key for
        self._pins: list[tuple[KeySource, Token]] = []  # open only with a PIN
        self._one = asyncio.Lock()

    async def run(self, may_ask: Callable[[], bool]) -> str:
        """Returns the source that opened it; an empty string for another program. Raises VmcryptdError."""
        given = self._prompt.untried(self._spec.name)
        if given is not None and self._is_keystores(given):
            given = None  # it has opened what holds the key, which is a source
        # A caller's key for this volume is tried before its sources.
        if given is not None and given.only is not None and await self._try_answer(given):
            return given.source
        if given is None or given.target != self._spec.name:
            for source in self._spec.keys:
                if (opened := await self._try_source(source)) is not None:
                    return opened
        while (answer := self._prompt.untried(self._spec.name)) is not None:
            if await self._try_answer(answer):
                return answer.source
        if not may_ask():
            error = self._failures.summary()
            needs_person = self._asks and not self._failures.is_answered
            raise NotAskedError(str(error)) if needs_person else error
        return await self._wait()

    async def by_answer(self, answer: Answer) -> str | None:
        """Try only an answer. Returns as `run`; None if it does not fit."""
        async with self._turn():
            if self._is_usable:
                return ""
            return answer.source if await self._try_answer(answer) else None

    def _is_keystores(self, answer: Answer) -> bool:
        node = self._inventory.graph.volumes.get(self._spec.name)
        return node is not None and not answer.accepted.isdisjoint(node.keys_in)

    # --- sources that need no person ---

    async def _try_source(self, source: KeySource) -> str | None:
        """Try one source. Returns as `run`; None if the volume is still locked."""
        try:
            match source.kind:
                case SourceKind.PROMPT:
                    return None
                case kind if kind.token_kind:
                    return await self._by_tokens(source)
                case SourceKind.CLEVIS:
                    return await self._by_bindings(source)
            return await self._by_key(source)
        except (KeyUnavailableError, WrongKeyError) as error:
            if isinstance(error, NotYetError) and source not in self._later:
                self._later.append(source)
            if isinstance(error, KeyFileMissingError) and source not in self._missing:
                self._missing.append(source)
            self._fail(str(source), error)
            return None

    async def _by_key(self, source: KeySource) -> str:
        key = await self._keys.fetch(source, self._spec)
        try:
            async with self._turn():
                if self._is_usable:
                    return ""
                await self._derivations.key(self._spec, self._header, key, str(source))
                return str(source)
        finally:
            key.close()

    async def _by_bindings(self, source: KeySource) -> str:
        """Each of the header's Clevis bindings, on its own key slot."""
        errors: list[VmcryptdError] = []
        for slot in await self._keys.bindings(self._spec, self._header):
            try:
                key = await self._keys.fetch_bound(self._spec, self._header, slot)
                try:
                    async with self._turn():
                        if self._is_usable:
                            return ""
                        await self._derivations.key(
                            self._spec, self._header, key, str(source), self._wrong, slot
                        )
                        return str(source)
                finally:
                    key.close()
            except (KeyUnavailableError, WrongKeyError) as error:
                errors.append(type(error)(f"key slot {slot}: {error}"))
        raise together(errors)

    async def _by_tokens(self, source: KeySource) -> str | None:
        """Each of the header's tokens of a kind; those that want a PIN are kept for later."""
        errors: list[VmcryptdError] = []
        for token in self._tokens.of(self._spec, self._header, source):
            if token.needs_pin or (source, token) in self._pins:
                self._needs_pin(source, token)
                continue
            try:
                async with self._turn():
                    if self._is_usable:
                        return ""
                    await self._tokens.open(self._spec, self._header, token, None)
                    return str(source)
            except WrongPinError:  # what enrolled it did not write down that it has one
                self._needs_pin(source, token)
            except KeyUnavailableError as error:
                errors.append(error)
        if errors:
            raise together(errors)
        return None

    def _needs_pin(self, source: KeySource, token: Token) -> None:
        if (source, token) not in self._pins:
            self._pins.append((source, token))

    # --- when these are exhausted: the first of several ways ---

    async def _wait(self) -> str:
        # A caller's key, or a mapping made by hand, always counts; but the attempt does not wait for these alone.
        ways = [self._by_pin(source, token) for source, token in self._pins]
        if not self._asks:
            # The network may come up later; a program knows best itself for how long to try.
            self._later = [one for one in self._later if one.kind is SourceKind.CLEVIS]
        if self._later:
            ways.append(self._by_what_comes_later())
        if not ways and not self._spec.asks:
            raise self._failures.summary()
        listening = [self._by_person() if self._spec.asks else self._by_what_is_handed_in()]
        if self._missing:
            listening.append(self._by_files_that_appear())
        if self._pins:
            self._prompt.expect(
                self._spec.name
            )  # it waits for a person, so typed answers are tried on it
        self._opening.phase = Phase.WAITING if self._asks else Phase.ALONE
        self._rest()
        try:
            return await self._first(listening, ways)
        finally:
            self._opening.phase = Phase.TRYING

    async def _first(self, listening: list[Way], ways: list[Way]) -> str:
        """The first that opens it; the others are called off, and have ended when this returns.

        Nothing waits for those that only listen, unless a person is asked.
        """
        listeners = {asyncio.create_task(way) for way in listening}
        others = {asyncio.create_task(way) for way in ways}
        try:
            pending = {*listeners, *others}
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in done if (error := task.exception()) is not None]
                if opened := [task.result() for task in done if task.exception() is None]:
                    return max(opened)  # a source's name wins over the empty one
                for error in errors:
                    if not isinstance(error, (KeyUnavailableError, WrongKeyError)):
                        raise error
                if not self._spec.asks and not pending - listeners:
                    raise self._failures.summary()
        finally:
            for task in (*listeners, *others):
                task.cancel()
            await asyncio.gather(*listeners, *others, return_exceptions=True)

    async def _by_person(self) -> str:
        while True:
            answer = self._prompt.untried(self._spec.name)
            if answer is None:
                answer = await self._prompt.next(self._spec, lambda: not self._is_over)
            if answer is None:
                return ""
            if await self._try_late_answer(answer):
                return answer.source if self._spec.name in answer.accepted else ""
            self._rest()

    async def _by_what_is_handed_in(self) -> str:
        while not self._is_over:
            answer = self._prompt.untried(self._spec.name)
            if answer is None:
                await self._prompt.changes.wait()
            elif await self._try_late_answer(answer):
                return answer.source if self._spec.name in answer.accepted else ""
            else:
                self._rest()
        return ""

    async def _by_pin(self, source: KeySource, token: Token) -> str:
        name = self._spec.name
        wrong = False
        for _ in range(PIN_TRIES):
            if str(source) not in self._failures:
                self._fail(
                    str(source),
                    KeyUnavailableError(
                        f"{token.title} wants its PIN: `systemd-tty-ask-password-agent` asks for it at a terminal"
                    ),
                )
            try:
                pin = await self._prompt.pin(self._spec, question(name, token, wrong))
            except CancelledError:
                error: VmcryptdError = KeyUnavailableError(
                    f"the PIN of {token.title} was not given"
                )
                break
            except KeyUnavailableError as failed:
                error = failed
                break
            try:
                async with self._turn():
                    if self._is_usable:
                        return ""
                    self._shows(VolumeState.UNLOCKING)
                    await self._read_header()
                    await self._tokens.open(self._spec, self._header, token, pin)
                return str(source)
            except WrongPinError as failed:
                error, wrong = failed, True
            except NotYetError as failed:  # the stick: to be connected, and then asked for again
                error, wrong = failed, False
                self._fail(str(source), error)
            except KeyUnavailableError as failed:
                error = failed
                break
            finally:
                pin.close()
            self._rest()
        self._rest()
        self._fail(str(source), error)
        raise error

    async def _by_what_comes_later(self) -> str:
        """Try sources again that may succeed later, also while a person is asked."""
        patience_s = None if self._asks else ALONE_S
        pause_s = AGAIN_S[0]
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, AGAIN_S[1])
                    # It may have been bound anew meanwhile.
                    await self._read_header()
                    for source in self._later:
                        if (opened := await self._try_source(source)) is not None:
                            return opened
        except TimeoutError:
            raise self._failures.summary() from None

    async def _by_files_that_appear(self) -> str:
        while self._missing:
            there = [one for one in self._missing if self._inventory.exists(one.argument)]
            for source in there:
                self._missing.remove(source)
                await self._read_header()
                if (opened := await self._try_source(source)) is not None:
                    return opened
                self._rest()
            if there:
                await self._inventory.look()  # one may have gone again
            elif self._missing:
                await self._inventory.changes.wait()
        raise self._failures.summary()

    async def _try_late_answer(self, answer: Answer) -> bool:
        async with self._turn():
            if self._is_usable:
                return True
            self._shows(VolumeState.UNLOCKING)
            # The person may have added the key slot only now.
            await self._read_header()
            return await self._try_answer(answer)

    async def _read_header(self) -> None:
        """Read the header again after a wait: its slots may have changed, or its path lead to another disk."""
        header = await self._crypt.header(self._spec)
        self._inventory.accept_header(self._spec.name, header)
        self._header = header

    async def _try_answer(self, answer: Answer) -> bool:
        name = self._spec.name
        try:
            await self._derivations.key(
                self._spec, self._header, answer.key, answer.source, answer.tried
            )
        except KeyWithdrawnError:
            return False  # its caller has gone
        except WrongKeyError as error:
            self._prompt.refuse(name, answer, error, self._header.uuid)
            self._failures.note_answer(answer.source, error)
            return False
        self._prompt.accept(name, answer)
        self._activity.giver = answer.requester
        return True

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One key at a time: two that fit would both make the mapping."""
        try:
            async with self._one:
                yield
        finally:
            self._prompt.changes.notify()  # wakes those that saw the mapping appear

    @property
    def _is_over(self) -> bool:
        """Open, and not by an attempt of our own that is just about to end: that is not to be called off."""
        return self._is_usable and not self._one.locked()

    # --- states ---

    def _rest(self) -> None:
        """Nothing is tried just now."""
        self._shows(VolumeState.WAITING if self._asks else VolumeState.UNLOCKING)

    @property
    def _asks(self) -> bool:
        """Whether a person is asked: for a passphrase, or for the PIN of a token."""
        return self._spec.asks or bool(self._pins)

    def _shows(self, state: VolumeState) -> None:
        self._activity.doing = state
        self._inventory.changes.notify()

    @property
    def _is_usable(self) -> bool:
        node = self._inventory.graph.volumes.get(self._spec.name)
        return node is not None and node.is_usable

    def _fail(self, source: str, error: VmcryptdError) -> None:
        """Show a source's failure at once, because the volume may wait for a long time now."""
        self._failures.note(source, error)
        self._activity.error = self._failures.summary()
        self._inventory.changes.notify()
