# SPDX-License-Identifier: LGPL-2.1-or-later
"""The budget of key derivations, and what can go wrong between device and mapping."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.lib import Running, handed_in, opened_by, play
from vmcryptd.core.errors import (
    AmbiguousDeviceError,
    BusyError,
    DamagedHeaderError,
    VmcryptdError,
    WrongUuidError,
)
from vmcryptd.core.model import Header, VolumeSpec
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.derivation import KdfBudget

A = opened_by("alpha")
GIB = 1024 * 1024


class Derivations:
    """Start when the budget lets them, end when the test says so."""

    def __init__(self, budget: KdfBudget, share: float = 0.5) -> None:
        self.budget, self.share = budget, share
        self.running: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, *sizes: int, height: int = 0, is_absurd: bool = False) -> None:
        for size in sizes:
            number = len(self.tasks)
            self.ends[number] = asyncio.Event()
            self.tasks.append(asyncio.create_task(self._derive(number, size, height, is_absurd)))

    async def _derive(self, number: int, size: int, height: int, is_absurd: bool) -> None:
        async with self.budget.take(size, self.share, height, is_absurd=is_absurd):
            self.running.append(number)
            try:
                await self.ends[number].wait()
            finally:
                self.running.remove(number)

    async def settle(self) -> list[int]:
        for _ in range(20):
            await asyncio.sleep(0)
        return sorted(self.running)

    async def end(self, number: int) -> list[int]:
        self.ends[number].set()
        return await self.settle()


def test_as_many_as_fit() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 4 * GIB, cores=16))
        derivations.start(GIB, GIB, GIB, GIB // 2)
        assert await derivations.settle() == [0, 1]
        assert await derivations.end(0) == [1, 2]
        assert await derivations.end(1) == [2, 3]
        assert await derivations.end(2) == [3]
        assert await derivations.end(3) == []

    asyncio.run(test())


def test_the_kernel_has_not_counted_yet_what_has_only_just_started() -> None:
    """The budget is a share of what was there before: not of that and what is on its way to be used, too."""

    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 8 * GIB, cores=16))
        derivations.start(*[GIB] * 10)
        assert await derivations.settle() == [0, 1, 2, 3]
        for number in range(10):
            assert len(await derivations.end(number)) <= 4

    asyncio.run(test())


def test_memory_that_others_have_taken_meanwhile() -> None:
    async def test() -> None:
        available = [8 * GIB]
        derivations = Derivations(KdfBudget(lambda: available[0], cores=16))
        derivations.start(GIB)
        await derivations.settle()
        available[0] = GIB // 2
        derivations.start(GIB)
        assert await derivations.settle() == [0]
        assert await derivations.end(0) == [1]  # a single one always runs
        await derivations.end(1)

    asyncio.run(test())


def test_no_more_than_there_are_cores() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 64 * GIB, cores=2))
        derivations.start(0, 0, 0)
        assert await derivations.settle() == [0, 1]
        assert await derivations.end(1) == [0, 2]
        await derivations.end(0)
        await derivations.end(2)

    asyncio.run(test())


def test_a_cancelled_one_gives_back_what_it_held() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 2 * GIB, cores=16))
        derivations.start(GIB, GIB)
        assert await derivations.settle() == [0]
        derivations.tasks[0].cancel()
        assert await derivations.settle() == [1]
        derivations.start(GIB)
        derivations.tasks[2].cancel()  # while it waits
        assert await derivations.settle() == [1]
        assert await derivations.end(1) == []

    asyncio.run(test())


def test_an_absurd_one_runs_beside_the_others_and_after_them() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 4 * GIB, cores=2))
        derivations.start(GIB)
        derivations.start(0, 3 * GIB, is_absurd=True)
        derivations.start(GIB)
        assert await derivations.settle() == [0, 3]
        assert await derivations.end(0) == [3]
        assert await derivations.end(3) == [1]  # one of them at a time
        derivations.start(GIB, GIB)
        assert await derivations.settle() == [1, 4, 5]
        assert await derivations.end(1) == [4, 5]
        derivations.tasks[4].cancel()
        derivations.tasks[5].cancel()
        assert await derivations.settle() == [2]
        assert await derivations.end(2) == []

    asyncio.run(test())


def test_what_most_waits_for_goes_first() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 64 * GIB, cores=1))
        derivations.start(0)
        derivations.start(0, 0)
        derivations.start(0, height=1)
        derivations.start(0, height=2)
        assert await derivations.settle() == [0]
        assert [await derivations.end(number) for number in (0, 4, 3, 1)] == [[4], [3], [1], [2]]
        await derivations.end(2)

    asyncio.run(test())


def test_a_small_one_does_not_wait_for_the_memory_of_a_large_one() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: 4 * GIB, cores=4))
        derivations.start(GIB)
        derivations.start(2 * GIB, height=1)
        derivations.start(0)
        assert await derivations.settle() == [0, 2]
        assert await derivations.end(0) == [1, 2]
        await derivations.end(1)
        await derivations.end(2)

    asyncio.run(test())


def test_one_that_is_cancelled_in_the_turn_it_is_let_in() -> None:
    async def test() -> None:
        derivations = Derivations(KdfBudget(lambda: GIB, cores=1))
        derivations.start(0, 0, 0)
        assert await derivations.settle() == [0]
        derivations.ends[0].set()
        while len(derivations.budget._waiting) == 2:
            await asyncio.sleep(0)
        derivations.tasks[1].cancel()
        assert await derivations.settle() == [2]
        await derivations.end(2)

    asyncio.run(test())


# --- between device and mapping ---


def volume(name: str, sim: str = A, more: str = "") -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\n{more}\n[sim.volume.{name}]\n{sim}\n'


async def failure(run: Running, name: str) -> VmcryptdError:
    with pytest.raises(VmcryptdError) as caught:
        await unlock_with_key.unlock(run.engine, name, handed_in("alpha"))
    return caught.value


UUID = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"


@play(volume("a", A, f'uuid = "{UUID}"'))
async def test_another_header_than_the_configured_one(run: Running) -> None:
    right = run.host.header

    async def another(spec: VolumeSpec) -> Header:
        return (await right(spec))._replace(uuid="00000000-0000-0000-0000-000000000000")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.host, "header", another)
        error = await failure(run, "a")
    assert isinstance(error, WrongUuidError)
    assert f"the configuration says {UUID}" in str(error)
    assert run.volumes() == {"a": "failed"}
    assert run.host.done("try") == []


@play(volume("a") + volume("b"))
async def test_disks_that_have_changed_places(run: Running) -> None:
    """As kernel names do from boot to boot: neither volume is opened on what was the other's disk."""
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    await unlock_with_key.unlock(run.engine, "b", handed_in("alpha"))
    await run.engine.lock_all()
    seen, tried = run.volume("a").uuid, run.host.done("try")
    right = run.host.header

    async def swapped(spec: VolumeSpec) -> Header:
        return await right(replace(spec, name={"a": "b", "b": "a"}[spec.name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.host, "header", swapped)
        for _ in range(2):  # to have seen it once does not make it right
            error = await failure(run, "a")
            assert isinstance(error, WrongUuidError)
            assert "volume a: the LUKS header on /dev/a was last seen as volume b" in str(error)
        with pytest.raises(WrongUuidError):
            await run.engine.key_slots.listed("a")
    assert run.host.done("try") == tried
    assert run.volume("a").uuid == seen
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))


