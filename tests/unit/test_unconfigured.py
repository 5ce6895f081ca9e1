# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is open stays ours until it is closed, also when its table leaves the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.lib import Host, Running, handed_in, opened_by, play
from vmcryptd.core.errors import NoSuchVolumeError
from vmcryptd.core.model import GuestState, Settings
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.engine import Engine

A = opened_by("alpha")


def volume(name: str, device: str = "", sim: str = A, more: str = "") -> str:
    table = f'[volume.{name}]\ndevice = "{device or f"/dev/{name}"}"\n{more}\n'
    return f"{table}[sim.volume.{name}]\n{sim}\n"


def settings(text: str) -> Settings:
    return Host.parse(text).settings


DOWN: list[Callable[[Engine], Awaitable[None]]] = [Engine.lock_all, Engine.shutdown, Engine.panic]
TWO = volume("a") + volume("b")


async def opened(run: Running, *names: str) -> None:
    for name in names:
        await unlock_with_key.unlock(run.engine, name, handed_in("alpha"))


@pytest.mark.parametrize("down", DOWN)
def test_it_is_shown_and_closed(down: Callable[[Engine], Awaitable[None]]) -> None:
    @play(TWO)
    async def scene(run: Running) -> None:
        await opened(run, "a", "b")
        run.engine.configure(settings(volume("b")))
        assert run.volumes() == {"b": "unlocked", "a": "unlocked"}
        assert "volume a: it is no longer configured" in run.volume("a").error
        assert run.volume("b").error == ""
        assert run.host.published == {"a": True, "b": True}
        await down(run.engine)
        assert set(run.host.done("close ")) == {"close a", "close b"}
        assert run.volumes() == {"b": "locked"}
        assert run.host.published == {"b": True}
        with pytest.raises(NoSuchVolumeError):
            await run.engine.unlock("a")

    scene()


@play(TWO + '[sim.guest.g]\ndisks = ["/dev/mapper/a"]\nrunning = true\n')
async def test_its_guest_is_stopped_first(run: Running) -> None:
    run.host.guest("g", GuestState.OFF)
    await opened(run, "a")
    run.host.guest("g", GuestState.RUNNING)
    run.engine.configure(settings(volume("b")))
    assert run.guest("g").needs == ("a",)
    await run.engine.shutdown()
    assert run.host.done("stop", "close ") == ["stop g", "close a"]


@play(TWO)
async def test_what_is_closed_by_hand_is_gone(run: Running) -> None:
    await opened(run, "a")
    run.engine.configure(settings(volume("b")))
    run.host.volume("a", open=False)
    await run.until(lambda: run.volumes() == {"b": "locked"})
    run.host.volume("a", open=True)  # opened later, it is not ours
    await run.looked()
    assert run.volumes() == {"b": "locked"}


@play(TWO)
async def test_it_comes_back(run: Running) -> None:
    await opened(run, "a")
    run.engine.configure(settings(volume("b")))
    run.engine.configure(settings(TWO))
    assert (run.volumes(), run.volume("a").error) == ({"a": "unlocked", "b": "locked"}, "")
    assert run.volume("a").key_source == "key"
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    assert run.state == "ready"


@play(TWO)
async def test_a_new_daemon_finds_it(run: Running) -> None:
    await opened(run, "a")
    await run.close()
    run.host.settings = settings(volume("b"))
    again = Running(run.host)
    assert again.volumes() == {"b": "locked", "a": "unlocked"}
    assert "no longer configured" in again.volume("a").error
    assert again.volume("a").key_source == "key"
    assert run.host.published == {"a": True, "b": True}
    await again.engine.shutdown()
    assert again.volumes() == {"b": "locked"}
    run.engine = again.engine


@play(TWO)
async def test_what_was_closed_before_the_new_daemon_is_not_shown(run: Running) -> None:
    await opened(run, "a")
    await run.close()
    run.host.volume("a", open=False)
    run.host.settings = settings(volume("b"))
    again = Running(run.host)
    assert again.volumes() == {"b": "locked"}
    run.host.volume("a", open=True)
    await again.looked()
    assert again.volumes() == {"b": "locked"}
    run.engine = again.engine


@play(TWO)
async def test_a_table_that_is_renamed_has_the_mapping(run: Running) -> None:
    """The mark of the mapping's own name stays: udev's rule goes by that."""
    await opened(run, "a")
    run.host._specs |= (renamed := settings(volume("c", "/dev/a") + volume("b"))).volumes
    run.engine.configure(renamed)
    assert run.volumes() == {"c": "unlocked", "b": "locked"}
    assert run.host.published == {"a": True, "b": True, "c": True}
    await run.engine.lock_all()
    assert run.host.done("close ") == ["close a"]
    assert run.volumes() == {"c": "locked", "b": "locked"}


@play(TWO)
async def test_the_table_goes_while_cryptsetup_makes_the_mapping(run: Running) -> None:
    run.host.hold("try a")
    work = asyncio.ensure_future(unlock_with_key.unlock(run.engine, "a", handed_in("alpha")))
    await run.until(lambda: run.host.deriving)
    run.host.volume("a", open=True)  # done just before it is killed, and not seen yet
    run.engine.configure(settings(volume("b")))
    run.host.release("try a")
    await work
    await run.until(lambda: run.volumes() == {"b": "locked", "a": "unlocked"})
    await run.engine.panic()
    assert run.volumes() == {"b": "locked"}


@play(volume("a", sim=A + "\nsuspended = true"))
async def test_one_whose_key_is_wiped_can_be_given_it_again(run: Running) -> None:
    await opened(run, "a")
    run.engine.configure(settings(""))
    run.host.volume("a", suspended=True)
    await run.until(lambda: run.volumes() == {"a": "suspended"})
    await opened(run, "a")
    assert run.volumes() == {"a": "unlocked"}
