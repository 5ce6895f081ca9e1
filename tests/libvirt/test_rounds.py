# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon that has lived for long costs no more than a fresh one: nothing grows from boot to boot."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.lib import Host, opened_by
from tests.libvirt.conftest import DEFAULT, TIMEOUT_S, domain_xml
from vmcryptd.adapters.libvirt import definitions, domains
from vmcryptd.adapters.libvirt.domains import Libvirt
from vmcryptd.core.model import GuestState, HostState
from vmcryptd.engine.engine import Engine

GUESTS = [f"g{number}" for number in range(4)]
HOST = "".join(
    f'[volume.v{n}]\ndevice = "/dev/v{n}"\n[sim.volume.v{n}]\n{opened_by("alpha")}\n'
    for n in range(len(GUESTS))
)
ROUNDS = 4
TYPING_TURNS = 1000  # of the loop, while the person types
# For one guest in a round, at most: two starts and two stops, each looked at for itself and for two events; each look
# reads the definition and, while it runs, what it runs with.
DESCRIPTIONS = 4 * 3 * 2
CHANGES = (
    100  # far more than there are, and far less than waiters that wake each other make in a second
)


def test_rounds_do_not_pile_up(run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boot, shutdown, and the same by hand, on libvirt itself."""
    counts: Counter[str] = Counter()
    others = set(threading.enumerate())  # of tests before, whose calls hang or are about to end

    def counted(place: Any, name: str) -> None:
        function = getattr(place, name)

        def count(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(place, name, count)

    counted(definitions, "domain")

    async def work() -> None:
        host = Host.parse(HOST)
        adapter = Libvirt(DEFAULT)
        engine = Engine(host.settings, replace(host.ports(), domains=adapter))
        by_hand = [
            outsider.defineXML(domain_xml(name, f"/dev/mapper/v{n}"))
            for n, name in enumerate(GUESTS)
        ]
        for domain in by_hand:
            domain.setAutostart(1)
        engine.start()
        engine.inventory.watch_libvirt()
        engine.changes.watch(lambda: counts.update(["changes"]))
        await adapter.refresh(TIMEOUT_S)

        async def until(predicate: Any) -> None:
            async with asyncio.timeout(TIMEOUT_S):
                while not predicate():
                    await asyncio.sleep(0.01)

        def guests(state: GuestState) -> bool:
            return all(engine.graph.guests[name].state is state for name in GUESTS)

        async def play() -> None:
            engine.boot()
            await until(lambda: host.open_questions)
            for _ in range(TYPING_TURNS):
                await asyncio.sleep(0)
            host.answer("alpha")
            await until(lambda: engine.state is HostState.READY and not engine.jobs)
            assert guests(GuestState.RUNNING)
            await engine.shutdown()
            for n, domain in enumerate(by_hand):
                host.volume(f"v{n}", open=True)
                domain.create()
            await until(lambda: guests(GuestState.RUNNING))
            for domain in by_hand:
                domain.destroy()
            await until(lambda: guests(GuestState.OFF))
            for n in range(len(by_hand)):
                host.volume(f"v{n}", open=False)
            await engine.inventory.look()
            await engine.background_done()

        def held() -> dict[str, int]:
            threads = set(threading.enumerate()) - others
            for thread in threads:
                if thread.name == "vmcryptd-blocking":
                    thread.join(TIMEOUT_S)  # it has answered, and is about to end
            return {
                "tasks": len(asyncio.all_tasks()),
                "threads": sum(thread.is_alive() for thread in threads),
                "watches": len(domains._attached.callbacks),
                "watchers": sum(
                    len(changes._watchers)
                    for changes in (
                        engine.changes, engine.inventory.rebuilt, engine.prompt.changes,
                        adapter._link.learnt, adapter._link._different,
                    )
                ),
                "listeners": len(engine.scheduler.on_step) + len(engine.scheduler.on_job),
                "keys": len(engine.prompt.held),
            }  # fmt: skip

        before: dict[str, int] = {}
        for _ in range(ROUNDS):
            counts.clear()
            await play()
            after = held()
            assert before in ({}, after)
            before = after
            assert 0 < counts["domain"] <= DESCRIPTIONS * len(GUESTS)
            assert 0 < counts["changes"] <= CHANGES * len(GUESTS)
        engine.close()
        await adapter.close()

    run(work())
