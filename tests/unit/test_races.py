# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two events at the same moment end as either of them would, never as an internal error or an unretrieved one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

import pytest

from tests.lib import Running, digest, handed_in, opened_by, play
from tests.unit.test_prompt import Token, spec
from vmcryptd.core.errors import (
    CancelledError,
    GuestError,
    NotAskedError,
    NotLuksError,
    VmcryptdError,
)
from vmcryptd.core.goals import Action, Goal, StepId
from vmcryptd.core.model import GuestState
from vmcryptd.core.ports import Key
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.prompt import Prompt

A = opened_by("alpha")


def volume(name: str, sim: str = A, more: str = "") -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\n{more}\n[sim.volume.{name}]\n{sim}\n'


def guest(name: str, *disks: str, sim: str = "autostart = true", more: str = "") -> str:
    paths = ", ".join(f'"/dev/mapper/{disk}"' for disk in disks)
    return f"[sim.guest.{name}]\ndisks = [{paths}]\n{sim}\n[guest.{name}]\n{more}\n"


@play(volume("a", 'fault = "not-luks"', 'content = "lvm"\nvg = "v"'))
async def test_a_step_is_begun_again_while_its_outcome_is_read(run: Running) -> None:
    again: list[VmcryptdError] = []

    def ended(step: StepId, error: VmcryptdError | None) -> None:
        if step.action is Action.UNLOCK and error is not None and not again:
            again.append(error)
            run.engine.scheduler.begin(Goal.parse("unlock:a"))

    run.engine.scheduler.on_step.append(ended)
    with pytest.raises(NotLuksError):
        await run.engine.unlock("a")
    assert len(again) == 1
    assert "no sound LUKS header" in run.volume("a").error


TWO_SLOTS = f'{opened_by("beta")}\n[[sim.volume.a.slots]]\npassphrase_sha256 = "{digest("alpha")}"'


@play(volume("a", TWO_SLOTS))
async def test_an_answer_is_withdrawn_between_two_key_slots(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.open_questions)
    run.host.hold("try a 0")
    caller = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("x")))
    await run.until(lambda: run.host.deriving)
    caller.cancel()
    await asyncio.wait({caller})
    run.host.release("try a 0")
    await run.until(lambda: run.engine.waiting == ["a"] and not run.host.deriving)
    assert "internal error" not in run.volume("a").error
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", TWO_SLOTS))
async def test_the_only_answer_is_withdrawn_between_two_key_slots(run: Running) -> None:
    ends: list[VmcryptdError | None] = []
    run.engine.scheduler.on_step.append(lambda _, error: ends.append(error))
    run.host.hold("try a 0")
    caller = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("x")))
    await run.until(lambda: run.host.deriving)
    caller.cancel()
    await asyncio.wait({caller})
    run.host.release("try a 0")
    await run.idle()
    assert [type(error) for error in ends] == [NotAskedError]
    assert run.volumes() == {"a": "locked"}


@play(volume("a", "open = true") + guest("g", "a", sim='autostart = true\nfault = "no network"'))
async def test_a_guest_fails_after_its_start_was_overtaken_twice(run: Running) -> None:
    """The harness fails on an unretrieved error."""
    run.host.hold("starting g")
    run.engine.boot()
    await run.until(lambda: run.guests()["g"] == "starting")
    down = asyncio.ensure_future(run.engine.shutdown())
    await run.until(lambda: run.state == "stopping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmcryptd.engine.engine.PANIC_CANCEL_S", 0.01)
        await run.engine.panic()
    await asyncio.gather(down, return_exceptions=True)  # overtaken at a step, or just after it
    run.host.release("starting g")
    for _ in range(30):
        await asyncio.sleep(0)
    gc.collect()
    assert run.guests() == {"g": "off"}


@play(volume("a") + volume("b") + volume("c"))
async def test_an_engine_whose_volumes_wait_is_at_rest(run: Running) -> None:
    """The harness fails if it is not."""
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a", "b", "c"] and run.host.open_questions)


ORDERED = (
    volume("a", "open = true")
    + guest("g", "a", sim="running = true")
    + guest("h", "a", sim="running = true", more='after = ["g"]')
)


@play(ORDERED)
async def test_a_guest_is_gone_before_its_turn_to_stop(run: Running) -> None:
    """A transient one: libvirt forgets it when it ends by itself."""

    async def stop(*_: object) -> None:
        del run.host._guests["g"]
        run.host.guest("h", GuestState.OFF)

    run.engine.configure(run.host.settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.host, "stop", stop)
        await run.engine.shutdown()
    assert run.volumes() == {"a": "locked"}


@play(volume("a") + '[sim.guest.g]\ndisks = ["/dev/mapper/a"]\n')
async def test_a_guest_is_undefined_while_its_volume_is_opened(run: Running) -> None:
    starting = asyncio.ensure_future(run.engine.start_guest("g"))
    await run.until(lambda: run.host.open_questions)
    run.host.hold("try a")
    run.host.answer("alpha")
    await run.until(lambda: run.host.deriving)
    del run.host._guests["g"]
    run.host.guest_gone()
    await run.looked()
    run.host.release("try a")
    with pytest.raises(GuestError, match="libvirt knows no such domain"):
        await starting


