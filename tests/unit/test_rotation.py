# SPDX-License-Identifier: LGPL-2.1-or-later
"""New volume keys on a simulated host: begun, stopped at any point, and gone on with."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.lib import Running, descriptors, handed_in, opened_by, play
from vmcryptd.adapters.sim.luks import SimReencryption, SimSlots
from vmcryptd.core.errors import (
    BusyError,
    CancelledError,
    NoSuchVolumeError,
    OtherKeysError,
    OutOfMemoryError,
    ShuttingDownError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.model import Header, KeySlot, Token
from vmcryptd.core.ports import OnProgress
from vmcryptd.engine.jobs import JobState
from vmcryptd.engine.rotation import check_alone

HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
[sim.volume.mail]
open = true
{opened_by("one")}
[sim.guest.imap]
disks = ["/dev/mapper/mail"]
"""
LONG = HOST.replace("open = true", 'open = true\nrotates_in = "infinity"')
TWO = f"{LONG}\n[[sim.volume.mail.slots]]\n{opened_by('two')}"
HALF = HOST.replace("open = true", "open = true\nhalf_rotated = true")


def rotating(run: Running, key: str = "one", *, drop_others: bool = False) -> asyncio.Task[None]:
    rotation = run.engine.rotations.rotate("mail", handed_in(key), drop_others=drop_others)
    return asyncio.create_task(rotation)


async def begun(run: Running) -> asyncio.Task[None]:
    task = rotating(run)
    await run.until(lambda: progress(run) == 0.25)
    return task


def progress(run: Running) -> float | None:
    return next(
        (j.progress for j in run.engine.jobs.values() if str(j.goal) == "rotate:mail"), None
    )


def shown(run: Running) -> str:
    return run.volume("mail").rotation


@play(HOST)
async def test_from_start_to_end(run: Running) -> None:
    before = descriptors()
    run.engine.inventory.note_fitted("mail", "file:/key", 0)
    task = await begun(run)
    assert shown(run) == "running"
    assert not run.engine.state.startswith("unlock")  # nothing comes up by it
    await task
    assert (shown(run), progress(run)) == ("", None)
    assert run.host.done("rotate", "stop rotating") == ["rotate mail 0"]
    assert run.host.fitted() == {"mail": {}}  # of slots that are gone
    assert await run.engine.key_slots.test("mail", handed_in("one")) == 1
    assert run.volume("mail").header_backup_due
    assert descriptors() == before


@play(TWO)
async def test_no_key_is_lost_that_nobody_gave_up(run: Running) -> None:
    with pytest.raises(OtherKeysError, match=r"opens key slot 1, .*: key slot 0 \(passphrase\);"):
        await rotating(run, "two")
    assert not run.volume("mail").header_backup_due
    task = rotating(run, "two", drop_others=True)
    await run.until(lambda: progress(run) == 0.25)
    await run.engine.rotations.stop("mail")
    with pytest.raises(CancelledError):
        await task
    run.host.volume("mail", rotates_in_s=0.0)
    # To go on takes the key that it was begun with, and no question about the others is asked again.
    await rotating(run, "two")
    with pytest.raises(WrongKeyError):
        await run.engine.key_slots.test("mail", handed_in("one"))


@play(HOST)
async def test_what_is_refused_leaves_everything_as_it_was(run: Running) -> None:
    before = descriptors()
    with pytest.raises(WrongKeyError):
        await rotating(run, "three")
    with pytest.raises(NoSuchVolumeError):
        await run.engine.rotations.rotate("male", handed_in("one"), drop_others=False)
    with pytest.raises(NoSuchVolumeError):
        await run.engine.rotations.stop("male")
    run.host.volume("mail", fault="no-rotation")
    with pytest.raises(StorageError, match="cannot be reencrypted"):
        await rotating(run)
    run.host.volume("mail", open=False, fault="")
    with pytest.raises(BusyError, match="`vmcryptctl unlock mail` first"):
        await rotating(run)
    assert not run.volume("mail").header_backup_due
    assert (shown(run), progress(run), descriptors()) == ("", None, before)


@play(LONG)
async def test_it_is_stopped_and_goes_on(run: Running) -> None:
    task = await begun(run)
    with pytest.raises(
        BusyError, match="volume mail: its volume key is being rotated; `vmcryptctl status mail`"
    ):
        await rotating(run)
    with pytest.raises(BusyError):
        await run.engine.key_slots.back_up("mail", handed_in(""))
    await run.engine.rotations.stop("mail")
    with pytest.raises(CancelledError, match="`vmcryptctl key rotate mail` goes on"):
        await task
    assert (shown(run), progress(run)) == ("unfinished", None)
    await run.engine.rotations.stop("mail")  # there is nothing left to do
    # A backup of now would be worth nothing in an hour, and cryptsetup itself refuses changes of the header.
    for done in (
        run.engine.key_slots.back_up("mail", handed_in("")),
        run.engine.key_slots.add("mail", handed_in("one"), handed_in("two")),
        run.engine.key_slots.remove("mail", 0, handed_in("one")),
        run.engine.key_slots.change("mail", handed_in("one"), handed_in("two")),
        run.engine.key_slots.test("mail", handed_in("one")),
    ):
        with pytest.raises(
            BusyError, match="volume mail: .*half rotated.*`vmcryptctl key rotate mail`"
        ):
            await done
    with pytest.raises(WrongKeyError):
        await rotating(run, "three")
    assert shown(run) == "unfinished"
    run.host.volume("mail", rotates_in_s=0.0)
    await rotating(run)
    assert shown(run) == ""
    assert run.host.done("rotate") == ["rotate mail 0", "rotate mail None"]


