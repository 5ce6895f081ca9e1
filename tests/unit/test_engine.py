# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine on a simulated host: the way up, one question, the way down, and everything at the wrong moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from tests.lib import PATIENCE_S, Host, Running, descriptors, handed_in, opened_by, play
from vmcryptd import daemon
from vmcryptd.core.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    DeviceMissingError,
    GuestError,
    KeyUnavailableError,
    KeyUnusableError,
    LibvirtError,
    NoSuchVolumeError,
    NotLuksError,
    StillWaitingError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.goals import BOOT
from vmcryptd.core.model import DaemonSpec, DiskSource, GuestState, Settings
from vmcryptd.core.ports import Ports
from vmcryptd.engine import hooks, panic, prompt, unlock_with_key
from vmcryptd.engine.opening import Phase
from vmcryptd.engine.prompt import Held

A, B = opened_by("alpha"), opened_by("beta")
SHARED = "autostart = true\nshareable = true"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "AGAIN_S", (0.01, 0.02))


def volume(name: str, sim: str = A, **keys: object) -> str:
    lines = [f"[volume.{name}]", f'device = "/dev/{name}"']
    for one, value in keys.items():
        text = str(value).lower() if isinstance(value, bool) else f'"{value}"'
        lines.append(f"{one} = {value if isinstance(value, list) else text}")
    return "\n".join([*lines, f"[sim.volume.{name}]", sim, ""])


def guest(name: str, *disks: str, sim: str = "autostart = true", **keys: object) -> str:
    paths = ", ".join(f'"/dev/mapper/{disk}"' for disk in disks)
    lines = [f"[sim.guest.{name}]", f"disks = [{paths}]", sim]
    if keys:
        lines.append(f"[guest.{name}]")
        lines += [f"{k} = {v if isinstance(v, list) else repr(v)}" for k, v in keys.items()]
    return "\n".join([*lines, ""])


async def failure(work: object) -> VmcryptdError:
    with pytest.raises(VmcryptdError) as caught:
        await work  # type: ignore[misc]
    return caught.value


# --- the way up ---


@play(volume("a") + volume("b") + guest("g", "a", "b"))
async def test_one_question_opens_everything(run: Running) -> None:
    assert (run.state, run.engine.is_console_needed) == ("locked", False)
    run.engine.boot()
    assert run.engine.is_console_needed
    await run.until(lambda: run.host.questions)
    assert run.host.questions == ["Passphrase for volumes a, b:"]
    assert run.volumes() == {"a": "waiting", "b": "waiting"}
    assert (run.state, run.engine.waiting) == ("waiting", ["a", "b"])
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "b": "unlocked"}
    assert run.guests() == {"g": "running"}
    assert (run.state, run.volume("a").key_source) == ("ready", "prompt")
    assert not run.engine.is_console_needed
    assert len(run.host.questions) == 1
    await run.until(lambda: "target reached" in run.host.calls)
    assert run.host.goals() == ("up",)


@play(volume("a") + volume("b") + volume("c") + guest("g", "a") + guest("h", "b", "c"))
async def test_a_guest_starts_as_soon_as_its_own_volumes_are_open(run: Running) -> None:
    run.engine.derivations._budget._cores = 3
    for name in "bc":
        run.host.hold(f"try {name}")
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["g"] == "running")
    assert run.host.done("open") == ["open a"]
    run.host.release("try b")
    await run.until(lambda: run.host.done("open") == ["open a", "open b"])
    assert run.guests()["h"] == "off"
    run.host.release("try c")
    await run.idle()
    assert run.host.done("start ") == ["start g", "start h"]


@play(volume("a") + volume("b") + guest("g", "a") + guest("h", "b"))
async def test_a_guest_does_not_wait_for_another_ones_backing_chain(run: Running) -> None:
    is_read = asyncio.Event()

    async def chain(source: DiskSource) -> tuple[DiskSource, ...]:
        if source.path == "/dev/mapper/b":
            await is_read.wait()
        return ()

    run.host.chain = chain  # type: ignore[method-assign]
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["g"] == "running")
    assert run.guests()["h"] != "running"
    is_read.set()
    await run.idle()
    assert run.host.done("start ") == ["start g", "start h"]


@play(volume("a") + volume("b", B))
async def test_who_did_not_fit_is_asked_for_by_name(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: len(run.host.questions) == 2)
    assert run.host.questions[1] == "That did not fit. Passphrase for volume b (/dev/b):"
    assert run.volumes() == {"a": "unlocked", "b": "waiting"}
    run.host.answer("beta")
    await run.idle()
    assert run.state == "ready"


@play(volume("a"))
async def test_wrong_answers_do_not_end_the_question(run: Running) -> None:
    run.engine.boot()
    for answer in ("x", "y", "z", ""):
        run.host.answer(answer)
    await run.until(lambda: len(run.host.questions) == 5)
    assert run.state == "waiting"
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(volume("outer") + volume("inner", A + '\non = ["outer"]') + volume("low", B))
async def test_an_answer_is_held_for_what_comes_up_on_it(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.volumes()["inner"] == "unlocked")
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("beta")
    await run.idle()
    assert [q for q in run.host.questions if "inner" in q] == []


@play(volume("a") + volume("b", B))
async def test_an_answer_is_let_go_when_nothing_needs_it(run: Running) -> None:
    before = len(descriptors())
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: len(run.host.questions) == 2)
    await run.until(lambda: len(descriptors()) == before)
    run.host.answer("beta")
    await run.idle()
    assert len(descriptors()) == before


CACHE = '[daemon]\nkey_cache = "infinity"\n'


