# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which key slot a key is tried on first, and that none is tried twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.lib import Host, Running, handed_in, key, opened_by, play
from vmcryptd.core import slot_order
from vmcryptd.core.errors import OutOfMemoryError, VmcryptdError, WrongKeyError
from vmcryptd.core.goals import Goal
from vmcryptd.core.model import Header, KeySlot, Token
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.derivation import heights

COSTLY = KeySlot(0, "argon2id", 1048576, iterations=4)
CHEAP = KeySlot(1, "pbkdf2", iterations=1000)
CHEAPER = KeySlot(2, "pbkdf2", iterations=500)


def order(*active: KeySlot, tokens: tuple[Token, ...] = (), fitted: int | None = None) -> list[int]:
    found = slot_order.order(Header(2, "u", active, tokens), fitted)
    return [slot.number for slot in found]


def test_the_cheapest_first() -> None:
    assert order(COSTLY, CHEAP, CHEAPER) == [2, 1, 0]


def test_what_fitted_last_time_goes_before_all() -> None:
    assert order(COSTLY, CHEAP, CHEAPER, fitted=0) == [0, 2, 1]
    assert order(COSTLY, CHEAP, fitted=7) == [1, 0]  # that slot is gone


def test_priorities_as_cryptsetup_means_them() -> None:
    ignored, preferred = replace(CHEAPER, priority=0), replace(COSTLY, priority=2)
    assert order(preferred, CHEAP, ignored) == [0, 1]
    assert order(ignored) == [2]
    assert order(preferred, CHEAP, ignored, fitted=2) == [2, 0, 1]


def test_what_claims_too_much_or_is_not_known_comes_last() -> None:
    absurd = KeySlot(3, "argon2id", 3 * 1024**2, iterations=2**31, priority=2)
    unknown = KeySlot(4, "scrypt")
    assert order(absurd, unknown, COSTLY) == [0, 3, 4]
    assert order(absurd, unknown, COSTLY, fitted=3) == [3, 0, 4]


def test_what_only_a_machine_knows_is_not_tried() -> None:
    tpm = Token(0, "systemd-tpm2", (1,))
    assert order(COSTLY, CHEAP, tokens=(tpm,)) == [0]
    assert order(CHEAP, tokens=(tpm,)) == [1]  # what else
    assert order(COSTLY, CHEAP, tokens=(tpm,), fitted=1) == [1, 0]
    recovery = Token(1, "systemd-recovery", (1,))
    assert order(COSTLY, CHEAP, tokens=(recovery,)) == [1, 0]
    assert order(COSTLY, CHEAP, tokens=(tpm, recovery)) == [1, 0]


def test_while_it_is_encrypted_anew_cryptsetup_alone_knows() -> None:
    assert slot_order.order(Header(2, "u", (COSTLY,), is_reencrypting=True), 0) == ()


# --- the same with an engine ---

ONE = '[volume.a]\ndevice = "/dev/a"\n[sim.volume.a]\n' + opened_by("alpha")
SLOTS = ONE + "\nmemory_kib = 1048576\nslots = [%s]\n"
CHEAP_BETA = "{" + opened_by("beta") + ", memory_kib = 0}"
LIKE_BETA = "{" + opened_by("beta") + ", memory_kib = 1048576}"


@play(SLOTS % CHEAP_BETA)
async def test_a_cheap_slot_behind_a_costly_one_costs_itself_only(run: Running) -> None:
    await unlock_with_key.unlock(run.engine, "a", handed_in("beta"))
    assert run.host.done("try") == ["try a 1"]
    await run.engine.lock("a")
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.host.done("try") == ["try a 1", "try a 1", "try a 0"]


@play(SLOTS % CHEAP_BETA)
async def test_what_fitted_is_remembered_for_each_source(run: Running) -> None:
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.host.fitted() == {"a": {"key": 0}}
    await run.engine.lock("a")
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.host.done("try") == ["try a 1", "try a 0", "try a 0"]
    await run.engine.lock("a")
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    run.host.answer("beta")
    await run.idle()
    assert run.host.fitted() == {"a": {"key": 0, "prompt": 1}}


def test_what_fitted_is_known_to_the_next_daemon() -> None:
    async def test() -> None:
        host = Host.parse(SLOTS % CHEAP_BETA)
        for _ in range(2):
            run = Running(host)
            await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
            await run.engine.lock("a")
            await run.close()
        assert host.done("try") == ["try a 1", "try a 0", "try a 0"]

    asyncio.run(test())


@play(SLOTS % CHEAP_BETA)
async def test_a_suspended_volume_is_resumed_by_its_slot(run: Running) -> None:
    run.host.volume("a", open=True, suspended=True)
    await run.until(lambda: run.volumes() == {"a": "suspended"})
    await unlock_with_key.unlock(run.engine, "a", handed_in("beta"))
    assert run.host.done("try") == ["try a 1"]


async def failure(run: Running, passphrase: str) -> VmcryptdError | None:
    try:
        await unlock_with_key.unlock(run.engine, "a", handed_in(passphrase))
    except VmcryptdError as error:
        return error
    return None


@play(SLOTS % CHEAP_BETA)
async def test_a_key_that_fits_none_was_tried_on_each_once(run: Running) -> None:
    assert isinstance(await failure(run, "x"), WrongKeyError)
    assert run.host.done("try") == ["try a 1", "try a 0"]