@play(LONG)
async def test_it_is_stopped_before_its_volume_is_closed(run: Running) -> None:
    task = await begun(run)
    await run.engine.lock("mail")
    with pytest.raises(CancelledError):
        await task
    assert run.host.done("stop rotating", "closing") == ["stop rotating mail", "closing mail"]
    assert (run.volumes(), shown(run)) == ({"mail": "locked"}, "unfinished")
    # Which slots a key has to fit now only cryptsetup knows.
    run.host.answer("one")
    await run.engine.unlock("mail")
    assert run.host.done("try") == ["try mail"]
    run.host.volume("mail", rotates_in_s=0.0)
    await rotating(run)


@play(LONG)
async def test_who_uses_the_volume_keeps_it_open_and_the_rotation_going(run: Running) -> None:
    await run.engine.start_guest("imap")
    task = await begun(run)
    with pytest.raises(BusyError, match="imap"):
        await run.engine.lock("mail")
    assert progress(run) == 0.25
    await run.engine.shutdown()
    assert run.host.done("stop", "closing") == ["stop imap", "stop rotating mail", "closing mail"]
    with pytest.raises(CancelledError):
        await task


@play(LONG)
async def test_panic(run: Running) -> None:
    task = await begun(run)
    await run.engine.panic()
    with pytest.raises(CancelledError):
        await task
    assert run.host.done("stop rotating", "closing") == ["stop rotating mail", "closing mail"]
    assert run.volumes() == {"mail": "locked"}


@play(f"""{LONG}
[volume.other]
device = "/dev/vg/other"
[sim.volume.other]
open = true
[sim.guest.web]
disks = ["/dev/mapper/other"]
running = true
""")
async def test_panic_waits_with_nothing_else_for_a_rotation(run: Running) -> None:
    held = asyncio.Event()

    async def stop(self: SimReencryption, volume: Any, grace_s: float) -> None:
        await held.wait()
        self._stopped[volume.name].set()

    task = await begun(run)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SimReencryption, "stop", stop)
        panicking = asyncio.create_task(run.engine.panic())
        await run.until(lambda: run.volumes()["other"] == "locked")
        assert run.guests()["web"] == "off"
        assert run.volumes()["mail"] != "locked"
        held.set()
        await panicking
    assert run.volumes() == {"mail": "locked", "other": "locked"}
    with pytest.raises(CancelledError):
        await task


def test_panic_goes_on_past_a_rotation_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    @play(LONG)
    async def scene(run: Running) -> None:
        task = await begun(run)

        async def fail(self: Any, *arguments: Any) -> None:
            raise StorageError("the kernel does not let go")

        with monkeypatch.context() as patched:
            patched.setattr(SimReencryption, "stop", fail)
            with pytest.raises(StorageError, match="does not let go"):
                await run.engine.lock("mail")
            await run.engine.panic()
        assert run.host.done("closing") == ["closing mail"]
        await run.engine.rotations.stop("mail")
        with pytest.raises(CancelledError):
            await task

    scene()


@play(LONG)
async def test_nobody_has_to_wait_for_it(run: Running) -> None:
    task = await begun(run)
    task.cancel()
    await asyncio.wait({task})
    assert (shown(run), progress(run)) == ("running", 0.25)
    await run.engine.rotations.stop("mail")
    await run.idle()


@play(LONG)
async def test_none_is_begun_on_the_way_down(run: Running) -> None:
    run.host.hold("closing mail")
    closing = asyncio.create_task(run.engine.shutdown())
    await run.until(lambda: run.volumes() == {"mail": "locking"})
    with pytest.raises(BusyError, match="everything is being stopped"):
        await rotating(run)
    run.host.release("closing mail")
    await closing
    run.engine.close()
    run.host.volume("mail", open=True)
    with pytest.raises(ShuttingDownError):
        await rotating(run)


def test_it_is_found_by_the_next_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[OnProgress] = []
    ended = asyncio.Event()

    async def follow(
        self: SimReencryption, volume: Any, mapping: str, on_progress: OnProgress
    ) -> None:
        followed.append(on_progress)
        await ended.wait()

    async def stop(self: SimReencryption, volume: Any, grace_s: float) -> None:
        ended.set()

    monkeypatch.setattr(SimReencryption, "is_running", lambda self, volume: True)
    monkeypatch.setattr(SimReencryption, "follow", follow)
    monkeypatch.setattr(SimReencryption, "stop", stop)

    # Its disk is busy and does not answer at first.
    @play(HALF.replace("half_rotated = true", "half_rotated = true\npresent = false"))
    async def scene(run: Running) -> None:
        await run.until(lambda: followed)
        assert shown(run) == "running"
        run.host.volume("mail", present=True)
        followed[0](0.5)
        assert progress(run) == 0.5
        with pytest.raises(BusyError):
            await rotating(run)
        [job] = run.engine.jobs.values()
        await run.engine.rotations.stop("mail")
        await run.idle()
        assert isinstance(job.error, CancelledError)
        assert (job.state, shown(run)) == (JobState.FAILED, "unfinished")

    scene()