@pytest.mark.parametrize("late", ["an answer", "an error"])
def test_a_question_ends_in_the_moment_it_is_withdrawn(late: str) -> None:
    token = Token()

    class Person:
        """Answers only when the question is taken back."""

        async def ask(self, message: str) -> Key:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if late == "an error":
                    raise CancelledError("the agent died") from None
            return token

    async def on_waiting(names: list[str]) -> None:
        pass

    async def scene() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: forgotten.append(context)
        )
        asked = Prompt(Person(), lambda: None, on_waiting)  # type: ignore[arg-type]
        asked.expect("a")
        waiting = asyncio.ensure_future(asked.next(spec("a"), lambda: True))
        for _ in range(30):
            await asyncio.sleep(0)
        waiting.cancel()
        asked.release("a")
        for _ in range(30):
            await asyncio.sleep(0)
        asked.close()
        gc.collect()

    forgotten: list[object] = []
    asyncio.run(scene())
    gc.collect()
    assert (token.closed, forgotten) == (1 if late == "an answer" else 0, [])


TWO_GUESTS = (
    volume("a", f"{A}\nopen = true", 'lock = "guest"')
    + guest("g", "a", sim="running = true\nshareable = true")
    + guest("h", "a", sim="shareable = true")
)


@contextlib.asynccontextmanager
async def stays_open_for_h(run: Running) -> AsyncIterator[None]:
    """What is done within, while h is being started, does not close its volume."""
    run.host.hold("starting h")
    starting = asyncio.ensure_future(run.engine.start_guest("h"))
    await run.until(lambda: "starting h" in run.host.calls)
    yield
    assert run.host.done("clos") == []
    run.host.release("starting h")
    await starting
    assert (run.guests(), run.volumes()) == ({"g": "off", "h": "running"}, {"a": "unlocked"})


@play(TWO_GUESTS)
async def test_a_volume_stays_open_for_a_guest_that_is_about_to_run(run: Running) -> None:
    """Between its start and libvirt's answer nothing shows it as running."""
    async with stays_open_for_h(run):
        run.host.guest("g", GuestState.OFF)  # the last one that runs
        await run.looked()
        await run.engine.background_done()


@play(TWO_GUESTS)
async def test_stopping_one_guest_closes_nothing_under_one_that_is_about_to_run(
    run: Running,
) -> None:
    async with stays_open_for_h(run):
        await run.engine.stop_guest("g")


@play(TWO_GUESTS)
async def test_a_guest_that_is_started_while_its_volume_closes_gets_it_opened_again(
    run: Running,
) -> None:
    run.host.hold("closing a")
    run.host.guest("g", GuestState.OFF)
    await run.until(lambda: "closing a" in run.host.calls)
    starting = asyncio.ensure_future(run.engine.start_guest("h"))
    await run.until(lambda: run.guests()["h"] == "starting")
    for _ in range(50):
        await asyncio.sleep(0)
    assert "starting h" not in run.host.calls
    run.host.answer("alpha")
    run.host.release("closing a")
    await starting
    assert run.host.done("close ", "open ", "start ") == ["close a", "open a", "start h"]


@pytest.mark.parametrize("key_cache_s", [0.0, 60.0])
def test_an_answer_that_comes_as_everything_goes_down(key_cache_s: float) -> None:
    """It is not kept for what comes up later."""
    token = Token()

    class Person:
        def __init__(self) -> None:
            self.answered = asyncio.Event()

        async def ask(self, message: str) -> Key:
            await self.answered.wait()
            return token

    async def on_waiting(names: list[str]) -> None:
        pass

    async def scene() -> None:
        person = Person()
        asked = Prompt(person, lambda: None, on_waiting)  # type: ignore[arg-type]
        asked.cache(key_cache_s)
        asked.expect("a")
        waiting = asyncio.ensure_future(asked.next(spec("a"), lambda: True))
        for _ in range(30):
            await asyncio.sleep(0)
        person.answered.set()
        asked.wipe()
        waiting.cancel()
        asked.release("a")
        for _ in range(30):
            await asyncio.sleep(0)
        assert (asked.held, token.closed) == ([], 1)

    asyncio.run(scene())


def test_an_answer_that_comes_as_its_volume_is_open() -> None:
    """Nothing needs it any more, so it is not kept."""
    token = Token()
    answered = asyncio.Event()

    class Person:
        async def ask(self, message: str) -> Key:
            await answered.wait()
            return token

    async def on_waiting(names: list[str]) -> None:
        pass

    async def scene() -> None:
        asked = Prompt(Person(), lambda: None, on_waiting)  # type: ignore[arg-type]
        asked.expect("a")
        waiting = asyncio.ensure_future(asked.next(spec("a"), lambda: True))
        for _ in range(30):
            await asyncio.sleep(0)
        answered.set()
        waiting.cancel()
        asked.release("a")
        for _ in range(30):
            await asyncio.sleep(0)
        assert (asked.held, token.closed) == ([], 1)

    asyncio.run(scene())
