# SPDX-License-Identifier: LGPL-2.1-or-later
"""`virsh autostart` right before `vmcryptctl boot`: libvirt reports that by no event."""

from __future__ import annotations

import asyncio

import pytest

from tests.lib import Running, opened_by, play
from vmcryptd.core.errors import CancelledError, LibvirtError
from vmcryptd.core.model import Virtualisation

HOST = (
    f'[volume.a]\ndevice = "/dev/a"\n[sim.volume.a]\n{opened_by("alpha")}\n'
    '[sim.guest.g]\ndisks = ["/dev/mapper/a"]\n'
)


@play(HOST)
async def test_a_guest_that_starts_at_boot_since_a_moment(run: Running) -> None:
    async def refresh(timeout_s: float) -> Virtualisation:
        run.host._guests["g"].autostart = True
        return run.host.current()

    run.host.refresh = refresh  # type: ignore[method-assign]
    assert run.engine.inventory.boot_set == (["a"], [])
    await run.engine.look_before_boot()
    assert run.engine.inventory.boot_set == (["a"], ["g"])


@play(HOST)
async def test_libvirt_that_does_not_answer(run: Running) -> None:
    async def refresh(timeout_s: float) -> Virtualisation:
        raise LibvirtError("no answer")

    run.host.refresh = refresh  # type: ignore[method-assign]
    await run.engine.look_before_boot()
    assert run.engine.inventory.boot_set == (["a"], [])


@play(HOST)
async def test_panic_overtakes_it(run: Running) -> None:
    asked = asyncio.Event()

    async def refresh(timeout_s: float) -> Virtualisation:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    run.host.refresh = refresh  # type: ignore[method-assign]
    looking = asyncio.create_task(run.engine.look_before_boot())
    await asked.wait()
    await run.engine.panic()
    with pytest.raises(CancelledError):
        await looking