@play(HALF)
async def test_that_one_is_unfinished_is_known_once_the_header_was_read(run: Running) -> None:
    assert shown(run) == ""
    await run.engine.key_slots.listed("mail")
    assert shown(run) == "unfinished"
    # A daemon that begins reads it where a backup is due, which it is from the start of a rotation to its end.
    run.host.keep_backups_due({"mail": "2026-08-01T12:00:00Z"})
    again = Running(run.host)
    await again.until(lambda: shown(again) == "unfinished")
    again.engine.close()


def test_tokens_go_with_their_key_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    header = SimReencryption.rotate
    is_done: list[bool] = []

    async def rotate(self: SimReencryption, *arguments: Any) -> None:
        await header(self, *arguments)
        is_done.append(True)

    async def remove(self: SimSlots, volume: Any, token: int) -> None:
        removed.append(token)
        if token == 2:
            raise OutOfMemoryError("there is no memory")

    monkeypatch.setattr(SimReencryption, "rotate", rotate)
    monkeypatch.setattr(SimSlots, "remove_token", remove)

    @play(HOST)
    async def scene(run: Running) -> None:
        read = run.host.header

        async def with_tokens(volume: Any) -> Header:
            kept = (1,) if is_done else (0,)
            gone = () if is_done else (7,)
            tokens = (
                Token(0, "systemd-recovery", kept),
                Token(1, "systemd-tpm2", gone),
                Token(2, "clevis", gone),
                Token(3, "note", ()),  # of another program, never bound to a slot
            )
            return (await read(volume))._replace(tokens=tokens)

        monkeypatch.setattr(run.host, "header", with_tokens)
        await rotating(run)
        assert removed == [1, 2]

    scene()


@play(HOST)
async def test_it_takes_its_turn_in_the_memory_budget(run: Running) -> None:
    run.host.available_kib = 0
    async with run.engine.derivations.room_aside(65536):
        task = rotating(run)
        for _ in range(200):
            await asyncio.sleep(0.001)
        assert progress(run) is None
    await task


def test_which_keys_would_be_lost() -> None:
    slots = KeySlot(0, "argon2id"), KeySlot(3, "pbkdf2", iterations=1000)
    header = Header(2, "", (*slots, KeySlot(4, "argon2id")), (Token(0, "systemd-tpm2", (4,)),))
    with pytest.raises(VmcryptdError, match=r"key slot 3 \(random key\), 4 \(tpm2\);"):
        check_alone(header, "mail", slots[0])
    check_alone(header._replace(slots=slots[:1]), "mail", slots[0])


# --- cut off at its very end, when all that is missing is that the header says so ---

MOVED = HALF.replace("half_rotated = true", "half_rotated = true\nmoved = true")


@play(MOVED.replace("open = true", "open = false"))
async def test_what_lacks_only_its_end_gets_it_when_the_volume_is_opened(run: Running) -> None:
    run.host.answer("one")
    await run.engine.unlock("mail")
    assert run.host.done("finish rotation", "open") == ["finish rotation mail", "open mail"]
    assert shown(run) == ""
    assert run.volume("mail").header_backup_due
    await run.engine.lock("mail")
    run.host.answer("one")
    await run.engine.unlock("mail")
    assert run.host.done("finish rotation") == ["finish rotation mail"]


@play(MOVED)
async def test_what_lacks_only_its_end_gets_it_when_it_is_gone_on_with(run: Running) -> None:
    await rotating(run)
    assert run.host.done("finish rotation", "rotate") == ["finish rotation mail"]
    assert shown(run) == ""


def test_who_is_killed_with_only_the_end_left_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the hotzone was still suspended: processes that use it get errors then."""
    torn = True

    async def rotate(self: SimReencryption, volume: Any, *rest: Any) -> None:
        simulated = self.volumes[volume.name]
        simulated.is_half_rotated = simulated.data_reencrypted = True
        raise StorageError("it was killed")

    monkeypatch.setattr(SimReencryption, "rotate", rotate)
    monkeypatch.setattr(SimReencryption, "is_torn", lambda self, mapping: torn)

    @play(HOST)
    async def scene(run: Running) -> None:
        nonlocal torn
        with pytest.raises(StorageError, match="it was killed"):
            await rotating(run)
        with pytest.raises(BusyError, match="gives errors.*`vmcryptctl lock mail`"):
            await rotating(run)
        assert run.host.done("finish rotation") == []
        assert shown(run) == "unfinished"
        run.host.volume("mail", data_reencrypted=False)
        torn = False
        await rotating(run)
        assert run.host.done("finish rotation") == ["finish rotation mail"]
        assert shown(run) == ""

    scene()