@play(CACHE + volume("a") + volume("b", A, unlock="manual"))
async def test_the_cache_keeps_an_answer_for_late_comers(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    await run.engine.unlock("b")
    assert len(run.host.questions) == 1
    await run.engine.shutdown()
    assert not [link for link in descriptors().values() if "memfd:" in link]


@play(CACHE + volume("a") + volume("late", A + "\npresent = false", timeout="1ms"))
async def test_a_disk_that_appears_while_the_answer_is_held(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "late": "missing"}
    run.host.volume("late", present=True)
    await run.until(lambda: run.volumes()["late"] == "unlocked")
    await run.idle()
    assert (run.state, len(run.host.questions)) == ("ready", 1)
    await run.engine.shutdown()


@play(CACHE + volume("a") + volume("b", B) + volume("late", A + "\npresent = false", timeout="1ms"))
async def test_a_wrong_answer_does_not_take_the_place_of_one_that_fitted(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.volumes()["b"] == "waiting" and len(run.host.questions) == 2)
    run.host.answer("wrong")
    await run.until(lambda: len(run.host.questions) == 3)
    assert run.volumes()["a"] == "unlocked"
    run.host.volume("late", present=True)
    await run.until(lambda: run.volumes()["late"] == "unlocked")
    run.host.answer("beta")
    await run.idle()
    assert (run.state, len(run.host.questions)) == ("ready", 3)
    await run.engine.shutdown()


@play(CACHE.replace("infinity", "1h") + volume("a") + volume("b", B))
async def test_held_keys_are_shown(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    assert run.engine.prompt.held == []
    run.host.hold("try b")
    before = time.time()
    run.host.answer("alpha")
    # Its mapping is seen before the attempt that made it has ended.
    await run.until(lambda: run.engine.prompt.held == [Held("prompt", ("b",), 0.0)])
    assert run.volumes()["a"] == "unlocked"
    shown = run.shown
    run.host.release("try b")
    await run.until(lambda: len(run.host.questions) == 2)
    [held] = run.engine.prompt.held
    assert (held.source, held.volumes) == ("prompt", ())
    assert before + 3600 <= held.until <= time.time() + 3600
    assert run.shown > shown
    await run.engine.panic()
    assert run.engine.prompt.held == []


@play(CACHE.replace("infinity", "20ms") + volume("a") + volume("b", A, unlock="manual"))
async def test_the_cache_ends(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    async with asyncio.timeout(PATIENCE_S):
        while [link for link in descriptors().values() if "memfd:" in link]:
            await asyncio.sleep(0.005)
    unlocking = asyncio.ensure_future(run.engine.unlock("b"))
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await unlocking


FILES = 'sources = ["file:/etc/k"]'


@play(
    volume("a", FILES, keys=["file:/etc/none", "file:/etc/k", "prompt"])
    + volume("b", A, keys=["file:/etc/none", "prompt"])
    + volume("c", A, keys=["file:/etc/none"])
    + guest("g", "c") + guest("h", "a")
)  # fmt: skip
async def test_sources_in_order_then_a_person_and_without_one_failed(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions and run.guests()["h"] == "running")
    assert run.host.questions == ["Passphrase for volume b (/dev/b):"]
    assert run.volumes() == {"a": "unlocked", "b": "waiting", "c": "failed"}
    assert run.volume("a").key_source == "file:/etc/k"
    assert "it gives no key" in run.volume("c").error
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "degraded"
    assert run.guests() == {"g": "off", "h": "running"}
    assert "guest g: start was not tried, because unlock of volume c failed" in run.guest("g").error
    # It is opened: the guest that should run starts.
    await unlock_with_key.unlock(run.engine, "c", handed_in("alpha"))
    await run.until(lambda: run.guests()["g"] == "running")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", 'fault = "not-luks"') + volume("b", 'fault = "out-of-memory"') + volume("c"))
async def test_one_failure_hinders_nothing_else(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "failed", "b": "failed", "c": "unlocked"}
    assert run.state == "degraded"
    assert isinstance(await failure(run.engine.unlock("a")), NotLuksError)


@play(
    volume("a")
    + guest("g", "a", sim='autostart = true\nshareable = true\nfault = "no such network"')
    + guest("h", "a", sim=SHARED)
)
async def test_a_guest_that_does_not_start(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.guests() == {"g": "off", "h": "running"}
    assert (run.state, run.guest("g").error) == (
        "degraded", "guest g could not be started: no such network"
    )  # fmt: skip
    assert isinstance(await failure(run.engine.start_guest("g")), GuestError)


@play(
    volume("a")
    + guest("raw", sim="autostart = true", needs=["a"]).replace("disks = []", 'disks = ["/dev/a"]')
    + guest("right", "a")
)
async def test_a_guest_on_the_luks_device_itself_is_never_started(run: Running) -> None:
    text = (
        "guest raw was not started: its disk /dev/a (/dev/sim-a) is the LUKS device of volume a: the "
        "guest would overwrite the LUKS header; give it /dev/mapper/a instead: `virsh edit raw`"
    )
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.guests() == {"raw": "off", "right": "running"}
    assert (run.state, run.guest("raw").error) == ("degraded", text)
    assert str(await failure(run.engine.start_guest("raw"))) == text
    assert run.host.done("start raw") == []


@play(volume("a") + guest("g", "a"))
async def test_a_guest_that_dies(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.engine.off) == ("ready", [])
    run.host.guest("g", GuestState.OFF, "died: killed")
    await run.until(lambda: run.state == "degraded")
    assert (run.guest("g").error, run.engine.off) == ("guest g died: killed", ["g"])
    await run.engine.start_guest("g")
    await run.until(lambda: run.state == "ready")
    run.host.guest("g", GuestState.CRASHED, "is kept")
    await run.until(lambda: run.guest("g").error == "guest g is kept")
    run.host.guest("g", GuestState.OFF)  # destroyed by hand
    await run.until(lambda: run.state == "ready")
    assert (run.guest("g").error, run.engine.off) == ("", ["g"])
    run.host.guest("g", GuestState.RUNNING)
    await run.until(lambda: run.engine.off == [])
    run.host.guest("g", GuestState.OFF, "died: killed")
    await run.until(lambda: run.state == "degraded")
    await run.engine.shutdown()
    assert (run.state, run.guest("g").error) == ("locked", "")


@play(volume("a", lock="guest") + guest("g", "a", sim='autostart = true\nstarting = "infinity"'))
async def test_a_start_by_libvirt_itself_counts_once_it_has_ended_well(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.volumes()["a"] == "unlocked")
    assert run.guests() == {"g": "starting"}
    assert run.state == "unlocking"
    run.host.guest("g", GuestState.OFF)  # it has failed
    await run.idle()
    assert (run.state, run.guests()) == ("ready", {"g": "running"})
    # The volume was not closed in between for want of a guest.
    assert run.host.done("close", "start g") == ["start g"]


@play('[sim]\ndue_once = ["g", "gone"]\n' + volume("a") + guest("g", "a", sim=""))
async def test_a_guest_to_be_started_once_starts_at_the_boot_after_that(run: Running) -> None:
    assert run.guest("g").starts_at_boot
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.guests()) == ("ready", {"g": "running"})
    await run.until(lambda: not run.guest("g").starts_at_boot)
    assert (run.host.marked_once, run.host.due_once()) == ((), ())
    run.host.guest("g", GuestState.OFF)
    await run.until(lambda: run.guests() == {"g": "off"})
    assert run.engine.off == []


@play(volume("a") + guest("g", "a", sim="autostart_once = true"))
async def test_who_is_to_be_started_once_is_remembered(run: Running) -> None:
    await run.until(lambda: run.host.marked_once == ("g",))
    assert run.guest("g").starts_at_boot
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.guests() == {"g": "running"}
    assert run.host.marked_once == ("g",)  # libvirt has not taken it away


@play(volume("a") + guest("g", "a"))
async def test_libvirt_that_goes_away_later(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    run.host.libvirt(False)
    await run.until(lambda: run.state == "degraded")
    assert run.engine.host_error == "libvirt cannot be reached (simulated)"
    assert run.guests() == {"g": "running"}  # as it was last seen
    run.host.libvirt(True)
    await run.until(lambda: run.state == "ready")
    assert run.engine.host_error == ""
    await run.idle()


@play(volume("a") + guest("g", "a") + guest("h", "a"))
async def test_two_guests_that_write_one_disk_never_run_at_once(run: Running) -> None:
    run.host.hold("starting g")
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.guest("h").error)
    run.host.release("starting g")
    await run.idle()
    assert run.guests() == {"g": "running", "h": "off"}
    error = await failure(run.engine.start_guest("h"))
    assert isinstance(error, GuestError)
    assert str(error) == (
        "guest h was not started: guest g, which runs, writes its disk /dev/mapper/a (/dev/dm-a): two "
        "would destroy it; stop that one first: `vmcryptctl stop g`; if the guests are made to share "
        "it, <shareable/> in both says so"
    )
    await run.engine.stop_guest("g")
    await run.engine.start_guest("h")
    assert run.guests() == {"g": "off", "h": "running"}


@play(
    volume("a")
    + guest("one", "a", sim=SHARED)
    + guest("two", "a", sim=SHARED, after=["one"])
    + guest("three", "a", sim=SHARED, after=["two"])
)
async def test_guests_start_one_after_another_and_stop_the_other_way_round(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.host.done("start ") == ["start one", "start two", "start three"]
    await run.engine.shutdown()
    assert run.host.done("stop ") == ["stop three", "stop two", "stop one"]


STORE = volume("store", A, lock="boot", content="filesystem", mount="/run/keys")
KEYED = FILES.replace("/etc/k", "/run/keys/k")


def on_store(name: str) -> str:
    return volume(name, KEYED, keys=["file:/run/keys/k"])


@play(STORE + on_store("a") + on_store("b"))
async def test_a_keystore_is_closed_when_the_boot_set_is_open(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    assert run.host.questions == ["Passphrase for volume store (/dev/store):"]
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "unlocked"}
    assert run.state == "ready"
    done = run.host.done("open", "close ", "mount", "unmount")
    assert done[:2] == ["open store", "mount store"]
    assert done[-2:] == ["unmount store", "close store"]


@play(STORE + on_store("a") + on_store("b"))
async def test_a_keystore_is_closed_when_nothing_is_opened_with_it_any_more(run: Running) -> None:
    run.host.answer("alpha")
    await run.engine.unlock_all()
    await run.until(lambda: run.volumes()["store"] == "locked")
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "unlocked"}


@play(STORE + on_store("a"))
async def test_a_keystore_opened_on_request_stays(run: Running) -> None:
    run.host.answer("alpha")
    await run.engine.unlock("store")
    await run.engine.unlock("a")
    assert run.volumes() == {"store": "unlocked", "a": "unlocked"}


BESIDE = KEYED + "\n" + B  # has a passphrase of its own, too


def beside(name: str, sim: str = BESIDE, **keys: object) -> str:
    return volume(name, sim, keys=["file:/run/keys/k", "prompt"], **keys)


@play(STORE + beside("a") + beside("b", sim=BESIDE) + guest("g", "a"))
async def test_what_does_not_fit_a_keystore_is_tried_on_what_stands_behind_it(run: Running) -> None:
    """Its passphrase is lost, and the person knows the volumes'."""
    run.engine.boot()
    await run.until(lambda: run.host.open_questions)
    run.host.answer("beta")
    await run.idle()
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "unlocked"}
    assert (run.volume("a").key_source, run.volume("store").error) == ("prompt", "")
    assert (run.state, run.engine.waiting, run.guests()) == ("ready", [], {"g": "running"})
    # The keystore is not asked for once more, not even for a moment.
    assert run.host.questions == ["Passphrase for volume store (/dev/store):"]
    assert run.engine.prompt.held == []


@play(STORE + beside("a") + beside("b", sim=KEYED + "\n" + opened_by("gamma")) + on_store("c"))
async def test_a_keystore_is_asked_for_as_long_as_anything_needs_it(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.open_questions)
    run.host.answer("beta")
    await run.until(lambda: len(run.host.questions) == 2)
    assert run.host.questions[1] == "That did not fit. Passphrase for volume store (/dev/store):"
    assert run.volumes() == {"store": "waiting", "a": "unlocked", "b": "locked", "c": "locked"}
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "unlocked", "c": "unlocked"}
    assert run.volume("b").key_source == "file:/run/keys/k"
    assert "try b" in run.host.calls
    assert "try c" in run.host.calls


@play(STORE + beside("a"))
async def test_what_fits_a_keystore_is_not_tried_on_what_stands_behind_it(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.open_questions)
    run.host.hold("mount store")
    run.host.answer("alpha")
    await run.idle()
    assert run.volume("a").key_source == "file:/run/keys/k"
    assert run.host.calls.count("try a") == 1  # by its key


def test_who_mistyped_is_asked_again_while_the_volumes_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "PASSED_ON_S", 0.01)

    @play(STORE + beside("a"))
    async def scene(run: Running) -> None:
        run.engine.boot()
        await run.until(lambda: run.host.open_questions)
        run.host.hold("try a")
        run.host.answer("alpah")
        await run.until(lambda: len(run.host.questions) == 2)
        run.host.answer("alpha")
        await run.until(lambda: run.volumes()["store"] == "unlocked")
        run.host.release("try a")
        await run.idle()
        assert run.volume("a").key_source == "file:/run/keys/k"

    scene()


