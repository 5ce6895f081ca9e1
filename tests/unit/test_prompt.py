# SPDX-License-Identifier: LGPL-2.1-or-later
"""One question for everything that waits, and how long its answers are held."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from vmcryptd.core.errors import VmcryptdError, WrongKeyError
from vmcryptd.core.model import Infinity, VolumeSpec
from vmcryptd.engine import prompt
from vmcryptd.engine.prompt import Answer, Prompt, question

WAITERS: set[asyncio.Task[Answer | None]] = set()  # the volumes' side, which ends with its steps
WRONG = WrongKeyError("no")


@dataclass(eq=False)
class Token:
    """A key without a content."""

    closed: int = 0

    def reader(self) -> int:
        raise AssertionError

    def close(self) -> None:
        self.closed += 1


@dataclass
class Person:
    """Answers when the test says so."""

    questions: list[str] = field(default_factory=list)
    answers: asyncio.Queue[Token | VmcryptdError] = field(default_factory=asyncio.Queue)
    waiting: list[list[str]] = field(default_factory=list)
    interrupted: int = 0

    async def ask(self, message: str) -> Token:
        self.questions.append(message)
        try:
            answer = await self.answers.get()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        if isinstance(answer, VmcryptdError):
            raise answer
        return answer

    async def on_waiting(self, names: list[str]) -> None:
        self.waiting.append(names)


Scene = Callable[[Prompt, Person], Awaitable[None]]


def play(scene: Scene) -> Callable[[], None]:
    async def scenes() -> None:
        person = Person()
        asked = Prompt(person, lambda: None, person.on_waiting)
        async with asyncio.timeout(120):
            await scene(asked, person)
        asked.close()
        await turns()
        left = asyncio.all_tasks() - {asyncio.current_task()} - WAITERS
        assert not left
        for waiter in WAITERS:
            waiter.cancel()
        await asyncio.gather(*WAITERS, return_exceptions=True)
        WAITERS.clear()

    def played() -> None:
        asyncio.run(scenes())

    played.__name__, played.__doc__ = scene.__name__, scene.__doc__  # type: ignore[attr-defined]
    return played


async def turns() -> None:
    """All that can happen without time has happened."""
    for _ in range(30):
        await asyncio.sleep(0)


def spec(name: str) -> VolumeSpec:
    return VolumeSpec(name, f"/dev/{name}")


def wait(asked: Prompt, *names: str) -> list[asyncio.Task[Answer | None]]:
    for name in names:
        asked.expect(name)
    waiters = [asyncio.create_task(asked.next(spec(name), lambda: True)) for name in names]
    WAITERS.update(waiters)
    return waiters


def test_the_words() -> None:
    assert question([spec("a")], False) == "Passphrase for volume a (/dev/a):"
    assert (
        question([spec("a"), spec("b")], True) == "That did not fit. Passphrase for volumes a, b:"
    )


@play
async def test_one_question_for_all(asked: Prompt, person: Person) -> None:
    tasks = wait(asked, "b", "a")
    await turns()
    assert person.questions == ["Passphrase for volumes a, b:"]
    assert person.waiting == [["a", "b"]]
    token = Token()
    person.answers.put_nowait(token)
    answers = await asyncio.gather(*tasks)
    assert {answer.key for answer in answers if answer} == {token}
    asked.release("a")
    assert not token.closed
    asked.release("b")
    assert token.closed


@play
async def test_who_waits_later_is_announced_and_does_not_change_the_question(
    asked: Prompt, person: Person
) -> None:
    wait(asked, "a")
    await turns()
    for name in ("b", "c", "d"):
        asked.expect(name)
    for name in ("b", "c"):
        asked.fetching(name)
    late = [asyncio.create_task(asked.next(spec(name), lambda: True)) for name in ("b", "d")]
    await turns()
    # The third tries another source still.
    assert person.waiting == [["a"]]
    asked.release("c")
    await turns()
    assert person.waiting == [["a"], ["a", "b", "d"]]
    assert (person.questions, person.interrupted) == (["Passphrase for volume a (/dev/a):"], 0)
    token = Token()
    person.answers.put_nowait(token)
    answers = await asyncio.gather(*late)
    assert {answer.key for answer in answers if answer} == {token}
    for name in ("a", "b", "d"):
        asked.release(name)
    assert token.closed
    assert len(person.waiting) == 2


@play
async def test_an_answer_does_not_wait_for_who_begins_to_wait(
    asked: Prompt, person: Person
) -> None:
    [first] = wait(asked, "a")
    await turns()
    asked.expect("slow")
    asked.fetching("slow")
    wait(asked, "b")
    await turns()
    person.answers.put_nowait(Token())
    await turns()
    assert first.done()
    assert person.waiting == [["a"]]


@play
async def test_the_question_waits_for_who_tries_another_source(
    asked: Prompt, person: Person
) -> None:
    asked.expect("slow")
    asked.fetching("slow")
    wait(asked, "a")
    await turns()
    assert person.questions == []
    wait(asked, "slow")
    await turns()
    assert person.questions == ["Passphrase for volumes a, slow:"]


@play
async def test_a_slow_source_does_not_hold_up_the_question(asked: Prompt, person: Person) -> None:
    asked.expect("slow")
    asked.fetching("slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "GATHER_S", 0.01)
        wait(asked, "a")
        while not person.questions:
            await asyncio.sleep(0.001)
    assert person.questions == ["Passphrase for volume a (/dev/a):"]


@play
async def test_a_slow_source_does_not_hold_up_the_second_question_either(
    asked: Prompt, person: Person
) -> None:
    asked.expect("slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "GATHER_S", 0.01)
        [task] = wait(asked, "a")
        asked.fetching("slow")
        person.answers.put_nowait(Token())
        answer = await task
        assert answer is not None
        asked.refuse("a", answer, WRONG)
        wait(asked, "a")
        while len(person.questions) < 2:
            await asyncio.sleep(0.001)
    assert person.questions[1] == "That did not fit. Passphrase for volume a (/dev/a):"


@play
async def test_volumes_that_wait_do_not_wake_each_other(asked: Prompt, person: Person) -> None:
    """Each wake-up woke all others again: two waiting volumes took a whole core for as long as they waited."""
    woken: list[None] = []
    wait(asked, "a", "b", "c")
    await turns()
    asked.changes.watch(lambda: woken.append(None))
    asked.changes.notify()
    await turns()
    assert len(woken) == 1
    assert asked.waiting == ["a", "b", "c"]


@play
async def test_an_answer_that_fits_nothing_is_dropped(asked: Prompt, person: Person) -> None:
    [task] = wait(asked, "a")
    token = Token()
    person.answers.put_nowait(token)
    answer = await task
    assert answer is not None
    asked.refuse("a", answer, WRONG)
    assert token.closed
    wait(asked, "a")
    await turns()
    assert person.questions[1] == "That did not fit. Passphrase for volume a (/dev/a):"
    assert len(person.waiting) == 1


@play
async def test_the_question_ends_when_nobody_wants_an_answer(asked: Prompt, person: Person) -> None:
    [task] = wait(asked, "a")
    await turns()
    task.cancel()
    asked.release("a")
    await turns()
    assert (person.interrupted, asked.waiting) == (1, [])
    wait(asked, "b")
    await turns()
    assert person.questions[1:] == ["Passphrase for volume b (/dev/b):"]


@play
async def test_who_was_opened_meanwhile_wants_no_answer(asked: Prompt, person: Person) -> None:
    wanted = True
    asked.expect("a")
    task = asyncio.create_task(asked.next(spec("a"), lambda: wanted))
    await turns()
    wanted = False
    asked.changes.notify()
    assert await task is None
    assert asked.waiting == []


@play
async def test_a_key_for_one_volume_is_for_no_other(asked: Prompt, person: Person) -> None:
    asked.expect("a")
    asked.expect("b")
    token = Token()
    answer = asked.offer(token, "key", frozenset(["a"]), "a")
    assert asked.untried("a") is answer
    assert asked.untried("b") is None
    asked.release("a")
    assert not token.closed  # its caller withdraws it
    asked.withdraw(answer)
    asked.withdraw(answer)
    assert asked.untried("a") is None
    assert token.closed


@play
async def test_a_key_for_one_volume_goes_before_a_general_one(
    asked: Prompt, person: Person
) -> None:
    asked.expect("a")
    asked.offer(Token(), "prompt")
    answer = asked.offer(Token(), "key", frozenset(["a"]), "a")
    assert asked.untried("a") is answer


@play
async def test_who_asks_nobody_takes_only_what_is_handed_in_for_it(
    asked: Prompt, person: Person
) -> None:
    asked.expect("other")
    asked.offer(Token(), "prompt")
    assert asked.untried("a") is None
    answer = asked.offer(Token(), "key", frozenset(["a"]), "a")
    assert asked.untried("a") is answer


@play
async def test_the_cache_lets_go_after_a_while(asked: Prompt, person: Person) -> None:
    asked.key_cache_s = 0.005
    token = Token()
    asked.offer(token, "prompt")
    asked.drop_unneeded()
    assert not token.closed
    while not token.closed:
        await asyncio.sleep(0.001)


@play
async def test_who_stands_behind_a_keystore_tries_what_that_leaves(
    asked: Prompt, person: Person
) -> None:
    left: set[Answer] = set()
    [task] = wait(asked, "store")
    asked.expect("a")
    with asked.behind("a", lambda answer: answer in left):
        passed_on = asyncio.create_task(asked.passed_on("a"))
        token = Token()
        person.answers.put_nowait(token)
        answer = await task
        assert answer is not None
        assert asked.is_behind("a")
        left.add(answer)
        assert not asked.is_behind("a")  # it is about to try it
        asked.refuse("store", answer, WRONG)
        wait(asked, "store")
        await turns()
        assert passed_on.done()
        assert len(person.questions) == 1  # it may open all that the keystore is wanted for
        asked.refuse("a", answer, WRONG)
        assert token.closed
        again = asyncio.create_task(asked.passed_on("a"))
        await turns()
        assert asked.is_behind("a")
        assert person.questions[1] == "That did not fit. Passphrase for volume store (/dev/store):"
        again.cancel()
    assert not asked.is_behind("a")


@play
async def test_the_cache_is_not_for_what_fitted_nothing(asked: Prompt, person: Person) -> None:
    asked.key_cache_s = Infinity
    [task] = wait(asked, "a")
    token = Token()
    person.answers.put_nowait(token)
    answer = await task
    assert answer is not None
    asked.refuse("a", answer, WRONG)
    assert (token.closed, asked.held) == (1, [])


@play
async def test_a_late_comer_stops_the_clock_of_the_cache(asked: Prompt, person: Person) -> None:
    asked.key_cache_s = 0.005
    token = Token()
    asked.offer(token, "prompt")
    asked.drop_unneeded()
    asked.expect("late")
    await asyncio.sleep(0.02)
    assert not token.closed
    [task] = wait(asked, "late")
    assert await task is not None
    asked.release("late")
    while not token.closed:
        await asyncio.sleep(0.001)


@play
async def test_wiping_is_final(asked: Prompt, person: Person) -> None:
    asked.key_cache_s = Infinity
    tokens = Token(), Token()
    asked.offer(tokens[0], "prompt")
    asked.offer(tokens[1], "key", frozenset(["a"]), "a")
    asked.drop_unneeded()
    assert not any(token.closed for token in tokens)
    asked.wipe()
    assert all(token.closed for token in tokens)


@play
async def test_a_failing_hook_does_not_end_the_asking(asked: Prompt, person: Person) -> None:
    async def fail(names: list[str]) -> None:
        asked._on_waiting = person.on_waiting
        raise OSError("no memory")

    asked._on_waiting = fail
    [task] = wait(asked, "a")
    await turns()
    person.answers.put_nowait(Token())
    assert await task is not None


@play
async def test_who_comes_just_as_the_asking_ends_is_asked_for(
    asked: Prompt, person: Person
) -> None:
    """In the same turn in which the question found no volume waiting."""
    [task] = wait(asked, "a")
    token = Token()
    person.answers.put_nowait(token)
    await task
    asked.release("a")
    for _ in range(10):
        [late] = wait(asked, "b")
        await asyncio.sleep(0)
        late.cancel()
        asked.release("b")
        await asyncio.sleep(0)
    asked_before = len(person.questions)
    wait(asked, "c")
    await turns()
    assert person.questions[asked_before:] == ["Passphrase for volume c (/dev/c):"]


def test_no_moment_is_missed_at_which_a_question_becomes_needless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The volume is open just when the one who asks for it has looked, and is about to wait for the next move."""

    @play
    async def scene(asked: Prompt, person: Person) -> None:
        [waiter] = wait(asked, "a")
        await turns()
        assert len(person.questions) == 1
        waiter.cancel()  # something else opens it
        await turns()
        begin = asyncio.ensure_future

        def begin_and_release(coroutine: Any) -> Any:
            task = begin(coroutine)
            asked.release("a")
            return task

        monkeypatch.setattr(asyncio, "ensure_future", begin_and_release)
        asked.changes.notify()
        await turns()
        assert person.interrupted == 1

    scene()
