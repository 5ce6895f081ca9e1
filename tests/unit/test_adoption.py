# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mappings that another program opened under its own name."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tests.lib import Running, opened_by, play
from vmcryptd.core.model import GuestState

UUID = "00000000-0000-0000-0000-000000000000"
UDISKS = f"luks-{UUID}"


def volume(mapped_as: str, more: str = "", **keys: str) -> str:
    shown = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    sim = f'{opened_by("alpha")}\nopen = true\nmapped_as = "{mapped_as}"\n{more}'
    return f'[volume.a]\ndevice = "/dev/a"\n{shown}[sim.volume.a]\n{sim}\n'


GUEST = '[sim.guest.g]\ndisks = ["/dev/mapper/a"]\nautostart = true\n'


@play(volume(UDISKS) + GUEST)
async def test_what_udisks_opened_gets_the_name_that_guests_look_for(run: Running) -> None:
    await run.until(lambda: run.host.done("rename"))
    assert run.host.done("rename") == [f"rename {UDISKS} a"]
    await run.until(lambda: run.volume("a").error == "")
    assert run.volumes() == {"a": "unlocked"}
    run.engine.boot()
    await run.idle()
    assert run.guests() == {"g": "running"}
    await run.engine.shutdown()
    assert run.host.done("close ") == ["close a"]


@play(volume(UDISKS, 'fault = "busy"') + GUEST)
async def test_what_is_used_keeps_its_name_and_says_so(run: Running) -> None:
    await run.until(lambda: run.engine.graph.volumes["a"].is_misnamed)
    await run.engine.background_done()
    assert run.host.done("rename") == []
    view = run.volume("a")
    assert view.state == "unlocked"
    assert (
        f"volume a: it is open as {UDISKS}, so its guests do not find /dev/mapper/a" in view.error
    )
    assert f"`dmsetup rename {UDISKS} a`" in view.error
    run.host.volume("a", fault="")
    run.host.guest("g", GuestState.OFF)
    await run.engine.start_guest("g")  # it is unused now
    assert run.host.done("rename") == [f"rename {UDISKS} a"]


@play(volume("by-hand") + GUEST)
async def test_a_name_chosen_by_hand_stays_until_a_guest_is_started(run: Running) -> None:
    await run.until(lambda: run.engine.graph.volumes["a"].is_misnamed)
    await run.engine.background_done()
    assert run.host.done("rename") == []
    assert "it is open as by-hand" in run.volume("a").error
    await run.engine.start_guest("g")
    assert run.host.done("rename") == ["rename by-hand a"]
    assert run.volume("a").error == ""


@play(volume(UDISKS, content="lvm"))
async def test_no_guest_looks_for_a_name_where_the_host_reads_it(run: Running) -> None:
    await run.until(lambda: run.volumes() == {"a": "unlocked"})
    await run.engine.background_done()
    assert run.host.done("rename") == []
    assert run.volume("a").error == ""


async def closes_the_renamed_mapping(run: Running, close: Coroutine[Any, Any, None]) -> None:
    """`close` is begun during the rename, which ends when that waits."""
    renaming, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(mapping: str, name: str) -> None:
        renaming.set()
        await go_on.wait()
        await right(mapping, name)

    right, run.host.rename = run.host.rename, slowly  # type: ignore[method-assign]
    run.host.volume("a", mapped_as=UDISKS)
    await renaming.wait()
    closing = asyncio.ensure_future(close)
    for _ in range(50):  # turns of the loop, no time
        await asyncio.sleep(0)
    go_on.set()
    await closing
    assert run.host.done("rename", "close ") == [f"rename {UDISKS} a", "close a"]
    assert run.volumes() == {"a": "locked"}


@play(volume("by-hand"))
async def test_a_mapping_is_closed_under_the_name_that_it_has_by_then(run: Running) -> None:
    """A rename under way is waited for: what closes by the old name would find nothing, and be content."""
    await closes_the_renamed_mapping(run, run.engine.lock("a"))


@play(volume("by-hand"))
async def test_panic_closes_a_mapping_under_the_name_that_it_has_by_then(run: Running) -> None:
    await closes_the_renamed_mapping(run, run.engine.panic())