@play(STORE + beside("a") + beside("b", unlock="manual"))
async def test_a_key_that_is_handed_in_needs_no_keystore(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.open_questions)
    await unlock_with_key.unlock(run.engine, "a", handed_in("beta"))
    await run.idle()
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "locked"}
    unlocking = asyncio.ensure_future(run.engine.unlock("b"))
    await run.until(lambda: run.engine.waiting == ["store"])
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "b", handed_in("x"))), WrongKeyError
    )
    assert isinstance(
        await failure(unlock_with_key.unlock_all(run.engine, handed_in("x"))), WrongKeyError
    )
    assert run.engine.waiting == ["store"]
    await unlock_with_key.unlock_all(run.engine, handed_in("beta"))
    await unlocking
    assert run.volumes() == {"store": "locked", "a": "unlocked", "b": "unlocked"}


@play(STORE + beside("a", unlock="manual"))
async def test_a_keystores_key_handed_in_for_what_stands_behind_it(run: Running) -> None:
    """Unlocking the volume asks for the keystore, and gets the keystore's passphrase."""
    for is_asked in (True, False):
        if is_asked:
            asking = asyncio.ensure_future(run.engine.unlock("a"))
            await run.until(lambda: run.engine.waiting == ["store"])
        await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
        assert run.volume("a").key_source == "file:/run/keys/k"
        if is_asked:
            await asking
        await run.until(lambda: run.volumes()["store"] == "locked")
        await run.engine.lock("a")


@play(STORE.replace("[sim", 'timeout = "1h"\n[sim') + "present = false\n" + beside("a"))
async def test_nobody_waits_for_a_keystore_that_is_not_there_to_give_another_key(
    run: Running,
) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.openings.phase("store") is Phase.ABSENT)
    await unlock_with_key.unlock(run.engine, "a", handed_in("beta"))
    await run.idle()
    assert run.volumes() == {"store": "missing", "a": "unlocked"}
    assert run.state == "ready"


@play(STORE.replace("[sim", 'timeout = "1ms"\n[sim') + "present = false\n" + beside("a", B))
async def test_a_keystore_that_is_lost_tells_so_in_one_sentence(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a"])
    assert run.volume("store").error.startswith(
        "volume store: its device /dev/store did not appear"
    )
    run.host.answer("beta")
    await run.idle()
    assert (run.state, run.volumes()) == ("ready", {"store": "missing", "a": "unlocked"})


# --- devices that come late, or not ---


@play(volume("a", A + "\npresent = false", timeout="30s") + volume("b", B))
async def test_a_device_appears_late(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["b"])
    assert run.volumes()["a"] == "missing"
    run.host.volume("a", present=True)
    await run.until(lambda: run.engine.waiting == ["a", "b"])
    run.host.answer("alpha")
    run.host.answer("beta")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", A + "\npresent = false", timeout="10ms") + volume("b") + guest("g", "a"))
async def test_a_device_appears_after_boot_ended(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "missing", "b": "unlocked"}
    assert run.state == "degraded"
    assert set(run.host.goals()) == {"late:a", "up"}
    assert "did not appear within 0.01 s" in run.volume("a").error
    assert run.volume("a").error.endswith("the volume is opened when it appears")
    run.host.volume("a", present=True)
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.guests()) == ("ready", {"g": "running"})
    assert run.host.goals() == ("up",)


PUT_DOWN = (
    volume("a", A + "\npresent = false", timeout="10ms")
    + volume("b")
    + volume("c")
    + guest("on-a", "a")
    + guest("on-b", "b")
)


@play(PUT_DOWN)
async def test_what_was_put_down_stays_so_when_a_device_appears(run: Running) -> None:
    """A stopped guest and a closed volume stay so until boot is requested again."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    await run.engine.stop_guest("on-b")
    await run.engine.lock("c")
    run.host.volume("a", present=True)
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "b": "unlocked", "c": "locked"}
    assert run.guests() == {"on-a": "running", "on-b": "off"}
    run.host.answer("alpha")
    run.engine.boot()
    await run.idle()
    assert run.state == "ready"


@play(PUT_DOWN + volume("d", B))
async def test_what_was_put_down_stays_so_while_boot_waits(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["on-b"] == "running" and run.engine.waiting == ["d"])
    await run.until(lambda: run.volume("a").error and run.volumes()["c"] == "unlocked")
    await run.engine.lock("c")
    run.host.volume("a", present=True)
    await run.until(lambda: run.engine.waiting == ["a", "d"])
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["on-a"] == "running")
    run.host.answer("beta")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "b": "unlocked", "c": "locked", "d": "unlocked"}


@play(PUT_DOWN)
async def test_boot_that_is_asked_for_again_is_the_whole_boot(run: Running) -> None:
    """Also when it joins the one that a device has begun."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    await run.engine.lock("c")
    run.host.volume("a", present=True)
    await run.until(lambda: run.engine.waiting == ["a"])
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a", "c"])
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", A + "\npresent = false", timeout="10ms", unlock="manual"))
async def test_a_late_volume_to_be_opened_by_hand_says_so(run: Running) -> None:
    with pytest.raises(DeviceMissingError, match="once it is there: `vmcryptctl unlock a`$"):
        await run.engine.unlock("a")
    run.host.volume("a", present=True)
    await run.until(lambda: run.volumes() == {"a": "locked"})
    assert run.host.done("open") == []


