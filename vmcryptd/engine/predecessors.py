# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits for the steps before a step. Volumes behind a keystore meanwhile try answers that do not open it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vmcryptd.core.errors import DependencyError, LibvirtError, VmcryptdError
from vmcryptd.core.goals import Action, Step, StepId
from vmcryptd.core.states import Activity
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, outcome
from vmcryptd.engine.opener import Opener
from vmcryptd.engine.opening import Openings, Phase
from vmcryptd.engine.prompt import Answer, Prompt


class Predecessors:
    """The steps that another one stands behind."""

    def __init__(
        self, inventory: Inventory, prompt: Prompt, openings: Openings, opener: Opener
    ) -> None:
        self._inventory = inventory
        self._prompt = prompt
        self._openings = openings
        self._opener = opener

    async def ended(self, job: Job, step: Step, activity: Activity) -> str | None:
        """Wait for the steps before this one. Raises DependencyError.

        A volume that waits for a keystore tries the answers that do not fit that one: its passphrase may be lost, or
        the person know only the volume's. Returns what has opened the volume meanwhile; None if nothing has.
        """
        await _ended(job, step, step.after)
        if not step.order:
            return None
        if step.action is not Action.UNLOCK:
            await _ended(job, step, step.order)
            return None
        name = step.object
        with self._prompt.behind(name, lambda answer: self._is_left(job, name, answer)):
            waiting = asyncio.ensure_future(_ended(job, step, step.order))
            try:
                while not waiting.done():
                    self._openings.of(name).phase = Phase.BEHIND
                    passed_on = asyncio.ensure_future(self._prompt.passed_on(name))
                    try:
                        both = {waiting, passed_on}
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        passed_on.cancel()
                    if not waiting.done():
                        opened_by = await self._opener.open_by(name, passed_on.result())
                        if opened_by is not None:
                            return opened_by
                        activity.doing = None
                        self._inventory.changes.notify()
            finally:
                waiting.cancel()
        return None

    def _is_left(self, job: Job, name: str, answer: Answer) -> bool:
        """Whether the answer opens none of the keystores that the volume waits for, as far as these are there."""
        volumes = self._inventory.graph.volumes
        if name not in volumes or not volumes[name].device:
            return False

        def leaves(keystore: str) -> bool:
            if volumes[keystore].is_usable:
                return False  # the key in it comes next
            unlocking = job.tasks.get(StepId(Action.UNLOCK, keystore))
            phase = self._openings.phase(keystore)
            if unlocking is None or unlocking.done() or phase is Phase.ABSENT:
                return True
            is_tried = answer.is_for(keystore) and (
                answer.only is not None or keystore in self._prompt.expected
            )
            return keystore in answer.refused or (
                not is_tried and phase in (Phase.WAITING, Phase.ALONE)
            )

        return all(map(leaves, volumes[name].keys_in))


async def _ended(job: Job, step: Step, before: Iterable[StepId]) -> None:
    """Wait for these steps, which come before this one. Raises DependencyError."""
    tasks = {other: job.tasks[other] for other in before if other in job.tasks}
    if tasks:
        await asyncio.wait(tasks.values())
    for other in step.after:
        if other in tasks and (error := outcome(tasks[other])) is not None:
            if isinstance(error, LibvirtError) and other.action in (Action.STOP, Action.STOP_POOL):
                # libvirt does not say whether it has stopped. The kernel does: it closes nothing that is in use.
                continue
            raise not_tried(step, other, error)


def not_tried(step: Step, other: StepId, error: VmcryptdError) -> DependencyError:
    """The error of a step that needs another one, which has failed."""
    return DependencyError(
        f"{step.id.subject}: {step.action} was not tried, "
        f"because {other.action} of {other.subject} failed: {error}",
        other.object,
    )


def is_reported(step: Step, error: VmcryptdError) -> bool:
    """Whether it failed because an earlier step of the same volume did: the error of that one says why."""
    return isinstance(error, DependencyError) and error.cause == step.object