@play(SLOTS % LIKE_BETA)
async def test_an_answer_is_not_derived_twice_for_a_slot(run: Running) -> None:
    """The second slot needed more memory than there was; asked for again, the first is not tried anew."""
    answer = run.engine.prompt.offer(key("beta"), "key")
    run.engine.prompt.key_cache_s = float("inf")
    opened = run.host.open

    async def poor(volume: object, key: object, slot: int | None = None) -> None:
        if slot == 1:
            raise OutOfMemoryError("no memory")
        await opened(volume, key, slot)  # type: ignore[arg-type]

    run.host.open = poor  # type: ignore[method-assign]
    job = run.engine.scheduler.begin(Goal.parse("unlock:a"), may_ask=False)
    await run.engine.scheduler.ended(job)
    assert isinstance(job.error, OutOfMemoryError)
    assert run.host.done("try") == ["try a 0"]
    run.host.open = opened  # type: ignore[method-assign]
    await run.engine.scheduler.wait(
        run.engine.scheduler.begin(Goal.parse("unlock:a"), may_ask=False)
    )
    assert run.host.done("try") == ["try a 0", "try a 1"]
    run.engine.prompt.withdraw(answer)


@play(ONE)
async def test_a_slot_that_was_added_while_a_person_was_asked(run: Running) -> None:
    """The header is read again for each answer: it is a person's way out to add a passphrase by hand."""
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    added = Host.parse(SLOTS % CHEAP_BETA)._volumes["a"]
    run.host.volume("a", slots=added.slots)
    run.host.answer("beta")
    await run.idle()
    assert run.state == "ready"


def volume(name: str, more: str = "") -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\n{more}\n[sim.volume.{name}]\n{opened_by("alpha")}\n'


CHAIN = (
    volume("a")
    + volume("b")
    + volume("low")
    + volume("mid", 'after = ["low"]')
    + volume("top", 'after = ["mid"]')
)


@play(CHAIN + volume("by_hand", 'after = ["a"]\nunlock = "manual"'))
async def test_the_longest_chain_goes_first(run: Running) -> None:
    assert heights(run.engine.graph) == {"low": 2, "mid": 1}
    run.engine.derivations._budget._cores = 1
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    run.host.answer("alpha")
    await run.idle()
    tries = run.host.done("try")
    assert tries.index("try low") <= 1  # the first one starts at once
    assert run.volumes()["top"] == "unlocked"


ABSURD = "memory_kib = 3145728\niterations = 2147483647"
HOSTILE = f"""
[volume.a]
device = "/dev/a"
[sim.volume.a]
{opened_by("beta")}
{ABSURD}
slots = [%s]
[volume.b]
device = "/dev/b"
[sim.volume.b]
{opened_by("alpha")}
[volume.c]
device = "/dev/c"
[sim.volume.c]
{opened_by("alpha")}
"""


@play(HOSTILE % f"{{{opened_by('alpha')}, memory_kib = 1048576}}")
async def test_an_absurd_slot_is_not_tried_before_one_that_fits(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert sorted(run.host.done("try")) == ["try a 1", "try b", "try c"]


@play(HOSTILE % "")
async def test_an_absurd_slot_holds_up_nobody(run: Running) -> None:
    """Not those that wait beside it, nor those that come while it is tried."""
    run.host.hold("try a")
    run.engine.boot()
    run.host.answer("alpha")
    opened = {"a": "unlocking", "b": "unlocked", "c": "unlocked"}
    await run.until(lambda: run.volumes() == opened and "try a" in run.host.calls)
    await run.engine.lock("b")
    await unlock_with_key.unlock(run.engine, "b", handed_in("alpha"))
    run.host.release("try a")
    await run.until(lambda: run.engine.waiting == ["a"])


@play(HOSTILE % f"{{{opened_by('x')}, memory_kib = 0}}")
async def test_an_absurd_slot_that_cannot_be_tried_says_what_it_claims(run: Running) -> None:
    async def open_(volume: object, key: object, slot: int | None = None) -> None:
        if slot == 1:
            raise WrongKeyError("it fits not")
        raise OutOfMemoryError("killed")

    run.host.open = open_  # type: ignore[method-assign, assignment]
    with pytest.raises(WrongKeyError) as caught:
        await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    claim = "key slot 0 claims 3072 MiB of memory and 2147483647 iterations: killed"
    assert str(caught.value) == f"it fits not; {claim}"
    run.host.volume("a", slots={0: run.host._volumes["a"].slots[0]})
    with pytest.raises(OutOfMemoryError, match=f"volume a; {claim}"):
        await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))


@play(ONE + f"""\nkdf = "scrypt"\nslots = [{{{opened_by("beta")}}}]\n""")
async def test_a_slot_whose_derivation_is_not_known_is_skipped(run: Running) -> None:
    with pytest.raises(WrongKeyError, match="key slot 0 has the key derivation scrypt"):
        await unlock_with_key.unlock(run.engine, "a", handed_in("x"))
    assert run.host.done("try") == ["try a 1", "try a 0"]
    await unlock_with_key.unlock(run.engine, "a", handed_in("beta"))