@play(volume("a", A + "\npresent = false", timeout="10ms") + volume("b", B) + guest("g", "a"))
async def test_a_device_appears_late_while_boot_waits_for_another(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.volume("a").error and run.engine.waiting == ["b"])
    run.host.volume("a", present=True)
    await run.until(lambda: run.engine.waiting == ["a", "b"])
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["g"] == "running")
    run.host.answer("beta")
    await run.idle()
    assert run.state == "ready"


@play(volume("a", A + "\npresent = false", timeout="10ms"))
async def test_a_device_never_appears(run: Running) -> None:
    assert isinstance(await failure(run.engine.unlock("a")), DeviceMissingError)
    assert run.volumes() == {"a": "missing"}
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))),
        DeviceMissingError,
    )


UNREADABLE = A + '\nfault = "unreadable"'


@play(volume("a", UNREADABLE) + volume("b") + volume("c", "", keys=["file:/c"]) + guest("g", "a"))
async def test_an_unreadable_header_rests(run: Running) -> None:
    """It is read once, the others are not tried again for it, and the host does not stay "unlocking"."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.guests()) == ("degraded", {"g": "off"})
    assert run.volumes() == {"a": "failed", "b": "unlocked", "c": "failed"}
    assert "there is no sound LUKS header on /dev/a" in run.volume("a").error
    tried = ["header a", "header c", "fetch file:/c"]
    assert run.host.done("header a", "header c", "fetch") == tried
    run.host.volume("b", delay_s=1.0)  # news of another one
    await run.looked()
    run.host.volume("a", present=False)
    await run.until(lambda: run.volumes()["a"] == "missing")
    assert (run.engine.jobs, run.host.done("header a")) == ({}, ["header a"])
    run.host.volume("a", present=True, fault="")
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "b": "unlocked", "c": "failed"}
    assert run.guests() == {"g": "running"}
    again = ["header a", "header a"]  # the second once it is answered
    assert run.host.done("header a", "header c", "fetch") == [*tried, *again]


HEADER_ON_A_STICK = (
    volume("a", A, header="/stick/a", timeout="10ms") + volume("b") + guest("g", "a")
)


@play(HEADER_ON_A_STICK + '[sim]\nmissing = ["/stick/a"]\n')
async def test_a_header_appears_after_boot_ended(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.volumes()) == ("degraded", {"a": "missing", "b": "unlocked"})
    assert "volume a: its header /stick/a did not appear within 0.01 s" in run.volume("a").error
    run.host.file("/stick/a", there=True)
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.guests()) == ("ready", {"g": "running"})


KEY_ON_A_STICK = 'sources = ["file:/stick/key"]'


@play(
    volume("a", KEY_ON_A_STICK, keys=["file:/stick/key"])
    + volume("b")
    + guest("g", "a")
    + '[sim]\nmissing = ["/stick/key"]\n'
)
async def test_a_key_file_appears_after_boot_ended(run: Running) -> None:
    """Nobody is asked for it: it has failed until then."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.volumes()) == ("degraded", {"a": "failed", "b": "unlocked"})
    assert "/stick/key is not there" in run.volume("a").error
    run.host.file("/stick/key", there=True)
    await run.until(lambda: run.state == "ready")
    assert (run.volumes()["a"], run.guests()) == ("unlocked", {"g": "running"})
    assert len(run.host.questions) == 1


@play(
    volume("a", f"{KEY_ON_A_STICK}\n{A}", keys=["file:/stick/key", "prompt"])
    + '[sim]\nmissing = ["/stick/key"]\n'
)
async def test_a_key_file_appears_while_a_person_is_asked(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a"])
    run.host.file("/stick/key", there=True)
    await run.idle()
    assert (run.state, run.volume("a").key_source) == ("ready", "file:/stick/key")
    await run.until(lambda: not run.host.open_questions)


@play(volume("a", A, keys=["file:/stick/key", "prompt"]) + '[sim]\nmissing = ["/stick/key"]\n')
async def test_a_key_file_that_appears_and_does_not_fit(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a"])
    run.host.file("/stick/key", there=True)
    await run.until(lambda: "gives no key" in run.volume("a").error)
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(
    volume("a", A + "\npresent = false", timeout="10ms")
    + volume("bad", "", keys=["file:/bad"])
    + volume("d", B)
    + guest("g", "a")
    + guest("h", "bad")
)
async def test_what_has_failed_is_not_tried_again_for_another_that_appears(run: Running) -> None:
    """Also while boot still waits for a person."""
    run.engine.boot()
    await run.until(lambda: run.volume("a").error and run.guest("h").error)
    assert run.engine.waiting == ["d"]
    run.host.volume("a", present=True)
    await run.until(lambda: run.engine.waiting == ["a", "d"])
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["g"] == "running")
    assert run.host.done("fetch file:/bad") == ["fetch file:/bad"]
    run.host.answer("beta")
    await run.idle()
    assert run.volumes() == {"a": "unlocked", "bad": "failed", "d": "unlocked"}
    run.engine.boot()
    await run.idle()
    assert len(run.host.done("fetch file:/bad")) == 2


@play(volume("a", UNREADABLE))
async def test_a_disk_that_answers_late(run: Running) -> None:
    run.host.silent = lambda: frozenset({"/dev/a"})  # type: ignore[method-assign]
    run.engine.boot()
    await run.idle()
    assert run.volumes() == {"a": "failed"}
    run.host.silent = frozenset  # type: ignore[method-assign]
    run.host.volume("a", fault="")
    await run.until(lambda: run.engine.waiting == ["a"])


@play(volume("a", A + "\npresent = false", timeout="infinity"))
async def test_a_key_waits_for_the_device_of_its_volume(run: Running) -> None:
    unlocking = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
    await run.until(lambda: run.engine.openings.phase("a") is Phase.ABSENT)
    run.host.volume("a", present=True)
    await unlocking
    assert run.volumes() == {"a": "unlocked"}


@play(volume("low", A + "\npresent = false", timeout="10ms") + volume("a", A, after=["low"]))
async def test_what_lies_on_what_is_missing(run: Running) -> None:
    error = await failure(run.engine.unlock("a"))
    assert isinstance(error, DeviceMissingError)


@play(volume("a"))
async def test_a_volume_opened_by_hand_is_adopted(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting)
    run.host.volume("a", open=True)
    await run.idle()
    assert (run.state, run.engine.waiting) == ("ready", [])


# --- keys that are handed in ---


@play(volume("a") + volume("b", B))
async def test_a_wrong_key_is_reported_and_boot_goes_on_waiting(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a", "b"])
    error = await failure(unlock_with_key.unlock(run.engine, "a", handed_in("wrong")))
    assert isinstance(error, WrongKeyError)
    await run.until(lambda: run.engine.waiting == ["a", "b"])
    assert run.state == "waiting"
    await unlock_with_key.unlock(run.engine, "b", handed_in("beta"))
    assert run.volumes() == {"a": "waiting", "b": "unlocked"}
    assert run.volume("b").key_source == "key"
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    await run.idle()
    assert (run.state, len(run.host.questions)) == ("ready", 1)


@play(volume("a"))
async def test_a_wrong_key_without_boot(run: Running) -> None:
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "a", handed_in("x"))), WrongKeyError
    )
    assert run.volumes() == {"a": "failed"}
    assert run.host.questions == []
    assert run.state == "locked"
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.state == "ready"


@play(volume("a", FILES, keys=["file:/etc/k"]) + volume("b", FILES, keys=["file:/etc/k"]))
async def test_a_wrong_key_is_wrong_although_a_source_would_fit(run: Running) -> None:
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "a", handed_in("x"))), WrongKeyError
    )
    assert run.volumes() == {"a": "failed", "b": "locked"}