def tagged(name: str) -> str:
    return volume(name, A + "\ncopied = true").replace(f"/dev/{name}", f"LABEL={name}")


@play(tagged("a") + volume("b"))
async def test_a_copy_of_a_disk_is_refused_until_it_is_gone(run: Running) -> None:
    error = await failure(run, "a")
    assert isinstance(error, AmbiguousDeviceError)
    assert "LABEL=a is on /dev/copy-a and /dev/sim-a" in str(error)
    with pytest.raises(AmbiguousDeviceError):
        await run.engine.key_slots.listed("a")
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "failed", "b": "unlocked"}
    run.host.answer("alpha")
    run.host.volume("a", copied=False)
    await run.until(lambda: run.volumes()["a"] == "unlocked")


@play(tagged("a"))
async def test_a_copy_that_comes_while_the_volume_is_open(run: Running) -> None:
    run.host.volume("a", copied=False)
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    run.host.volume("a", copied=True)
    await run.until(lambda: run.volume("a").device == "/dev/sim-a")
    assert run.volumes() == {"a": "unlocked"}
    await run.engine.lock_all()
    assert run.host.done("close ") == ["close a"]
    assert run.volumes() == {"a": "failed"}


@play(tagged("a"))
async def test_a_copy_that_comes_while_a_person_is_asked(run: Running) -> None:
    run.host.volume("a", copied=False)
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    run.host.volume("a", copied=True)
    run.host.answer("alpha")
    await run.until(lambda: "is on /dev/copy-a and /dev/sim-a" in run.volume("a").error)
    assert run.host.done("try") == []


BIG = "memory_kib = 1048576\n"


@play(volume("b", BIG + A) + tagged("a").replace("copied", f"{BIG}copied"))
async def test_a_copy_that_comes_while_another_volume_has_the_memory(run: Running) -> None:
    run.host.volume("a", copied=False)
    run.host.available_kib = 1048576
    run.host.hold("try b")
    other = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "b", handed_in("alpha")))
    await run.until(lambda: run.host.deriving)
    work = asyncio.ensure_future(failure(run, "a"))
    await run.until(lambda: run.engine.derivations._budget._waiting)
    run.host.volume("a", copied=True)
    run.host.release("try b")
    assert isinstance(await work, AmbiguousDeviceError)
    await other
    assert run.host.done("try") == ["try b"]


@play(tagged("a"))
async def test_a_copy_that_comes_before_a_key_is_added(run: Running) -> None:
    """Its header would get the key, and the volume's own would not."""
    run.host.volume("a", copied=False)
    run.engine.derivations._budget._cores = 1
    async with run.engine.derivations.room_aside(0):
        work = asyncio.ensure_future(
            run.engine.key_slots.add("a", handed_in("alpha"), handed_in("beta"))
        )
        await run.until(lambda: run.engine.derivations._budget._waiting)
        run.host.volume("a", copied=True)
    with pytest.raises(AmbiguousDeviceError):
        await work
    assert run.host.done("add") == []


@play(volume("a", 'fault = "damaged"'))
async def test_a_damaged_header(run: Running) -> None:
    assert isinstance(await failure(run, "a"), DamagedHeaderError)


@play(volume("a"))
async def test_the_uuid_is_shown_once_the_header_was_read(run: Running) -> None:
    assert run.volume("a").uuid == ""
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.volume("a").uuid == "00000000-0000-0000-0000-000000000000"


@play(volume("a"))
async def test_another_caller_was_faster_with_the_key(run: Running) -> None:
    async def taken(*_: object) -> None:
        run.host.volume("a", open=True)
        raise BusyError("device a already exists")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.host, "open", taken)
        await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert (run.volumes(), run.volume("a").error) == ({"a": "unlocked"}, "")


@play(volume("a"))
async def test_a_suspended_volume_is_resumed(run: Running) -> None:
    run.host.volume("a", open=True, suspended=True)
    await run.until(lambda: run.volumes() == {"a": "suspended"})
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.volumes() == {"a": "unlocked"}
