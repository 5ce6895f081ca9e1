# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens volumes with a caller's key."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from vmcryptd.core import planner
from vmcryptd.core.errors import StillWaitingError, VmcryptdError
from vmcryptd.core.goals import Goal, Verb
from vmcryptd.core.model import Lock
from vmcryptd.core.wording import few
from vmcryptd.engine.engine import Engine
from vmcryptd.engine.jobs import Job
from vmcryptd.engine.opening import Phase
from vmcryptd.engine.prompt import Answer


async def unlock(engine: Engine, name: str, fd: int) -> None:
    """Open one volume, and what it needs. `fd` is closed. Raises what kept the volume closed."""
    with contextlib.ExitStack() as operation:
        try:
            operation.enter_context(engine.operations.begun(name))
            engine.inventory.observe()
            planner.check_volume(engine.graph, name)
        except VmcryptdError:
            os.close(fd)
            raise
        await _unlock(engine, name, fd)


async def _unlock(engine: Engine, name: str, fd: int) -> None:
    key = await engine.receive(fd)
    try:
        planner.check_volume(engine.graph, name)  # the configuration may be another by now
    except VmcryptdError:
        key.close()
        raise
    closed = _closed(engine, engine.graph.beneath([name], still=True))
    answer = engine.prompt.offer(key, "key", frozenset(closed), name)
    try:
        if not closed:
            return
        job = engine.scheduler.begin(Goal(Verb.UNLOCK, name), may_ask=False)
        await _tried(engine, [job], answer, closed, patient=True)
        if name in answer.accepted:
            await engine.scheduler.wait(job)
        elif engine.openings.phase(name) is Phase.ENDED:
            await engine.scheduler.ended(job)
    finally:
        engine.prompt.withdraw(answer)
    planner.check_volume(engine.graph, name)
    if not _closed(engine, [name]):
        return
    for volume in reversed(closed):
        if volume in answer.refused:
            raise answer.refused[volume]
    raise job.error or StillWaitingError(f"volume {name} still waits for another key")


async def unlock_all(engine: Engine, fd: int) -> None:
    """Try a key on all that waits, and on what comes up on that. `fd` is closed.

    Raises WrongKeyError if it fits nothing, StillWaitingError if it fits some.
    """
    with contextlib.ExitStack() as operation:
        try:
            operation.enter_context(engine.operations.begun())
        except VmcryptdError:
            os.close(fd)
            raise
        await _unlock_all(engine, fd)


async def _unlock_all(engine: Engine, fd: int) -> None:
    key = await engine.receive(fd)
    engine.inventory.observe()
    volumes, _ = engine.inventory.boot_set
    # A volume behind a keystore does not wait for a person itself, but may take an answer.
    closed = _closed(engine, [*volumes, *engine.waiting, *sorted(engine.prompt.expected)])
    answer = engine.prompt.offer(key, "key")
    try:
        # A volume that needs a keystore has begun to open it, and may find another key meanwhile.
        jobs = [
            engine.scheduler.begin(Goal(Verb.UNLOCK, name), may_ask=False, look=False)
            for name in closed
            if engine.settings.volumes[name].lock is not Lock.BOOT
        ]
        await _tried(engine, jobs, answer, closed, patient=False)
    except VmcryptdError:
        engine.prompt.withdraw(answer)
        raise
    finally:
        engine.prompt.drop_unneeded()
    left = [
        name
        for name in _closed(engine, closed)
        if engine.settings.volumes[name].lock is not Lock.BOOT or name in engine.prompt.expected
    ]
    if not left:
        return
    if not answer.accepted:
        for name in left:
            if name in answer.refused:
                raise answer.refused[name]
        for job in jobs:
            # Its step has ended; the job itself ends in a moment, or goes on for something else.
            if (error := job.error or next(iter(job.failures().values()), None)) is not None:
                raise error
    raise StillWaitingError(
        f"opened: {few(sorted(answer.accepted)) or 'nothing'}; "
        f"still locked: {few(left)}; `vmcryptctl unlock` asks for these"
    )


def _closed(engine: Engine, names: Sequence[str]) -> list[str]:
    volumes = engine.graph.volumes
    return [
        name for name in dict.fromkeys(names) if name in volumes and not volumes[name].is_usable
    ]


async def _tried(
    engine: Engine, jobs: list[Job], answer: Answer, volumes: list[str], *, patient: bool
) -> None:
    """Wait until each volume has tried the answer, or cannot because something else keeps it.

    `patient`: devices that are not there are waited for, for as long as their volumes say.
    """
    openings, running = engine.openings, engine.scheduler.running

    def is_done(name: str) -> bool:
        return openings.has_tried(answer, name) or (
            not patient and openings.is_left_out(name, running)
        )

    await engine.changes.until(
        lambda: not any(job.id in engine.jobs for job in jobs) or all(map(is_done, volumes))
    )