@play(
    volume("low")
    + volume("a", A + '\non = ["low"]', after=["low"])
    + volume("odd", B + '\non = ["low"]')
)
async def test_a_key_opens_the_whole_stack(run: Running) -> None:
    await unlock_with_key.unlock(run.engine, "a", handed_in("alpha"))
    assert run.volumes() == {"low": "unlocked", "a": "unlocked", "odd": "locked"}
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "odd", handed_in("x"))), WrongKeyError
    )
    await unlock_with_key.unlock(run.engine, "a", handed_in("whatever"))  # it is open already


@play(volume("low", B) + volume("a", A + '\non = ["low"]', after=["low"]))
async def test_a_key_that_opens_only_half_of_the_stack(run: Running) -> None:
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "a", handed_in("beta"))), WrongKeyError
    )
    assert run.volumes() == {"low": "unlocked", "a": "failed"}


@play(volume("a") + volume("b", B) + volume("c", A + "\npresent = false"))
async def test_one_key_for_all(run: Running) -> None:
    error = await failure(unlock_with_key.unlock_all(run.engine, handed_in("x")))
    assert isinstance(error, WrongKeyError)
    error = await failure(unlock_with_key.unlock_all(run.engine, handed_in("alpha")))
    assert isinstance(error, StillWaitingError)
    assert str(error).startswith("opened: a; still locked: b, c;")
    run.host.volume("c", present=True)
    run.host.volume("b", slots=run.host._volumes["a"].slots)
    await unlock_with_key.unlock_all(run.engine, handed_in("alpha"))
    await run.idle()
    assert run.state == "ready"
    await unlock_with_key.unlock_all(run.engine, handed_in("whatever"))


@play(volume("a"))
async def test_keys_that_cannot_be_used(run: Running) -> None:
    for work in (
        unlock_with_key.unlock(run.engine, "a", handed_in("")),
        unlock_with_key.unlock_all(run.engine, handed_in("")),
    ):
        assert isinstance(await failure(work), KeyUnusableError)
    assert isinstance(
        await failure(unlock_with_key.unlock(run.engine, "b", handed_in("x"))), NoSuchVolumeError
    )
    assert run.host.done("try") == []


@play(volume("a") + volume("b"))
async def test_a_caller_that_goes_away_takes_its_key_along(run: Running) -> None:
    run.host.hold("try a")
    unlocking = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
    await run.until(lambda: run.host.deriving)
    unlocking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unlocking
    run.host.release("try a")
    await run.idle()


# --- many callers ---


@play(volume("a"))
async def test_callers_join(run: Running) -> None:
    run.engine.boot()
    callers = [asyncio.ensure_future(run.engine.unlock("a")) for _ in range(5)]
    await run.until(lambda: run.engine.waiting)
    run.host.answer("alpha")
    await asyncio.gather(*callers)
    await run.idle()
    assert len(run.host.questions) == 1
    assert run.host.done("open") == ["open a"]


