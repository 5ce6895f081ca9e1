# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl unlock`: asks once, tries the answer on all waiting volumes, and asks again for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmcryptd.bus.client import Client
from vmcryptd.cli import terminal
from vmcryptd.cli.output import show_opening
from vmcryptd.core.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_WAITING,
    EXIT_WRONG_KEY,
    KeyUnavailableError,
    NotAuthorizedError,
    StillWaitingError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.wording import few, question

if TYPE_CHECKING:
    from vmcryptd.posix.memfd import MemfdKey

TRIES = 3
GATHER_S = 1.0
AT_ONCE = 8  # parallel calls with one key for several volumes
# Each call is as slow as a wrong key, and only improves the message.
TRIES_WITHOUT_NEWLINE = 3

Say = Callable[[str], None]
Reader = Callable[[], int]  # returns a descriptor of the key; the caller closes it


async def hand_over(
    client: Client, names: Sequence[str], reader: Reader
) -> dict[str, VmcryptdError]:
    """Try the key on the named volumes, or on all that wait. Returns the failures; "" stands for all."""
    failed: dict[str, VmcryptdError] = {}
    turn = asyncio.Semaphore(AT_ONCE)

    async def give(name: str) -> None:
        async with turn:
            fd = reader()
            try:
                if name:
                    await client.call("UnlockWithKey", "sh", name, 0, fds=[fd])
                else:
                    await client.call("UnlockAllWithKey", "h", 0, fds=[fd])
            except VmcryptdError as error:
                failed[name] = error
            finally:
                os.close(fd)

    named = list(dict.fromkeys(names)) or [""]
    async with show_opening(client, names):
        await asyncio.gather(*map(give, named))
    await client.ping()  # all earlier changes arrive before the answer
    return {name: failed[name] for name in named if name in failed}


async def with_key(
    client: Client, names: Sequence[str], key: MemfdKey, say: Say
) -> dict[str, VmcryptdError]:
    """Unlock with a key from a file. Returns the failures; "" stands for all."""
    failed = await hand_over(client, names, key.reader)
    wrong = [name for name, error in failed.items() if isinstance(error, WrongKeyError)]
    if wrong == [""]:
        wrong = list(client.host["Waiting"])
    if wrong:
        await _explain_newline(client, wrong[:TRIES_WITHOUT_NEWLINE], key, say)
    return failed


async def _explain_newline(client: Client, names: list[str], key: MemfdKey, say: Say) -> None:
    """Report a key that fits without its last newline, which an editor or `echo` has added."""
    from vmcryptd.cli.key_input import without_newline

    if (shorter := await without_newline(key)) is None:
        return
    # The caller may lack this right, and a hint is no reason to ask for a password.
    client.interactive, interactive = False, client.interactive
    try:
        with contextlib.closing(shorter):
            for name in names:
                fd = shorter.reader()
                try:
                    await client.call("TestKey", "sh", name, 0, fds=[fd])
                except NotAuthorizedError:
                    say("the key ends with a newline, which is a part of it")
                    return
                except VmcryptdError:
                    continue
                finally:
                    os.close(fd)
                say(
                    f"volume {name}: the key fits without the newline at its end, which is a part of it as given; "
                    "`head -c -1 FILE` leaves that out, and so does `printf %s` instead of `echo`"
                )
                return
    finally:
        client.interactive = interactive


def exit_status(client: Client, names: Sequence[str], failed: Mapping[str, VmcryptdError]) -> int:
    """The exit status for one key and the named volumes, or all, as in vmcryptctl(1)."""
    codes = {error.exit_code for error in failed.values()}
    if not codes:
        return EXIT_OK
    if codes == {EXIT_WRONG_KEY}:
        return EXIT_WRONG_KEY
    if EXIT_WAITING in codes:
        wanted = beneath(client, failed) if names else client.volumes
        is_asked = any(client.volumes.get(name, {}).get("State") == "waiting" for name in wanted)
        return EXIT_WAITING if codes <= {EXIT_WRONG_KEY, EXIT_WAITING} and is_asked else EXIT_FAILED
    # One call has one reason: usage, authorisation, a daemon that is away.
    return EXIT_FAILED if len(set(names)) > 1 else codes.pop()


def named(failed: dict[str, VmcryptdError]) -> list[VmcryptdError]:
    """Each failure as a sentence that names its volume."""
    return [
        error if name in str(error) else type(error)(f"volume {name}: {error}")
        for name, error in failed.items()
    ]


