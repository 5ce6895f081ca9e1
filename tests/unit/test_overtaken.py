# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was begun before LockAll, Shutdown or Panic never takes effect after these have answered."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lib import Running, descriptors, handed_in, opened_by, play
from vmcryptd.core.errors import BusyError, CancelledError, VmcryptdError
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.engine import Engine

A = opened_by("alpha")


def volume(name: str, sim: str = A) -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\n[sim.volume.{name}]\n{sim}\n'


DOWN: list[Callable[[Engine], Awaitable[None]]] = [Engine.lock_all, Engine.shutdown, Engine.panic]
WITH_KEY: dict[str, Callable[[Engine, int], Awaitable[Any]]] = {
    "unlock": lambda engine, fd: unlock_with_key.unlock(engine, "a", fd),
    "unlock all": unlock_with_key.unlock_all,
    "test": lambda engine, fd: engine.key_slots.test("a", fd),
    "add": lambda engine, fd: engine.key_slots.add("a", handed_in("alpha"), fd),
    "change": lambda engine, fd: engine.key_slots.change("a", handed_in("alpha"), fd),
    "remove": lambda engine, fd: engine.key_slots.remove("a", 0, fd),
    "keystore": lambda engine, fd: engine.key_slots.add_from_keystore("a", "b", fd),
    "rotate": lambda engine, fd: engine.rotations.rotate("a", fd, drop_others=True),
}


def keys() -> list[str]:
    return [link for link in descriptors().values() if "memfd:" in link]


async def failure(work: Awaitable[object]) -> VmcryptdError:
    with pytest.raises(VmcryptdError) as caught:
        await work
    return caught.value


async def turns() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@contextmanager
def in_transit() -> Iterator[tuple[int, int]]:
    """A pipe whose writer has not finished; the reader is the daemon's."""
    reader, writer = os.pipe()
    os.write(writer, b"alp")
    try:
        yield reader, writer
    finally:
        os.close(writer)


def finish(writer: int) -> None:
    with pytest.raises(BrokenPipeError):  # it is not read any more
        os.write(writer, b"ha")


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("name", WITH_KEY)
def test_a_key_in_transit(name: str, down: Callable[[Engine], Awaitable[None]]) -> None:
    @play(volume("a") + volume("b"))
    async def scene(run: Running) -> None:
        with in_transit() as (reader, writer):
            work = asyncio.ensure_future(WITH_KEY[name](run.engine, reader))
            await turns()
            assert keys()
            await down(run.engine)
            assert keys() == []
            finish(writer)
            assert isinstance(await failure(work), CancelledError)
        assert run.host.done("try", "open", "add", "remove", "rotate") == []
        assert run.volumes() == {"a": "locked", "b": "locked"}
        # From now on all is as ever.
        await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
        assert run.volumes()["a"] == "unlocked"

    scene()


LAYERS = volume("outer") + volume("inner").replace("\n[sim", '\nafter = ["outer"]\n[sim')


@pytest.mark.parametrize("locked", ["outer", "inner"])
def test_a_key_in_transit_while_its_volume_is_locked(locked: str) -> None:
    @play(LAYERS + volume("other"))
    async def scene(run: Running) -> None:
        with in_transit() as (reader, writer), in_transit() as (another, last):
            work = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "inner", reader))
            kept = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "other", another))
            await turns()
            await run.engine.lock(locked)
            finish(writer)
            assert isinstance(await failure(work), CancelledError)
            os.write(last, b"ha")
            os.dup2(writer, last)  # closes the other's writing end
            await kept
        assert run.volumes() == {"outer": "locked", "inner": "locked", "other": "unlocked"}

    scene()


@play(volume("a", A + "\nopen = true") + volume("b"))
async def test_nothing_is_opened_while_all_is_being_locked(run: Running) -> None:
    run.host.hold("closing a")
    down = asyncio.ensure_future(run.engine.lock_all())
    await run.until(lambda: run.volumes()["a"] == "locking")
    for work in (
        run.engine.unlock("b"),
        unlock_with_key.unlock(run.engine, "b", handed_in("alpha")),
        unlock_with_key.unlock_all(run.engine, handed_in("alpha")),
        run.engine.key_slots.test("b", handed_in("alpha")),
    ):
        assert isinstance(await failure(work), BusyError)
    assert run.state != "stopping"  # the guests stay
    run.host.release("closing a")
    await down
    assert run.volumes() == {"a": "locked", "b": "locked"}