@play(volume("a") + volume("b", B))
async def test_what_was_closed_meanwhile_is_opened_by_who_joins(run: Running) -> None:
    """Boot still waits for another volume, and has opened this one once."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: len(run.host.questions) == 2)
    await run.engine.lock("a")
    assert run.volumes() == {"a": "locked", "b": "waiting"}
    run.engine.boot()
    await run.until(lambda: "a" in run.engine.waiting)
    await run.engine.shutdown()


@play(volume("a") + guest("g", "a", sim=""))
async def test_a_guest_that_nobody_starts_at_boot(run: Running) -> None:
    run.host.answer("alpha")
    await run.engine.start_guest("g")
    assert (run.guests(), run.state) == ({"g": "running"}, "ready")
    await run.engine.stop_guest("g")
    assert (run.guests(), run.volumes()) == ({"g": "off"}, {"a": "unlocked"})


@play(volume("a", FILES, keys=["file:/etc/none"]) + volume("b", A, after=["a"]))
async def test_a_joined_step_that_fails_by_another(run: Running) -> None:
    first, second = (asyncio.ensure_future(run.engine.unlock("b")) for _ in range(2))
    for work in (first, second):
        assert isinstance(await failure(work), KeyUnavailableError)
    assert run.volumes() == {"a": "failed", "b": "locked"}


# --- people ---


@play(volume("a"))
async def test_who_declines_is_asked_again_but_the_console_is_free(run: Running) -> None:
    run.engine.boot()
    assert run.engine.is_console_needed
    run.host.answer(CancelledError("declined"))
    await run.until(lambda: len(run.host.questions) == 2)
    assert not run.engine.is_console_needed
    run.host.answer(KeyUnavailableError("no agent"))
    await run.until(lambda: len(run.host.questions) == 3)
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play('[daemon]\non_waiting = ["/bin/mail-me", "root"]\n' + volume("b") + volume("a"))
async def test_on_waiting(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.host.questions)
    assert run.host.done("hook") == ["hook /bin/mail-me root {'VMCRYPTD_WAITING': 'a b'}"]
    run.host.answer("wrong")
    await run.until(lambda: len(run.host.questions) == 2)
    assert len(run.host.done("hook")) == 1
    run.host.answer("alpha")
    await run.idle()


MAIL = '[daemon]\non_failed = ["/bin/mail-me", "root"]\n'
FAILING = 'fault = "not-luks"'


def hook(failed: str, *reasons: str) -> str:
    environment = {"VMCRYPTD_FAILED": failed, "VMCRYPTD_REASONS": "\n".join(reasons)}
    return f"hook /bin/mail-me root {environment}"


@play(MAIL + volume("a", FILES, keys=["file:/etc/k"]) + volume("b", FAILING, keys=["file:/etc/b"])
      + guest("g", "a") + guest("h", "b"))  # fmt: skip
async def test_on_failed(run: Running) -> None:
    assert run.host.done("hook") == []
    run.engine.boot()
    await run.until(lambda: run.state == "degraded")
    reasons = [run.volume("b").error, run.guest("h").error]
    assert all(reasons)
    assert run.host.done("hook") == [hook("b h", *reasons)]
    # What has failed already is no news, however often it fails.
    await failure(run.engine.unlock("b"))
    assert run.state == "degraded"
    assert len(run.host.done("hook")) == 1
    # Something else is.
    run.host.guest("g", GuestState.CRASHED)
    await run.until(lambda: len(run.host.done("hook")) == 2)
    assert "guest g has crashed" in run.host.done("hook")[1]
    # After the host was down it begins anew.
    await run.engine.shutdown()
    run.engine.boot()
    await run.until(lambda: len(run.host.done("hook")) == 3)
    assert run.host.done("hook")[2] == hook("b h", *reasons)


@play(MAIL + volume("a") + guest("g", "a"))
async def test_on_failed_is_not_run_for_what_waits_or_was_stopped(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting)
    run.host.answer("wrong")
    run.host.answer("alpha")
    await run.until(lambda: run.state == "ready")
    await run.engine.stop_guest("g")
    await run.engine.shutdown()
    assert run.host.done("hook") == []


def test_the_environment_of_a_command_is_bounded() -> None:
    class Listener:
        environment: dict[str, str]

        async def run_hook(self, argv: object, environment: dict[str, str]) -> None:
            self.environment = environment

    listener = Listener()
    settings = Settings(DaemonSpec(on_waiting=("/x",), on_failed=("/x",)))
    inventory = SimpleNamespace(settings=settings)
    made = hooks.Hooks(listener, inventory)  # type: ignore[arg-type]
    names = [f"{number:0127}" for number in range(2000)]
    asyncio.run(made.waiting(names))
    assert names[:100] == listener.environment["VMCRYPTD_WAITING"].split()[:100]
    asyncio.run(
        made.failed({name: f"volume {name}:\nfirst\x1b line " + "x" * 5000 for name in names})
    )
    for value in listener.environment.values():
        assert 30_000 < len(value) <= 64 * 1024
    lines = listener.environment["VMCRYPTD_REASONS"].split("\n")
    assert all(line.startswith("volume ") and line.isprintable() for line in lines)


# --- one guest after the other ---


@play(
    '[daemon]\nstart_delay = "1h"\n' + volume("a") + guest("g", "a") + guest("h", "a", sim=SHARED)
)
async def test_a_start_waits_for_its_turn_and_a_shutdown_does_not(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: sorted(run.guests().values()) == ["running", "starting"])
    await run.looked()
    assert len(run.host.done("start ")) == 1
    await run.engine.shutdown()
    assert len(run.host.done("start ")) == 1
    assert run.volumes() == {"a": "locked"}


@play('[daemon]\nstart_delay = "5ms"\n' + volume("a")
      + guest("g", "a", sim=SHARED) + guest("h", "a", sim=SHARED) + guest("i", "a", sim=SHARED))  # fmt: skip
async def test_guests_start_one_after_the_other(run: Running) -> None:
    run.host.hold("starting g")
    run.engine.boot()
    run.host.answer("alpha")
    # One that takes long keeps only its own turn.
    await run.until(lambda: run.guests() == {"g": "starting", "h": "running", "i": "running"})
    run.host.release("starting g")
    await run.until(lambda: run.state == "ready")
    assert run.guests() == {"g": "running", "h": "running", "i": "running"}


# --- key derivations ---


BIG = "memory_kib = 1048576"


@play("".join(volume(f"v{i}", f"{A}\n{BIG}") for i in range(6)))
async def test_key_derivations_stay_within_the_budget(run: Running) -> None:
    run.host.available_kib = 5 * 1024 * 1024  # half of it is the budget: two at a time
    run.engine.derivations._budget._cores = 16
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"
    assert run.host.most_kib == 2 * 1048576


@play(volume("a", f"{A}\n{BIG}") + volume("b", f"{A}\n{BIG}"))
async def test_one_that_is_too_large_for_the_budget_still_runs(run: Running) -> None:
    run.host.available_kib = 1000
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.host.most_kib) == ("ready", 0)


# --- the way down ---


@play(
    volume("low")
    + volume("a", A + '\non = ["low"]')
    + guest("g", "a")
    + guest("else", sim="running = true")
)
async def test_everything_down(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    run.host.hold("closing low")
    down = asyncio.ensure_future(run.engine.shutdown())
    await run.until(lambda: run.volumes()["low"] == "locking")
    assert run.state == "stopping"
    assert isinstance(await failure(run.engine.unlock("a")), BusyError)
    with pytest.raises(BusyError):
        run.engine.boot()
    run.host.release("closing low")
    await down
    assert run.host.done("stop", "close ") == ["stop g", "close a", "close low"]
    assert run.guests() == {"g": "off", "else": "running"}
    assert (run.state, run.host.goals(), run.engine.booted) == ("locked", (), False)
    assert run.host.done("target") == ["target reached", "target left"]


def stubborn(how: str) -> str:
    return guest(
        "g", "a", sim='running = true\nstop_delay = "infinity"',
        stop_timeout="10ms", on_stop_timeout=how,
    )  # fmt: skip


@play(volume("a", "open = true") + stubborn("kill") + volume("b", "open = true"))
async def test_a_guest_that_ignores_the_button_is_killed(run: Running) -> None:
    await run.engine.shutdown()
    assert run.host.done("kill", "close ") == ["close b", "kill g", "close a"]
    assert run.state == "locked"


@play(volume("a", "open = true") + stubborn("leave") + volume("b", "open = true"))
async def test_a_guest_that_ignores_the_button_is_left(run: Running) -> None:
    error = await failure(run.engine.shutdown())
    assert "is left running, as configured; its volumes (a) stay open" in str(error)
    assert run.volumes() == {"a": "unlocked", "b": "locked"}
    assert "volume a: lock was not tried, because stop of guest g failed" in run.volume("a").error


@pytest.mark.parametrize("is_dead", [True, False])
def test_the_kernel_knows_what_libvirt_does_not_tell(is_dead: bool) -> None:
    """libvirtd ends a guest, and then waits for a bus that hangs: nothing is answered, and the guest is gone."""

    @play(volume("a", "open = true") + stubborn("kill"))
    async def scene(run: Running) -> None:
        async def kill(name: str) -> None:
            if is_dead:
                run.host.guest(name, GuestState.OFF)
            raise LibvirtError(f"guest {name} could not be ended: libvirt did not answer")

        run.host.kill = kill  # type: ignore[method-assign]
        error = await failure(run.engine.shutdown())
        assert isinstance(error, LibvirtError)
        assert run.volumes() == {"a": "locked" if is_dead else "unlocked"}

    scene()


@play(volume("a", 'open = true\nfault = "busy"') + volume("b", "open = true") + stubborn("leave")
      + volume("c", 'open = true\nfault = "busy"'))  # fmt: skip
async def test_everything_that_stays_open_is_reported(run: Running) -> None:
    text = str(await failure(run.engine.shutdown()))
    assert "guest g did not stop" in text
    assert "volume c cannot be closed" in text
    assert run.volumes() == {"a": "unlocked", "b": "locked", "c": "unlocked"}


@play('[daemon]\nshutdown_timeout = "10ms"\n' + volume("a", "open = true")
      + guest("g", "a", sim='running = true\nstop_delay = "infinity"'))  # fmt: skip
async def test_the_budget_of_the_whole_counts(run: Running) -> None:
    await run.engine.shutdown()
    assert run.host.done("kill") == ["kill g"]


@play(volume("a", 'open = true\nfault = "busy"') + volume("b", "open = true"))
async def test_a_volume_that_cannot_be_closed_is_reported_with_its_holder(run: Running) -> None:
    error = await failure(run.engine.shutdown())
    assert isinstance(error, BusyError)
    assert "in use by a simulated process" in str(error)
    assert run.volumes() == {"a": "unlocked", "b": "locked"}


@play(volume("a") + volume("b", "open = true"))
async def test_shutdown_while_boot_waits(run: Running) -> None:
    job = run.engine.boot()
    await run.until(lambda: run.engine.waiting)
    unlocking = asyncio.ensure_future(run.engine.unlock("a"))
    await run.until(lambda: len(run.engine.jobs) == 2)
    await run.engine.shutdown()
    assert isinstance(await failure(unlocking), CancelledError)
    assert run.volumes() == {"a": "locked", "b": "locked"}
    assert (str(job.state), run.engine.waiting, run.state) == ("failed", [], "locked")


@play(volume("a"))
async def test_shutdown_while_a_key_is_tried(run: Running) -> None:
    run.host.hold("try a")
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.host.deriving)
    await run.engine.shutdown()
    assert run.volumes() == {"a": "locked"}


@play(volume("a", "open = true") + guest("g", "a"))
async def test_shutdown_while_a_guest_starts(run: Running) -> None:
    run.host.hold("starting g")
    run.engine.boot()
    await run.until(lambda: run.guests()["g"] == "starting")
    down = asyncio.ensure_future(run.engine.shutdown())
    await run.until(lambda: run.state == "stopping")
    run.host.release("starting g")
    await down
    assert (run.guests(), run.volumes()) == ({"g": "off"}, {"a": "locked"})


@play(volume("a", "open = true", lock="manual") + volume("b", "open = true"))
async def test_a_manual_volume_stays(run: Running) -> None:
    await run.engine.shutdown()
    assert run.volumes() == {"a": "unlocked", "b": "locked"}


@play(volume("a") + volume("b"))
async def test_boot_after_shutdown(run: Running) -> None:
    for _ in range(3):
        run.engine.boot()
        run.host.answer("alpha")
        await run.idle()
        assert run.state == "ready"
        await run.engine.shutdown()
        assert run.state == "locked"


@play(volume("a"))
async def test_boot_right_after_everything_was_locked(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting)
    await run.engine.lock_all()
    run.engine.boot()
    await run.until(lambda: len(run.host.questions) == 2)
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


# --- locking ---


@play(volume("low", "open = true") + volume("a", 'open = true\non = ["low"]')
      + guest("g", "a", sim="running = true"))  # fmt: skip
async def test_lock_is_refused_while_in_use(run: Running) -> None:
    for work, who in (
        (run.engine.lock("low"), "volume a"),
        (run.engine.lock("a"), "guest g"),
        (run.engine.lock_all(), "guest g"),
    ):
        error = await failure(work)
        assert isinstance(error, BusyError)
        assert who in str(error)
    await run.engine.stop_guest("g")
    await run.engine.lock("a")
    await run.engine.lock("low")
    await run.engine.lock("low")
    assert run.volumes() == {"low": "locked", "a": "locked"}


@play(volume("a") + volume("b"))
async def test_lock_ends_an_attempt_to_open(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a", "b"])
    await run.engine.lock("a")
    assert run.volumes() == {"a": "locked", "b": "waiting"}
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"a": "locked", "b": "unlocked"}
    assert run.state == "degraded"


@play(volume("a", "open = true\nsources = []\n" + A))
async def test_unlock_while_it_is_being_closed(run: Running) -> None:
    run.host.hold("closing a")
    closing = asyncio.ensure_future(run.engine.lock("a"))
    await run.until(lambda: run.volumes() == {"a": "locking"})
    opening = asyncio.ensure_future(run.engine.unlock("a"))
    for _ in range(20):  # turns of the loop: as long as it is still open, but about to go
        await asyncio.sleep(0)
    assert not opening.done()
    run.host.release("closing a")
    await run.until(lambda: run.engine.waiting == ["a"])
    run.host.answer("alpha")
    await asyncio.gather(closing, opening)
    assert run.volumes() == {"a": "unlocked"}


@play(volume("low", "open = true") + volume("a", A + '\non = ["low"]') + guest("g", "a"))
async def test_lock_ends_what_comes_up_on_it(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting == ["a"])
    await run.engine.lock("low")
    assert run.volumes() == {"low": "locked", "a": "locked"}
    await run.idle()
    assert run.engine.waiting == []


@play(volume("a", "open = true") + guest("g", "a"))
async def test_lock_while_a_guest_starts(run: Running) -> None:
    run.host.hold("starting g")
    run.engine.boot()
    await run.until(lambda: "starting g" in run.host.calls)
    locking = asyncio.ensure_future(run.engine.lock("a"))
    await run.until(lambda: True)
    run.host.release("starting g")
    assert "in use by guest g" in str(await failure(locking))
    assert run.guests() == {"g": "running"}


@play(
    volume("a", A, unlock="guest", lock="guest")
    + guest("g", "a", sim="shareable = true")
    + guest("h", "a", sim="shareable = true")
)
async def test_the_last_guest_closes_its_volume(run: Running) -> None:
    run.host.answer("alpha")
    await run.engine.start_guest("g")
    await run.engine.start_guest("h")
    await run.engine.stop_guest("g")
    assert run.volumes() == {"a": "unlocked"}
    run.host.guest("h", GuestState.OFF)  # shut down from inside
    await run.until(lambda: run.volumes() == {"a": "locked"})


@play(
    volume("low", A, lock="guest")
    + volume("a", A + '\non = ["low"]', lock="guest")
    + guest("g", "a")
)
async def test_a_guest_that_is_gone_closes_the_stack(run: Running) -> None:
    """Also a transient one, of which libvirt knows nothing any more."""
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    del run.host._guests["g"]
    run.host.guest_gone()
    await run.until(lambda: run.volumes() == {"low": "locked", "a": "locked"})


@play(volume("a", A, lock="guest") + guest("g", "a", needs=["a"]))
async def test_libvirt_away_is_not_a_guest_that_stopped(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    run.host.libvirt(False)
    await run.until(lambda: not run.engine.graph.libvirt_reachable)
    run.host.libvirt(True)
    await run.until(lambda: run.engine.graph.libvirt_reachable)
    assert run.host.done("closing") == []
    run.host.libvirt(False)
    await run.until(lambda: not run.engine.graph.libvirt_reachable)
    run.host._guests["g"].state = GuestState.OFF
    run.host.libvirt(True)
    await run.until(lambda: run.volumes() == {"a": "locked"})


@play(volume("a", "open = true") + guest("g", "a"))
async def test_stop_while_a_guest_starts(run: Running) -> None:
    run.host.hold("starting g")
    starting = asyncio.ensure_future(run.engine.start_guest("g"))
    await run.until(lambda: run.guests()["g"] == "starting")
    stopping = asyncio.ensure_future(run.engine.stop_guest("g"))
    await run.until(lambda: True)
    run.host.release("starting g")
    await stopping
    assert isinstance(await failure(starting), CancelledError)
    assert run.guests() == {"g": "off"}


# --- panic ---


@play(volume("low") + volume("a", A + '\non = ["low"]') + volume("b", B) + guest("g", "a"))
async def test_panic(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.guests()["g"] == "running")
    await run.until(lambda: run.engine.waiting == ["b"])
    await run.engine.panic()
    assert run.host.done("kill", "stop", "close ") == ["kill g", "close a", "close low"]
    assert (run.state, run.engine.waiting, run.guests()) == ("locked", [], {"g": "off"})
    assert run.host.goals() == ()


@play(volume("a", "open = true") + guest("g", "a", sim="running = true"))
async def test_a_guest_that_has_crashed_has_its_disks_until_it_is_killed(run: Running) -> None:
    """With libvirt's `on_crash` "preserve"."""
    run.host.guest("g", GuestState.CRASHED)
    with pytest.raises(BusyError, match="guest g"):
        await run.engine.lock("a")
    await run.engine.shutdown()
    assert run.host.done("stop", "kill", "close ") == ["stop g", "close a"]
    run.host.volume("a", open=True)
    run.host.guest("g", GuestState.CRASHED)
    await run.engine.panic()
    assert run.host.done("kill", "close ")[-2:] == ["kill g", "close a"]