async def without_asking(client: Client, names: Sequence[str]) -> dict[str, VmcryptdError]:
    """Open the named volumes, or the boot set, by sources that need no person. Returns the failures."""
    failed: dict[str, VmcryptdError] = {}

    async def open_one(name: str) -> None:
        try:
            await client.call("UnlockUnattended", "s", name)
        except VmcryptdError as error:
            failed[name] = error

    wanted = list(dict.fromkeys(names))
    if not names:
        [text] = await client.call("Plan", "s", "boot")
        wanted = [
            step["object"] for step in json.loads(text)["steps"] if step["action"] == "unlock"
        ]
    closed = [name for name in wanted if client.volumes[name]["State"] != "unlocked"]
    async with show_opening(client, closed):
        await asyncio.gather(*map(open_one, closed))
    return {name: failed[name] for name in closed if name in failed}


def beneath(client: Client, names: Iterable[str]) -> set[str]:
    """The named volumes and those beneath them."""
    found = set(names)
    while True:
        more = {
            name
            for name, values in client.volumes.items()
            if name not in found and found.intersection(values.get("NeededBy", []))
        }
        if not more:
            return found
        found |= more


def waiting_for(names: Sequence[str]) -> str:
    """The message when a passphrase is needed and there is no terminal to ask on."""
    return (
        f"waiting for a passphrase for {few(names)}; `vmcryptctl unlock` on a terminal asks for it, "
        "and so do the system's agents"
    )


def unread_key() -> str:
    """A hint when standard input is a pipe that is not read."""
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(0).st_mode)
    except OSError:
        return ""
    return 'standard input is not read: "--key-file -" takes the key from there' if is_pipe else ""


