# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys of a simulated volume are changed, and something goes wrong in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from tests.lib import Running, descriptors, handed_in, opened_by, play
from vmcryptd.adapters.sim.luks import SimSlot, SimSlots
from vmcryptd.adapters.systemd.state_files import StateFiles
from vmcryptd.core.errors import (
    LastKeyError,
    NoSuchVolumeError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.model import Header, KeySlot, Token
from vmcryptd.engine.key_management import KeySlots, check_removable
from vmcryptd.engine.key_management import opened_by as kind

HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
[sim.volume.mail]
{opened_by("one")}
"""


def slots(run: Running) -> dict[int, SimSlot]:
    return run.host._volumes["mail"].slots


def failing(monkeypatch: pytest.MonkeyPatch, method: str, error: VmcryptdError | None) -> None:
    async def fail(self: Any, *arguments: Any, **more: Any) -> bool:
        if error is not None:
            raise error
        return False

    monkeypatch.setattr(SimSlots, method, fail)


@play(HOST)
async def test_what_fails_before_anything_was_written_leaves_no_backup_due(run: Running) -> None:
    keys = run.engine.key_slots
    before = descriptors()
    for fd, error in ((handed_in("wrong"), WrongKeyError), (handed_in("one"), StorageError)):
        if error is StorageError:
            slots(run).update(
                {number: SimSlot(str(number)) for number in range(1, 8)}
            )  # all in use
        with pytest.raises(error):
            await keys.add("mail", fd, handed_in("two"))
        assert not keys.backup_due_since("mail")
    with pytest.raises(NoSuchVolumeError):
        await keys.add("male", handed_in("one"), handed_in("two"))
    with pytest.raises(NoSuchVolumeError):
        await keys.back_up("male", handed_in(""))
    assert descriptors() == before


def test_a_new_key_that_does_not_work_ends_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    @play(HOST)
    async def scene(run: Running) -> None:
        fits, tested = SimSlots.fits, []

        async def fit_once(self: SimSlots, *arguments: Any) -> bool:
            tested.append(arguments[1])
            return len(tested) == 1 and await fits(self, *arguments)

        monkeypatch.setattr(SimSlots, "fits", fit_once)
        with pytest.raises(StorageError, match="does not open its key slot 1.*the old keys work"):
            await run.engine.key_slots.change("mail", handed_in("one"), handed_in("two"))
        assert sorted(slots(run)) == [0, 1]
        assert tested == [0, 1]
        assert run.engine.key_slots.backup_due_since("mail")

    scene()


def test_an_old_key_that_stays_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "remove", OutOfMemoryError("there is no memory"))

    @play(HOST)
    async def scene(run: Running) -> None:
        with pytest.raises(OutOfMemoryError) as caught:
            await run.engine.key_slots.change("mail", handed_in("one"), handed_in("two"))
        assert "there is no memory; the new key of volume mail works (key slot 1)" in str(
            caught.value
        )
        assert "`vmcryptctl key remove mail 0`" in str(caught.value)
        assert sorted(slots(run)) == [0, 1]
        assert run.volume("mail").header_backup_due

    scene()


@play(HOST)
async def test_two_at_once_cannot_take_away_both_ways_in(run: Running) -> None:
    keys = run.engine.key_slots
    await keys.add("mail", handed_in("one"), handed_in("two"))
    both: list[Awaitable[None]] = [
        keys.remove("mail", 0, handed_in("two")),
        keys.remove("mail", 1, handed_in("one")),
    ]
    first, second = await asyncio.gather(*both, return_exceptions=True)
    assert first is None
    assert isinstance(second, LastKeyError)
    assert sorted(slots(run)) == [1]


@play(HOST)
async def test_derivations_take_turns_in_the_memory_budget(run: Running) -> None:
    run.host.available_kib = 0
    taken = run.engine.derivations.room_aside(65536)
    async with taken:
        testing = asyncio.ensure_future(run.engine.key_slots.test("mail", handed_in("one")))
        for _ in range(200):
            await asyncio.sleep(0.001)
        assert not testing.done()
    assert await testing == 0


@play(HOST)
async def test_what_is_due_outlives_the_daemon(run: Running) -> None:
    keys = run.engine.key_slots
    await keys.add("mail", handed_in("one"), handed_in("two"))
    since = keys.backup_due_since("mail")
    again = KeySlots(
        run.engine._ports, run.engine.inventory, run.engine.derivations, run.engine.operations
    )
    assert again.backup_due_since("mail") == since
    await again.change("mail", handed_in("one"), handed_in("three"))
    assert again.backup_due_since("mail") == since  # not from now on


def test_what_is_due_is_kept_in_a_file(tmp_path: Any) -> None:
    files = StateFiles(tmp_path / "run", tmp_path / "lib")
    assert files.backups_due() == {}
    files.keep_backups_due({"mail": "2026-08-01T12:00:00Z"})
    asyncio.run(files.kept())
    assert StateFiles(tmp_path / "run", tmp_path / "lib").backups_due() == {
        "mail": "2026-08-01T12:00:00Z"
    }
    (tmp_path / "lib/backups.json").write_text('{"due": {"mail": 3}}')
    assert files.backups_due() == {}


def test_a_slot_that_is_ignored_is_no_way_in() -> None:
    header = Header(2, "", (KeySlot(0, "argon2id"), KeySlot(3, "argon2id", priority=0)))
    with pytest.raises(LastKeyError):
        check_removable(header, "mail", 0)
    check_removable(header, "mail", 3)


def test_what_opens_a_slot() -> None:
    cheap, dear = KeySlot(0, "pbkdf2", iterations=1000), KeySlot(1, "pbkdf2", iterations=400_000)
    token = Token(0, "systemd-tpm2", (2,))
    header = Header(2, "", (cheap, dear, KeySlot(2, "pbkdf2", iterations=1000)), (token,))
    assert [kind(header, slot) for slot in header.slots] == ["random key", "passphrase", "tpm2"]