@play(
    volume("a", 'open = true\nfault = "busy"')
    + volume("b", "open = true")
    + guest("g", "b", sim="running = true")
)
async def test_panic_goes_past_every_error(run: Running) -> None:
    error = await failure(run.engine.panic())
    assert "volume a: it cannot be closed (a is busy); its key is wiped" in str(error)
    assert run.volumes() == {"a": "suspended", "b": "locked"}
    assert run.state == "locked"


@play(volume("a", "open = true") + volume("b", "open = true") + guest("g", "a"))
async def test_panic_does_not_wait_for_what_hangs(run: Running) -> None:
    run.host.hold("starting g")
    run.engine.boot()
    await run.until(lambda: run.guests()["g"] == "starting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmcryptd.engine.engine.PANIC_CANCEL_S", 0.01)
        await run.engine.panic()
    assert run.volumes() == {"a": "locked", "b": "locked"}
    run.host.release("starting g")
    await run.idle()


@play(volume("a", "open = true") + guest("g", "a", sim='running = true\nstop_delay = "infinity"'))
async def test_panic_overtakes_a_shutdown(run: Running) -> None:
    down = asyncio.ensure_future(run.engine.shutdown())
    await run.until(lambda: run.guests()["g"] == "stopping")
    await run.engine.panic()
    assert isinstance(await failure(down), CancelledError)
    assert (run.guests(), run.volumes()) == ({"g": "off"}, {"a": "locked"})
    assert run.state == "locked"


@play(volume("a", "open = true") + guest("g", "a", sim="running = true"))
async def test_panic_with_a_libvirt_that_hangs(run: Running) -> None:
    async def hang(name: str) -> None:
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panic, "KILL_S", 0.01)
        patch.setattr(run.host, "kill", hang)
        error = await failure(run.engine.panic())
    assert "guest g could not be killed within 0.01 s" in str(error)
    assert run.volumes() == {"a": "suspended"}


# --- libvirt away ---