@contextmanager
def slow_change(run: Running) -> Iterator[asyncio.Event]:
    """A new key slot is written only when the test says so."""
    slots, go_on = run.engine._ports.slots, asyncio.Event()
    add = slots.add

    async def slow(*arguments: Any, **more: Any) -> None:
        run.host.calls.append("writing")
        await go_on.wait()
        await add(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "add", slow)
        yield go_on


@pytest.mark.parametrize("down", [Engine.lock_all, Engine.shutdown])
def test_a_header_that_is_being_changed_is_waited_for(
    down: Callable[[Engine], Awaitable[None]],
) -> None:
    @play(volume("a"))
    async def scene(run: Running) -> None:
        with slow_change(run) as go_on:
            keys_of_a = run.engine.key_slots
            work = asyncio.ensure_future(keys_of_a.add("a", handed_in("alpha"), handed_in("beta")))
            await run.until(lambda: run.host.done("writing"))
            going = asyncio.ensure_future(down(run.engine))
            await turns()
            assert not going.done()
            go_on.set()
            await going
            assert await work == 1
        assert keys() == []

    scene()


@play(volume("a"))
async def test_panic_waits_for_no_header(run: Running) -> None:
    with slow_change(run) as go_on:
        work = asyncio.ensure_future(
            run.engine.key_slots.change("a", handed_in("alpha"), handed_in("beta"))
        )
        await run.until(lambda: run.host.done("writing"))
        await run.engine.panic()
        assert keys() == []
        go_on.set()
        assert isinstance(await failure(work), CancelledError)
    assert run.host.done("add", "remove") == []


@play(volume("a"))
async def test_a_caller_that_leaves_is_no_request_that_overtook(run: Running) -> None:
    with in_transit() as (reader, writer):
        work = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", reader))
        await turns()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        finish(writer)
    assert keys() == []


@play(volume("a") + volume("b", A + "\nopen = true"))
async def test_what_is_killed_opens_its_volume_in_its_last_moment(run: Running) -> None:
    go_on = asyncio.Event()

    async def killed(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await go_on.wait()
            run.host.volume("a", open=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmcryptd.engine.engine.PANIC_CANCEL_S", 0.01)
        patch.setattr(run.host, "open", killed)
        work = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
        await run.until(lambda: run.volumes()["a"] == "unlocking")
        await turns()
        down = asyncio.ensure_future(run.engine.panic())
        await run.until(lambda: run.host.done("close b"))
        go_on.set()
        await down
        await turns()
    await run.looked()
    assert run.volumes() == {"a": "locked", "b": "locked"}
    assert isinstance(await failure(work), CancelledError)
    assert keys() == []


@play(volume("a"))
async def test_what_never_ends_is_named_by_panic(run: Running) -> None:
    go_on = asyncio.Event()

    async def hangs(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await go_on.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmcryptd.engine.engine.PANIC_CANCEL_S", 0.01)
        patch.setattr("vmcryptd.engine.engine.KILLED_S", 0.01)
        patch.setattr(run.host, "open", hangs)
        work = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
        await run.until(lambda: run.volumes()["a"] == "unlocking")
        await turns()
        error = await failure(run.engine.panic())
        assert "volume a: an attempt to open it does not end" in str(error)
        go_on.set()
        await failure(work)


@pytest.mark.parametrize("what", ["close", "unmount"])
def test_panic_wipes_the_key_of_what_cannot_be_closed_in_time(what: str) -> None:
    @play(
        volume("a", A + "\nopen = true").replace(
            "[sim", 'content = "filesystem"\nmount = "/m"\n[sim'
        )
    )
    async def scene(run: Running) -> None:
        async def hangs(*_: object) -> None:
            await asyncio.Event().wait()

        run.host.volume("a", mounted=True)
        await run.looked()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vmcryptd.engine.panic.CLOSE_S", 0.01)
            patch.setattr(run.host, what, hangs)
            error = await failure(run.engine.panic())
        assert "it takes longer than 0.01 s" in str(error)
        assert "its key is wiped" in str(error)
        assert run.volumes() == {"a": "suspended"}

    scene()