class Unlocking:
    """Opens the named volumes, or all; asks on the terminal if there is one."""

    def __init__(self, client: Client, names: Sequence[str], *, can_ask: bool, say: Say) -> None:
        self._client = client
        self._names = list(dict.fromkeys(names))  # still to be opened
        self._is_for_all = not self._names
        self._can_ask = can_ask
        self._say = say
        self._calls: dict[
            str, asyncio.Task[object]
        ] = {}  # Unlock of a volume, or UnlockAll under ""
        self._insist: set[str] = set()  # asked for although they do not wait
        self._before = ""  # the text before the next question
        self._tries = 0
        self._has_explained = False

    async def run(self) -> dict[str, VmcryptdError]:
        """Returns the failures by volume. Raises an error that ends everything."""
        closed = {name for name in self._client.volumes if not self._is_open(name)}
        for name in self._names:
            if name not in closed:
                self._say(f"volume {name} is open already")
        self._names = [name for name in self._names if name in closed]
        if not (self._is_for_all or self._names):
            return {}
        try:
            # A waiting volume has tried its other sources; the others may need no person.
            for name in self._names or ([] if self._waiting() else [""]):
                if not self._can_ask or name not in self._waiting():
                    self._begin(name)
            if self._is_for_all and not self._can_ask:
                self._begin("")
            failed = await self._pursue()
            if self._is_for_all and not failed and not any(map(self._is_open, closed)):
                self._say("nothing is waiting for a key")
            for name in self._names:
                if not self._is_open(name) and name not in failed:
                    failed[name] = StillWaitingError(
                        f"volume {name} is not open: another request has cancelled its unlock"
                    )
            return failed
        finally:
            for call in self._calls.values():
                call.cancel()
            if opened := sorted(name for name in closed if self._is_open(name)):
                self._say(f"open now: {few(opened)}")

    async def _pursue(self) -> dict[str, VmcryptdError]:
        failed: dict[str, VmcryptdError] = {}
        while True:
            for name, call in list(self._calls.items()):
                if call.done():
                    del self._calls[name]
                    error = call.exception()
                    if isinstance(error, KeyUnavailableError) and name and self._can_ask:
                        self._insist.add(name)
                        self._before = f"{error}. "
                    elif isinstance(error, VmcryptdError):
                        failed[name] = error
                    elif error is not None:
                        raise error
            targets = self._targets()
            if targets and self._can_ask:
                # Volumes whose other sources are still being tried may join the question.
                await self._client.until(self._is_question_complete, GATHER_S)
                if targets := self._targets():
                    await self._ask(targets)
            elif not self._calls:
                return {
                    name: error
                    for name, error in failed.items()
                    if not (name and self._is_open(name))
                }
            else:
                if targets and not self._has_explained:
                    self._has_explained = True
                    self._say(waiting_for(targets))
                    if hint := unread_key():
                        self._say(hint)
                await self._next_event()

    def _begin(self, name: str) -> None:
        if name not in self._calls:
            call = (
                self._client.call("Unlock", "s", name) if name else self._client.call("UnlockAll")
            )
            self._calls[name] = asyncio.create_task(call)

    async def _next_event(self) -> None:
        """Wait until a call has ended, or a question is due."""
        explained = self._has_explained
        asked = asyncio.ensure_future(
            self._client.until(lambda: bool(self._targets()) and not explained)
        )
        try:
            async with show_opening(self._client, self._names):
                await asyncio.wait(
                    {asked, *self._calls.values()}, return_when=asyncio.FIRST_COMPLETED
                )
            if asked.done():
                asked.result()
        finally:
            asked.cancel()

    # --- asking ---

    async def _ask(self, targets: list[str]) -> None:
        device = str(self._client.volumes.get(targets[0], {}).get("Device", ""))
        text = question(targets, device, self._before)
        with _answer(many=len(self._names) > 1) as answer:
            answered = await self._answered(text, targets, answer)
            answer.finish()
            if not answered:
                return
            if not answer.size():
                self._wrong(WrongKeyError("nothing was entered"), "Nothing was entered. ", targets)
                return
            open_before = {name for name in self._client.volumes if self._is_open(name)}
            failed = await hand_over(self._client, self._names, answer.reader)
        fitted = sorted(
            n for n in self._client.volumes if self._is_open(n) and n not in open_before
        )
        self._before = f"That fitted {few(fitted)}. " if fitted else ""
        if fitted:
            self._tries = 0
        self._insist.clear()
        for name, error in failed.items():
            if isinstance(error, StillWaitingError) or (
                fitted and isinstance(error, WrongKeyError)
            ):
                self._insist.update(target for target in targets if not self._is_open(target))
                self._begin(name)
            elif not isinstance(error, WrongKeyError):
                raise error
        if not failed:
            self._insist.clear()
        elif not fitted:
            wrong = next((e for e in failed.values() if isinstance(e, WrongKeyError)), None)
            if wrong is not None:
                self._wrong(wrong, "That did not fit. ", targets)
        self._names = [name for name in self._names if not self._is_open(name)]

    def _wrong(self, error: VmcryptdError, before: str, targets: list[str]) -> None:
        self._tries += 1
        if self._tries >= TRIES:
            raise error
        self._before = before
        self._insist.update(name for name in targets if not self._is_open(name))

    async def _answered(self, text: str, targets: list[str], answer: _Answer) -> bool:
        """False when the question is not needed any more. Raises StillWaitingError when the person declined."""
        waiting = set(self._waiting())

        def is_over() -> bool:
            return all(
                self._is_open(name) or (name in waiting and self._has_given_up(name))
                for name in targets
            )

        asking = asyncio.ensure_future(terminal.ask(text, answer.writer))
        over = asyncio.ensure_future(self._client.until(is_over))
        try:
            await asyncio.wait({asking, over}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                if asking.result():
                    return True
                raise StillWaitingError(f"not answered; still locked: {few(targets)}")
            over.result()
        finally:
            for task in (asking, over):
                task.cancel()
            await asyncio.gather(asking, over, return_exceptions=True)
        self._insist.clear()
        self._before = ""
        opened = [name for name in targets if self._is_open(name)]
        what = f"{few(opened)} opened meanwhile" if opened else f"{few(targets)} given up meanwhile"
        self._say(f"{what}; the question is withdrawn")
        return False

    # --- the daemon's state ---

    def _state(self, name: str) -> str:
        return str(self._client.volumes.get(name, {}).get("State", ""))

    def _is_open(self, name: str) -> bool:
        return self._state(name) == "unlocked"

    def _has_given_up(self, name: str) -> bool:
        return self._state(name) in ("", "locked", "failed", "missing")

    def _is_question_complete(self) -> bool:
        """Whether no volume is about to wait, and all waiting volumes are known.

        The daemon announces each volume separately and the manager's `Waiting` last, so some may be missing in between.
        """
        if any(self._state(name) == "unlocking" for name in self._client.volumes):
            return False
        return set(self._waiting()) == set(self._client.host.get("Waiting", ()))

    def _waiting(self) -> list[str]:
        # Not the manager's `Waiting`: it is announced after the volumes, so it may be older.
        return [name for name in self._client.volumes if self._state(name) == "waiting"]

    def _targets(self) -> list[str]:
        """The volumes that a question would name now."""
        wanted = set(self._waiting())
        if not self._is_for_all:
            wanted &= beneath(self._client, self._names)
        return sorted(name for name in wanted | self._insist if not self._is_open(name))


class _Answer(NamedTuple):
    """A typed answer, in a pipe or a memfd: never in Python."""

    writer: int
    reader: Reader
    size: Callable[[], int]
    finish: Callable[[], None]  # called once, when it is complete


@contextlib.contextmanager
def _answer(*, many: bool) -> Iterator[_Answer]:
    """A pipe for one reader: its pages are never swapped. Several readers need a memfd."""
    if many:
        from vmcryptd.posix.memfd import LockedKey

        key = LockedKey()
        try:
            yield _Answer(key.fileno(), key.reader, lambda: key.size, key.seal)
        finally:
            key.close()
        return
    with contextlib.ExitStack() as open_fds:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        open_fds.callback(os.close, reader)
        finish = open_fds.enter_context(contextlib.ExitStack())
        finish.callback(os.close, writer)
        size = functools.partial(terminal.waiting_bytes, reader)
        yield _Answer(writer, functools.partial(os.dup, reader), size, finish.close)