@play("[sim]\nlibvirt = false\n" + volume("a") + guest("g", "a"))
async def test_libvirt_away_at_boot_and_back(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert (run.state, run.volumes()) == ("degraded", {"a": "unlocked"})
    assert "libvirt cannot be reached" in run.engine.status_line(run.engine.state)
    run.host.libvirt(True)
    await run.until(lambda: run.guests() == {"g": "running"})
    await run.idle()
    assert run.state == "ready"


@play("[sim]\nlibvirt = false\n" + volume("a", "open = true"))
async def test_shutdown_without_libvirt(run: Running) -> None:
    await run.engine.shutdown()
    assert run.volumes() == {"a": "locked"}


# --- a new daemon on the same host ---


@play(
    volume("a")
    + volume("b", B)
    + volume("c", A + "\npresent = false", timeout="10ms")
    + guest("g", "b")
)
async def test_a_restart_takes_up_what_was_begun(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.until(lambda: run.engine.waiting == ["b"] and len(run.host.goals()) == 3)
    await run.until(lambda: run.volumes()["a"] == "unlocked")
    await run.close()
    assert set(run.host.goals()) == {"boot", "up", "late:c"}
    assert run.host.done("close", "stop") == []
    asked = len(run.host.questions)
    again = Running(run.host)
    assert again.volumes() == {"a": "unlocked", "b": "locked", "c": "missing"}
    assert again.volume("a").key_source == "prompt"
    again.engine.resume()
    await again.until(lambda: len(run.host.questions) > asked)
    assert again.engine.waiting == ["b"]
    run.host.answer("beta")
    await again.until(lambda: again.guests()["g"] == "running")
    await again.idle()
    assert again.state == "degraded"
    await again.close()
    third = Running(run.host)
    third.engine.resume()
    assert third.engine.booted
    run.host.volume("c", present=True)
    await third.until(lambda: third.engine.waiting == ["c"])
    run.host.answer("alpha")
    await third.idle()
    assert third.state == "ready"
    assert run.host.done("close", "stop") == []
    run.engine = third.engine


@play(volume("a") + volume("b", A + "\npresent = false", timeout="10ms"))
async def test_a_daemon_that_is_killed_while_it_resumes_has_lost_nothing(run: Running) -> None:
    kept = ("boot", "unlock:a", "late:b", "up")
    run.host.keep_goals(kept)
    seen: list[set[str]] = []
    keep = run.host.keep_goals

    def keep_goals(goals: Iterable[str]) -> None:
        keep(goals)
        seen.append(set(run.host.goals()))

    run.host.keep_goals = keep_goals  # type: ignore[method-assign]
    run.engine.resume()
    assert seen
    assert all(goals >= set(kept) for goals in seen)
    run.host.answer("alpha")
    await run.idle()


@play(volume("a", "open = true") + volume("b"))
async def test_sources_of_what_was_closed_meanwhile(run: Running) -> None:
    run.host.keep_sources({"a": "tpm2", "b": "tpm2", "gone": "tpm2"})
    again = Running(run.host)
    assert [again.volume(name).key_source for name in ("a", "b")] == ["tpm2", ""]
    assert run.host.sources() == {"a": "tpm2"}
    run.engine = again.engine


@play(volume("a"))
async def test_goals_that_make_no_sense_any_more(run: Running) -> None:
    run.host.keep_goals(["unlock:gone", "start:gone", "late:gone", "nonsense", "up"])
    run.engine.resume()
    assert (run.engine.booted, run.engine.jobs) == (True, {})


# --- another configuration while jobs run ---


def reconfigured(text: str) -> Settings:
    return Host.parse(text).settings


@play(volume("a") + volume("b") + volume("c", A + "\npresent = false"))
async def test_volumes_are_taken_away_and_come(run: Running) -> None:
    run.engine.boot()
    await run.until(
        lambda: run.engine.waiting == ["a", "b"] and run.engine.openings.phase("c") is Phase.ABSENT
    )
    fresh = reconfigured(volume("b") + volume("d"))
    more = Host.parse(volume("b") + volume("d"))
    run.host._volumes["d"] = more._volumes["d"]
    run.host.settings, run.host._specs = fresh, {**run.host._specs, **fresh.volumes}
    run.engine.configure(run.host.settings)
    await run.until(lambda: run.engine.waiting == ["b", "d"])
    assert run.volumes() == {"b": "waiting", "d": "waiting"}
    run.host.answer("alpha")
    await run.idle()
    assert run.volumes() == {"b": "unlocked", "d": "unlocked"}
    assert run.host.done("open") in (["open b", "open d"], ["open d", "open b"])


@play("")
async def test_libvirt_is_followed_once_there_is_something_to_follow_it_for(run: Running) -> None:
    watched: list[object] = []
    run.host.watch = watched.append  # type: ignore[method-assign, assignment]
    run.engine.configure(reconfigured(""))
    assert watched == []
    for _ in range(2):
        run.engine.configure(reconfigured(volume("a")))
    assert len(watched) == 1


@play(volume("a"))
async def test_a_volume_is_taken_away_while_its_key_is_tried(run: Running) -> None:
    run.host.hold("try a")
    unlocking = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
    await run.until(lambda: run.host.deriving)
    run.engine.configure(reconfigured(""))
    assert isinstance(await failure(unlocking), NoSuchVolumeError)
    assert run.volumes() == {}


@play(volume("a", A + "\npresent = false", timeout="10ms"))
async def test_a_late_comer_is_taken_away(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    run.engine.configure(reconfigured(""))
    assert run.host.goals() == ("up",)


@play(volume("a") + volume("b"))
async def test_a_bad_configuration_changes_nothing(run: Running) -> None:
    circle = reconfigured(volume("a", "", after=["b"]) + volume("b", "", after=["a"]))
    with pytest.raises(ConfigError):
        run.engine.configure(circle)
    assert run.engine.settings is run.host.settings
    run.host.answer("alpha")
    await run.engine.unlock_all()


# --- after the end ---


@play(volume("a"))
async def test_nothing_is_begun_after_close(run: Running) -> None:
    run.engine.boot()
    await run.until(lambda: run.engine.waiting)
    await run.close()
    with pytest.raises(VmcryptdError, match="vmcryptd is stopping"):
        run.engine.boot()
    assert set(run.host.goals()) == {"boot", "up"}


@play("")
async def test_nothing_is_configured(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    assert run.state == "ready"
    await run.engine.shutdown()
    await run.engine.panic()


@play(volume("a") + guest("g", "a", after=["x"]))
async def test_plans_do_nothing(run: Running) -> None:
    assert [str(step.id) for step in run.engine.plan(BOOT).steps] == ["unlock:a", "start:g"]
    assert (run.host.calls, run.engine.jobs) == ([], {})


@play(volume("a", "open = true"))
async def test_the_target_is_left_after_it_was_reached(run: Running) -> None:
    """`vmcryptctl shutdown` without a daemon looks, finds all ready, and goes down at once."""
    told: list[bool] = []
    slow = asyncio.Event()

    async def reach_target(reached: bool) -> None:
        if reached:
            await slow.wait()
        told.append(reached)

    run.host.reach_target = reach_target  # type: ignore[method-assign]
    run.engine.boot()
    await run.until(lambda: run.state == "ready")
    await run.engine.shutdown()
    slow.set()
    await run.engine.background_done()
    assert told == [True, False]


@pytest.mark.parametrize("verb", ["shutdown", "panic"])
def test_a_process_that_only_goes_down_asks_for_no_target(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the host goes down systemd refuses such a job, which the journal shows as an error."""
    hosts: list[Host] = []

    def ports(settings: Settings) -> Ports:
        hosts.append(
            Host.parse(volume("a", f"{A}\nopen = true") + guest("g", "a", sim="running = true"))
        )
        return hosts[-1].ports()

    monkeypatch.setattr(daemon.configuration, "load", lambda **_: Host.parse(volume("a")).settings)
    monkeypatch.setattr(daemon, "real_ports", ports)
    monkeypatch.setattr(daemon.journal, "log_to_journal", lambda: None)
    monkeypatch.setattr(daemon, "keep_out_of_core_dumps", lambda: None)
    daemon.down_here(verb)
    assert hosts[0].done("close ", "target") == ["target left", "close a"]
